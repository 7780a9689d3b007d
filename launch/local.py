"""The local backend: submit, resume and cancel a run on this machine, and the runner's own entry point.

`python -m launch.local RUN` is what `submit` starts, detached; what it does is in runner.py.
"""

import contextlib
import dataclasses
import getpass
import json
import os
import secrets
import select
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from jobkit import contract, mirror
from jobkit.contract import State
from jobkit.errors import ConfigError, JobkitError
from jobkit.ledger import Ledger
from jobkit.storage import Store, explain, is_remote, local_path, remove_tree
from jobkit.units import show_duration
from launch import leftovers, report, snapshot
from launch import spec as specs
from launch.command import check_command
from launch.lock import RunLock, acquire, cancel_mutex, held, holder, runner_alive
from launch.spec import JobSpec

BACKEND = "local"
_OURS = (contract.ENV_RUN, contract.ENV_ATTEMPT, contract.ENV_SUPERVISOR, contract.ENV_LOCK, contract.ENV_RUNNER)
"""What a submit from inside another run must not hand on."""
_PATIENCE_S = 20.0
"""How long a person at a prompt waits for a bucket that does not answer."""
_READY_S = 30.0
"""How long a runner may take to come up: imports on a slow shared disk."""


@dataclasses.dataclass(frozen=True)
class Local:
    """The local backend: attempts are processes of this machine."""

    name = BACKEND

    def submit(self, spec: JobSpec) -> Store:
        """See `submit`."""
        return submit(spec)


def open_run(url: str | os.PathLike[str]) -> Store:
    """Return the store of a run, under the one name that its processes know it by.

    A run on an object store is read from its home on this node, which is brought up to date first unless a runner
    here is writing to it.
    """
    if not is_remote(url):
        return Store(os.path.realpath(local_path(url)))
    store = Store(url, deadline_s=_PATIENCE_S)
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


def prepare(spec: JobSpec) -> Plan:
    """Check a specification against this machine and fill in what it leaves open; writes nothing.

    Raises:
        ConfigError: If it cannot work.
    """
    specs.check(spec)
    cwd = Path(os.path.realpath(spec.cwd or os.getcwd()))
    if not cwd.is_dir():
        raise ConfigError(f"the working directory {cwd} does not exist; give one that does")
    check_command(spec.command, cwd, os.environ)
    store = open_run(spec.run or _fresh_place(spec.name or _script_name(spec)))
    _check_place(store)
    spec = msgspec.structs.replace(spec, run=store.url, cwd=str(cwd), name=spec.name or store.path.name)
    if not spec.snapshot:
        return Plan(store, msgspec.structs.replace(spec, root=str(cwd)), None)
    tree = snapshot.find(cwd, store.path)
    imports = snapshot.imports_below(tree.root, [*_python_path(), *sys.path])
    return Plan(store, msgspec.structs.replace(spec, root=str(tree.root), links=tree.links, imports=imports), tree)


def _fresh_place(name: str) -> str:
    stem = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    count = 2
    place = stem
    while os.path.lexists(place):
        place, count = f"{stem}-{count}", count + 1
    return place


def _script_name(spec: JobSpec) -> str:
    words = [word for word in spec.command if not word.startswith("-")]
    name = Path(words[1] if len(words) > 1 else words[0]).stem.rpartition(".")[2]
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name).strip("-._") or "run"


def _python_path() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


_LAYOUT = (
    contract.RUN_JSON, contract.README, contract.CANCEL, contract.EVENTS, contract.LOCK, contract.CODE,
    contract.CHECKPOINTS, contract.ATTEMPTS, contract.REPORT, contract.CACHE, "runner.log", "tensorboard",
)  # fmt: skip


def _check_place(store: Store) -> None:
    """Refuse a directory that is not writable, or that holds something else than a run."""
    path = store.path
    if path.exists() and not path.is_dir():
        raise ConfigError(f"the run directory {path} is a file; give another --run")
    strange = [name for name in store.names("") if name not in _LAYOUT and not name.startswith(".")]
    if strange and not specs.exists(store):
        shown = ", ".join(strange[:3])
        raise ConfigError(f"{path} is not empty and is not a run (it holds {shown}); give a new directory as --run")
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"the run directory {path} is not writable: {parent} is not; give another --run")


def submit(spec: JobSpec) -> Store:
    """Start a run: snapshot, run.json, a detached runner.

    Durability: on return run.json is on storage and a runner holds the run's lock.

    Raises:
        ConfigError: If the specification cannot work or the directory is taken; nothing is left behind then.
    """
    plan = prepare(spec)
    store = plan.store
    with _new_directory(store) as lock:
        if specs.exists(store):
            raise ConfigError(_taken(plan))
        code = snapshot.take(plan.tree, store) if plan.tree is not None else None
        spec = msgspec.structs.replace(plan.spec, code=code)
        specs.write_readme(store, spec)
        store.remove(contract.CANCEL)  # of a submit that was killed half-way, then cancelled
        if not specs.create(store, spec, BACKEND):
            raise ConfigError(_taken(plan))
        try:
            mirror.publish(store)
        except JobkitError:
            store.remove(contract.RUN_JSON)
            raise
        _record(store, "submitted", command=list(spec.command), code=code, by=_who())
    _start(store, lock)
    return store


def _taken(plan: Plan) -> str:
    try:
        old = specs.read(plan.store)
        digest = snapshot.digest(plan.tree) if plan.tree is not None else None
        same = old.same_job(msgspec.structs.replace(plan.spec, code=digest))
    except JobkitError as error:
        return str(error)
    what = "this very job" if same else "another job"
    return (
        f"{plan.store.url} already holds {what} ({shlex.join(old.command)}); two trainings never share a directory: "
        f"continue it with 'jobkit resume {plan.store.url}', or give a new --run"
    )


@contextlib.contextmanager
def _new_directory(store: Store) -> Iterator[RunLock]:
    """Make the run directory and take its lock; on an error remove what was made, and leave the lock free."""
    made = [path for path in (store.path, *store.path.parents) if not path.exists()]
    lock = None
    try:
        for _ in range(10):
            try:
                store.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise explain(error, f"cannot create {store.path}") from None
            try:
                lock = acquire(store)
                break
            except JobkitError:
                if store.path.exists():
                    raise
                # a submit that failed removed the directory meanwhile
        if lock is None:
            raise ConfigError(_alive(store))
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


def _alive(store: Store) -> str:
    pid = holder(store).get("pid", "unknown")
    return f"run {store.url} is alive (pid {pid}): 'jobkit logs -f {store.url}' or 'jobkit cancel {store.url}'"


def _who() -> str:
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):
        return socket.gethostname()


def _record(store: Store, event: str, **fields: object) -> None:
    ledger = Ledger(store.file(contract.EVENTS))
    ledger.append(event, durable=True, **fields)
    ledger.close()


def _start(store: Store, lock: RunLock) -> None:
    """Start a detached runner that inherits the lock, and wait until it is up."""
    ready, write = os.pipe()
    fds = [lock.descriptor, write]
    command = [sys.executable, "-P", "-m", "launch.local", store.url, *map(str, fds)]
    try:
        with store.file("runner.log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=store.path, env=_runner_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=fds, start_new_session=True,
            )  # fmt: skip
        os.close(write)
        write = -1
        process.wait()  # it forks, and the child is the runner
        answered = select.select([ready], [], [], _READY_S)[0] and os.read(ready, 16)
    except OSError as error:
        raise explain(error, f"cannot start the local runner of {store.url}") from None
    finally:
        lock.close()
        os.close(ready)
        if write >= 0:
            os.close(write)
    if not answered:
        log_path = store.file("runner.log")
        raise JobkitError(f"the local runner of {store.url} did not come up; see {log_path}, then 'jobkit resume'")


def _runner_environment() -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if name not in _OURS}
    path = [os.path.abspath(entry) for entry in _python_path()]
    home = Path(__file__).absolute().parent.parent
    if home.name not in ("site-packages", "dist-packages") and str(home) not in path:
        path.append(str(home))  # running from a checkout: the runner and the program find it too
    return environ | ({"PYTHONPATH": os.pathsep.join(path)} if path else {})


def resume(url: str | os.PathLike[str], *, wait_s: float | None = None, clear_cancel: bool = True) -> State:
    """Start a runner for a run that has none; what it committed is where it goes on.

    Args:
        url: The run.
        wait_s: How long to wait for an attempt that is still stopping after its runner was killed; by default as
            long as it may take.
        clear_cancel: Whether an earlier cancel is taken back; a cancel that comes meanwhile never is.

    Returns:
        RUNNING once a runner is up; DONE, and nothing started, if the run is done.

    Raises:
        ConfigError: If the run is alive.
    """
    store = open_run(url)
    spec = specs.read(store)
    cancel_seen = _cancel_content(store)
    if report.status(store).state is State.DONE:
        return State.DONE
    if _has_runner(store):
        raise ConfigError(_alive(store))
    lock = acquire(store, wait_s=spec.grace_s + 10 if wait_s is None else wait_s)
    if lock is None:
        raise ConfigError(_alive(store))
    if report.status(store).state is State.DONE:
        lock.close()
        return State.DONE
    lock.sign(os.getpid())
    if clear_cancel:
        with cancel_mutex(store):
            if _cancel_content(store) == cancel_seen:
                store.remove(contract.CANCEL)
                if store.remote is not None:
                    store.remote.remove([contract.CANCEL])
    _record(store, "resumed", by=_who())
    _start(store, lock)
    return State.RUNNING


def _has_runner(store: Store) -> bool:
    """Tell whether a run has a runner; one that was killed this very moment gets a second to be gone."""
    deadline = time.monotonic() + 1.0
    while held(store) and runner_alive(store):
        if time.monotonic() > deadline:
            return True
        time.sleep(0.05)
    return False


def _cancel_content(store: Store) -> bytes | None:
    try:
        return store.read(contract.CANCEL)
    except FileNotFoundError:
        return None


def cancel(
    url: str | os.PathLike[str], *, wait: bool = True, progress: Callable[[str], None] = lambda text: None
) -> State:
    """End a run for good: no attempt is ever started again, unless a person resumes it.

    Args:
        url: The run.
        wait: Whether to wait until nothing of it runs any more.
        progress: Called with a line for a person when the waiting starts.

    Durability: on return cancel.json is on storage; nothing overrules it but `resume`.

    Raises:
        ConfigError: If the run is already done.
    """
    store = open_run(url)
    spec = specs.read(store)
    if report.status(store).state is State.DONE:
        raise ConfigError(f"run {store.url} is already done; there is nothing to cancel")
    content = json.dumps({"by": _who(), "at": time.time(), "id": secrets.token_hex(8)}).encode() + b"\n"
    with cancel_mutex(store):
        if store.remote is not None:
            store.remote.write(contract.CANCEL, content)
        store.write(contract.CANCEL, content)
    _record(store, "cancelled", by=_who())
    if wait and held(store):
        progress(f"waiting for {store.url} to save and stop (killed after {show_duration(spec.grace_s)})")
    _finish_cancel(store, spec, content, wait=wait)
    return report.status(store).state


def _finish_cancel(store: Store, spec: JobSpec, content: bytes, *, wait: bool) -> None:
    """Wait for the runner, or do its part where it is dead."""
    clearing: leftovers.Clearing | None = None
    while _cancel_content(store) == content:  # else somebody resumed the run or cancelled it again
        lock = acquire(store, wait_s=0.0 if wait else 0.3)
        if lock is not None:
            with contextlib.closing(lock):
                _bury(store, spec)
            return
        if not runner_alive(store):
            clearing = clearing or leftovers.Clearing(grace_s=spec.grace_s, notice_s=0.0)
            clearing.step(leftovers.processes_of(store))
        if not wait:
            return
        time.sleep(0.05)


def _bury(store: Store, spec: JobSpec) -> None:
    """Write down the end of a cancelled run that has no runner; the lock is ours."""
    status = report.status(store, assume_held=False)
    if status.ended:
        return
    leftovers.clear(store, grace_s=spec.grace_s)
    leftovers.close_attempts(store, "the supervisor was killed")
    _record(store, "ended", state=State.CANCELLED, reason=report.cancel_reason(store))


def main(arguments: list[str]) -> int:
    """Run a run's attempts in a detached process.

    Args:
        arguments: The run, the descriptor of its lock, the descriptor to answer on; the run alone takes the lock
            itself and stays in the foreground.
    """
    from launch.runner import Runner

    store = open_run(arguments[0])
    spec = specs.read(store)
    if len(arguments) == 3:
        lock = RunLock(store, int(arguments[1]))
        os.set_inheritable(lock.descriptor, False)
        if os.fork():
            os._exit(0)
        answer = int(arguments[2])
    else:
        taken = acquire(store)
        if taken is None:
            raise ConfigError(_alive(store))
        lock, answer = taken, None
        _record(store, "resumed", by=_who())
    lock.sign(os.getpid())

    def ready() -> None:
        if answer is not None:
            with contextlib.suppress(OSError):
                os.write(answer, b"up")
            os.close(answer)

    Runner(store, spec, lock.descriptor).run(ready)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except JobkitError as problem:
        print(f"jobkit: {problem}", file=sys.stderr)
        sys.exit(contract.Exit.USAGE)
