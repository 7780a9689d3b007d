"""What differs between the looks that a probe has taken (jobkit/drill/looks.py), and what that says of a program."""

from collections.abc import Iterator
from dataclasses import dataclass

from jobkit.drill import looks
from jobkit.drill.looks import Kind, Look, Looks, Variable
from jobkit.rundir.ledger import attempt_events
from jobkit.rundir.store import Store

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
"""What a drill can tell apart; of what was not carried over the likeliest comes first."""
_REMEDIES = {
    "rng": "give it to resume() as a part: resume(..., rng=generator), or nnx.Rngs, or a key in run.state",
    "data": "give resume() an iterator that knows its position (Grain, or state_dict and load_state_dict)",
    "part": "give it to resume() as a part, and use run.state.NAME",
    "counter": "make it a part, or compute it from the step that run.steps() yields",
    "changed": "call resume() after everything that sets the parts' initial values",
    "donated": "assign what the step returns to run.state.NAME in the same step, before the boundary",
    "clock": "compute nothing that trains from the time of day: from the step, or from a seed that is a part",
    "hash": "sort what comes from a set, or set PYTHONHASHSEED",
    "file": "make what is in it a part, or compute it from the step",
    "start": "compute it from what is the same in each attempt, or make it a part",
    "unseeded": "seed it, and give it to resume() as a part",
    "nondeterministic": "look for threads, os.urandom, unordered reductions; on a GPU set "
    "XLA_FLAGS=--xla_gpu_deterministic_ops=true",
    "unknown": "give resume() everything that the next step depends on",
    "failed": "run the drill again with --keep and compare the runs: jobkit.compare",
}
_KINDS = {Kind.RNG: "rng", Kind.ITERATOR: "data", Kind.ARRAY: "part", Kind.NUMBER: "counter"}
_GLOBALS = {
    "random": "Python's global generator (random)",
    "numpy": "numpy's global generator (np.random)",
    "torch": "PyTorch's global generator (torch)",
}


@dataclass
class Diagnosis:
    """Why a run differs.

    Args:
        cause: A key of `CAUSES`.
        what: The thing itself: a variable of the program, a generator, a part; '' if it has no name.
        evidence: What was seen, a sentence each.
        remedy: What to do; the usual one for its cause by default.
        step: The first step that went another way, None if unknown.
        tensor: The first leaf of the parts that differs then, None if unknown.
        line: Where the program writes the thing, if it is a variable.
    """

    cause: str
    what: str
    evidence: list[str]
    step: int | None = None
    tensor: str | None = None
    line: int | None = None
    remedy: str = ""

    def __post_init__(self) -> None:
        self.remedy = self.remedy or _REMEDIES[self.cause]

    @property
    def name(self) -> str:
        """What a person reads: 'unsaved RNG: key in train.py:main'."""
        return CAUSES[self.cause] + (f": {self.what}" if self.what else "")

    def names(self, warning: str) -> bool:
        """Tell whether it is of the same thing as a warning."""
        return bool(self.what) and warning.startswith(self.what)


def seen(store: Store, attempt: int = 0) -> Looks:
    """Return what the probe saw in an attempt."""
    return looks.read(attempt_events(store, attempt))


def first_tensor(one: Looks, other: Looks) -> tuple[int | None, str | None]:
    """Return the first step at which a leaf of the parts differs, and the leaf."""
    for step in sorted(one.keys() & other.keys()):
        now = other[step].parts
        for name, crc in one[step].parts.items():
            if now.get(name, crc) != crc:
                return step, name
    return None, None


def _others(one: Look, two: Look) -> Iterator[tuple[str, Variable]]:
    """Yield the variables that there are in both, and are not the same."""
    for name, variable in one.outside.items():
        other = two.outside.get(name)
        if other is not None and other.crc != variable.crc:
            yield name, variable


def _moves(seen: Looks, name: str) -> bool:
    """Tell whether a global generator, or a variable, changes after the first step, in which much is set up."""
    fingerprints = [seen[step].fingerprint(name) for step in sorted(seen) if step > 0]
    return any(each is not None and each != fingerprints[0] for each in fingerprints)


def _is_input(name: str) -> bool:
    """Tell data from results: what a step makes of equal parts and equal data is equal, so a name has to decide."""
    word = name.partition(" in ")[0].lower()
    return not any(result in word for result in ("loss", "grad", "metric", "out", "logit", "state", "param"))


def _placed(name: str, variable: Variable) -> str:
    return f"{name}, line {variable.line}," if variable.line else name


# The interruption makes the difference.


@dataclass(frozen=True)
class Restart:
    """What a probe saw around the restart of a run.

    Args:
        before: In the attempt that was interrupted.
        after: In the one that went on.
        usual: In another run, which nobody interrupted: what differs there as well, a time, a name, says nothing.
    """

    before: Looks
    after: Looks
    usual: Looks

    @classmethod
    def of(cls, interrupted: Store, undisturbed: Store) -> "Restart":
        """Read it from an interrupted run and an undisturbed one."""
        return cls(seen(interrupted), seen(interrupted, 1), seen(undisturbed))

    @property
    def both(self) -> tuple[Look, Look] | None:
        """The step at which the resumed attempt begins, without the interruption and after it; None if not seen."""
        at, usual = min(self.after, default=-1), self.uninterrupted
        return (usual[at], self.after[at]) if at in usual else None

    @property
    def uninterrupted(self) -> Looks:
        """All that was seen of a training that nobody had interrupted yet."""
        return self.usual | self.before

    def varies(self, name: str) -> bool:
        """Tell whether a variable, or a global generator, differs between two runs that nobody has interrupted yet."""
        one, two = self.before, self.usual
        return any(one[step].fingerprint(name) != two[step].fingerprint(name) for step in one.keys() & two.keys())

    def moves(self, name: str) -> bool:
        """Tell whether a variable, or a global generator, changes as it trains: one run may have ended too early."""
        return _moves(self.before, name) or _moves(self.usual, name)

    def repeats(self, name: str) -> bool:
        """Tell whether a variable is the same in two runs that nobody has interrupted yet, and changes in them."""
        steps = [step for step in self.before.keys() & self.usual.keys() if step > 0]
        one, two = ([seen[step].fingerprint(name) for step in steps] for seen in (self.before, self.usual))
        return one == two and len({*one} - {None}) > 1

    def begins_anew(self, name: str) -> bool:
        """Tell whether a variable is after the restart what it was before the very first step."""
        start = self.before.get(0)
        return start is not None and self.both is not None and self.both[1].fingerprint(name) == start.fingerprint(name)

    def copies_parts(self, name: str) -> bool:
        """Tell whether the arrays of a variable are those of parts, whenever it was looked at: they are saved there."""
        variables = [look.outside.get(name) for step, look in self.before.items() if step > 0]
        return all(variable.copy for variable in variables if variable is not None)


def carried(restart: Restart) -> list[Diagnosis]:
    """Return what is carried from step to step and was not carried over the restart, the likeliest first.

    These are variables that go on changing, are no parts, and are others when a resumed run begins its first step.
    What is not there yet before that step cannot make it go another way.
    """
    if restart.both is None:
        return []
    then, now = restart.both
    start = restart.before.get(0)
    suspects = []
    for name, variable in _others(then, now):
        lasting = variable.live and (start is None or name in start.outside) and restart.moves(name)
        saved = variable.kind is Kind.ARRAY and restart.copies_parts(name)
        if lasting and not saved and not restart.varies(name):
            cause, what = _KINDS[variable.kind], _placed(name, variable)
            observation = (
                f"{what} changes from step to step and is no part; after the restart it is another one at step "
                f"{then.step}"
            )
            suspects.append(Diagnosis(cause, name, [observation], line=variable.line))
    return sorted(suspects, key=_likeliest)


def given_anew(restart: Restart) -> list[Diagnosis]:
    """Return what an iterator gives in the first resumed steps, where it is another than without the interruption.

    The parts are the same there, so it feeds nothing that trains; the iterator may be nowhere to be seen. Only what two
    undisturbed runs have the same, and another at each step, is held against a restart: no time, no count of seconds.
    """
    if restart.both is None:
        return []
    (then, now), start = restart.both, restart.before.get(0)
    steps = [step for step in (then.step + 1, then.step + 2) if step in restart.before and step in restart.after]
    pairs = [(restart.before[step], restart.after[step]) for step in steps]
    if not pairs or any(one.parts != other.parts for one, other in pairs):
        return []
    names = [name for name, variable in _others(*pairs[0]) if variable.taken and not variable.live]
    return [
        Diagnosis("data", name, [], line=pairs[0][0].outside[name].line)
        for name in names
        if name not in now.outside and (start is None or name not in start.outside)
        if all(one.fingerprint(name) != other.fingerprint(name) for one, other in pairs)
        if restart.repeats(name)
    ]


def _likeliest(suspect: Diagnosis) -> int:
    # PyTorch's loaders draw from its global generator at each epoch, whether or not they shuffle.
    return list(CAUSES).index("data" if suspect.what == _GLOBALS["torch"] else suspect.cause)


def lost(restart: Restart) -> Diagnosis | None:
    """Say what a restart has lost: by what both had when the resumed run began its first step, and after it."""
    if restart.both is None:
        return None
    then, now = restart.both
    changed = [name for name, crc in then.parts.items() if now.parts.get(name) != crc]
    if changed:
        where = f"at step {then.step}, restored and before the first step"
        return Diagnosis("changed", changed[0], [f"{where}, {len(changed)} leaves are not as they were saved"])
    # The program's own generators first: a library may draw from a global one without any effect on the training.
    likely = sorted([*carried(restart), *_globals(restart, then, now)], key=_likeliest)
    diagnosis = likely[0] if likely else None
    if diagnosis is None or diagnosis.cause == "counter":
        diagnosis = _other_batch(restart, then, now) or diagnosis
    if diagnosis is None or diagnosis.cause == "counter":
        diagnosis = in_file(restart, diagnosis) or diagnosis
    diagnosis = diagnosis or _each_attempt(restart, then, now)
    diagnosis = diagnosis or _drawn_ahead(restart, then, now)
    others = [one.what for one in likely if diagnosis is not None and one.what != diagnosis.what]
    if diagnosis is not None and others:
        diagnosis.evidence.append(f"also another after the restart: {', '.join(others[:5])}")
    return diagnosis


def _globals(restart: Restart, then: Look, now: Look) -> Iterator[Diagnosis]:
    """Yield the global generators that the training moves, and that were not carried over."""
    for name, title in _GLOBALS.items():
        moved = restart.moves(name) and then.fingerprint(name) != now.fingerprint(name)
        if moved and not restart.varies(name):
            observation = (
                f"the training moves {title}, and after the restart it is in another state at step {then.step}"
            )
            own = "torch.Generator().manual_seed(seed)" if name == "torch" else "np.random.default_rng(seed)"
            remedy = f"draw from a generator of your own and give that to resume(): {own}"
            yield Diagnosis("rng", title, [observation], remedy=remedy)


def in_file(restart: Restart, likely: Diagnosis | None = None) -> Diagnosis | None:
    """Look for a file that was written before the restart and read after it."""
    written = {name for look in restart.before.values() for name, ways in look.files.items() if "w" in ways}
    read = {name for look in restart.after.values() for name, ways in look.files.items() if "r" in ways}
    names = sorted(written & read)
    if not names:
        return None
    evidence = [f"{names[0]} is written while it trains and read after the restart; no checkpoint brings it back"]
    evidence += [f"as well: {', '.join(names[1:5])}"] if names[1:] else []
    evidence += [f"also another after the restart: {likely.what}"] if likely is not None else []
    return Diagnosis("file", names[0], evidence)


def _other_batch(restart: Restart, then: Look, now: Look) -> Diagnosis | None:
    """Look whether the first resumed step had other data: a variable that the loop sets anew at each step."""
    usual, resumed = restart.uninterrupted.get(then.step + 1), restart.after.get(then.step + 1)
    if usual is None or resumed is None or (start := restart.uninterrupted.get(0)) is None:
        return None
    for name, variable in _others(usual, resumed):
        fresh = name not in now.outside and name not in start.outside
        if variable.kind is Kind.ARRAY and fresh and _is_input(name):
            observation = f"the parts are restored to the bit, and yet the first resumed step has another {name}"
            return Diagnosis("data", name, [observation])
    return None


def _each_attempt(restart: Restart, then: Look, now: Look) -> Diagnosis | None:
    """Look for a variable that stands still, in each attempt at another value."""
    for name, variable in _others(then, now):
        if variable.live and not restart.moves(name) and not restart.varies(name):
            observation = f"{_placed(name, variable)} stands still as it trains; after the restart it is another one"
            return Diagnosis("start", name, [observation], line=variable.line)
    return None


def _drawn_ahead(restart: Restart, then: Look, now: Look) -> Diagnosis | None:
    """Look for what a thread draws from ahead of the steps: where it stands is another place in each run."""
    threads = _threads(restart.before)
    for name, variable in _others(then, now) if threads else ():
        if variable.kind in (Kind.RNG, Kind.ITERATOR) and restart.moves(name):
            observation = f"{_placed(name, variable)} is drawn from ahead of the steps, by a thread: {threads[0]}"
            return Diagnosis(_KINDS[variable.kind], name, [observation], line=variable.line)
    return None


def hidden(restart: Restart) -> Diagnosis | None:
    """Look for an iterator that hides where it stands, once nothing else differs, the time of day included."""
    then = restart.both[0].outside if restart.both is not None else {}
    for name, variable in then.items():
        if variable.live and variable.kind is Kind.ITERATOR and not restart.moves(name):
            hides = f"nothing that the drill can see differs, and {_placed(name, variable)} hides where it stands"
            return Diagnosis("data", name, [hides], line=variable.line)
    return None


def unknown(restart: Restart) -> Diagnosis:
    """Say that nothing was found, and what there is that could not be looked into."""
    threads = _threads(restart.before)
    evidence = [f"what its threads hold it cannot see: {', '.join(threads[:3])}"] if threads else []
    return Diagnosis("unknown", "", ["nothing that the drill can see differs when the run resumes", *evidence])


def _threads(seen: Looks) -> list[str]:
    return sorted({name for look in seen.values() for name in look.threads})


# No two runs are equal.


def by_chance(one: Looks, two: Looks) -> Diagnosis:
    """Name what differs first between two runs, and the program's threads."""
    inputs = (
        (step, name)
        for step in sorted(one.keys() & two.keys())
        for name, variable in _others(one[step], two[step])
        if variable.kind in (Kind.ARRAY, Kind.NUMBER) and _is_input(name)
    )
    step, what = next(inputs, (0, ""))
    evidence = [f"the first variable that differs between them, at step {step}: {what}"] if what else []
    threads = _threads(one)
    if threads:
        what = f"thread {threads[0]}"
        evidence.append(f"it has threads: {', '.join(threads[:3])}")
    return Diagnosis("nondeterministic", what, evidence)


def unseeded(one: Looks, two: Looks) -> Diagnosis | None:
    """Look for a generator that is another one from the start, and that the training moves."""
    if 0 not in one or 0 not in two:
        return None
    for name, title in _GLOBALS.items():
        if one[0].fingerprint(name) != two[0].fingerprint(name) and _moves(one, name):
            observation = f"{title} starts in another state each time, and the training moves it"
            return Diagnosis("unseeded", title, [observation])
    for name, variable in _others(one[0], two[0]):
        if variable.kind is Kind.RNG:
            return Diagnosis("unseeded", name, [f"{name} starts in another state each time"])
    for name, crc in one[0].parts.items():
        part = name.partition("/")[0]
        if part in one[0].rngs and two[0].parts.get(name) != crc:
            return Diagnosis("unseeded", part, [f"the part {name} starts in another state each time"])
    return None


def drawn(one: Looks, two: Looks) -> Diagnosis | None:
    """Look for data that is another one before the first step already: a shuffle by a generator nobody seeded."""
    if 0 not in one or 0 not in two:
        return None
    for name, variable in _others(one[0], two[0]):
        if variable.kind is Kind.ARRAY:
            evidence = [f"{name} is another one before the first step, each time"]
            evidence += [
                f"{title} is not seeded, and was drawn from before the first step"
                for each, title in _GLOBALS.items()
                if each in one[0].drawn and one[0].fingerprint(each) != two[0].fingerprint(each)
            ]
            return Diagnosis("unseeded", name, evidence, line=variable.line)
    return None
