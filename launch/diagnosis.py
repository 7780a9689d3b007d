"""Why a resumed run differs: evidence from more runs of the same program, not guesses.

Two runs that nobody interrupts tell whether the program repeats itself at all. If it does, the fingerprints that an
interrupted run and an undisturbed one leave at the same steps (jobkit/probe.py) tell what was carried over and what was
not; if it does not, runs with a wall clock that stands still and with a fixed hash seed tell what it depends on.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobkit import contract
from jobkit.contract import ENV_DRILL, ENV_FAULT
from jobkit.drilled import Drill
from jobkit.errors import DONATED
from jobkit.ledger import read_events
from jobkit.storage import Store
from launch.scenarios import Shown

_DONATED = re.compile(rf"{DONATED}|[Aa]rray has been deleted|deleted or donated")
"""What jobkit says of an array that was donated, and what JAX does, in words that depend on who touches it."""
_NOON_S = 1_700_000_000.0
_FROZEN = """\
import os
if os.environ.get("JOBKIT_SUPERVISOR"):
    from jobkit.frozen import freeze
    freeze(float(os.environ["JOBKIT_DRILL_CLOCK"]))
"""

CAUSES = {
    "rng": "unsaved RNG",
    "data": "unsaved data position",
    "part": "unsaved part",
    "counter": "step-dependent state outside the parts",
    "changed": "a part that is changed after it was restored",
    "donated": "donated buffer",
    "clock": "wall-clock dependence",
    "hash": "hash order",
    "unseeded": "unseeded RNG",
    "nondeterministic": "nondeterministic operation",
    "unknown": "unknown",
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

    @property
    def name(self) -> str:
        """What a person reads: 'unsaved RNG: key in train.py:main'."""
        return CAUSES[self.cause] + (f": {self.what}" if self.what else "")


def tell(comparison: Mapping[str, Any]) -> str:
    """Say the first difference of a comparison: the metric and its step, the tensor."""
    differences = [each for each in (comparison.get("metric"), comparison.get("leaf")) if each]
    return "; ".join(f"{each['name']} at step {each['step']}: {each['a']} / {each['b']}" for each in differences)


Compare = Callable[[str, str], Mapping[str, Any]]
Start = Callable[[str, dict[str, str]], Callable[[], Store]]
"""Start a run by name, with variables in its environment; what it returns waits for the end."""
Seen = dict[int, dict[str, Any]]
"""`probed` events by step."""


def diagnose(run: str, shown: Shown, compare: Compare, start: Start) -> Diagnosis:
    """Find out why an interrupted run differs from the reference.

    Args:
        run: The run that differs.
        shown: The reference.
        compare: Compares two runs.
        start: Starts more runs.
    """
    if (found := _donated(run, shown.run)) is not None:
        return found
    at = shown.middle
    drill = Drill(until=shown.steps, save_every=shown.save_every, probe=(0, 1, 2, at, at + 1, at + 2))
    probed = {ENV_DRILL: drill.to_json()}
    stopped = probed | {ENV_FAULT: f"step:{at}@0=TERM"}
    ask = _Ask(start, Path(shown.run).parent)
    again, interrupted = ask({"again": probed, "again-interrupted": stopped})
    if (found := _donated(again.url, interrupted.url)) is not None:
        return found
    repeated = compare(shown.run, again.url)
    if not repeated["equal"]:
        return _unrepeatable(repeated, probed, compare, ask)
    evidence = ["two runs that nobody interrupted are equal to the last bit: the interruption makes the difference"]
    undisturbed, resumed = _seen(again, 0), _seen(interrupted, 1)
    found = _lost(undisturbed, resumed, at)
    if found is None or found.cause == "counter":
        found = _clock(found, stopped, probed, compare, ask) or found
    if found is None:
        remedy = "give resume() everything that the next step depends on"
        found = Diagnosis("unknown", "", remedy, ["nothing that the drill can see differs when the run resumes"])
    found.evidence[:0] = evidence
    found.step, found.tensor = _first_tensor(undisturbed, resumed, [at, at + 1, at + 2])
    return found


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
        if told := _told_donated(store):
            seen = f"a save found an array that the program had given away (donate_argnums): {told[:200]}"
            return Diagnosis("donated", "", remedy, [seen])
    return None


def _told_donated(store: Store) -> str:
    """Return what a run's ledger or log says of an array that was donated, '' if nothing."""
    told = [str(event.get("reason") or event.get("error") or "") for event in read_events(store)]
    for attempt in store.numbers(contract.ATTEMPTS):
        log = store.file(contract.log_file(attempt))
        told += log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line for line in told if _DONATED.search(line)), "")


def _seen(store: Store, attempt: int) -> Seen:
    events = [event for event in read_events(store) if event["event"] == "probed" and event.get("attempt") == attempt]
    return {event["step"]: event for event in events}


# The interruption makes the difference.


def _lost(undisturbed: Seen, resumed: Seen, at: int) -> Diagnosis | None:
    """Compare what both had when the resumed run began its first step, and after it."""
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
    suspects = [_variable(name, undisturbed, resumed, at) for name in then["outside"]]
    suspects += [_global(name, title, undisturbed, resumed, at) for name, title in _GLOBALS]
    likely = sorted((one for one in suspects if one is not None), key=lambda one: _ORDER.index(one.cause))
    found = likely[0] if likely and likely[0].cause != "counter" else _other_batch(undisturbed, resumed, at)
    found = found or (likely[0] if likely else None)
    others = [one.what for one in likely if found is not None and one.what != found.what]
    if found is not None and others:
        found.evidence.append(f"also another after the restart: {', '.join(others[:5])}")
    return found


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
    """Tell whether a global generator, or a variable, changes from one step to the next."""

    def read(step: int) -> Any:
        return seen[step]["outside"].get(name, seen[step].get(name))

    return any(read(step) is not None and read(step) != read(step + 1) for step in seen if step + 1 in seen)


def _variable(name: str, undisturbed: Seen, resumed: Seen, at: int) -> Diagnosis | None:
    """Hold against a variable that it is carried from step to step and was not carried over the restart."""
    then, now = undisturbed[at]["outside"][name], resumed[at]["outside"].get(name)
    # What is not there yet before the first resumed step cannot make it go another way.
    if now is None or now == then or not _moves(undisturbed, name):
        return None
    if 0 in undisturbed and name not in undisturbed[0]["outside"]:
        return None
    cause = _KINDS[then[0]]
    return Diagnosis(
        cause, name, _REMEDIES[cause],
        [f"{name} changes from step to step and is no part; after the restart it is another one at step {at}"],
    )  # fmt: skip


def _other_batch(undisturbed: Seen, resumed: Seen, at: int) -> Diagnosis | None:
    """Look whether the first resumed step had other data: a variable that the loop sets anew at each step."""
    then, now = undisturbed.get(at + 1), resumed.get(at + 1)
    if then is None or now is None:
        return None
    for name, (kind, crc) in then["outside"].items():
        new = now["outside"].get(name)
        fresh = name not in resumed[at]["outside"] and name not in undisturbed.get(0, {}).get("outside", {name: 0})
        if kind == "array" and fresh and new is not None and new[1] != crc and _is_input(name, undisturbed, at):
            return Diagnosis(
                "data", name, _REMEDIES["data"],
                [f"the parts are restored to the bit, and yet the first resumed step has another {name}"],
            )  # fmt: skip
    return None


def _is_input(name: str, undisturbed: Seen, at: int) -> bool:
    """Tell data from results: what a step makes of equal parts and equal data is equal, so a name has to decide."""
    word = name.partition(" in ")[0].lower()
    return not any(result in word for result in ("loss", "grad", "metric", "out", "logit", "state", "param"))


def _first_tensor(undisturbed: Seen, resumed: Seen, steps: list[int]) -> tuple[int | None, str | None]:
    """Return the first of some steps at which a leaf differs, and the leaf."""
    for step in steps:
        then, now = undisturbed.get(step, {}).get("parts", {}), resumed.get(step, {}).get("parts", {})
        for name, crc in then.items():
            if name in now and now[name] != crc:
                return step, name
    return None, None


# The clock, the hash seed, chance.


def _clock(
    found: Diagnosis | None, interrupted: dict[str, str], undisturbed: dict[str, str], compare: Compare, ask: "_Ask"
) -> Diagnosis | None:
    """Look whether an interruption makes no difference once the wall clock stands still."""
    whole, broken = ask({"still": ask.frozen(undisturbed), "still-interrupted": ask.frozen(interrupted)})
    if not compare(whole.url, broken.url)["equal"]:
        return None
    evidence = ["with a wall clock that stands still, the interrupted run is equal to the last bit"]
    return Diagnosis("clock", found.what if found is not None else "", _CLOCK_REMEDY, evidence)


_CLOCK_REMEDY = "compute nothing that trains from the time of day: from the step, or from a seed that is a part"


def _unrepeatable(repeated: Mapping[str, Any], probed: dict[str, str], compare: Compare, ask: "_Ask") -> Diagnosis:
    """Find out why two runs that nobody interrupted differ."""
    still = ask.frozen(probed)
    later = ask.frozen(probed, at_s=_NOON_S + 100_003.5)
    one, two, other = ask({"still": still, "still-again": still, "later": later})
    evidence = [f"two runs that nobody interrupted differ: {tell(repeated)}"]
    step, tensor = _first_tensor(_seen(one, 0), _seen(two, 0), sorted(_seen(one, 0)))
    if compare(one.url, two.url)["equal"]:
        if not compare(one.url, other.url)["equal"]:
            evidence.append("with a wall clock that stands still they are equal, and with another time of day not")
            step, tensor = _first_tensor(_seen(one, 0), _seen(other, 0), sorted(_seen(one, 0)))
            return Diagnosis("clock", "", _CLOCK_REMEDY, evidence, step, tensor)
        return Diagnosis("nondeterministic", "", _CHANCE_REMEDY, [*evidence, "not every pair of runs differs"])
    evidence.append("they differ with a wall clock that stands still, too")
    found = _unseeded(_seen(one, 0), _seen(two, 0))
    if found is None:
        hashed = still | {"PYTHONHASHSEED": "0"}
        a, b = ask({"hashed": hashed, "hashed-again": hashed})
        if compare(a.url, b.url)["equal"]:
            told = "with PYTHONHASHSEED=0 they are equal: the order of a set or of hash() decides"
            found = Diagnosis("hash", "", "sort what comes from a set, or set PYTHONHASHSEED", [told])
    found = found or Diagnosis("nondeterministic", "", _CHANCE_REMEDY)
    found.evidence[:0] = evidence
    found.step, found.tensor = step, tensor
    return found


_CHANCE_REMEDY = (
    "look for threads, os.urandom, unordered reductions; on a GPU set XLA_FLAGS=--xla_gpu_deterministic_ops=true"
)


def _unseeded(one: Seen, two: Seen) -> Diagnosis | None:
    """Look for a generator that is another one from the start, and that the training moves."""
    if 0 not in one or 0 not in two:
        return None
    for name, title in _GLOBALS:
        if one[0].get(name) != two[0].get(name) and _moves(one, name):
            told = f"{title} starts in another state each time, and the training moves it"
            return Diagnosis("unseeded", title, _SEED_REMEDY, [told])
    for name, (kind, crc) in one[0]["outside"].items():
        if kind == "rng" and two[0]["outside"].get(name, ["", crc])[1] != crc:
            return Diagnosis("unseeded", name, _SEED_REMEDY, [f"{name} starts in another state each time"])
    for name, crc in one[0]["parts"].items():
        if name.partition("/")[0] in one[0].get("rngs", ()) and two[0]["parts"].get(name) != crc:
            return Diagnosis(
                "unseeded", name.partition("/")[0], _SEED_REMEDY, [f"the part {name} starts in another state each time"]
            )
    return None


_SEED_REMEDY = "seed it, and give it to resume() as a part"


class _Ask:
    """Starts runs together and waits for them.

    Args:
        start: Starts one.
        place: Where the drill lies.
    """

    def __init__(self, start: Start, place: Path) -> None:
        self._start, self._place = start, place

    def __call__(self, wanted: Mapping[str, dict[str, str]]) -> list[Store]:
        """Run programs by name, each with its environment, and return their runs in that order."""
        return [finish() for finish in [self._start(name, environ) for name, environ in wanted.items()]]

    def frozen(self, environ: dict[str, str], *, at_s: float = _NOON_S) -> dict[str, str]:
        """Return an environment in which the program's wall clock stands still."""
        directory = self._place / "clock"
        directory.mkdir(exist_ok=True)
        (directory / "sitecustomize.py").write_text(_FROZEN)
        path = [str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]
        return environ | {"JOBKIT_DRILL_CLOCK": str(at_s), "PYTHONPATH": os.pathsep.join(path)}
