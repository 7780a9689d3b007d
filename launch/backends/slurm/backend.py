"""The SLURM backend: submit, resume and cancel runs from a login node.

submitit writes and submits the script; what the job then does, requeues included, is in job.py. A run's jobs are
in its ledger; the newest of them is the one that may run attempts.
"""

import contextlib
import dataclasses
import io
import os
import re
import shlex
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from jobkit import contract
from jobkit.contract import State
from jobkit.errors import ConfigError, JobkitError, say
from jobkit.rundir import mirror
from jobkit.rundir.store import Store, explain
from jobkit.units import parse_limit, show_duration
from launch.backends.slurm import scontrol
from launch.backends.slurm.scontrol import Job, SlurmError
from launch.lifecycle import run_status
from launch.lifecycle.submission import (
    Plan,
    ask_to_cancel,
    cancel_content,
    end_cancelled,
    make_point,
    new_run,
    open_run,
    prepare,
    record,
    record_resumed,
    runner_environment,
    take_back_cancel,
    who,
)  # fmt: skip
from launch.spec import container, sweep
from launch.spec import jobspec as specs
from launch.spec.command import in_container
from launch.spec.jobspec import JobSpec

BACKEND = "slurm"
WARNING_S = 60.0
"""SLURM looks at time limits every 30 s: the warning is asked for this much before the grace has to begin."""
WAKER = "jobkit-wake "
"""Begins the comment of a job that is none of a run's own but helps one to start, before the run's URL."""
_POLL_S = 0.5


@dataclasses.dataclass(frozen=True)
class Slurm:
    """The SLURM backend.

    Args:
        options: What `sbatch` is to be given, by its long option's name: {"partition": "low", "time": "1:00:00"}; an
            empty value is a switch.
    """

    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    name = BACKEND

    def submit(self, spec: JobSpec) -> Store:
        """See `submit`."""
        return submit(msgspec.structs.replace(spec, sbatch=dict(self.options)))


def submit(spec: JobSpec) -> Store:
    """Start a run as a job, or a sweep as one array of jobs.

    Durability: on return run.json is on storage and SLURM has the job.

    Raises:
        ConfigError: If the specification cannot work, or SLURM refuses it; nothing is left behind then.
    """
    check(spec.sbatch, grace_s=spec.grace_s)
    with new_run(plan(spec), BACKEND) as (store, spec, lock):
        sbatch(store, spec, points=range(sweep.count(spec.sweep)))
    lock.close()
    return store


_REFUSED = {
    "array": "one run is one job, and --sweep makes an array of them",
    "signal": "jobkit asks for its own warning before the time limit (--grace)",
    "output": "the run directory has the logs: jobkit logs",
    "error": "the run directory has the logs: jobkit logs",
    "open-mode": "jobkit sets it",
    "requeue": "jobkit requeues by itself",
    "wrap": "give the command after '--'",
    "job-name": "use --name",
    "comment": "jobkit writes the run's URL there, to find its jobs again",
    "chdir": "the job runs where it was submitted; change there",
    "parsable": "use --json",
    "test-only": "use --dry-run",
    "ntasks": "give -N and --ntasks-per-node",
}


def check(options: Mapping[str, str], *, grace_s: float) -> None:
    """Refuse sbatch options that would break a run, and a machine without SLURM.

    Args:
        options: Long options of sbatch and their values.
        grace_s: How long the program may take to save.

    Raises:
        ConfigError: With the remedy.
    """
    if "expedite" in (options.get("requeue"), os.environ.get("SBATCH_REQUEUE")):
        raise ConfigError(
            "--requeue=expedite (or SBATCH_REQUEUE=expedite) is not for runs: SLURM then takes any exit code but 0 for "
            "a broken node and may hold the job, also the 75 of a run that has saved and goes on; leave it out"
        )
    for name, value in options.items():
        if name in _REFUSED:
            raise ConfigError(f"--{name} cannot be passed on to sbatch: {_REFUSED[name]}")
        specs.check_line(f"--{name}", value)
        if not name.replace("-", "").isalnum():
            raise ConfigError(f"--{name}={value!r} is no option of sbatch")
    limit_s = parse_limit(options.get("time", ""))
    if limit_s is not None and limit_s < 2 * (grace_s + WARNING_S):
        raise ConfigError(
            f"--time {options['time']} leaves hardly time to train: the warning comes "
            f"{show_duration(grace_s + WARNING_S)} before the limit; give at least twice that"
        )
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch is not on PATH: submit from a login node of the cluster")


def script(spec: JobSpec, store: Store) -> str:
    """Return the batch script, exactly as it is submitted."""
    return str(
        _executor(spec, store, range(sweep.count(spec.sweep)))._make_submission_file_text(command(store), "jobkit")
    )


def command(store: Store) -> str:
    """Return the line that the batch script runs: our runner, which starts each attempt with srun.

    A runner that is killed alone (out of memory) is started again; SLURM's signals are the runner's business.
    """
    words = python("-P", "-m", "launch.backends.slurm.job", store.url)
    again = 'do code=$?; [ "$code" -eq 137 ] || exit "$code"; sleep 1; done'
    return f"trap : TERM USR1 USR2; until {shlex.join(words)}; {again}"


def python(*arguments: str) -> list[str]:
    """Return the command line of this Python in a job, where it finds the same packages."""
    path = runner_environment().get("PYTHONPATH")
    return [*(["env", f"PYTHONPATH={path}"] if path else []), sys.executable, *arguments]


def plan(spec: JobSpec) -> Plan:
    """Check a specification and fill in what it leaves open; writes nothing. In an image nothing here is looked for.

    Raises:
        ConfigError: If it cannot work.
    """
    if spec.container is not None:
        container.refuse_foreign(spec.container, BACKEND)
        spec = msgspec.structs.replace(spec, container=container.in_full(spec.container, spec.cwd or os.getcwd()))
    found = prepare(spec, elsewhere=spec.container is not None)
    if found.spec.container is not None:
        in_container(found.store, found.spec, cwd=Path(found.spec.cwd), environ={})
    return found


def folder(store: Store) -> Path:
    """Return where the script and the job's own output lie: on a disk that login and compute nodes share."""
    if store.remote is None:
        return store.file(contract.SLURM)
    return Path.home() / ".jobkit" / "slurm" / store.path.name


def _executor(spec: JobSpec, store: Store, points: Iterable[int]) -> Any:
    import submitit

    executor = submitit.SlurmExecutor(folder=folder(store))
    options: dict[str, Any] = {name: value or True for name, value in spec.sbatch.items()} | {"comment": store.url}
    if "no-requeue" not in options:
        options["requeue"] = True
    if spec.sweep:
        options["array"] = sweep.compact(points) + (f"%{spec.parallel}" if spec.parallel else "")
    executor.update_parameters(
        job_name=spec.name,
        use_srun=False,  # the runner starts each attempt as a step of its own
        stderr_to_stdout=True,
        signal_delay_s=int(spec.grace_s + WARNING_S),
        additional_parameters=options,
    )
    # The cluster's own defaults, not submitit's five minutes and its name.
    executor.parameters |= {"time": None, "wckey": None}
    return executor


def sbatch(store: Store, spec: JobSpec, *, dependency: str | None = None, points: Iterable[int] = ()) -> str:
    """Submit a job for a run, or an array for points of a sweep, and write it down; return its number.

    Raises:
        ConfigError: If SLURM refuses it.
    """
    import submitit

    executor = _executor(spec, store, points)
    if dependency:
        executor.parameters["dependency"] = dependency
    said = io.StringIO()
    with clean_environment(), contextlib.redirect_stderr(said):  # submitit prints what sbatch said, and raises less
        try:
            folder(store).mkdir(mode=0o777 if store.remote is None else 0o700, parents=True, exist_ok=True)
            job = executor._submit_command(command(store)).job_id
        except OSError as error:
            raise explain(error, f"cannot write the job's script into {folder(store)}") from None
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            hint = "; scontrol show config | grep MaxArraySize tells how large an array may be" if spec.sweep else ""
            raise ConfigError(f"SLURM refused the job: {_said(said.getvalue() or str(error))}{hint}") from None
    told = {"array": sweep.compact(points)} if spec.sweep else {}
    try:
        record(store, "job", id=str(job), backend=BACKEND, by=who(), **told)
        # SLURM has its own copy; a sweep of any size is five files. submitit leaves a link under its temporary name.
        for path in folder(store).glob("*.sh" if spec.sweep else ".*.sh"):
            path.unlink(missing_ok=True)
        mirror.carry_described(store)
    except (JobkitError, OSError) as error:
        say(f"job {job} is submitted, and writes itself down when it starts: {error}")
    return str(job)


def _said(text: str) -> str:
    """Put what sbatch said into one line."""
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in text.splitlines()]
    return "; ".join(filter(None, lines))[:400]


@contextlib.contextmanager
def clean_environment() -> Any:
    """Hide what belongs to a run that this process is part of: sbatch hands the environment on."""
    # What SLURM says of a job srun would take for orders, and a program for its own. What a person tells srun stays.
    inside = "SLURM_JOB_ID" in os.environ
    kept = {name for name in contract.handed_on(os.environ) if not (inside and _OF_JOB.match(name))}
    hidden = {name: os.environ.pop(name) for name in set(os.environ) - kept}
    try:
        yield
    finally:
        os.environ.update(hidden)


_OF_JOB = re.compile(
    r"SLURM_(JOBID|JOB_|STEP|ARRAY_|TASK|NTASKS|NPROCS|NNODES|NODEID|NODELIST|NODE_ALIASES|PROCID|LOCALID|GTIDS|LAUNCH_"
    r"|SRUN_|SUBMIT_|CPUS_|CPU_BIND|MEM_PER_|GPUS|RESTART_COUNT|TOPOLOGY_|PRIO_PROCESS|WORKING_CLUSTER)"
)
"""What SLURM tells a job and its steps of themselves."""


def jobs(store: Store) -> list[str]:
    """List the numbers of a run's jobs that are in its ledger, oldest first; of a point also its tasks of arrays."""
    own = run_status.jobs(store, BACKEND)
    place = specs.sweep_of(store)
    if place is not None:
        told = [event for event in run_status.events(place[0]) if event["event"] == "job" and "array" in event]
        own += [f"{event['id']}_{place[1]}" for event in told if place[1] in sweep.expand(str(event["array"]))]
    return sorted(set(own), key=scontrol.number)


def queued(stores: Sequence[Store]) -> dict[str, list[Job]]:
    """Ask SLURM once for the jobs of any number of runs that it still knows, oldest first, by the run's URL.

    Also those that a submit, killed the moment after, did not write down.

    Raises:
        JobkitError: If SLURM does not answer.
    """
    found: dict[str, list[Job]] = defaultdict(list)
    for job in scontrol.queue() if stores else []:
        task = f"/{contract.POINTS}/{job.id.partition('_')[2]}" if "_" in job.id else ""
        for key in {job.id, job.comment + task} - {""}:
            found[key].append(job)
    mine = {}
    for store in stores:
        known = {job.id: job for key in (store.url, *jobs(store)) for job in found.get(key, ())}
        mine[store.url] = sorted(known.values(), key=lambda job: scontrol.number(job.id))
    return mine


def jobs_of(stores: Sequence[Store]) -> dict[str, Job]:
    """Return the job that counts, by the run's URL: the newest that is active, else the newest.

    A job that SLURM has forgotten is as the accounting says, GONE without one; where SLURM does not answer it is
    UNKNOWN.
    """
    try:
        known = queued([store for store in stores if run_status.last_life_event(store).get("event") != "ended"])
    except JobkitError as error:
        unknown = str(error)
        return {store.url: Job((jobs(store) or [""])[-1], "UNKNOWN", unknown) for store in stores}
    found = {}
    for store in stores:
        table = known.get(store.url, [])
        active = [job for job in table if job.active]
        forgotten = Job((jobs(store) or [""])[-1], "GONE")
        found[store.url] = active[-1] if active else table[-1] if table else forgotten
    # Of those whose end is not written down; SLURM forgets a job minutes after its end, its accounting does not.
    gone = [store.url for store in stores if store.url in known and found[store.url].state == "GONE"]
    told = scontrol.accounted(found[url].id for url in gone)
    return found | {url: told[found[url].id] for url in gone if found[url].id in told}


def _status(stores: Sequence[Store]) -> dict[str, State]:
    jobs = jobs_of(stores)
    return {store.url: run_status.status(store, job=jobs[store.url]).state for store in stores}


def resume(url: str | os.PathLike[str], *, clear_cancel: bool = True) -> State:
    """Submit a job for a run that has none, an array for a sweep; what is committed is where it goes on.

    Raises:
        ConfigError: If the run, or a point of the sweep, is alive, or SLURM refuses.
    """
    store = open_run(url)
    spec = specs.read(store)
    members = specs.points(store, spec)
    cancels = {one: cancel_content(one) for one in {store, *members}}
    states = _status(members)
    left = [one for one in members if states[one.url] is not State.DONE]
    if not left:
        return State.DONE
    _refuse_alive(left)
    check(spec.sbatch, grace_s=spec.grace_s)
    if not spec.sweep:
        make_point(store)
    for one in {store, *left}:
        if clear_cancel and specs.exists(one):
            take_back_cancel(one, cancels[one])
    for one in left:
        if specs.exists(one):
            record_resumed(one, afresh=True)
    sbatch(store, spec, points=[members.index(one) for one in left])
    return State.QUEUED


def refuse_alive(store: Store) -> None:
    """Raise ConfigError if a run, or a point of a sweep, has a job that is not over, or nobody can tell."""
    _refuse_alive(specs.points(store, specs.read(store)))


def _refuse_alive(stores: Sequence[Store]) -> None:
    try:
        known = queued(stores)
    except JobkitError as error:
        raise ConfigError(f"cannot tell whether run {stores[0].url} is alive: {error}; try again") from None
    for one in stores:
        for job in known[one.url][-1:]:
            if job.active:
                raise ConfigError(
                    f"run {one.url} is alive: job {job.id} is {job.state.lower()}: 'jobkit logs -f {one.url}' or "
                    f"'jobkit cancel {one.url}'"
                )


def cancel(
    url: str | os.PathLike[str],
    *,
    wait: bool = True,
    word: str = "cancelled",
    progress: Callable[[str], None] = lambda text: None,
) -> State:
    """End a run, or all points of a sweep, for good: they get their grace, then SLURM is told to insist.

    Durability: on return cancel.json is on storage; nothing overrules it but `resume`.

    Raises:
        ConfigError: If the run is already done.
        SlurmError: If SLURM does not answer; the cancel stands all the same.
    """
    store = open_run(url)
    spec = specs.read(store)
    members = specs.points(store, spec)
    states = _status(members)
    if set(states.values()) == {State.DONE}:
        raise ConfigError(f"run {store.url} is already done; there is nothing to cancel")
    if not spec.sweep:
        make_point(store)
    content, asked = ask_to_cancel(store, word), {}
    # After the sweep's own: a point that is made later looks for that one.
    if spec.sweep:
        members = [one for one in members if not states[one.url].over]
        asked = {one: ask_to_cancel(one, word) for one in filter(specs.exists, members)}
    _stop(members, grace_s=spec.grace_s, wait=wait, progress=progress)
    for one in filter(specs.exists, members if wait else ()):
        end_cancelled(one, asked.get(one, content))
    after = set(_status(members).values())
    return next((state for state in after if not state.over), State.DONE if after == {State.DONE} else State.CANCELLED)


def _stop(members: Sequence[Store], *, grace_s: float, wait: bool, progress: Callable[[str], None]) -> None:
    """End the jobs of runs; return when none is left, or at once."""
    asked = time.monotonic()
    told: set[str] = set()
    wakers = {f"{WAKER}{one.url}" for one in members}
    _tell([job.id for job in scontrol.queue() if job.active and job.comment in wakers])
    while True:
        active = {job.id: job for table in queued(members).values() for job in table if job.active}
        if not active:
            return
        insist = time.monotonic() - asked > grace_s
        ended = [job.id for job in active.values() if job.pending or (insist and f"{job.id}!" not in told)]
        asked_now = [job.id for job in active.values() if job.state == "RUNNING" and job.id not in {*told, *ended}]
        if asked_now and wait and not told:
            shown = f"job{'s' * (len(asked_now) > 1)} {', '.join(asked_now[:5])}"
            progress(f"waiting for {shown} to save and stop (killed after {show_duration(grace_s)})")
        told |= {f"{job}!" for job in ended} | set(asked_now)
        _tell(ended)
        _tell(asked_now, "--signal=TERM")
        if not wait:
            return
        time.sleep(_POLL_S)


def _tell(jobs: Sequence[str], *options: str) -> None:
    if jobs:
        with contextlib.suppress(SlurmError):  # one has ended this very moment
            scontrol.run("scancel", *options, *jobs)
