"""Why a resumed run differs: evidence from more runs of the same program, not guesses.

Two runs that nobody interrupts tell whether the program repeats itself at all. If it does, the fingerprints that an
interrupted run leaves at the same step before and after its restart (jobkit/drill/fingerprints.py) tell what was
carried over and what was not; if it does not, runs with a wall clock that stands still and with a fixed hash seed tell
what it depends on.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobkit import contract
from jobkit.contract import ENV_DRILL, ENV_FAULT, Outcome
from jobkit.drill.settings import Drill
from jobkit.errors import DONATED
from jobkit.rundir.ledger import read_events
from jobkit.rundir.store import Store
from launch.drill.asking import NOON_S, Ask, AskedError, Start, must_end
from launch.drill.scenarios import Shown
from launch.lifecycle import orphans

_DONATED = re.compile(rf"{DONATED}|[Aa]rray has been deleted|deleted or donated")
"""What jobkit says of an array that was donated, and what JAX does, in words that depend on who touches it."""
CAUSES = {
    "rng": "unsaved RNG",
    "data": "unsaved data position",
    "part": "unsaved part",
    "counter": "step-dependent state outside the parts",
    "changed": "a part that is changed after it was restored",
    "donated": "donated buffer",
    "clock": "wall-clock dependence",
    "hash": "hash order",
    "file": "state in a file",
    "start": "a value that is another one in each attempt",
    "unseeded": "unseeded RNG",
    "nondeterministic": "nondeterministic operation",
    "unknown": "unknown",
    "failed": "the diagnosis failed",
}
"""What a drill can tell apart."""


@dataclass
class Diagnosis:
    """Why a run differs.

    Args:
        cause: A key of `CAUSES`.
        what: The thing itself: a variable of the program, a generator, a part; '' if it has no name.
        remedy: What to do.
        evidence: What was seen, a sentence each.
        step: The first step that went another way, None if unknown.
        tensor: The first leaf of the parts that differs then, None if unknown.
    """

    cause: str
    what: str
    remedy: str
    evidence: list[str] = field(default_factory=list)
    step: int | None = None
    tensor: str | None = None
    line: int | None = None
    """Where the program writes the thing, if it is a variable."""

    @property
    def name(self) -> str:
        """What a person reads: 'unsaved RNG: key in train.py:main'."""
        return CAUSES[self.cause] + (f": {self.what}" if self.what else "")

    def names(self, warning: str) -> bool:
        """Tell whether it is of the same thing as a warning."""
        return bool(self.what) and warning.startswith(self.what)


def tell(comparison: Mapping[str, Any]) -> str:
    """Say the first difference of a comparison: of the state if there is one, else of a metric."""
    each = comparison.get("leaf") or comparison.get("metric")
    return f"{each['name']} at step {each['step']}: {each['a']} / {each['b']}" if each else ""


def same(comparison: Mapping[str, Any], aside: Collection[str] = ()) -> bool:
    """Tell whether two runs have the same state, and the same metrics but for some."""
    return bool(comparison["equal"]) or (comparison["leaf"] is None and {*comparison["metrics"]} <= {*aside})


def varying(comparison: Mapping[str, Any]) -> frozenset[str]:
    """Return the metrics that differ between two undisturbed runs of equal state: times, memory, the host's name."""
    return frozenset(comparison["metrics"]) if comparison["leaf"] is None else frozenset()


Compare = Callable[[str, str], Mapping[str, Any]]
Seen = dict[int, dict[str, Any]]
"""`probed` events by step."""


FIRST = (0, 1, 2, 5, 10, 20)
"""Where a drill looks into the reference and into one interrupted run, besides where that is interrupted."""


def diagnose(run: str, shown: Shown, compare: Compare, start: Start) -> Diagnosis:
    """Find out why an interrupted run differs from the reference.

    Args:
        run: The run that differs.
        shown: The reference.
        compare: Compares two runs.
        start: Starts more runs.

    Raises:
        JobkitError: If it cannot: a run that was to tell something came to nothing.
    """
    if (diagnosis := _donated(run, shown.run)) is not None:
        return diagnosis
    at = shown.middle
    probed = {ENV_DRILL: Drill(shown.until, shown.save_every, probe=(*FIRST, at, at + 1, at + 2)).to_json()}
    paced = {ENV_DRILL: Drill(shown.until, shown.save_every, shown.pace_s, (*FIRST, at, at + 1, at + 2)).to_json()}
    ways = {
        "notice": probed | {ENV_FAULT: notice(shown)},
        "kill": paced | {ENV_FAULT: f"{_point(shown)}@0"},
    }
    if (orphans.read_outcome(Store(run), 0) or {}).get("outcome") == Outcome.KILLED:
        ways = dict(reversed(ways.items()))
    ask = Ask(start, Path(shown.run).parent)
    (way, stopped), other = ways.items()
    again, interrupted = ask({"again": probed, f"again-{way}": stopped}, whole=("again",))
    if (diagnosis := _donated(again.url, interrupted.url)) is not None:
        return diagnosis
    repeated = compare(shown.run, again.url)
    aside = varying(repeated)

    def compare_rest(one: str, other: str) -> Mapping[str, Any]:
        comparison = compare(one, other)
        return {**comparison, "equal": same(comparison, aside)}

    if not same(repeated, aside):
        return _unrepeatable(repeated, again, probed, compare_rest, ask)
    must_end(interrupted)
    evidence = ["two runs that nobody interrupted are equal to the last bit: the interruption makes the difference"]
    if compare_rest(again.url, interrupted.url)["equal"]:
        observation = {"notice": "on a notice nothing is lost", "kill": "after that kill nothing was lost"}[way]
        way, stopped = other
        (interrupted,) = ask({f"again-{way}": stopped})
        if compare_rest(again.url, interrupted.url)["equal"]:
            return Diagnosis("unknown", "", _ALL, [*evidence, "interrupted for the diagnosis, it was the same"])
        evidence.append(f"{observation}: only a {way} makes it")
    undisturbed, resumed = seen(interrupted, 0), seen(interrupted, 1)
    usual = seen(again, 0)
    diagnosis = _lost(undisturbed, resumed, usual)
    if diagnosis is None or diagnosis.cause in ("counter", "start"):
        try:
            diagnosis = _clock(diagnosis, stopped, probed, compare_rest, ask) or diagnosis
        except AskedError as error:
            evidence.append(f"whether it depends on the time of day is not known: {error}")
    if diagnosis is None:
        diagnosis = Diagnosis("unknown", "", _ALL, ["nothing that the drill can see differs when the run resumes"])
    diagnosis.evidence[:0] = evidence
    diagnosis.step, diagnosis.tensor = _first_tensor({**usual, **undisturbed}, resumed)
    return diagnosis


def notice(shown: Shown) -> str:
    """Return the fault that has a program preempted in its middle."""
    return f"{_point(shown)}@0=TERM"


def _point(shown: Shown) -> str:
    """Name a point some steps after a save, so that a kill there costs some; after a save where steps are not ours."""
    return f"step:{shown.middle}" if shown.total is not None else f"after_rename:{shown.hit_save}"


_ALL = "give resume() everything that the next step depends on"


def failed(why: str) -> Diagnosis:
    """Say that the reason was not found, since the diagnosis came to nothing; the verdict stands."""
    return Diagnosis("failed", "", "run the drill again with --keep and compare the runs: jobkit.compare", [why])


def given_away(store: Store) -> dict[str, Any]:
    """Return the first boundary at which a run had donated what it holds, as the program looked for it; {} if none."""
    return next((event for event in read_events(store) if event["event"] == "donated"), {})


def _donated(*runs: str) -> Diagnosis | None:
    """Look in runs for a state that was given away: at any boundary, or where somebody stumbled over it."""
    remedy = "assign what the step returns to run.state.NAME in the same step, before the boundary"
    for store in map(Store, runs):
        if event := given_away(store):
            seen = f"after step {event['step']} the run holds arrays that the program has given away (donate_argnums)"
            return Diagnosis("donated", "", remedy, [seen], event["step"], event["leaves"][0])
    for store in map(Store, runs):
        if line := _told_donated(store):
            seen = f"a save found an array that the program had given away (donate_argnums): {line[:200]}"
            return Diagnosis("donated", "", remedy, [seen])
    return None


def _told_donated(store: Store) -> str:
    """Return what a run's ledger or log says of an array that was donated, '' if nothing."""
    lines = [str(event.get("reason") or event.get("error") or "") for event in read_events(store)]
    for attempt in store.numbers(contract.ATTEMPTS):
        log = store.file(contract.log_file(attempt))
        lines += store.read(contract.log_file(attempt)).decode(errors="replace").splitlines() if log.exists() else []
    return next((line for line in lines if _DONATED.search(line)), "")


def seen(store: Store, attempt: int) -> Seen:
    """Return what the probe saw in an attempt."""
    events = [event for event in read_events(store) if event["event"] == "probed" and event.get("attempt") == attempt]
    return {event["step"]: event for event in events}


# The interruption makes the difference.


def carried(undisturbed: Seen, resumed: Seen, usual: Seen) -> list[Diagnosis]:
    """Return the variables that go on changing, are no parts, and are others when a resumed run begins its first step.

    Args:
        undisturbed: What was seen before the interruption, at that step too.
        resumed: What was seen after it.
        usual: What was seen in another run, which nobody interrupted: what differs there as well (a time, a name) is
            none of them.
    """
    at = min(resumed, default=-1)
    if at not in undisturbed:
        return []
    names = undisturbed[at]["outside"]
    suspects = (_variable(name, undisturbed, resumed, at) for name in names if not _varies(name, undisturbed, usual))
    return sorted((one for one in suspects if one is not None), key=lambda one: _ORDER.index(one.cause))


def warnings(interrupted: Store, reference: Store) -> list[str]:
    """Say, of one run that was interrupted and probed, which variables its restart has not brought back."""
    undisturbed, resumed = seen(interrupted, 0), seen(interrupted, 1)
    if min(resumed, default=-1) not in undisturbed:
        return ["which variables a restart does not bring back could not be seen"]
    return [
        f"{one.what}{f', line {one.line}' if one.line else ''}: changes from step to step, is no part, and is another "
        f"after the restart"
        for one in carried(undisturbed, resumed, seen(reference, 0))
    ]


def of_files(names: Collection[str], interrupted: Store, reference: Store) -> Diagnosis:
    """Say why the files of a run differ whose state is the same: a variable that its restart has not brought back.

    Args:
        names: The files.
        interrupted: A run that was interrupted and probed.
        reference: The reference.
    """
    undisturbed, resumed = seen(interrupted, 0), seen(interrupted, 1)
    evidence = [f"the state is the same to the last bit, and {', '.join(sorted(names)[:5])} is another"]
    likely = carried(undisturbed, resumed, seen(reference, 0))
    diagnosis = likely[0] if likely else _in_file(undisturbed, resumed, None)
    diagnosis = diagnosis or Diagnosis("file", min(names), "write it from what resume() is given alone")
    diagnosis.evidence[:0] = evidence
    if likely[1:]:
        diagnosis.evidence.append(f"also another after the restart: {', '.join(one.what for one in likely[1:6])}")
    return diagnosis


def _varies(name: str, one: Seen, two: Seen) -> bool:
    """Tell whether a variable, or a global generator, differs between two runs that nobody has interrupted yet."""
    return any(_value(one[step], name) != _value(two[step], name) for step in one.keys() & two.keys())


def _value(look: dict[str, Any], name: str) -> Any:
    """Return the fingerprint of a variable, or of a global generator, None if there is none."""
    variable = look["outside"].get(name)
    return variable[1] if variable is not None else look.get(name)


def _lost(undisturbed: Seen, resumed: Seen, usual: Seen) -> Diagnosis | None:
    """Compare what both had when the resumed run began its first step, and after it."""
    at = min(resumed, default=-1)
    then, now = undisturbed.get(at), resumed.get(at)
    if then is None or now is None:
        return None
    wrong = [name for name, crc in then["parts"].items() if now["parts"].get(name) != crc]
    if wrong:
        return Diagnosis(
            "changed", wrong[0], "call resume() after everything that sets the parts' initial values",
            [f"at step {at}, restored and before the first step, {len(wrong)} leaves are not as they were saved"],
        )  # fmt: skip
    # The program's own generators first: a library may draw from a global one without any effect on the training.
    likely = carried(undisturbed, resumed, usual)
    moved = (
        _global(name, title, undisturbed, resumed, at)
        for name, title in _GLOBALS
        if not _varies(name, undisturbed, usual)
    )
    likely = sorted([*likely, *(one for one in moved if one)], key=lambda one: _ORDER.index(one.cause))
    diagnosis = (
        likely[0] if likely and likely[0].cause != "counter" else _other_batch({**usual, **undisturbed}, resumed, at)
    )
    diagnosis = diagnosis or (likely[0] if likely else None)
    if diagnosis is None or diagnosis.cause == "counter":
        diagnosis = _in_file(undisturbed, resumed, diagnosis) or diagnosis
    if diagnosis is None:
        diagnosis = _each_attempt(undisturbed, resumed, usual, at)
    others = [one.what for one in likely if diagnosis is not None and one.what != diagnosis.what]
    if diagnosis is not None and others:
        diagnosis.evidence.append(f"also another after the restart: {', '.join(others[:5])}")
    return diagnosis


_ORDER = ("rng", "data", "part", "counter")
_GLOBALS = (("random", "Python's global generator (random)"), ("numpy", "numpy's global generator (np.random)"))
_KINDS = {"rng": "rng", "iterator": "data", "array": "part", "number": "counter"}
_REMEDIES = {
    "rng": "give it to resume() as a part: resume(..., rng=generator), or nnx.Rngs, or a key in run.state",
    "data": "give resume() an iterator that knows its position (Grain, or state_dict and load_state_dict)",
    "part": "give it to resume() as a part, and use run.state.NAME",
    "counter": "make it a part, or compute it from the step that run.steps() yields",
}


def _global(name: str, title: str, undisturbed: Seen, resumed: Seen, at: int) -> Diagnosis | None:
    if not _moves(undisturbed, name) or undisturbed[at].get(name) == resumed[at].get(name):
        return None
    return Diagnosis(
        "rng", title, "draw from a generator of your own and give that to resume(): np.random.default_rng(seed)",
        [f"the training moves {title}, and after the restart it is in another state at step {at}"],
    )  # fmt: skip


def _moves(seen: Seen, name: str) -> bool:
    """Tell whether a global generator, or a variable, changes after the first step, in which much is set up."""
    looks = [_value(seen[step], name) for step in sorted(seen) if step > 0]
    return any(look is not None and look != looks[0] for look in looks)


def _variable(name: str, undisturbed: Seen, resumed: Seen, at: int) -> Diagnosis | None:
    """Hold against a variable that it is carried from step to step and was not carried over the restart."""
    then, now = undisturbed[at]["outside"][name], resumed[at]["outside"].get(name)
    # What is not there yet before the first resumed step cannot make it go another way.
    if now is None or now[1] == then[1] or not _moves(undisturbed, name) or not _live(then):
        return None
    if 0 in undisturbed and name not in undisturbed[0]["outside"]:
        return None
    if then[0] == "array" and _copies_parts(name, undisturbed):
        return None
    cause, (line, place) = _KINDS[then[0]], _line(then)
    return Diagnosis(
        cause, name, _REMEDIES[cause],
        [f"{name}{place} changes from step to step and is no part; after the restart it is another one at step {at}"],
        line=line,
    )  # fmt: skip


def _live(told: list[Any]) -> bool:
    """Tell whether a variable is read again before it is written, as the probe saw."""
    return bool(told[3])


def _line(told: list[Any]) -> tuple[int | None, str]:
    """Return the line that writes a variable, and how to say it."""
    line = told[2]
    return line, f", line {line}," if line else ""


def _copies_parts(name: str, seen: Seen) -> bool:
    """Tell whether the arrays of a variable are those of parts, whenever it was looked at: they are saved there."""
    looks = [look["outside"][name] for step, look in seen.items() if step > 0 and name in look["outside"]]
    return all(variable[4] for variable in looks)


def _in_file(undisturbed: Seen, resumed: Seen, found: Diagnosis | None) -> Diagnosis | None:
    """Look for a file that was written before the restart and read after it."""
    written = {name for look in undisturbed.values() for name, ways in look.get("files", {}).items() if "w" in ways}
    read = {name for look in resumed.values() for name, ways in look.get("files", {}).items() if "r" in ways}
    names = sorted(written & read)
    if not names:
        return None
    evidence = [f"{names[0]} is written while it trains and read after the restart; no checkpoint brings it back"]
    evidence += [f"as well: {', '.join(names[1:5])}"] if names[1:] else []
    evidence += [f"also another after the restart: {found.what}"] if found is not None else []
    return Diagnosis("file", names[0], "make what is in it a part, or compute it from the step", evidence)


def _each_attempt(undisturbed: Seen, resumed: Seen, usual: Seen, at: int) -> Diagnosis | None:
    """Look for a variable that stands still, in each attempt at another value."""
    for name, then in undisturbed[at]["outside"].items():
        now = resumed[at]["outside"].get(name)
        other = now is not None and now[1] != then[1] and _live(then)
        if other and not _moves(undisturbed, name) and not _varies(name, undisturbed, usual):
            line, place = _line(then)
            observation = f"{name}{place} stands still as it trains; after the restart it is another one"
            remedy = "compute it from what is the same in each attempt, or make it a part"
            return Diagnosis("start", name, remedy, [observation], line=line)
    return None


def _other_batch(undisturbed: Seen, resumed: Seen, at: int) -> Diagnosis | None:
    """Look whether the first resumed step had other data: a variable that the loop sets anew at each step."""
    then, now = undisturbed.get(at + 1), resumed.get(at + 1)
    if then is None or now is None:
        return None
    for name, (kind, crc, *_) in then["outside"].items():
        new = now["outside"].get(name)
        fresh = name not in resumed[at]["outside"] and name not in undisturbed.get(0, {}).get("outside", {name: 0})
        if kind == "array" and fresh and new is not None and new[1] != crc and _is_input(name):
            return Diagnosis(
                "data", name, _REMEDIES["data"],
                [f"the parts are restored to the bit, and yet the first resumed step has another {name}"],
            )  # fmt: skip
    return None


def _is_input(name: str) -> bool:
    """Tell data from results: what a step makes of equal parts and equal data is equal, so a name has to decide."""
    word = name.partition(" in ")[0].lower()
    return not any(result in word for result in ("loss", "grad", "metric", "out", "logit", "state", "param"))


def _first_tensor(undisturbed: Seen, resumed: Seen) -> tuple[int | None, str | None]:
    """Return the first step at which a leaf differs, and the leaf."""
    for step in sorted(undisturbed.keys() & resumed.keys()):
        then, now = undisturbed.get(step, {}).get("parts", {}), resumed.get(step, {}).get("parts", {})
        for name, crc in then.items():
            if name in now and now[name] != crc:
                return step, name
    return None, None


# The clock, the hash seed, chance.


def _clock(
    found: Diagnosis | None, interrupted: dict[str, str], undisturbed: dict[str, str], compare: Compare, ask: Ask
) -> Diagnosis | None:
    """Look whether an interruption makes no difference once the wall clock stands still."""
    whole, broken = ask({"still": ask.frozen(undisturbed), "still-interrupted": ask.frozen(interrupted)})
    if not compare(whole.url, broken.url)["equal"]:
        return None
    evidence = ["with a wall clock that stands still, the interrupted run is equal to the last bit"]
    return Diagnosis("clock", found.what if found is not None else "", _CLOCK_REMEDY, evidence)


_CLOCK_REMEDY = "compute nothing that trains from the time of day: from the step, or from a seed that is a part"


def _unrepeatable(
    repeated: Mapping[str, Any], again: Store, probed: dict[str, str], compare: Compare, ask: Ask
) -> Diagnosis:
    """Find out why two runs that nobody interrupted differ."""
    still = ask.frozen(probed)
    later = ask.frozen(probed, at_s=NOON_S + 100_003.5)
    evidence = [f"two runs that nobody interrupted differ: {tell(repeated)}"]
    try:
        one, two, other = ask({"still": still, "still-again": still, "later": later})
    except AskedError as error:
        evidence.append(f"whether it depends on the time of day is not known: {error}")
        still = probed
        one, (two,) = again, ask({"again-2": probed})
    else:
        if compare(one.url, two.url)["equal"]:
            if not compare(one.url, other.url)["equal"]:
                evidence.append("with a wall clock that stands still they are equal, and with another time of day not")
                step, tensor = _first_tensor(seen(one, 0), seen(other, 0))
                return Diagnosis("clock", "", _CLOCK_REMEDY, evidence, step, tensor)
            return Diagnosis("nondeterministic", "", _CHANCE_REMEDY, [*evidence, "not every pair of runs differs"])
        evidence.append("they differ with a wall clock that stands still, too")
    step, tensor = _first_tensor(seen(one, 0), seen(two, 0))
    diagnosis = _unseeded(seen(one, 0), seen(two, 0)) or _by_hash(still, compare, ask)
    diagnosis = diagnosis or _drawn(seen(one, 0), seen(two, 0)) or _by_chance(seen(one, 0), seen(two, 0))
    diagnosis.evidence[:0] = evidence
    diagnosis.step, diagnosis.tensor = step, tensor
    return diagnosis


def _by_hash(environ: dict[str, str], compare: Compare, ask: Ask) -> Diagnosis | None:
    """Look whether undisturbed runs are equal once strings have the same hashes."""
    hashed = environ | {"PYTHONHASHSEED": "0"}
    a, b = ask({"hashed": hashed, "hashed-again": hashed})
    if not compare(a.url, b.url)["equal"]:
        return None
    observation = "with PYTHONHASHSEED=0 they are equal: the order of a set or of hash() decides"
    return Diagnosis("hash", "", "sort what comes from a set, or set PYTHONHASHSEED", [observation])


def _drawn(one: Seen, two: Seen) -> Diagnosis | None:
    """Look for data that is another one before the first step already: a shuffle by a generator nobody seeded."""
    if 0 not in one or 0 not in two:
        return None
    for name, (kind, crc, line, *_) in one[0]["outside"].items():
        if kind == "array" and two[0]["outside"].get(name, ["", crc])[1] != crc:
            other = {each for each, _ in _GLOBALS if one[0].get(each) != two[0].get(each)}
            drawn = [title for each, title in _GLOBALS if each in other & {*one[0].get("drawn", ())}]
            evidence = [f"{name} is another one before the first step, each time"]
            evidence += [f"{title} is not seeded, and was drawn from before the first step" for title in drawn]
            return Diagnosis("unseeded", name, _SEED_REMEDY, evidence, line=line)
    return None


def _by_chance(one: Seen, two: Seen) -> Diagnosis:
    """Name what differs first between two runs, and the program's threads."""
    what, evidence = _first_others(one, two)
    threads = sorted({name for look in one.values() for name in look.get("threads", ())})
    if threads:
        evidence.append(f"it has threads: {', '.join(threads[:3])}")
    return Diagnosis("nondeterministic", f"thread {threads[0]}" if threads else what, _CHANCE_REMEDY, evidence)


def _first_others(one: Seen, two: Seen) -> tuple[str, list[str]]:
    """Return the variable that differs first between two runs, and say it."""
    for step in sorted(one.keys() & two.keys()):
        then, now = one[step]["outside"], two[step]["outside"]
        for name, (kind, crc, *_) in then.items():
            if kind in ("array", "number") and _is_input(name) and now.get(name, ["", crc])[1] != crc:
                return name, [f"the first variable that differs between them, at step {step}: {name}"]
    return "", []


_CHANCE_REMEDY = (
    "look for threads, os.urandom, unordered reductions; on a GPU set XLA_FLAGS=--xla_gpu_deterministic_ops=true"
)


def _unseeded(one: Seen, two: Seen) -> Diagnosis | None:
    """Look for a generator that is another one from the start, and that the training moves."""
    if 0 not in one or 0 not in two:
        return None
    for name, title in _GLOBALS:
        if one[0].get(name) != two[0].get(name) and _moves(one, name):
            observation = f"{title} starts in another state each time, and the training moves it"
            return Diagnosis("unseeded", title, _SEED_REMEDY, [observation])
    for name, (kind, crc, *_) in one[0]["outside"].items():
        if kind == "rng" and two[0]["outside"].get(name, ["", crc])[1] != crc:
            return Diagnosis("unseeded", name, _SEED_REMEDY, [f"{name} starts in another state each time"])
    for name, crc in one[0]["parts"].items():
        if name.partition("/")[0] in one[0].get("rngs", ()) and two[0]["parts"].get(name) != crc:
            return Diagnosis(
                "unseeded", name.partition("/")[0], _SEED_REMEDY, [f"the part {name} starts in another state each time"]
            )
    return None


_SEED_REMEDY = "seed it, and give it to resume() as a part"
