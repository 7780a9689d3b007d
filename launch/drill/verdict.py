"""What became of the scenarios of a drill, held against what is promised."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from jobkit import contract
from jobkit.contract import Outcome
from jobkit.rundir import commits, ledger
from jobkit.rundir.store import Store
from jobkit.units import show_duration
from launch.drill import diagnosis, observe, own_files
from launch.drill.comparing import Comparison
from launch.drill.observe import Ending
from launch.drill.reference import Reference
from launch.drill.scenarios import Scenario
from launch.drill.suspects import Diagnosis


class Verdict(StrEnum):
    """What a drill says of a program."""

    CERTIFIED = "certified"
    NOT_CERTIFIED = "not certified"
    NOT_JUDGED = "could not judge"

    @property
    def exit_code(self) -> int:
        """What the command exits with."""
        return {Verdict.CERTIFIED: 0, Verdict.NOT_CERTIFIED: 1, Verdict.NOT_JUDGED: 2}[self]


@dataclass
class Trial:
    """How one scenario went.

    Args:
        broken: The promises that did not hold, a sentence each; empty if it went well.
        identical: Whether it ended with the reference's bits; None if it could not be compared.
        comparison: What `jobkit.compare` says.
        donated: Whether the program gave away what the run holds.
        files: Files of the program's own below the run directory that are others than an undisturbed run's, or missing.
        warnings: What may be a mistake, and breaks no promise.
        missed: Why the run could not be hit, so that nothing is shown; '' if it was.
    """

    name: str
    text: str
    done: list[str] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    identical: bool | None = None
    comparison: Comparison = field(default_factory=dict)
    seconds: float = 0.0
    run: str = ""
    donated: bool = False
    files: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    missed: str = ""

    @property
    def survived(self) -> bool:
        """Whether it was hit, and every promise held."""
        return not self.broken and not self.missed

    @property
    def mark(self) -> str:
        """How it went, in a word."""
        return "yes" if self.survived else "no" if self.broken else "missed"

    @property
    def in_short(self) -> str:
        """How it went, in a line."""
        if not self.survived:
            return f"FAIL  {self.name}: {(self.broken or [self.missed])[0]}"
        lost = "-" if self.lost_steps is None else self.lost_steps
        return f"ok    {self.name}: {self.text}; {lost} steps lost, {show_duration(self.seconds)}"

    @property
    def at_steps(self) -> list[int]:
        """Completed steps when it was interrupted, for each attempt that had begun to count them."""
        reached = [ending.reached_step for ending in self.endings[:-1]]
        return [step for step in reached if step is not None and step >= 0]

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


@dataclass(frozen=True)
class Untried:
    """A scenario that was not tried, and why."""

    name: str
    text: str
    why: str


@dataclass
class DrillResult:
    """What a drill found; card, page and --json show it.

    Args:
        trials: How the scenarios went.
        aside: Metrics that are not compared, since they differ between undisturbed runs of equal state too.
        files_aside: Files below the run directory that are not compared, for the same reason.
        warnings: What the verdict does not cover, a sentence each: it costs no certificate, and may be a mistake all
            the same.
        untried: The scenarios that were not tried.
    """

    command: tuple[str, ...]
    place: str
    reference: Reference
    trials: list[Trial]
    diagnosis: Diagnosis | None
    seconds: float
    aside: tuple[str, ...] = ()
    files_aside: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    untried: list[Untried] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """What it says of the program: one broken promise is enough, and nothing missed is certified."""
        if any(trial.broken for trial in self.trials):
            return Verdict.NOT_CERTIFIED
        return Verdict.CERTIFIED if self.passed else Verdict.NOT_JUDGED

    @property
    def passed(self) -> bool:
        """Whether every promise held in every scenario that was asked for."""
        return bool(self.trials) and all(trial.survived for trial in self.trials)


def judge_files(trial: Trial, difference: own_files.Difference) -> None:
    """Hold against a run the files that it leaves; lines that stand there twice, and files left over, are told only."""
    trial.files = tuple(sorted(difference.other | difference.missing))
    trial.broken += [f"it left another {name} than an undisturbed run" for name in sorted(difference.other)]
    trial.broken += [f"it left no {name}, and an undisturbed run does" for name in sorted(difference.missing)]
    warnings = [f"{name}: lines of steps that were done again stand in it twice" for name in sorted(difference.again)]
    warnings += [f"{name}: left over by an interruption ({trial.text})" for name in sorted(difference.extra)[:_FEW]]
    trial.warnings = tuple(warnings)


_FEW = 5


def judge(trial: Trial, scenario: Scenario, store: Store, reference: Reference) -> None:
    """Hold against a run what was promised."""
    attempts = store.numbers(contract.ATTEMPTS)
    endings = [observe.ending_of(store, attempt) for attempt in attempts]
    trial.endings = endings
    last = endings[-1] if endings else None
    if last is None or last.outcome != Outcome.DONE:
        trial.broken.append(f"it did not get to its end: {last.reason if last else 'it never started'}")
    elif (newest := max(commits.steps(store), default=-1)) != reference.steps:
        trial.broken.append(f"it ended with step {newest} committed, and the reference with {reference.steps}")
    for ending, wanted in zip(endings[:-1], scenario.ends, strict=False):
        if wanted and ending.outcome != wanted:
            trial.broken.append(f"attempt {ending.attempt} ended {ending.outcome} ({ending.reason}), not {wanted}")
    if len(endings) == 1 and endings[0].outcome == Outcome.DONE and scenario.ends:
        trial.missed = trial.missed or "the run was over before it could be hit"
    elif len(endings) - 1 != len(scenario.ends):
        trial.broken.append(f"it took {len(endings)} attempts and should have taken {len(scenario.ends) + 1}")
    # A damaged checkpoint costs its own interval besides, and is forgotten; a storage that fails, fails saves.
    damaged, failing = scenario.name == "damage", scenario.name == "storage"
    trial.broken += _losses(endings[:-1], reference.allowed_loss + (reference.save_every if damaged else 0))
    if not damaged:
        trial.broken += _forgotten(store, endings)
    failed = (event for attempt in attempts if (event := observe.first(store, attempt, "save_failed")))
    if not failing and (event := next(failed, {})):
        trial.broken.append(f"a save failed at step {event.get('step')}: {event.get('reason')}")
    if event := diagnosis.given_away(store):
        trial.donated = True
        gone, *more = event["leaves"]
        gone += f" (and {len(more)} more)" if more else ""
        text = f"a save after step {event['step']} would have failed: {gone} had been given away (donate_argnums)"
        trial.broken.append(text)


def _losses(endings: list[Ending], allowed: int) -> Iterator[str]:
    for ending in endings:
        lost = ending.lost_steps or 0
        if ending.outcome == Outcome.PREEMPTED and lost:
            yield f"{lost} steps were lost on a notice, and none may be"
        if ending.outcome == Outcome.KILLED and lost > allowed:
            yield f"{lost} steps were lost on a kill; the interval and the save in flight are at most {allowed}"


def _forgotten(store: Store, endings: list[Ending]) -> Iterator[str]:
    """Whatever the interval: nothing that was committed may be gone."""
    committed = 0
    for attempt, ending in zip(store.numbers(contract.ATTEMPTS), endings[:-1], strict=False):
        saved = [event["step"] for event in ledger.attempt_events(store, attempt) if event["event"] == "saved"]
        committed = max([committed, *saved])
        if ending.resumed_step is not None and ending.resumed_step < committed:
            yield f"it went on from step {ending.resumed_step} although step {committed} had been committed"
