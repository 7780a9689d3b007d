"""The SLURM backend: runs as jobs, submitted from a login node.

A run's jobs are in its ledger; the newest of them is the one that may run attempts (queue.py). Their script is in
batch_script.py, and what they do, requeues included, in job.py.
"""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from jobkit.contract import State
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir.store import Store
from jobkit.units import parse_limit, show_duration
from launch.backends import after
from launch.backends.slurm import batch_script, doctor, queue
from launch.lifecycle import run_status
from launch.lifecycle.run_status import Job
from launch.lifecycle.submission import Plan, cancel_content, end_cancelled, prepare
from launch.lifecycle.verbs import Backend, Cancelled
from launch.spec import container
from launch.spec import jobspec as specs
from launch.spec.command import check_code, in_container
from launch.spec.finding import Finding
from launch.spec.jobspec import JobSpec
from launch.spec.profiles import SBATCH, refuse_foreign


class Slurm(Backend):
    """The SLURM backend.

    Args:
        options: What `sbatch` is to be given, by its long option's name: {"partition": "low", "time": "1:00:00"}; an
            empty value is a switch. By default what the specification has.
    """

    name = batch_script.BACKEND
    options = frozenset({*SBATCH, "sbatch", "container-runtime", "mount", "setup"})
    waits = True
    runtimes = ("apptainer", "singularity", container.PYXIS)

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        self._options = options

    def check(self, spec: JobSpec, *, look: bool = True) -> Plan:
        """See `Backend`. In an image nothing here is looked for."""
        if self._options is not None:
            spec = msgspec.structs.replace(spec, sbatch=dict(self._options))
        refuse_foreign(spec, self.name, self.options)
        check_options(spec.sbatch, grace_s=spec.grace_s)
        if spec.after and "dependency" in spec.sbatch:
            raise ConfigError("--after is a dependency, and --sbatch dependency would replace it: give one of them")
        spec = self._with_image(spec, spec.cwd or os.getcwd())
        plan = prepare(spec, elsewhere=spec.container is not None, look=look)
        if plan.spec.container is not None:
            in_container(plan.store, plan.spec, cwd=Path(plan.spec.cwd), environ={})
        return after.check(self, plan)

    def fit(self, store: Store, spec: JobSpec, *, moved: bool) -> JobSpec:
        """See `Backend`."""
        check_options(spec.sbatch, grace_s=spec.grace_s)
        after.check_resumed(self, store, spec)
        if not moved:
            return spec
        check_code(store.url, spec)
        return self._with_image(spec, os.getcwd())

    def _with_image(self, spec: JobSpec, cwd: str) -> JobSpec:
        """Name an image that is a file by its whole path."""
        if spec.container is None:
            return spec
        container.refuse_foreign(spec.container, self.name, self.runtimes)
        return msgspec.structs.replace(spec, container=container.in_full(spec.container, cwd))

    def examine(self, spec: JobSpec) -> list[Finding]:
        """See `Backend`."""
        partition, qos = (spec.sbatch.get(name) for name in ("partition", "qos"))
        return doctor.examine(partition, qos=qos, grace_s=spec.grace_s)

    def preview(self, plan: Plan) -> str:
        """Return the batch script."""
        return batch_script.script(plan.spec, plan.store, behind=after.jobs_before(self, plan.store, plan.spec))

    def enqueue(self, store: Store, spec: JobSpec, points: Sequence[int]) -> None:
        """See `Backend`: one job, or one array of them."""
        behind = after.jobs_before(self, store, spec)
        batch_script.sbatch(store, spec, behind=behind, points=points if spec.sweep else ())

    def jobs(self, stores: Sequence[Store]) -> Mapping[str, Job]:
        """See `Backend`."""
        return queue.jobs_of(stores)

    def refuse_alive(self, store: Store, *, take_over: bool = False) -> None:
        """See `Backend`. Of a sweep the points that are done do not count: their job may still be leaving."""
        spec = specs.read(store)
        members = specs.points(store, spec)
        queue.refuse_alive([one for one in members if not spec.sweep or not run_status.has_ended(one, State.DONE)])

    def beside(self, store: Store, command: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """See `Backend`: a step of its own in the job, that shares what the attempt has."""
        job = queue.jobs_of([store]).get(store.url)
        if job is None or not job.active or job.pending:
            raise ConfigError(f"no job of {store.url} runs just now: 'jobkit status {store.url}'")
        step = ["srun", f"--jobid={job.id}", "--overlap", "--nodes=1", "--ntasks=1", "--immediate=60"]
        return [*step, *(["--pty"] if sys.stdin.isatty() else []), "--", *command], {}

    def stop(self, cancelled: Cancelled) -> None:
        """See `Backend`: they get their grace, then SLURM is told to insist."""
        store, cancels = cancelled.store, cancelled.cancels

        def standing() -> list[Store]:
            """Return those whose cancel nobody has taken back: the job of a resume is not ended."""
            return [one for one in cancelled.left if cancel_content(one if one in cancels else store) is not None]

        grace_s = specs.read(store).grace_s
        queue.end(standing, grace_s=grace_s, wait=cancelled.wait, progress=cancelled.progress)
        problems = []
        for one in filter(specs.exists, standing() if cancelled.wait else ()):
            try:
                end_cancelled(one, cancels.get(one, cancels[store]))
            except JobkitError as error:  # the others are ended all the same
                problems.append(error)
        if problems:
            raise problems[0]


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


def check_options(options: Mapping[str, str], *, grace_s: float) -> None:
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
    if limit_s is not None and limit_s < 2 * (grace_s + batch_script.WARNING_S):
        raise ConfigError(
            f"--time {options['time']} leaves hardly time to train: the warning comes "
            f"{show_duration(grace_s + batch_script.WARNING_S)} before the limit; give at least twice that"
        )
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise ConfigError(f"{program} is not on PATH: submit from a login node of the cluster")
