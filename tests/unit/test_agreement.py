"""A model of the agreement: any order of notices, steps and deaths, and all who stop, stop at the same step."""

from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from jobkit.preemption.stop_step import SAVE, STOP, Rounds

TOTAL = 12


@dataclass
class Process:
    """One process of the model: its loop, and what its thread has still to hear.

    Args:
        draw: Chooses the next move: a number below the one given.
    """

    draw: "Draws"
    count: int = 0
    counted: bool = False
    """Whether the loop has counted a boundary and not yet looked at the flag."""
    stopped: int | None = None
    saves: list[int] = field(default_factory=list)
    alive: bool = True

    def __post_init__(self) -> None:
        self.rounds = Rounds(self.read)

    def read(self) -> int:
        """Return the count as the thread sees it: the loop may move on before it is read."""
        for _ in range(self.draw.below(4)):
            self.move()
        return self.count

    def move(self) -> None:
        """Take the loop one move on: count a boundary, or look at the flag there."""
        if not self.alive or self.stopped is not None or (self.count == TOTAL and not self.counted):
            return
        if not self.counted:
            self.count += 1
            self.counted = True
            return
        if self.rounds.noticed:
            if self.rounds.undecided:
                return  # it waits at this boundary
            due = self.rounds.due(self.count)
            if SAVE in due:
                self.saves.append(self.count)
            if STOP in due and self.count < TOTAL:
                self.stopped = self.count
        self.counted = False


class Draws:
    """Choices that hypothesis makes, all 0 when they are used up."""

    def __init__(self, choices: list[int]) -> None:
        self._choices = deque(choices)

    def below(self, count: int) -> int:
        """Choose a number below `count`."""
        return self._choices.popleft() % count if self._choices else 0


@settings(max_examples=400, deadline=None)
@given(
    st.integers(2, 4),
    st.lists(st.sampled_from([STOP, SAVE]), min_size=1, max_size=3),
    st.lists(st.integers(0, 1000), max_size=300),
    st.booleans(),
)
def test_all_who_stop_stop_at_the_same_step(count: int, kinds: list[str], choices: list[int], deaths: bool) -> None:
    """Whatever the order of steps, answers, decisions and deaths: one stop step, the same saves for all."""
    draw = Draws(choices)
    processes = [Process(draw) for _ in range(count)]

    def loops(moves: int) -> None:
        for _ in range(moves):
            processes[draw.below(count)].move()

    for number, kind in enumerate(kinds):
        loops(draw.below(20))
        bounds = []
        for index in sorted(range(count), key=lambda index: draw.below(7)):
            if deaths and draw.below(9) == 8:
                processes[index].alive = False
            if processes[index].alive:
                bounds.append(processes[index].rounds.begin(number, kind))
            loops(draw.below(6))
        if len(bounds) < count:
            break  # no agreement: nobody who waits ever goes on by this round
        at = max(bounds)
        for index in sorted(range(count), key=lambda index: draw.below(7)):
            processes[index].rounds.decide(number, at)
            loops(draw.below(6))
    else:
        for _ in range(4 * TOTAL):
            for process in processes:
                process.move()
        assert all(process.stopped is not None or process.count == TOTAL for process in processes), "one waits for ever"
    stops = {process.stopped for process in processes if process.alive}
    assert len(stops - {None}) <= 1
    if all(process.alive for process in processes):
        assert len(stops) == 1
        assert len({tuple(process.saves) for process in processes}) == 1 or STOP in kinds
