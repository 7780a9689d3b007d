"""Durations and sizes as people type them."""

import re
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobkit.errors import ConfigError
from jobkit.units import duration_s, show_duration, show_size, size_bytes

SECONDS = {"ms": Fraction(1, 1000), "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
BYTES = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGTP", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024), ("", 1024))
}
numbers = st.from_regex(r"[0-9]{1,12}(\.[0-9]{1,6})?", fullmatch=True)
spaces = st.sampled_from(["", " ", "  "])


def cased(text: str) -> st.SearchStrategy[str]:
    return st.sampled_from([text, text.upper(), text.lower()])


@given(st.lists(st.tuples(numbers, st.sampled_from(list(SECONDS)), spaces), min_size=1, max_size=4), st.data())
def test_a_duration_is_the_exact_sum_of_its_parts(parts: list[tuple[str, str, str]], data: Any) -> None:
    """Numbers with units, in any case and spacing, are the float nearest to their exact sum."""
    text = " ".join(number + space + data.draw(cased(unit)) for number, unit, space in parts)
    assert duration_s(text) == float(sum(Fraction(number) * SECONDS[unit] for number, unit, _ in parts))


@given(st.floats(0, 1e12))
def test_a_bare_number_is_seconds(seconds: float) -> None:
    """A number, and the same number as text, are seconds."""
    assert duration_s(seconds) == seconds
    assert duration_s(f"{seconds:.6f}") == float(f"{seconds:.6f}")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90.0), ("90s", 90.0), ("1h30m", 5400.0), ("250ms", 0.25), ("9ms", 0.009), (" 2 D ", 172800.0), (0, 0.0)],
)
def test_durations_of_the_documentation(text: Any, seconds: float) -> None:
    """The forms that the docstrings and messages show."""
    assert duration_s(text) == seconds


@given(numbers, st.sampled_from(list(BYTES)), spaces, st.data())
def test_a_size_is_exact(number: str, unit: str, space: str, data: Any) -> None:
    """A size is its number times its unit, exactly, and rounded down to whole bytes."""
    exact = Fraction(number) * BYTES[unit]
    assert size_bytes(number + space + data.draw(cased(unit))) == int(exact)


@given(st.integers(0, 2**80))
def test_whole_bytes_beyond_the_precision_of_floats(size: int) -> None:
    """Bytes round-trip whatever their number, as number and as text."""
    assert size_bytes(size) == size_bytes(str(size)) == size


@pytest.mark.parametrize(
    "text",
    [
        *("s", "m10", "10x", "-5s", "+5s", "1e3", "1e3s", ".5s", "5.s", "1.2.3s", "1,5h", "1:30", "inf", "nan", "ten"),
        *("10m!", "٣s", "5\0s"),
        *("", " ", "10 20", "10m 20", "9" * 400, "9" * 5000 + "s", None, True, [], {}),
        *(-1, -0.1, float("inf"), float("nan"), 10**400),
    ],
)
def test_what_is_no_duration_is_refused(text: Any) -> None:
    """Garbage, negative and infinite values are refused with a sentence, never another exception."""
    with pytest.raises(ConfigError, match=r"duration|unit of time"):
        duration_s(text)


@pytest.mark.parametrize(
    "text", ["", "B", "4 Gi B", "4GiBs", "-1", "1e3", "1.2.3", "inf", "4XB", "٣", "9" * 5000, None, True, -1, 10**400]
)
def test_what_is_no_size_is_refused(text: Any) -> None:
    """Garbage is refused with a sentence, never another exception."""
    with pytest.raises(ConfigError, match="is not a size"):
        size_bytes(text)


@given(st.text())
def test_any_text_is_understood_or_refused(text: str) -> None:
    """Whatever is typed, the answer is a number of zero or more, or one `ConfigError`."""
    for parse in (duration_s, size_bytes):
        try:
            assert parse(text) >= 0
            assert re.search("[0-9]", text)
        except ConfigError:
            pass


@given(st.floats(0, 1e10))
def test_a_shown_duration_is_near(seconds: float) -> None:
    """What a person reads is the duration, to the precision that is shown."""
    shown = show_duration(seconds)
    unit_s = 60.0 if " h" in shown else 1.0 if seconds >= 10 else 0.1
    assert abs(duration_s(shown) - seconds) <= unit_s * 1.001


@given(st.integers(0, 10**15))
def test_a_shown_size_is_near(size: int) -> None:
    """What a person reads is the size, to a tenth of the unit that is shown."""
    shown = show_size(size)
    assert abs(size_bytes(shown) - size) <= size_bytes(f"0.1 {shown.split()[1]}")
