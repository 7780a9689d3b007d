"""What became of the scenarios of a drill, held against what is promised."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jobkit import commits, contract, ledger
from jobkit.contract import Outcome
from jobkit.storage import Store
from launch import diagnosis, drive
from launch.diagnosis import Diagnosis
from launch.drive import Ending
from launch.scenarios import Scenario, Shown


@dataclass
class Found:
    """How one scenario went.

    Args:
        broken: The promises that did not hold, a sentence each; empty if it went well.
        identical: Whether it ended with the reference's bits; None if it could not be compared.
        difference: The first difference, as `jobkit.compare` says it.
    """

    name: str
    text: str
    done: list[str] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    identical: bool | None = None
    comparison: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    run: str = ""
    donated: bool = False
    """Whether the program gave away what the run holds."""
    missed: bool = False
    """Whether the run was over before it could be hit: nothing is shown then."""

    @property
    def survived(self) -> bool:
        """Whether every promise held."""
        return not self.broken

    @property
    def lost_steps(self) -> int | None:
        """Steps done again, over all interruptions."""
        lost = [ending.lost_steps for ending in self.endings if ending.lost_steps is not None]
        return sum(lost) if lost else None

    @property
    def commit_s(self) -> float | None:
        """The longest time from a notice to its commit."""
        return max((ending.commit_s for ending in self.endings if ending.commit_s is not None), default=None)

    @property
    def restart_s(self) -> float | None:
        """The longest time from an end to the next completed step."""
        return max((ending.restart_s for ending in self.endings if ending.restart_s is not None), default=None)


@dataclass
class Result:
    """What a drill found; card, page and --json show it."""

    command: tuple[str, ...]
    place: str
    shown: Shown
    found: list[Found]
    diagnosis: Diagnosis | None
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every promise held in every scenario."""
        return bool(self.found) and all(each.survived for each in self.found)


def judge(found: Found, scenario: Scenario, store: Store, shown: Shown) -> None:
    """Hold against a run what was promised."""
    attempts = store.numbers(contract.ATTEMPTS)
    endings = [drive.ending_of(store, attempt) for attempt in attempts]
    found.endings = endings
    last = endings[-1] if endings else None
    if last is None or last.outcome != Outcome.DONE:
        found.broken.append(f"it did not get to its end: {last.reason if last else 'it never started'}")
    elif (newest := max(commits.steps(store), default=-1)) != shown.steps:
        found.broken.append(f"it ended with step {newest} committed, and the reference with {shown.steps}")
    for ending, wanted in zip(endings[:-1], scenario.ends, strict=False):
        if wanted and ending.outcome != wanted:
            found.broken.append(f"attempt {ending.attempt} ended {ending.outcome} ({ending.reason}), not {wanted}")
    if len(endings) - 1 != len(scenario.ends):
        found.missed |= len(endings) == 1 and endings[0].outcome == Outcome.DONE
        found.broken.append(f"it took {len(endings)} attempts and should have taken {len(scenario.ends) + 1}")
    found.broken += list(_losses(found, scenario, shown))
    if scenario.name != "damage":
        found.broken += list(_forgotten(store, endings))
    if scenario.name != "storage":
        found.broken += list(_failed_saves(store))
    if event := diagnosis.given_away(store):
        found.donated = True
        gone, *more = event["leaves"]
        gone += f" (and {len(more)} more)" if more else ""
        told = f"a save after step {event['step']} would have failed: {gone} had been given away (donate_argnums)"
        found.broken.append(told)


def _losses(found: Found, scenario: Scenario, shown: Shown) -> Iterator[str]:
    for ending in found.endings[:-1]:
        lost = ending.lost_steps or 0
        if ending.outcome == Outcome.PREEMPTED and lost:
            yield f"{lost} steps were lost on a notice, and none may be"
        # A damaged checkpoint costs its own interval besides.
        allowed = shown.allowed_loss + (shown.save_every if scenario.name == "damage" else 0)
        if ending.outcome == Outcome.KILLED and lost > allowed:
            yield f"{lost} steps were lost on a kill, and a save interval is {shown.save_every}"


def _forgotten(store: Store, endings: list[Ending]) -> Iterator[str]:
    """Whatever the interval: nothing that was committed may be gone."""
    committed = 0
    for ending in endings[:-1]:
        saved = [event for event in ledger.attempt_events(store, ending.attempt) if event["event"] == "saved"]
        committed = max([committed, *(event["step"] for event in saved)])
        if ending.resumed_step is not None and ending.resumed_step < committed:
            yield f"it went on from step {ending.resumed_step} although step {committed} had been committed"


def _failed_saves(store: Store) -> Iterator[str]:
    for attempt in store.numbers(contract.ATTEMPTS):
        if event := drive.first(store, attempt, "save_failed"):
            yield f"a save failed at step {event.get('step')}: {event.get('reason')}"
            return
