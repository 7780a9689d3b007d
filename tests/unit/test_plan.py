"""The plan of an emergency save: properties of a pure function, and what it makes of real saves in flight."""

import dataclasses
import itertools

from hypothesis import given
from hypothesis import strategies as st

from jobkit.checkpoint.schedule import Rates
from jobkit.preemption import plan
from jobkit.preemption.plan import Choice, Plan, Situation

SECONDS = st.floats(0, 1000, allow_nan=False)
SITUATIONS = st.builds(
    Situation,
    step=st.integers(-1, 12),
    committed=st.integers(-1, 12),
    saving=st.none() | st.integers(0, 12),
    saving_for_s=SECONDS,
    nbytes=st.integers(0, 10**12),
    save_s=st.floats(0.01, 1000),
    upload_s=st.just(0.0) | SECONDS,
    left_s=st.none() | st.floats(-10, 2000),
    can_abandon=st.booleans(),
)


def remaining_s(now: Situation) -> float:
    """Return how long the save in flight still needs."""
    return max(now.save_s - now.saving_for_s, 0.1 * now.save_s)


@given(SITUATIONS)
def test_a_plan_makes_sense(now: Situation) -> None:
    """What is chosen is there to be chosen, and a save is abandoned only for a newer one that lands sooner."""
    chosen = plan.choose(now)
    left_s = plan.UNKNOWN_S if now.left_s is None else now.left_s
    in_flight = now.saving is not None and now.saving > now.committed
    newer = now.step > max(now.committed, now.saving if now.saving is not None else -1)
    assert (chosen.choice is Choice.PROMOTE) <= in_flight
    assert (chosen.choice in (Choice.FULL, Choice.LOCAL, Choice.NOTHING)) <= newer
    assert (chosen.choice is Choice.COMMITTED) == (not newer and not in_flight)
    if chosen.choice in (Choice.FULL, Choice.LOCAL):
        assert chosen.expected_s * plan.MARGIN <= left_s
    if chosen.choice is Choice.LOCAL:
        assert (chosen.expected_s + now.upload_s) * plan.MARGIN > left_s
    if chosen.abandon:
        assert now.can_abandon
        assert in_flight
        assert chosen.choice in (Choice.FULL, Choice.LOCAL)
        assert chosen.expected_s < remaining_s(now) + now.save_s


@given(SITUATIONS, st.lists(st.floats(0, 2000), min_size=2, max_size=5))
def test_more_time_is_never_worse(now: Situation, left: list[float]) -> None:
    """With more time left the choice is as good or better."""
    order = [Choice.NOTHING, Choice.PROMOTE, Choice.LOCAL, Choice.FULL, Choice.COMMITTED]
    ranks = [order.index(plan.choose(dataclasses.replace(now, left_s=left_s)).choice) for left_s in sorted(left)]
    assert all(one <= other for one, other in itertools.pairwise(ranks))


def test_plans_by_example() -> None:
    """Each kind of choice, at one second per save."""
    behind = Situation(step=6, committed=0, saving=5, saving_for_s=0.1, save_s=1.0, left_s=30.0, can_abandon=True)
    assert plan.choose(behind) == Plan(Choice.FULL, 1.0 + plan.ABANDON_S, abandon=True)
    assert plan.choose(dataclasses.replace(behind, can_abandon=False)) == Plan(Choice.FULL, 1.9)
    assert plan.choose(dataclasses.replace(behind, saving_for_s=0.95)) == Plan(Choice.FULL, 1.1), "it is nearly done"
    assert plan.choose(dataclasses.replace(behind, left_s=1.5)) == Plan(Choice.PROMOTE, 0.9)
    assert plan.choose(dataclasses.replace(behind, step=5)) == Plan(Choice.PROMOTE, 0.9)
    idle = dataclasses.replace(behind, saving=None)
    assert plan.choose(idle) == Plan(Choice.FULL, 1.0)
    assert plan.choose(dataclasses.replace(idle, upload_s=60.0)) == Plan(Choice.LOCAL, 1.0)
    assert plan.choose(dataclasses.replace(idle, left_s=0.5)) == Plan(Choice.NOTHING, 1.0)
    assert plan.choose(dataclasses.replace(idle, committed=6)) == Plan(Choice.COMMITTED)
    assert plan.choose(dataclasses.replace(idle, left_s=None, save_s=60.0)).choice is Choice.NOTHING


def test_rates() -> None:
    """The slowest of the last saves counts, scaled to the size; without any a guess on the slow side."""
    saved = [{"t": i, "event": "saved", "bytes": 100, "durable_s": s} for i, s in enumerate([9.0, 1, 2, 1, 1, 1])]
    other = [{"event": "saved", "bytes": "x"}, {"event": "metrics"}, {"event": "uploaded", "bytes": 50, "seconds": 4}]
    rates = Rates.from_events([*saved, *other])
    assert rates.save_s(100) == 2.0
    assert rates.save_s(300) == 6.0
    assert rates.save_s(10) == 2.0
    assert rates.upload_s(50) == 4.0
    assert Rates().save_s(10**9) > 5
