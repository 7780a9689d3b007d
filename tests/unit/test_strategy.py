"""When a save is due: the forms of `save_every`, refusals, and the sequence of saves that follows from them."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobkit.checkpoint.interval import UNKNOWN_S
from jobkit.checkpoint.schedule import SaveEvery
from jobkit.errors import ConfigError
from jobkit.rundir.retention import Keep

BEST = ("val_loss", "min")


@pytest.mark.parametrize(
    ("text", "every_steps", "every_s", "only_best"),
    [
        (None, 0, math.inf, False),
        ((), 0, math.inf, False),
        (500, 500, math.inf, False),
        ("500", 500, math.inf, False),
        ("500 steps", 500, math.inf, False),
        (" 1 step ", 1, math.inf, False),
        ("500steps", 500, math.inf, False),
        ("10m", 0, 600.0, False),
        ("1h30m", 0, 5400.0, False),
        ("500ms", 0, 0.5, False),
        ("5 s", 0, 5.0, False),
        ("best", 0, math.inf, True),
        (("500 steps", "10m"), 500, 600.0, False),
        ("auto", 0, UNKNOWN_S, False),
        (("auto", "500 steps", "best"), 500, UNKNOWN_S, True),
        (["10m", 500, "best"], 500, 600.0, True),
    ],
)
def test_every_form(text: Any, every_steps: int, every_s: float, only_best: bool) -> None:
    """Steps, durations, 'best', tuples of these and None."""
    made = SaveEvery.parse(text, keep_best=BEST)
    assert (made.every_steps, made.every_s, made.only_best) == (every_steps, every_s, only_best)
    told = json.loads(made.to_json(Keep(3, BEST)))
    assert told == {
        "every_steps": every_steps,
        "every_s": None if every_s == math.inf or made.auto else every_s,
        "auto": "auto" in (text if isinstance(text, tuple) else (text,)),
        "only_best": only_best,
        "keep": 3,
        "keep_best": ["val_loss", "min"],
    }


@pytest.mark.parametrize(
    "text",
    [
        *(0, -1, True, False, 2.5, math.inf, {}, b"10m", object(), (None,), ("10m", "often")),
        *("", "0", "0 steps", "0s", "-5 steps", "5 stepss", "often", "steps", "10x", "inf", "1e3 steps", "٣ steps"),
        *("9" * 5000, "9" * 5000 + " steps"),
    ],
)
def test_what_makes_no_sense_is_refused(text: Any) -> None:
    """Zero, negative, boolean, fractional and unknown intervals are refused with the right forms."""
    with pytest.raises(
        ConfigError, match=r"save_every=.*: give '500 steps', a duration like '10m', 'auto', 'best', or None"
    ):
        SaveEvery.parse(text)


@pytest.mark.parametrize("text", [("10 steps", 20), ("10m", "1h"), ("10 steps", "5m", "10 steps"), ("auto", "5m")])
def test_two_intervals_of_one_kind_are_refused(text: Any) -> None:
    """Two intervals in steps or two durations: neither is dropped without a word."""
    with pytest.raises(ConfigError, match=r"save_every gives two .*: choose one"):
        SaveEvery.parse(text)


@pytest.mark.parametrize("best", [("loss", "lowest"), ("loss",), "loss", ("loss", "min", "max"), 7, ("loss", None)])
def test_a_best_that_makes_no_sense_is_refused(best: Any) -> None:
    """`keep_best` is a metric and 'min' or 'max'."""
    with pytest.raises(ConfigError, match=r"give a metric and 'min' or 'max'"):
        SaveEvery.parse("10m", keep_best=best)


def test_best_only_needs_to_know_what_is_best() -> None:
    """save_every='best' without `keep_best` is refused with the missing argument."""
    with pytest.raises(ConfigError, match=r"keep_best=\('val_loss', 'min'\)"):
        SaveEvery.parse("best")


@given(st.integers(1, 50), st.integers(0, 200), st.integers(1, 300))
def test_saves_by_steps_fall_on_multiples(every: int, first: int, count: int) -> None:
    """From wherever a run resumes, saves are due at exactly the multiples of the interval beyond that step."""
    made = SaveEvery.parse(every)
    made.begin(first, 0.0)
    saved = []
    for step in range(first + 1, first + count + 1):
        if made.due(step, step * 1e6):
            saved.append(step)
            made.begin(step, step * 1e6)
    assert saved == [step for step in range(first + 1, first + count + 1) if step % every == 0]


@given(st.floats(0.01, 100), st.lists(st.floats(0, 50), max_size=60))
def test_saves_by_time_keep_their_distance(every_s: float, durations: list[float]) -> None:
    """Between two saves at least the interval passes, and no step ends later than that without a save."""
    made = SaveEvery(every_s=every_s)
    now = last = 1000.0
    made.begin(0, now)
    for step, duration in enumerate(durations, start=1):
        now += duration
        assert made.due(step, now) == (now >= last + every_s)
        if made.due(step, now):
            last = now
            made.begin(step, now)


@given(st.integers(1, 20), st.floats(0.1, 20), st.lists(st.floats(0, 5), max_size=60))
def test_both_together_are_due_when_either_is(every: int, every_s: float, durations: list[float]) -> None:
    """Combined, a save is due when the steps or the time say so, counted from the last save of either kind."""
    made = SaveEvery(every_steps=every, every_s=every_s)
    now, begun, step_then = 0.0, 0.0, 0
    made.begin(0, now)
    for step, duration in enumerate(durations, start=1):
        now += duration
        expected = step // every > step_then // every or now >= begun + every_s
        assert made.due(step, now) == expected
        if expected:
            begun, step_then = now, step
            made.begin(step, now)


@given(st.integers(0, 10**9), st.floats(0, 1e12))
def test_without_an_interval_nothing_is_due(step: int, now_s: float) -> None:
    """None and 'best' are never due by themselves, nor is anything before the run has begun."""
    for made in (SaveEvery.parse(None), SaveEvery.parse("best", keep_best=BEST)):
        made.begin(0, 0.0)
        assert not made.due(step, now_s)
    assert not SaveEvery.parse((1, "1s")).due(step, now_s)
