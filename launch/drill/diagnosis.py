"""Why a resumed run differs: evidence from more runs of the same program, not guesses.

Two runs that nobody interrupts tell whether the program repeats itself at all. If it does, the fingerprints that an
interrupted run leaves at the same step before and after its restart (jobkit/drill/fingerprints.py) tell what was
carried over and what was not; if it does not, runs with a wall clock that stands still and with a fixed hash seed tell
what it depends on.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from jobkit import contract
from jobkit.contract import Outcome
from jobkit.errors import DONATED
from jobkit.rundir.ledger import read_events
from jobkit.rundir.store import Store
from launch.drill import suspects
from launch.drill.comparing import Compare, Comparison, first_difference, same, varying
from launch.drill.observe import UnfinishedError, must_end
from launch.drill.reference import PROBED, Reference
from launch.drill.suspects import Diagnosis, Restart
from launch.lifecycle import orphans

_DONATED = re.compile(rf"{DONATED}|[Aa]rray has been deleted|deleted or donated")
"""What jobkit says of an array that was donated, and what JAX does, in words that depend on who touches it."""
_UNCLEAR = "whether it depends on the time of day is not known"

Environ = Mapping[str, str]
Finish = Callable[[Mapping[str, Environ]], list[Store]]
"""Run the program by several names at once, each with its environment; return the runs once they are over."""


def diagnose(run: str, reference: Reference, compare: Compare, finish: Finish) -> Diagnosis:
    """Find out why an interrupted run differs from the reference.

    Args:
        run: The run that differs.
        reference: The reference.
        compare: Compares two runs.
        finish: Starts more runs.

    Raises:
        JobkitError: If it cannot: a run that was to tell something came to nothing.
    """
    if (diagnosis := donated(run, reference.run)) is not None:
        return diagnosis
    at = reference.middle
    probe = (*PROBED, at, at + 1, at + 2)
    undisturbed = reference.environ(probe=probe)
    ways = {
        "notice": reference.environ(probe=probe, fault=notice(reference)),
        "kill": reference.environ(paced=True, probe=probe, fault=f"{_point(reference)}@0"),
    }
    if (orphans.read_outcome(Store(run), 0) or {}).get("outcome") == Outcome.KILLED:
        ways = dict(reversed(ways.items()))
    (way, stopped), (other_way, stopped_otherwise) = ways.items()
    again, interrupted = finish({"again": undisturbed, f"again-{way}": stopped})
    must_end(again)
    if (diagnosis := donated(again.url, interrupted.url)) is not None:
        return diagnosis
    repeated = compare(reference.run, again.url)
    more = _MoreRuns(compare, varying(repeated), finish, Path(reference.run).parent)
    if not same(repeated, more.aside):
        return _unrepeatable(repeated, again, undisturbed, more)
    must_end(interrupted)
    evidence = ["two runs that nobody interrupted are equal to the last bit: the interruption makes the difference"]
    if more.equal(again, interrupted):
        observation = {"notice": "on a notice nothing is lost", "kill": "after that kill nothing was lost"}[way]
        stopped = stopped_otherwise
        (interrupted,) = more.run({f"again-{other_way}": stopped})
        if more.equal(again, interrupted):
            return Diagnosis("unknown", "", [*evidence, "interrupted for the diagnosis, it was the same"])
        evidence.append(f"{observation}: only a {other_way} makes it")
    restart = Restart.of(interrupted, again)
    diagnosis = suspects.lost(restart)
    if diagnosis is None or diagnosis.cause in ("counter", "start"):
        try:
            # Whether an interruption makes no difference once the wall clock stands still.
            wanted = {"still": more.frozen(undisturbed), "still-interrupted": more.frozen(stopped)}
            if more.equal(*more.run(wanted)):
                observation = "with a wall clock that stands still, the interrupted run is equal to the last bit"
                what = diagnosis.what if diagnosis is not None else ""
                diagnosis = Diagnosis("clock", what, [observation])
        except UnfinishedError as error:
            evidence.append(f"{_UNCLEAR}: {error}")
    if diagnosis is None:
        diagnosis = suspects.hidden(restart) or suspects.unknown(restart)
    diagnosis.evidence[:0] = evidence
    diagnosis.step, diagnosis.tensor = suspects.first_tensor(restart.uninterrupted, restart.after)
    return diagnosis


class _MoreRuns:
    """More runs of a program, and whether they are equal but for what differs anyway.

    Args:
        compare: Compares two runs.
        aside: Metrics that differ between undisturbed runs too.
        finish: Starts the runs.
        place: Where the drill lies.
    """

    _FROZEN = """\
import os
if os.environ.get("JOBKIT_SUPERVISOR"):
    from jobkit.drill.frozen_clock import freeze
    freeze(float(os.environ["JOBKIT_DRILL_CLOCK"]))
"""

    def __init__(self, compare: Compare, aside: Collection[str], finish: Finish, place: Path) -> None:
        self._compare, self.aside, self._finish, self._place = compare, aside, finish, place

    def run(self, wanted: Mapping[str, Environ]) -> tuple[Store, ...]:
        """Run the program by several names; return the runs once they have come to their end.

        Raises:
            UnfinishedError: If one does not.
        """
        return must_end(*self._finish(wanted))

    def equal(self, one: Store, other: Store) -> bool:
        """Tell whether two runs are equal."""
        return same(self._compare(one.url, other.url), self.aside)

    def frozen(self, environ: Environ, *, at_s: float = 1_700_000_000.0) -> Environ:
        """Return an environment in which the program's wall clock stands still."""
        directory = self._place / "clock"
        directory.mkdir(exist_ok=True)
        (directory / "sitecustomize.py").write_text(self._FROZEN)
        path = [str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**environ, contract.ENV_DRILL_CLOCK: str(at_s), "PYTHONPATH": os.pathsep.join(path)}


def notice(reference: Reference) -> str:
    """Return the fault that has a program preempted in its middle."""
    return f"{_point(reference)}@0=TERM"


def _point(reference: Reference) -> str:
    """Name a point some steps after a save, so that a kill there costs some; after a save where steps are not ours."""
    return f"step:{reference.middle}" if reference.counted else f"after_rename:{reference.hit_save}"


def failed(why: str) -> Diagnosis:
    """Say that the reason was not found, since the diagnosis came to nothing; the verdict stands."""
    return Diagnosis("failed", "", [why])


def given_away(store: Store) -> dict[str, Any]:
    """Return the first boundary at which a run had donated what it holds, as the program looked for it; {} if none."""
    return next((event for event in read_events(store) if event["event"] == "donated"), {})


def donated(*runs: str) -> Diagnosis | None:
    """Look in runs for a state that was given away: at any boundary, or where somebody stumbled over it."""
    for store in map(Store, runs):
        if event := given_away(store):
            seen = f"after step {event['step']} the run holds arrays that the program has given away (donate_argnums)"
            return Diagnosis("donated", "", [seen], event["step"], event["leaves"][0])
    for store in map(Store, runs):
        # What its ledger or its log says of an array that was donated.
        lines = [str(event.get("reason") or event.get("error") or "") for event in read_events(store)]
        for log in map(contract.log_file, store.numbers(contract.ATTEMPTS)):
            lines += store.read(log).decode(errors="replace").splitlines() if store.file(log).exists() else []
        if line := next(filter(_DONATED.search, lines), ""):
            seen = f"a save found an array that the program had given away (donate_argnums): {line[:200]}"
            return Diagnosis("donated", "", [seen])
    return None


def warnings(interrupted: Store, reference: Store) -> list[str]:
    """Say, of one run that was interrupted and probed, which variables its restart has not brought back."""
    restart = Restart.of(interrupted, reference)
    if restart.both is None:
        return ["which variables a restart does not bring back could not be seen"]
    suspected = [
        one
        for one in suspects.carried(restart)
        # One that was made anew from the step has yielded the same, one that began with the first again by chance.
        if one.cause != "data" or restart.begins_anew(one.what)
    ]
    if not any(one.cause == "data" for one in suspected):  # else it is named where it comes from
        suspected += suspects.given_anew(restart)
    return [
        f"{one.what}{f', line {one.line}' if one.line else ''}: changes from step to step, is no part, and is another "
        f"after the restart"
        for one in suspected
    ]


def of_files(names: Collection[str], interrupted: Store, reference: Store) -> Diagnosis:
    """Say why the files of a run differ whose state is the same: a variable that its restart has not brought back.

    Args:
        names: The files.
        interrupted: A run that was interrupted and probed.
        reference: The reference.
    """
    restart = Restart.of(interrupted, reference)
    likely = suspects.carried(restart)
    diagnosis = likely[0] if likely else suspects.in_file(restart)
    diagnosis = diagnosis or Diagnosis("file", min(names), [], remedy="write it from what resume() is given alone")
    diagnosis.evidence.insert(
        0, f"the state is the same to the last bit, and {', '.join(sorted(names)[:5])} is another"
    )
    if likely[1:]:
        diagnosis.evidence.append(f"also another after the restart: {', '.join(one.what for one in likely[1:6])}")
    return diagnosis


def _unrepeatable(repeated: Comparison, again: Store, undisturbed: Environ, more: _MoreRuns) -> Diagnosis:
    """Find out why two runs that nobody interrupted differ."""
    still, later = more.frozen(undisturbed), more.frozen(undisturbed, at_s=1_700_100_003.5)
    evidence = [f"two runs that nobody interrupted differ: {first_difference(repeated)}"]
    try:
        one, two, other = more.run({"still": still, "still-again": still, "later": later})
    except UnfinishedError as error:
        evidence.append(f"{_UNCLEAR}: {error}")
        still = undisturbed
        one, (two,) = again, more.run({"again-2": undisturbed})
    else:
        if more.equal(one, two):
            if more.equal(one, other):
                return Diagnosis("nondeterministic", "", [*evidence, "not every pair of runs differs"])
            evidence.append("with a wall clock that stands still they are equal, and with another time of day not")
            return Diagnosis("clock", "", evidence, *suspects.first_tensor(suspects.seen(one), suspects.seen(other)))
        evidence.append("they differ with a wall clock that stands still, too")
    looks = suspects.seen(one), suspects.seen(two)
    diagnosis = (
        suspects.unseeded(*looks) or _by_hash(still, more) or suspects.drawn(*looks) or suspects.by_chance(*looks)
    )
    diagnosis.evidence[:0] = evidence
    diagnosis.step, diagnosis.tensor = suspects.first_tensor(*looks)
    return diagnosis


def _by_hash(environ: Environ, more: _MoreRuns) -> Diagnosis | None:
    """Look whether undisturbed runs are equal once strings have the same hashes."""
    hashed = {**environ, "PYTHONHASHSEED": "0"}
    if not more.equal(*more.run({"hashed": hashed, "hashed-again": hashed})):
        return None
    observation = "with PYTHONHASHSEED=0 they are equal: the order of a set or of hash() decides"
    return Diagnosis("hash", "", [observation])
