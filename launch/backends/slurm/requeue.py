"""How a run goes on after its SLURM job: requeued, by a successor, on other nodes, and without waiting needlessly.

All of it is called inside the job that has to end.
"""

import contextlib
import os
from collections.abc import Sequence

import msgspec

from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir.store import Store
from jobkit.units import show_duration
from launch.backends.slurm import scontrol
from launch.backends.slurm.batch_script import clean_environment, sbatch
from launch.backends.slurm.queue import WAKER
from launch.backends.slurm.scontrol import SlurmError
from launch.spec.jobspec import JobSpec


def elsewhere(store: Store, spec: JobSpec, job: str, avoid: Sequence[str]) -> str:
    """Have a run go on after its job without some nodes; return what was done, for the ledger.

    As many of the nodes are left out, the worst first, as leave enough that are up: a job that waits for a node to come
    back might wait for ever.

    Raises:
        ConfigError: If not even the worst can be spared.
    """
    for count in range(len(avoid), 0, -1):
        if _could_start(_without(spec, avoid[:count])):
            successor = _succeed(store, _without(spec, avoid[:count]), job)
            return f"submitted job {successor} after job {job}, without {', '.join(avoid[:count])}"
    raise ConfigError(f"SLURM has not enough nodes that are up, without {avoid[0]}")


def _could_start(spec: JobSpec) -> bool:
    """Ask SLURM whether a job could ever start on the nodes that are up now; submits nothing."""
    try:
        with clean_environment():
            scontrol.run("sbatch", "--test-only", "--output=/dev/null", *scontrol.flags(spec.sbatch), "--wrap=true")
    except JobkitError:
        return False
    return True


def _without(spec: JobSpec, avoid: Sequence[str]) -> JobSpec:
    given = spec.sbatch.get("exclude")
    names = ",".join([*([given] if given else []), *avoid])
    return msgspec.structs.replace(spec, sbatch=spec.sbatch | ({"exclude": names} if names else {}))


def again(store: Store, spec: JobSpec, job: str, *, running: bool, avoid: Sequence[str] = ()) -> str:
    """Have a run go on after its job: a requeue, or a successor where that starts sooner; called inside the job.

    A successor looks, when it starts, whether a person cancelled the job before it.

    Args:
        store: The run.
        spec: What was submitted.
        job: The job that has to end.
        running: Whether SLURM lets it run yet; a job that is being ended is never requeued, since that would undo a
            person's cancel.
        avoid: Nodes that a successor leaves out, if SLURM has others.

    Returns:
        What was done, for the ledger.

    Raises:
        JobkitError: If SLURM refuses both.
    """
    why = "since this one is being ended"
    if avoid:
        with contextlib.suppress(ConfigError):
            return elsewhere(store, spec, job, avoid)
    if running:
        try:
            hold_s = scontrol.hold_s()
            if hold_s <= _SHORT_HOLD_S:
                scontrol.requeue(job)
                return f"requeued job {job}"
            why = f"since a requeue is held back for {show_duration(hold_s)}"
        except SlurmError as error:
            why = f"since it cannot be requeued ({error})"
    return f"submitted job {_succeed(store, spec, job)} after job {job}, {why}"


def behind(store: Store, spec: JobSpec, job: str, others: Sequence[str]) -> str:
    """Have a run begin in a job after this one, once other jobs are over; return what was done, for the ledger.

    Raises:
        JobkitError: If SLURM refuses it.
    """
    return f"submitted job {_succeed(store, spec, job, others)} after job {job}, behind {', '.join(others)}"


def _succeed(store: Store, spec: JobSpec, job: str, others: Sequence[str] = ()) -> str:
    """Submit the job that goes on after this one, and after others, which is then not requeued; return its number.

    In this order: killed between the two, SLURM may requeue this job as well, which then finds itself superseded. So it
    does where the grace was over just before; then this job's next life is let make way at once.
    """
    successor = sbatch(store, spec, behind=[job, *others])
    scontrol.never_requeue(job)
    with contextlib.suppress(JobkitError):
        if int(scontrol.show_job(job).get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT", "0")):
            wake(store, spec, job)
    return successor


_SHORT_HOLD_S = 15.0


_WAKE = """\
for look in $(seq 250); do
  shown=$(scontrol -o show job {job}) || exit 0
  case "$shown" in
    *" JobState=PENDING Reason=BeginTime "* | *" JobState=PENDING Reason=None "*)
      sleep 1.1
      exec scontrol update JobId={job} StartTime=now ;;
    *" JobState=COMPLETING "*) sleep 0.2 ;;
    *) exit 0 ;;
  esac
done
"""
"""Waits until SLURM holds a requeued job back, and lets it start; does nothing to one that was cancelled or runs.

Not at once: a node refuses a job that starts in the very second in which it was ended there ("Job credential revoked"),
and SLURM takes that for the job's end. Waiting here, and not with a later StartTime, has SLURM look for room right away
instead of in its next round, which may be a minute off.
"""
_WAKER_NEEDS = ("partition", "account", "qos", "reservation", "clusters")


def wake(store: Store, spec: JobSpec, job: str) -> str | None:
    """Have a job that SLURM has requeued start as soon as there is room, instead of after minutes.

    SLURM holds it back (cred_expire), and only once it has left its nodes can the hold be lifted: by a job of one
    minute and one CPU that is started when there is room again. Without it the hold just stays.

    Returns:
        The number of that job; None if the hold is short.

    Raises:
        JobkitError: If SLURM refuses it.
    """
    if scontrol.hold_s() <= _SHORT_HOLD_S:
        return None
    given = {name: value for name, value in spec.sbatch.items() if name in _WAKER_NEEDS}
    given |= {"nodes": "1", "ntasks": "1", "time": "1", "job-name": "jobkit-wake", "output": "/dev/null"}
    given |= {"comment": f"{WAKER}{store.url}", "wrap": _WAKE.format(job=job)}
    with clean_environment():
        return scontrol.submit("--no-requeue", *scontrol.flags(given))
