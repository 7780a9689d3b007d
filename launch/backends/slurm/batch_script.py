"""The batch script of a run's jobs, and its submission: submitit writes and submits it, with sbatch.

What the job then does, requeues included, is in job.py.
"""

import contextlib
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jobkit import contract
from jobkit.errors import ConfigError, JobkitError, say
from jobkit.rundir import mirror
from jobkit.rundir.store import Store, explain
from launch.backends.slurm import scontrol
from launch.backends.slurm.scontrol import SlurmError
from launch.lifecycle.submission import record, runner_environment, who
from launch.spec import sweep
from launch.spec.jobspec import JobSpec

BACKEND = "slurm"
WARNING_S = 60.0
"""SLURM looks at time limits every 30 s: the warning is asked for this much before the grace has to begin."""


def script(spec: JobSpec, store: Store, *, behind: Sequence[str] = ()) -> str:
    """Return the batch script, exactly as it is submitted; for the arguments see `sbatch`."""
    executor = _executor(spec, store, range(sweep.count(spec.sweep)), behind)
    return str(executor._make_submission_file_text(command(store), "jobkit"))


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


def folder(store: Store) -> Path:
    """Return where the script and the job's own output lie: on a disk that login and compute nodes share."""
    if store.remote is None:
        return store.file(contract.SLURM)
    return Path.home() / ".jobkit" / "slurm" / store.path.name


def _executor(spec: JobSpec, store: Store, points: Iterable[int], behind: Sequence[str]) -> Any:
    import submitit

    executor = submitit.SlurmExecutor(folder=folder(store))
    options: dict[str, Any] = {name: value or True for name, value in spec.sbatch.items()} | {"comment": store.url}
    if "no-requeue" not in options:
        options["requeue"] = True
    if spec.sweep:
        options["array"] = sweep.compact(points) + (f"%{spec.parallel}" if spec.parallel else "")
    executor.update_parameters(
        job_name=spec.name,
        setup=_setup(spec.setup) or None,
        use_srun=False,  # the runner starts each attempt as a step of its own
        stderr_to_stdout=True,
        signal_delay_s=int(spec.grace_s + WARNING_S),
        additional_parameters=options,
    )
    # The cluster's own defaults, not submitit's five minutes and its name.
    executor.parameters |= {"time": None, "wckey": None}
    if behind:
        executor.parameters["dependency"] = f"afterany:{':'.join(behind)}"
    return executor


def _setup(lines: Sequence[str]) -> list[str]:
    """Return what a script begins with: the lines as they are, and word of them for a successor's script."""
    told = [f"export {contract.ENV_SETUP}={shlex.quote(json.dumps(lines))}"] if lines else []
    return [*lines, *told]


def sbatch(store: Store, spec: JobSpec, *, behind: Sequence[str] = (), points: Iterable[int] = ()) -> str:
    """Submit a job for a run, or an array for points of a sweep, and write it down; return its number.

    Args:
        store: The run or sweep.
        spec: What was submitted.
        behind: Jobs that have to be over before it starts, however they end.
        points: Of a sweep, those that it is for.

    Raises:
        ConfigError: If SLURM refuses it.
    """
    import submitit

    executor = _executor(spec, store, points, behind)
    text = executor._make_submission_file_text

    def for_owner_alone(line: str, name: str) -> str:
        """Return the script, whose file submitit has just made, and that nothing is in yet."""
        folder(store).joinpath(f".submission_file_{name}.sh").chmod(0o600)
        return str(text(line, name))

    executor._make_submission_file_text = for_owner_alone
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
        finally:
            # SLURM has its own copy. Of a sweep of any size little is left, of lines of --setup nothing: they may hold
            # a secret. submitit leaves a link under its temporary name.
            with contextlib.suppress(OSError):
                for path in folder(store).glob("*.sh" if spec.sweep or spec.setup else ".*.sh"):
                    path.unlink(missing_ok=True)
    extra = {"array": sweep.compact(points)} if spec.sweep else {}
    try:
        record(store, "job", id=str(job), backend=BACKEND, by=who(), **extra)
        mirror.upload_described(store)
    except (JobkitError, OSError) as error:
        say(f"job {job} is submitted, and writes itself down when it starts: {error}")
    except KeyboardInterrupt:  # whoever asked for it sees to the run
        with contextlib.suppress(SlurmError):
            scontrol.run("scancel", str(job))
        raise
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
