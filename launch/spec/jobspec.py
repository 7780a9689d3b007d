"""What is submitted: the job's specification, its durable form in run.json."""

import contextlib
import hashlib
import itertools
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

import jobkit
from jobkit import contract, names, versions
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir.store import Store
from jobkit.units import duration_s, show_duration
from launch.spec import container, sweep
from launch.spec.cloud_options import Cloud
from launch.spec.container import Container

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One training to run.

    Args:
        command: The program and its arguments, run as it stands (no shell).
        run: URL of the run directory; empty for runs/<name>-<time> below the current directory.
        name: What a person calls it; empty for the name of the run directory or of the script.
        cwd: Directory that the command is run in; empty for the current one.
        snapshot: Run a copy of the code as it is now, whatever happens to the working tree later.
        shared: Make the run directory for others to look into, as the umask has it; by default it is its owner's alone
            (see `Store.make`). A bucket has permissions of its own.
        grace_s: Seconds between asking an attempt to stop and killing it.
        max_failures: Failures of the program after which the run may still be restarted.
        stall_s: Seconds that a step may take before the program counts as stalled and is started again; 0: it never
            does; None: what this run was seen to do, generously.
        sbatch: For the SLURM backend: long options of sbatch and their values, empty for a switch. The local one knows
            `ntasks-per-node` alone, gcp `nodes` alone.
        container: What the processes of the run are in, on this machine or on SLURM; None for neither.
        notify: Who is told what becomes of the run, as env:NAME or file:PATH (see targets.py).
        sweep: Names in the command, written {name}, and their values: one run per combination; empty for a single run.
        parallel: At most so many points of a sweep at once; None for what the backend has room for, locally 1.
        values: Set for a point of a sweep: what each name is there.
        sweep_url: Set for a point of a sweep: URL of the sweep, where the snapshot is.
        cloud: For the backends of managed services.
        after: URL of the run that has to finish well before the first attempt begins; empty for none. Submit puts the
            whole URL in.
        setup: Lines of bash that run before ours in each job, verbatim: `module load`, `conda activate`. They are never
            written to run.json and never read from there: whoever may write to a run directory gives no job a line.
        setup_digest: Their digest, by which a resume knows that there were any; '' for none.
        price_per_hour: What an hour of the run's machines costs, in any currency; for the ledger's money.
        max_time_s: Seconds in attempts, all together, after which the run commits and stops for good; None: no limit.
        max_cost: The same in money, by `price_per_hour`.
        root: Set by submit: top of the tree that the snapshot was taken of.
        code: Set by submit: digest of the snapshot, None without one.
        links: Set by submit: paths below root that are no part of the snapshot but are linked into it (data).
        imports: Set by submit: directories below root that Python imports from.
    """

    command: tuple[str, ...]
    run: str = ""
    name: str = ""
    cwd: str = ""
    snapshot: bool = True
    shared: bool = False
    grace_s: float = 30.0
    max_failures: int = 10
    stall_s: float | None = None
    sbatch: dict[str, str] = {}
    container: Container | None = None
    notify: tuple[str, ...] = ()
    sweep: dict[str, tuple[str, ...]] = {}
    parallel: int | None = None
    values: dict[str, str] = {}
    sweep_url: str = ""
    cloud: Cloud | None = None
    after: str = ""
    price_per_hour: float | None = None
    max_time_s: float | None = None
    max_cost: float | None = None
    setup: tuple[str, ...] = ()
    setup_digest: str = ""
    root: str = ""
    code: str | None = None
    links: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()

    @property
    def tasks_per_node(self) -> int:
        """Processes of an attempt on each node."""
        return int(self.sbatch.get("ntasks-per-node") or 1)

    def used_up(self, spent_s: float) -> str:
        """Return which limit of the run is used up, as a clause; '' while none is.

        Args:
            spent_s: Seconds in attempts, all together.
        """
        if self.max_time_s is not None and spent_s >= self.max_time_s:
            return f"its {show_duration(self.max_time_s)} (--max-time) are used up"
        if self.max_cost is not None and (self.price_per_hour or 0.0) * spent_s / 3600 >= self.max_cost:
            return f"its {self.max_cost:g} of money (--max-cost) are used up"
        return ""

    def point(self, number: int) -> "JobSpec":
        """Return the specification of one point of a sweep.

        Args:
            number: The point's number, from 0 on.
        """
        values = sweep.values(self.sweep, number)
        return msgspec.structs.replace(
            self,
            command=sweep.fill(self.command, values),
            run=f"{self.run}/{contract.POINTS}/{number}",
            name=f"{self.name}-{number}"[-100:].lstrip("._-"),
            sweep={},
            parallel=None,
            values=values,
            sweep_url=self.run,
        )

    def same_job(self, other: "JobSpec") -> bool:
        """Return whether both run the same command on the same code.

        Args:
            other: What to compare with.
        """
        return (self.command, self.sweep, self.code) == (other.command, other.sweep, other.code)


def fresh_place(name: str) -> str:
    """Return a directory below runs/ that is not there yet."""
    stem = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    places = itertools.chain([stem], (f"{stem}-{count}" for count in itertools.count(2)))
    return next(place for place in places if not os.path.lexists(place))


def script_name(spec: JobSpec) -> str:
    """Return what a run without a name is called: its script or program."""
    words = [word for word in spec.command if not word.startswith("-")]
    name = Path(words[1] if len(words) > 1 else words[0]).stem.rpartition(".")[2]
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name).strip("-._") or "run"


class RunFile(msgspec.Struct, frozen=True, kw_only=True):
    """run.json as a whole: what was submitted, to which backend, and when. It names no variable's value."""

    version: int
    jobkit: str
    python: str = ""
    backend: str
    created: float
    spec: JobSpec


def check(spec: JobSpec) -> None:
    """Refuse values that cannot work.

    Raises:
        ConfigError: With the value and the remedy.
    """
    if not spec.command or not spec.command[0].strip():
        raise ConfigError("no command to run; write it after '--': jobkit submit -- python train.py")
    for name, value in _lines_of(spec):
        check_line(name, value)
    if spec.name and not _NAME.fullmatch(spec.name):
        raise ConfigError(f"the name {spec.name!r} is not usable; use letters, digits, '.', '_' and '-' (at most 100)")
    if spec.max_failures < 0:
        raise ConfigError(f"max-failures is {spec.max_failures}; give 0 or more")
    if spec.container is not None:
        container.check(spec.container)
    tasks = spec.sbatch.get("ntasks-per-node", "1")
    if not re.fullmatch("[1-9][0-9]{0,4}", tasks):
        raise ConfigError(f"ntasks-per-node is {tasks!r}; give a number of processes, 1 or more")
    duration_s(spec.grace_s)
    if spec.stall_s is not None:
        duration_s(spec.stall_s)
    if spec.parallel is not None and (spec.parallel < 1 or not spec.sweep):
        raise ConfigError(f"array-parallelism is {spec.parallel}; give a number of points, 1 or more, of a --sweep")
    if spec.sweep:
        sweep.check(spec.command, spec.sweep)
    else:
        sweep.refuse_names(spec.command)
    if spec.price_per_hour is not None and not 0 <= spec.price_per_hour < float("inf"):
        raise ConfigError(f"price-per-hour is {spec.price_per_hour}; give 0 or more")
    for name, limit in (("max-time", spec.max_time_s), ("max-cost", spec.max_cost)):
        if limit is not None and not 0 < limit < float("inf"):
            raise ConfigError(f"{name} is {limit:g}; give more than 0")
    if spec.max_cost is not None and spec.price_per_hour is None:
        raise ConfigError("--max-cost needs to know what an hour costs, if only 0: give --price-per-hour too")


def check_line(name: str, value: str) -> None:
    """Refuse a value that would not stay one line where it is written: in a job script, a request, a table.

    Args:
        name: What it is of.
        value: The value.

    Raises:
        ConfigError: If it has a character that does not print.
    """
    if not value.isprintable():
        raise ConfigError(f"{name} is {value!a}: no line break or other character that does not print may be in it")


_FREE = frozenset(
    {"command", "sweep", "values", "run", "after", "sweep_url", "cwd", "root", "code", "links", "imports"}
)
"""Fields that may hold any letter: words of a command, which are quoted, and places, which have checks of their own."""


def _lines_of(spec: JobSpec) -> Iterator[tuple[str, str]]:
    """Yield what is written into job scripts and requests by other names than ours; of variables the names alone."""

    def texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, str):
            yield name, value
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                yield f"a name in {name}", key
                if name != "env":
                    yield from texts(key, inner)
        elif isinstance(value, Sequence):
            for inner in value:
                yield from texts(name, inner)

    for field, value in msgspec.to_builtins(spec).items():
        if field not in _FREE:
            yield from texts(field, value)


def encode(spec: JobSpec, backend: str, created: float | None = None) -> bytes:
    """Return run.json's content: all but the lines of `setup`."""
    digest = setup_digest(spec.setup) if spec.setup else spec.setup_digest
    spec = msgspec.structs.replace(spec, setup=(), setup_digest=digest)
    created = time.time() if created is None else created
    file = RunFile(
        version=contract.RUN_VERSION,
        jobkit=jobkit.__version__,
        python=platform.python_version(),
        backend=backend,
        created=created,
        spec=spec,
    )
    return msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n"


def setup_digest(lines: Sequence[str]) -> str:
    """Return the digest of lines of `--setup`, as run.json has it."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def create(store: Store, spec: JobSpec, backend: str) -> bool:
    """Write run.json if there is none; tell whether this call made it.

    Durability: on storage on return; this is the instant at which a run exists.
    """
    return store.create(contract.RUN_JSON, encode(spec, backend))


def rewrite(store: Store, spec: JobSpec, backend: str, created: float) -> None:
    """Replace run.json, of a run that has moved.

    Durability: on storage on return, on the run's URL first.
    """
    content = encode(spec, backend, created)
    if store.remote is not None:
        store.remote.write(contract.RUN_JSON, content)
    store.write(contract.RUN_JSON, content)


def exists(store: Store) -> bool:
    """Tell whether the directory is a run that was submitted."""
    return store.exists(contract.RUN_JSON)


def begun_by_hand(store: Store) -> bool:
    """Tell whether the directory is a run that a program of its own began, without a submit."""
    place = sweep_of(store)
    return store.exists(contract.STRATEGY) and not exists(store) and (place is None or not exists(place[0]))


def read(store: Store) -> JobSpec:
    """Read what was submitted; see `read_file`."""
    return read_file(store).spec


def check_format(store: Store) -> None:
    """Refuse a run that a newer jobkit submitted; one that is damaged or was started by hand is not refused.

    Raises:
        ConfigError: With both versions.
    """
    with contextlib.suppress(FileNotFoundError, ValueError):
        versions.check_run(store.read(contract.RUN_JSON), store.file(contract.RUN_JSON))


def sweep_of(store: Store) -> tuple[Store, int] | None:
    """Return the sweep on a disk that a run is a point of, and which one; None if it is of none."""
    return _place(store) if store.remote is None else None


def _place(store: Store) -> tuple[Store, int] | None:
    """Return the sweep that a run is a point of, and which one, by the run's place alone; None if it is of none."""
    above, _, number = store.url.rpartition(f"/{contract.POINTS}/")
    point = names.number(number)
    return (store.at(above), point) if above and point is not None else None


def code_store(store: Store, spec: JobSpec) -> Store:
    """Return the run directory that has the snapshot: of a point its sweep's, where it lies now."""
    place = sweep_of(store) if spec.sweep_url else None
    return store if place is None else place[0]


def points(store: Store, spec: JobSpec) -> list[Store]:
    """Return the runs that a sweep consists of, in order; of a single run that run."""
    if not spec.sweep:
        return [store]
    return [store.at(f"{store.url}/{contract.POINTS}/{number}") for number in range(sweep.count(spec.sweep))]


def read_file(store: Store) -> RunFile:
    """Read run.json; of a point that has not started yet, what its sweep says.

    Raises:
        ConfigError: If there is no run, or a newer jobkit wrote it.
        JobkitError: If run.json is damaged.
    """
    try:
        return _read_own(store)
    except ConfigError:
        place = _place(store)
        if place is None or not exists(place[0]):
            raise
        if exists(store):  # it has started this very moment
            return _read_own(store)
        whole = _read_own(place[0])
        size = sweep.count(whole.spec.sweep) if whole.spec.sweep else 0
        if place[1] >= size or str(place[1]) != store.url.rpartition("/")[2]:
            raise ConfigError(f"{place[0].url} has no point {place[1]}; it has {size}, counted from 0") from None
        return msgspec.structs.replace(whole, spec=whole.spec.point(place[1]))


def _read_own(store: Store) -> RunFile:
    path = store.file(contract.RUN_JSON)
    try:
        content = store.read(contract.RUN_JSON)
    except FileNotFoundError:
        if begun_by_hand(store):
            raise ConfigError(
                f"{store.url} was started by hand and not submitted: what it printed is where it was started, and who "
                f"starts its program again continues it; 'jobkit status {store.url}' and 'jobkit explain {store.url}' "
                f"tell what it did, 'jobkit stop {store.url}' stops it"
            ) from None
        place = store.url.replace("\n", r"\u000a")  # as every other character that acts is printed
        raise ConfigError(f"{place} is not a run: it has no run.json; 'jobkit ls' lists the runs here") from None
    try:
        versions.check_run(content, path)
        file = msgspec.json.decode(content, type=RunFile)
        check_places(file.spec)
        return msgspec.structs.replace(file, spec=msgspec.structs.replace(file.spec, setup=()))
    except (ValueError, RecursionError) as error:  # msgspec's and Unicode's among them
        raise JobkitError(
            f"{path} is damaged ({error}); put it back from a copy, or submit to a new run directory: the "
            f"checkpoints in {store.file(contract.CHECKPOINTS)} are not affected"
        ) from None


def check_places(spec: JobSpec) -> None:
    """Refuse what becomes a path, or many, and is none inside the run or inside the tree of its code.

    Raises:
        ValueError: With the value.
    """
    if spec.code is not None and not re.fullmatch("[0-9a-f]{16}", spec.code):
        raise ValueError(f"no snapshot has the digest {spec.code!a}")
    place = os.path.relpath(spec.cwd or spec.root, spec.root) if spec.root else "."
    for name in (*spec.links, *spec.imports, place):
        if name != "." and not names.inside(name):
            raise ValueError(f"{name!a} is no name inside the code, or has characters that none may have here")
    if sweep.count(spec.sweep) > sweep.LIMIT:
        raise ValueError(f"a sweep has at most {sweep.LIMIT} points")


_README = """\
# {name}: a run of jobkit {version}

This directory is one training, first to last, with every interruption it survived.

    command   {command}

Look at it, follow it, have it save now, stop it, continue it:

    jobkit status {url}
    jobkit logs -f {url}
    jobkit save {url}
    jobkit stop {url}
    jobkit resume {url}

| here | what it is |
|---|---|
| run.json | what was submitted; no secret is in it |
| code/ | the snapshot of the code that every attempt runs in, and what it writes beside itself |
| checkpoints/<step>/ | committed steps (those with a commit.json); plain Orbax can read them |
| scores/ | metrics that came after their step was committed |
| attempts/<n>/ | log, events and outcome of each attempt; in a bucket the first two in parts, log-0.txt.d/* in order |
| leases/ | which machine's local runner has the run: the newest number |
| events.jsonl | what the launching side did: submitted, decisions, ended |
| runner.log | what the local runner itself printed: normally nothing |
"""


_SWEEP_README = """\
# {name}: a sweep of jobkit {version}

This directory is one sweep of {count} points; points/<n>/ is the run of one of them, made when it starts.

    command   {command}
    sweep     {sweep}

    jobkit status {url}
    jobkit logs -f {url}/points/0
    jobkit cancel {url}
    jobkit resume {url}
"""


def write_readme(store: Store, spec: JobSpec) -> None:
    """Write the run directory's README.md."""
    import shlex

    command = shlex.join(spec.command)
    url = shlex.quote(store.url)
    if spec.sweep:
        axes = "  ".join(f"{name}={','.join(values)}" for name, values in spec.sweep.items())
        fields = {"count": sweep.count(spec.sweep), "sweep": axes[:1000], "command": command, "url": url}
        store.write(contract.README, _SWEEP_README.format(name=spec.name, version=jobkit.__version__, **fields))
        return
    text = _README.format(name=spec.name, version=jobkit.__version__, command=command, url=url)
    store.write(contract.README, text)
