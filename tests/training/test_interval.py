"""The interval of `save_every="auto"`: bounds and direction on any history, and what real runs make of it."""

import itertools
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobkit import contract
from jobkit.checkpoint import interval
from jobkit.checkpoint.interval import Cost, Interval, Past, between_s, interval_s, read_past
from jobkit.checkpoint.schedule import SaveEvery
from jobkit.rundir.ledger import read_events
from jobkit.rundir.store import Store
from tests.benchmarks import intervals
from tests.harness import training

costs = st.tuples(st.floats(0, 1e4), st.floats(0, 1e4)).map(lambda pair: Cost(min(pair), max(pair)))
means = st.floats(1, 1e9)


@given(costs, means)
def test_bounds_and_the_cap(cost: Cost, mean_s: float) -> None:
    """The interval is finite and positive, no shorter than a save, and keeps the time spent blocked below the cap."""
    found = interval_s(cost, mean_s)
    assert 0 < found < math.inf
    assert found >= cost.durable_s
    assert cost.blocking_s <= interval.CAP * found * (1 + 1e-9)


@given(costs, costs, means, means)
def test_dearer_saves_and_rarer_losses_make_it_longer(one: Cost, other: Cost, mean_s: float, longer_s: float) -> None:
    """The interval grows with what a save blocks, the time until it is durable, and the time between losses."""
    low = Cost(min(one.blocking_s, other.blocking_s), min(one.durable_s, other.durable_s))
    high = Cost(max(one.blocking_s, other.blocking_s), max(one.durable_s, other.durable_s))
    assert interval_s(low, min(mean_s, longer_s)) <= interval_s(high, max(mean_s, longer_s)) * (1 + 1e-9)


def test_where_nothing_else_decides_it_is_youngs() -> None:
    """A save that is durable as soon as it lets go, a loss an hour: sqrt(2 b M)."""
    assert interval_s(Cost(2.0, 2.0), 3600.0, cap=1.0) == pytest.approx(math.sqrt(2 * 2.0 * 3600))


@given(st.floats(0, 1e9), st.integers(0, 10**6))
def test_the_prior_gives_way_to_history(exposed_s: float, losses: int) -> None:
    """Before any history one loss in a day is expected; a long history counts for itself; losses make it shorter."""
    found = between_s(exposed_s, losses)
    assert 0 < found < math.inf
    assert found >= between_s(exposed_s, losses + 1)
    assert between_s(0, 0) == interval.PRIOR_S
    if losses and exposed_s > 100 * interval.PRIOR_S * losses:
        assert found < 1.1 * exposed_s


anything = st.sampled_from([None, True, -1, 0, 0.5, 7, 1e300, math.nan, math.inf, "1", []])
events = st.fixed_dictionaries(
    {
        "t": st.floats(-1e12, 1e12),
        "event": st.sampled_from(["fresh", "restored", "first_step", "saved", "uploaded", "stopped", "exited", "x"]),
    },
    optional={"blocking_s": anything, "durable_s": anything, "seconds": anything, "step": anything},
)


@given(st.lists(st.lists(events, max_size=12), max_size=4), st.lists(costs, max_size=12), st.floats(0, 1e8))
def test_it_survives_any_history(history: list[list[Any]], own: list[Cost], now_s: float) -> None:
    """Whatever earlier attempts wrote down, the interval stays within its bounds."""
    with tempfile.TemporaryDirectory() as directory:
        for attempt, lines in enumerate(history):
            path = Path(directory) / contract.events_file(attempt, 0)
            path.parent.mkdir(parents=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "sav')
        opened = Interval(0.0)
        opened.past = read_past(Store(directory), len(history))
    for step, cost in enumerate(own):
        opened.saved(step, cost)
    found = opened.seconds(now_s)
    assert interval.SHORTEST_S <= found < math.inf
    if opened.cost is not None:
        assert found >= opened.cost.durable_s


def _write(root: Path, attempt: int, *lines: dict[str, Any], writer: int | str = 0) -> None:
    path = root / contract.events_file(attempt, writer)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


def test_what_counts_as_a_loss(tmp_path: Path) -> None:
    """Killed and failed attempts are losses; noticed, finished ones and those that did no step are not."""
    begun = {"t": 100.0, "event": "restored", "step": 5}, {"t": 110.0, "event": "first_step", "step": 5}
    saved = {"t": 120.0, "event": "saved", "step": 9, "blocking_s": 0.2, "durable_s": 1.0}
    _write(tmp_path, 0, *begun, saved, {"t": 130.0, "event": "metrics", "step": 6, "values": {}})
    _write(
        tmp_path,
        0,
        {"t": 200.0, "event": "exited"},
        {"t": 150.0, "event": "uploaded", "seconds": 4.0},
        writer="supervisor",
    )
    _write(tmp_path, 1, *begun, {"t": 140.0, "event": "raised"})  # fmt: skip
    _write(tmp_path, 2, *begun, {"t": 160.0, "event": "stopped"})
    _write(tmp_path, 3, *begun[:1], {"t": 105.0, "event": "raised"})
    _write(tmp_path, 4, *begun, {"t": 101.0, "event": "finished"})
    past = read_past(Store(tmp_path), 5)
    assert past == Past(exposed_s=100 + 40 + 60 + 10, losses=2, costs=(Cost(0.2, 1.0),), upload_s=4.0)
    assert read_past(Store(tmp_path), 1).losses == 1


def test_the_first_save_does_not_count_for_long() -> None:
    """The first save of an attempt takes many times longer; after some more it is forgotten, as is another machine."""
    opened = Interval(0.0)
    opened.past = Past(costs=(Cost(50.0, 100.0),) * 8)
    opened.saved(0, Cost(5.0, 9.0))
    slow = opened.seconds(0.0)
    for step in range(1, 4):
        opened.saved(step, Cost(0.1, 0.5))
        opened.saved(step, Cost(0.1, 0.5))  # heard of twice
    assert opened.cost == Cost(0.1, 0.5)
    assert opened.seconds(0.0) < slow / 10


def test_the_ledger_is_told_of_changes_alone() -> None:
    """The first interval is told, then only one that differs by a tenth."""
    opened = Interval(0.0)
    assert opened.news(0.0) is None  # nothing is measured yet
    opened.saved(0, Cost(0.1, 0.2))
    told = opened.news(0.0)
    assert told is not None
    assert told["seconds"] == pytest.approx(math.sqrt(2 * 0.101 * 86400), rel=1e-3)
    assert "unnoticed losses" in told["why"]
    assert opened.news(60.0) is None
    opened.past = Past(losses=3)
    assert opened.news(60.0) is not None


class Read(Interval):
    """An interval for which earlier attempts are read while it is asked: each look finds another past."""

    looks = 0

    @property
    def past(self) -> Past:  # type: ignore[override]
        """Return what is known just now."""
        self.looks += 1
        return Past(exposed_s=1000.0 * self.looks, losses=self.looks % 3, costs=(Cost(0.1, self.looks / 10),))

    @past.setter
    def past(self, past: Past) -> None:
        pass


def test_what_is_read_meanwhile_fails_nothing() -> None:
    """The thread that reads earlier attempts may come between any two looks at what they tell."""
    opened = Read(0.0)
    opened.saved(1, Cost(0.2, 0.5))
    assert opened.news(10.0) is not None
    assert opened.seconds(10.0) > 0


@given(st.floats(1, 1e5), st.floats(0, 600), st.floats(0.001, 30), st.lists(st.floats(0.01, 100), max_size=80))
def test_one_save_before_the_time_limit(ends_s: float, grace_s: float, durable_s: float, steps: list[float]) -> None:
    """However long the steps are: after the last call one save begins, and others only an interval later."""
    opened = Interval(0.0, ends_s=ends_s, grace_s=grace_s)
    opened.past = Past(costs=(Cost(durable_s / 10, durable_s),))
    strategy = SaveEvery.parse("auto")
    strategy.interval = opened
    last_call = opened.last_call_s()
    assert last_call <= ends_s - grace_s - 2 * durable_s
    now = 0.0
    strategy.begin(0, now)
    begun = []
    for step, duration in enumerate(steps, start=1):
        now += duration
        if strategy.due(step, now):
            begun.append(now)
            strategy.begin(step, now)
    if 0 < last_call <= now:
        after = [at for at in begun if at >= last_call]
        first_step = next(at for at in itertools.accumulate(steps) if at >= last_call)
        assert after[0] == first_step
        assert all(at - before >= opened.seconds(before) * 0.99 for before, at in itertools.pairwise(after))


def test_simulated_it_comes_close_to_who_knows_the_rate() -> None:
    """On a simulated trace without notice auto loses at most a tenth more than Young/Daly with the true rate."""
    found = intervals.measure(intervals.TRACES[0], intervals.COSTS["10 GB"])
    assert found["auto"] < 1.1 * found["Young/Daly, true M"] < 0.5 * found["fixed 10 min"] * 1.1


def _ends_soon(point: str, run: Any) -> None:
    if point == "opened":  # so that the last call comes in two seconds
        os.environ |= {contract.ENV_ENDS_AT: str(time.time() + 32), "SLURM_JOB_END_TIME": "1"}


@pytest.mark.timing
def test_a_run_on_auto_measures_and_tells(tmp_path: Path) -> None:
    """A real training: killed once, it tells the interval and why, and the next attempt knows of the loss."""
    url = tmp_path / "run"
    log = tmp_path / "log"
    process = training.start(training.train, str(url), log=log, hook=_ends_soon, save_every="auto", pause_s=0.2)
    deadline = time.monotonic() + 50
    while not (_told(url, "saved", reason="interval") and _told(url, "interval")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _told(url, "saved", reason="interval"), log.read_text()
    process.kill()
    process.join()
    (told,) = _told(url, "interval")[:1]
    assert told["losses"] == 0
    assert 1 <= told["seconds"] < interval.UNKNOWN_S
    code, printed = training.attempt(url, save_every=("auto", "7 steps"), pause_s=0.15)
    assert code == 0, printed
    again = [event for event in _told(url, "interval") if event["attempt"] == 1]
    assert again
    assert again[-1]["losses"] == 1
    assert again[-1]["between_s"] < told["between_s"]


def _told(url: Path, name: str, **fields: Any) -> list[dict[str, Any]]:
    found = [event for event in read_events(Store(url)) if event["event"] == name]
    return [event for event in found if fields.items() <= event.items()]
