"""Which variables a frame still reads, and which line writes them."""

import sys
from collections.abc import Iterator

import pytest

from jobkit.drill import liveness


def watched(steps: int, seen: list[frozenset[str]]) -> Iterator[int]:
    """Yield steps, and note before each which variables of the loop are live."""
    for step in range(steps):
        frame = sys._getframe(1)
        seen.append(liveness.live(frame) & set(frame.f_locals))
        yield step


def test_what_a_step_hands_to_the_next() -> None:
    """Read before it is written is live: an average, a best, a list; what each step makes anew is dead."""
    seen: list[frozenset[str]] = []
    average, best, history, batch, loss, stale, pair = 0.0, 9.0, [], 0, 0.0, 0.0, [0]
    for step in watched(3, seen):
        batch = step * 2
        loss = batch + 1.0
        average = 0.9 * average + loss
        if loss < best:
            best = loss
        history.append(loss)
        if step % 10 == 0:
            stale = loss
        pair = [item + 1 for item in range(2)]
    print(loss, stale, pair)
    assert seen[0] - {"seen"} == {"average", "best", "history", "stale"}
    assert seen[1] == seen[2] == seen[0]


def test_what_an_iterator_gives() -> None:
    """The targets of a loop, and what next() gave, whole or taken apart; not what is made of them, or drawn unnamed."""

    def draws(rows: Iterator[int]) -> None:
        made = 0
        for number, (left, right) in zip(rows, [(1, 2)], strict=False):
            first = next(rows)
            second = float(next(rows, 0))
            third, fourth = next(rows), 0
            print(next(rows))
            made = first + second + third + fourth + number + left + right
        print(made, next(iter([1])))
        made = 2

    names = {"number", "left", "right", "first", "second", "third"}
    assert names <= liveness.taken(draws.__code__) <= names | {"fourth"}


def test_what_a_function_inside_reads_is_live() -> None:
    """A variable that a closure reads may be read by whoever calls it."""
    seen: list[frozenset[str]] = []
    scale = 1.0

    def scaled(value: float) -> float:
        return value * scale

    for step in watched(2, seen):
        scale = step + 1.0
        assert scaled(1.0) == scale
    assert "scale" in seen[1]


def test_frame_that_calls_the_loop() -> None:
    """In a function around the loop it is the code after the call that reads."""
    seen: list[frozenset[str]] = []

    def around() -> int:
        total, other = 1, 2
        loop()
        other = 3
        return total + other

    def loop() -> None:
        frame = sys._getframe(1)
        seen.append(liveness.live(frame) & set(frame.f_locals))

    assert around() == 4
    assert seen[0] & {"total", "other"} == {"total"}


@pytest.mark.parametrize(
    ("name", "attribute", "line"),
    [("a", False, 4), ("b", False, 2), ("c", False, 5), ("count", True, 8), ("d", False, None), ("a", True, None)],
)
def test_line_that_writes(name: str, attribute: bool, line: int | None) -> None:
    """The last line that writes a variable; where the code itself does not, one inside it."""
    lines = ["a = 0", "b = 1", "for _ in range(2):", "    a += 1", "def f(): global c; c = 1", "class K:"]
    lines += ["    def g(self):", "        self.count = 1; b = 2"]
    code = compile("\n".join(lines), "x.py", "exec")
    assert liveness.line_of(code, name, attribute=attribute) == line
