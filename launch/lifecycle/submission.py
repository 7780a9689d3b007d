"""What every backend does to start a run: check, snapshot, run directory; and how a run is opened later."""

import contextlib
import dataclasses
import functools
import getpass
import json
import os
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from jobkit import contract, names
from jobkit.contract import State
from jobkit.errors import ConfigError, JobkitError, leave, say
from jobkit.rundir import mirror
from jobkit.rundir.files import remove_tree
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.store import Store, explain, is_remote, local_path
from launch.lifecycle import lease, orphans, run_status, targets
from launch.lifecycle.lock import PROBE_S, RunLock, acquire, cancel_mutex, held, holder
from launch.spec import jobspec as specs
from launch.spec import snapshot
from launch.spec.command import check_command, check_script
from launch.spec.jobspec import JobSpec

LEAVING_S = 60.0
"""How long the runner of a run that has ended may take to be gone: it empties the home of one in a bucket."""
_PATIENCE_S = 20.0
"""How long a person at a prompt waits for a bucket that does not answer."""


def open_run(url: str | os.PathLike[str], *, patience_s: float = _PATIENCE_S) -> Store:
    """Return the store of a run, under the one name that its processes know it by.

    A run on an object store is read from its home on this node, which is brought up to date first unless a runner
    here is writing to it.

    Args:
        url: The run.
        patience_s: How long an object store may take to answer.
    """
    if not is_remote(url):
        return Store(os.path.realpath(local_path(url)))
    store = Store(url, deadline_s=patience_s)
    refresh(store)
    return store


def refresh(store: Store) -> None:
    """Bring a home up to date, unless a runner here is writing to it."""
    if store.remote is not None and not held(store):
        mirror.refresh(store)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked submission that has written nothing yet."""

    store: Store
    spec: JobSpec
    tree: snapshot.Tree | None

    @property
    def coded(self) -> JobSpec:
        """The specification with the digest that the snapshot will have."""
        code = snapshot.digest(self.tree) if self.tree is not None else None
        return msgspec.structs.replace(self.spec, code=code)


def prepare(spec: JobSpec, *, elsewhere: bool = False, look: bool = True) -> Plan:
    """Check a specification against this machine and fill in what it leaves open; writes nothing.

    Args:
        spec: What to run.
        elsewhere: Whether it runs in an image of its own, whose programs and paths are not this machine's.
        look: Whether a bucket is asked what it has of the run.

    Raises:
        ConfigError: If it cannot work.
    """
    specs.check(spec)
    if spec.sweep and is_remote(spec.run) and spec.cloud is None:
        raise ConfigError(f"a sweep here has to lie on a file system that all its nodes share, not on {spec.run}")
    cwd = Path(os.path.realpath(spec.cwd or os.getcwd()))
    if not cwd.is_dir():
        raise ConfigError(f"the working directory {cwd} does not exist; give one that does")
    if spec.cloud is not None:
        targets.check_elsewhere(spec.notify, plain=spec.cloud.env, secrets=spec.cloud.secrets)
    else:  # in a container of this machine's or SLURM's too: the runner is outside
        spec = msgspec.structs.replace(spec, notify=targets.check(spec.notify, cwd=cwd, environ=os.environ))
    first = spec.point(0).command if spec.sweep else spec.command
    if elsewhere:
        check_script(first, cwd, in_snapshot=spec.snapshot)
    else:
        check_command(first, cwd, os.environ)
    if is_remote(spec.run):
        names.check_place(spec.run)  # before it is asked for
    url = spec.run or specs.fresh_place(spec.name or specs.script_name(spec))
    store = open_run(url) if look else Store(url)
    names.check_place(store.url)
    _check_place(store)
    spec = msgspec.structs.replace(spec, run=store.url, cwd=str(cwd), name=spec.name or store.url.rpartition("/")[2])
    if not spec.snapshot:
        return Plan(store, msgspec.structs.replace(spec, root=str(cwd)), None)
    tree = snapshot.find(cwd, store.path, secret=targets.files(spec.notify))
    spec = msgspec.structs.replace(spec, root=str(tree.root), links=tree.links, imports=imports_of(tree))
    try:
        specs.check_places(spec)
    except ValueError as error:
        raise ConfigError(f"{error}: rename that directory") from None
    return Plan(store, spec, tree)


def imports_of(tree: snapshot.Tree) -> tuple[str, ...]:
    """Return the directories of a tree that Python imports from, here and now."""
    return snapshot.imports_below(tree.root, [*_python_path(), *sys.path])


def _python_path() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _check_place(store: Store) -> None:
    """Refuse a directory that is not writable, or that holds something else than a run."""
    path = store.path
    if path.exists() and not path.is_dir():
        raise ConfigError(f"the run directory {path} is a file; give another --run")
    strange = [name for name in store.names("") if name not in contract.LAYOUT and not name.startswith(".")]
    if specs.begun_by_hand(store):
        if pid := orphans.opened_by(store):
            raise ConfigError(f"{store.url} is open in process {pid}, by hand: 'jobkit stop {store.url}', or end that")
        for attempt in store.numbers(contract.ATTEMPTS)[-1:]:
            if not orphans.ended_by_itself(store, attempt):
                raise ConfigError(f"{store.url} is trained by hand just now: 'jobkit stop {store.url}' first")
    elif strange and not specs.exists(store):
        shown = ", ".join(strange[:3])
        raise ConfigError(f"{path} is not empty and is not a run (it holds {shown}); give a new directory as --run")
    parent = next(above for above in (path, *path.parents) if above.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"the run directory {path} is not writable: {parent} is not; give another --run")


_say_once = functools.cache(say)
"""Says a line once: a drill submits the same code again and again."""


def remarks(plan: Plan) -> list[str]:
    """Say what a person should know of the snapshot that a submit takes."""
    return [] if plan.tree is None else list(snapshot.remarks(plan.tree, sent=plan.store.remote is not None))


@contextlib.contextmanager
def new_run(
    plan: Plan, backend: str, begin: Callable[[Store], dict[str, Any]] | None = None
) -> Iterator[tuple[Store, JobSpec, RunLock]]:
    """Make a run: directory, snapshot, run.json, `submitted` in its ledger; the lock is held and is the caller's.

    One that was begun by hand goes on from what it has committed.

    Args:
        plan: What is submitted.
        backend: To which one.
        begin: Commits the step that it begins with; returns the fields of `begun_from`.

    On an error inside, of ours or of the caller's, nothing is left behind.

    Durability: on entering run.json is on storage, on the URL too.

    Raises:
        ConfigError: If the directory is taken.
    """
    store = plan.store
    fresh = store.remote is not None and not store.names("")
    with _new_directory(store, fresh=fresh, shared=plan.spec.shared) as lock, contextlib.ExitStack() as undone:
        mirror.set_deleted_aside(store)
        refuse_taken(plan)
        for line in remarks(plan):
            _say_once(line)
        undone.enter_context(orphans.no_copies(store))
        by_hand = specs.begun_by_hand(store)
        begun = None if begin is None else begin(store)
        code = snapshot.take(plan.tree, store) if plan.tree is not None else None
        spec = msgspec.structs.replace(plan.spec, code=code)
        specs.write_readme(store, spec)
        store.remove(contract.CANCEL)  # of a submit that was killed half-way, then cancelled
        if not specs.create(store, spec, backend):
            raise ConfigError(_taken(plan))
        published = False
        try:
            mirror.publish(store)
            published = True
            if begun is not None:
                orphans.check_copy(store, begun["begins"])
            _record_submitted(store, spec, by_hand=by_hand, begun=begun)
            yield store, spec, lock
        except BaseException:
            names = [contract.RUN_JSON, *(name for name in mirror.described(store) if name != contract.STRATEGY)]
            store.remove(contract.RUN_JSON)
            store.remove(contract.EVENTS)
            if published and store.remote is not None:
                with contextlib.suppress(JobkitError):
                    store.remote.remove(dict.fromkeys(names))
            raise


def _record_submitted(store: Store, spec: JobSpec, *, by_hand: bool, begun: dict[str, Any] | None) -> None:
    """Write down that a run was submitted, and what it begins with."""
    before: dict[str, Any] = {}
    if by_hand:
        if (ended := orphans.close_by_hand(store)) is not None:
            then = {"t": ended}
            record(store, "ended", **then, state=State.CANCELLED, reason="started by hand until then")
        before = {"attempts": len(store.numbers(contract.ATTEMPTS)), "committed": orphans.committed_step(store)}
    if begun is not None:
        before = {"attempts": 0, "committed": begun["begins"]}
    record(store, "submitted", command=list(spec.command), code=spec.code, by=who(), **before)
    if begun is not None:
        record(store, "begun_from", **begun, by=who())


def make_point(store: Store) -> None:
    """Make the run of one point of a sweep, unless it is there.

    Raises:
        ConfigError: If its sweep has no such point.
    """
    if specs.exists(store):
        return
    file = specs.read_file(store)
    spec = file.spec
    try:
        store.path.mkdir(parents=True, exist_ok=True)  # the sweep's own mode says who gets that far
    except OSError as error:
        raise explain(error, f"cannot create {store.path}") from None
    specs.write_readme(store, spec)
    if specs.create(store, spec, file.backend):
        record(store, "submitted", command=list(spec.command), code=spec.code, by=who())


def begin_point(store: Store, point: Store) -> bool:
    """Make the run of a point that is about to start; tell whether it may.

    Who cancels a sweep writes that down and then looks which points there are; so this looks once more after it has
    made one.
    """
    if cancel_content(store) is None:
        make_point(point)
    content = cancel_content(store)
    if content is not None and specs.exists(point) and cancel_content(point) is None:
        point.write(contract.CANCEL, content)
    return specs.exists(point)


def refuse_taken(plan: Plan) -> None:
    """Raise ConfigError if the run directory holds a run already."""
    if specs.exists(plan.store) and not mirror.is_deleted(plan.store):
        raise ConfigError(_taken(plan))


def _taken(plan: Plan) -> str:
    try:
        old = specs.read(plan.store)
        same = old.same_job(plan.coded)
    except JobkitError as error:
        return str(error)
    what = "this very job" if same else "another job"
    kept = " with the code as it was then" if not same and old.command == plan.spec.command else ""
    away = lease.elsewhere(plan.store)
    where = f", running on {away.place}" if away is not None else ""
    return (
        f"{plan.store.url} already holds {what} ({shlex.join(old.command)}{kept}){where}; two trainings never share a "
        f"directory: continue it with 'jobkit resume {plan.store.url}', with other code or another command by "
        f"'jobkit resume {plan.store.url} --new-code -- COMMAND', or give a new --run"
    )


@contextlib.contextmanager
def _new_directory(store: Store, *, fresh: bool, shared: bool) -> Iterator[RunLock]:
    """Make the run directory and take its lock; on an error remove what was made, and leave the lock free.

    Args:
        store: The run.
        fresh: Whether it is the home of a run on an object store that was made, empty, a moment ago.
        shared: As `JobSpec.shared`.
    """
    made = [path for path in (store.path, *store.path.parents) if not path.exists()]
    if fresh:
        made.insert(0, store.path)
    lock = None
    try:
        for _ in range(10):
            store.make(shared=shared)
            try:
                lock = acquire(store, wait_s=LEAVING_S if run_status.has_ended(store) else PROBE_S)
                break
            except JobkitError:
                if store.path.exists():
                    raise
                # a submit that failed removed the directory meanwhile
        if lock is None:
            raise ConfigError(says_alive(store))
        lock.sign(os.getpid())
        yield lock
    except BaseException:
        if lock is not None and store.path in made and not specs.exists(store):
            remove_tree(store.path)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()  # only if it is empty: another submit may use it
        if lock is not None:
            lock.close()
        raise


def says_alive(store: Store) -> str:
    """Say who holds a run, and what can be done."""
    pid = holder(store).get("pid", "unknown")
    return f"run {store.url} is alive (pid {pid}): 'jobkit logs -f {store.url}' or 'jobkit cancel {store.url}'"


def ask_to_cancel(store: Store, word: str = "cancelled") -> bytes:
    """Write a cancel, on the URL first; return what was written, which tells it from any other.

    Args:
        store: The run.
        word: 'cancelled', or 'stopped' by who means to go on later: the same to every process, told apart for people.

    Durability: on storage on return; nothing overrules it but `take_back_cancel`.
    """
    with cancel_mutex(store):
        content = ask(store, contract.CANCEL, word=word)
    if store.remote is None:  # elsewhere the ledger is being written by the machine that runs the run
        record(store, word, by=who())
    return content


def ask(store: Store, name: str, **fields: object) -> bytes:
    """Write what is asked of a run, on the URL first; return what was written, which tells it from any other."""
    content = json.dumps({"by": who(), "at": time.time(), "id": secrets.token_hex(8)} | fields).encode() + b"\n"
    if store.remote is not None:
        store.remote.write(name, content)
    store.write(name, content)
    return content


def cancel_content(store: Store) -> bytes | None:
    """Return the cancel that this machine knows of, None if there is none."""
    return store.get(contract.CANCEL)


def take_back_cancel(store: Store, seen: bytes | None) -> None:
    """Remove the cancel that was there when a resume began; one that has come meanwhile stays.

    Raises:
        ConfigError: If one has come meanwhile from another machine.
    """
    with cancel_mutex(store):
        if cancel_content(store) != seen:
            return
        if store.remote is not None and not store.remote.remove_this(contract.CANCEL, seen):
            raise ConfigError(f"run {store.url} was cancelled on another machine this very moment")
        store.remove(contract.CANCEL)


def end_cancelled(store: Store, content: bytes) -> None:
    """Write down the end of a cancelled run that has no job any more, unless somebody has taken that cancel back.

    Args:
        store: The run.
        content: The cancel, as `ask_to_cancel` returned it.
    """
    with cancel_mutex(store):
        if cancel_content(store) == content:
            end(store, State.CANCELLED, run_status.cancel_reason(store))


def who() -> str:
    """Name the person and machine for the ledger."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):
        return socket.gethostname()


def record(store: Store, event: str, **fields: object) -> None:
    """Append to the launching side's ledger, durably."""
    ledger = store.insist(lambda: Ledger(store.file(contract.EVENTS)))
    try:
        ledger.append(event, durable=True, **fields)
        store.insist(ledger.flush)
    finally:
        ledger.close()


def record_begun_afresh(store: Store) -> None:
    """Write down that a person resumes a run, with fresh budgets."""
    begun = {"attempts": len(store.numbers(contract.ATTEMPTS)), "committed": orphans.committed_step(store)}
    record(store, "resumed", by=who(), **begun)


def record_taken_up(store: Store) -> None:
    """Write down that a person resumes a run, with what is left of its budgets unless it has ended or has moved."""
    moved = [event["event"] for event in run_status.events(store)][-1:] == ["moved"]
    if moved or run_status.has_ended(store):
        record_begun_afresh(store)
    else:
        record(store, "resumed", by=who())


def end(store: Store, state: State, reason: str) -> None:
    """Write down the end of a run, unless it is written."""
    if run_status.last_life_event(store).get("event") == "ended":
        return
    record(store, "ended", state=state, reason=reason)
    with contextlib.suppress(JobkitError):
        mirror.upload_described(store)


def runner_environment() -> dict[str, str]:
    """Return the environment in which a runner finds the same packages; nothing of another run is handed on."""
    environ = contract.handed_on(os.environ)
    path = [os.path.abspath(entry) for entry in _python_path()]
    home = Path(__file__).absolute().parents[2]
    if home.name not in ("site-packages", "dist-packages") and str(home) not in path:
        path.append(str(home))  # running from a checkout: the runner and the program find it too
    return environ | ({"PYTHONPATH": os.pathsep.join(path)} if path else {})


def run_as_program(main: Callable[[list[str]], int], *, refused: int | None = None) -> NoReturn:
    """Run a module as a program: an error of ours is one line, and an exit code.

    Args:
        main: Gets the arguments; returns the exit code.
        refused: The exit code of an error; by default the error's own.
    """
    try:
        leave(main(sys.argv[1:]))
    except JobkitError as error:
        say(str(error))
        leave(int(error.exit_code if refused is None else refused))
