"""What a SLURM job runs, `python -m launch.backends.slurm.job RUN`: attempts as srun steps, until the job has to end.

The batch script becomes this process, on the job's first node. SLURM tells the steps of a preemption and of the time
limit, and tells the batch script of neither; so the supervisor in the step serves the notice, and when the step is
over this process asks `scontrol` why, and only then decides: go on in this very allocation, have SLURM start the run
again, or leave it be. A person's cancel is never undone.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from jobkit import contract
from jobkit.contract import Exit, Outcome, State
from jobkit.errors import ConfigError, JobkitError, say
from jobkit.patience import Patience
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from jobkit.supervise.slurm_grace import parse_time
from launch.backends import after
from launch.backends.job_runner import JobRunner
from launch.backends.slurm import bad_nodes as nodes
from launch.backends.slurm import queue, requeue, scontrol
from launch.backends.slurm.batch_script import BACKEND, WARNING_S
from launch.backends.slurm.scontrol import SlurmError
from launch.lifecycle import orphans, restart, run_status
from launch.lifecycle.restart import Cause
from launch.lifecycle.runner import KILLED
from launch.lifecycle.submission import begin_point, open_run, run_as_program
from launch.spec import container
from launch.spec import jobspec as specs
from launch.spec.command import environment
from launch.spec.jobspec import JobSpec

_ASK_S = 2.0
"""slurmctld may take a moment to write down why it has signalled a step."""
_LOOK_S = 2.0
_TRIES = 10
"""How often a job that is to wait behind others is submitted where SLURM refuses it."""
_WAITING_END_S = 90.0
"""How long before its end a job that waits for its run's storage has itself requeued: a try may take half a minute."""


class SlurmRunner(JobRunner):
    """Run attempts inside one job.

    Args:
        store: The run.
        spec: What was submitted.
        job: SLURM_JOB_ID.
        restarts: SLURM_RESTART_COUNT: how often SLURM has started this job again.
    """

    def __init__(self, store: Store, spec: JobSpec, job: str, restarts: int) -> None:
        super().__init__(store, spec, job, BACKEND)
        self._restarts = restarts
        self._successor = ""
        """What makes the run go on after this job, once that is arranged."""
        self._lifted = False
        self._look_at = 0.0

    def _begin(self) -> int | None:
        if (code := super()._begin()) is not None:
            return code
        here = {"job": self._job, "restarts": self._restarts}
        again = any(here.items() <= event.items() for event in run_status.events(self._store))
        self._write_down("job_started", **here, nodes=_nodes())
        if self._restarts and not again:
            self._blame_lost_nodes()
        self._clear()
        ended_by = "the runner was killed" if again else "SLURM ended the job"
        preempted = self._restarts > 0 and not again
        orphans.close_attempts(self._store, ended_by, preempted=preempted)
        cancelled = self._cancelled_before()
        if cancelled is not None:
            return self._end(State.CANCELLED, cancelled)
        return self._wait_for_other() if after.due(self._store, self._spec) else None

    def _wait_for_other(self) -> int | None:
        """See to it that the run begins once the one that it starts after has finished well, or never.

        While that goes on a job behind its newest one takes over from this one, which would hold its nodes for nothing.

        Returns:
            An exit code, unless the run may begin here.
        """
        watch, tries = after.Watch(self._store, self._spec, queue.jobs_of), _TRIES
        while (over := self._over_anywhere()) is None and not self._successor:
            other = watch.look()
            if other.state is State.DONE:
                return None
            if other.state.over:
                return self._end(State.FAILED, other.reason)
            if other.jobs:
                tries -= 1
                self._step_back(other.jobs, insist=not tries)
            self._wait(watch.pause_s)  # of a run that has no job as far as SLURM says, which may not answer
        return self._leave(self._successor, Exit.PREEMPTED) if over is None else self._end(*over)

    def _step_back(self, others: Sequence[str], *, insist: bool) -> None:
        """Have a job behind others begin the run; what SLURM refuses is an error only where that is insisted on."""
        try:
            self._successor = requeue.behind(self._store, self._spec, self._job, others)
        except JobkitError as error:  # one of them was forgotten this very moment, or SLURM is away
            if insist:
                raise
            say(str(error))
        else:
            self._ledger.append("requeued", job=self._job, how=self._successor, durable=True)

    def _says_cancelled(self) -> str:
        return f"job {self._job} was cancelled (scancel)"

    def _facts(self, decision: restart.Decision, why: Cause) -> dict[str, Any]:
        return super()._facts(decision, why) | {"reason": f"{decision.reason}; {_WORDS[why]}", "cause": why}

    def _go_on(self, decision: restart.Decision, why: Cause) -> int | None:
        if why is Cause.REQUEUED:
            self._lift_hold()
            return self._leave("SLURM starts the job again", Exit.PREEMPTED)
        if why is Cause.PROGRAM:
            self._blame_node()
            if self._move_away():
                return self._leave(self._successor, Exit.PREEMPTED)
            self._wait(decision.delay_s)
            return self._leave(self._successor, Exit.PREEMPTED) if self._successor else None
        if (over := self._over_anywhere()) is not None:
            return self._end(*over)
        self._arrange_successor(running=why is not Cause.GONE)
        return self._leave(self._successor, Exit.PREEMPTED)

    def _blame_node(self) -> None:
        """Hold the death of a process against its node, where SLURM had nothing to do with it."""
        outcome = orphans.read_outcome(self._store, self._newest_attempt) or {}
        if self._history[-1].outcome in (Outcome.KILLED, Outcome.STALLED) and "node" in outcome:
            self._write_down("strike", node=outcome["node"], why=outcome.get("reason"))

    def _blame_lost_nodes(self) -> None:
        """Hold it against a node of the job's life before this one that SLURM has given up on."""
        before = [event for event in run_status.events(self._store) if event["event"] == "job_started"][:-1]
        if before:
            for node in scontrol.lost_nodes(str(before[-1].get("nodes", ""))):
                self._write_down("strike", node=node, why="SLURM lost it", lost=True)

    def _move_away(self) -> bool:
        """Leave this allocation for one without the nodes that failed us, if it has any and SLURM has others."""
        here = set(scontrol.hostnames(_nodes()))
        # Ours first: others are spared before them, if all cannot be.
        bad = sorted(nodes.avoid(run_status.events(self._store), time.time()), key=lambda node: node not in here)
        if not bad or bad[0] not in here:
            return False
        try:
            self._successor = requeue.elsewhere(self._store, self._spec, self._job, bad)
        except JobkitError as error:
            say(f"stays on {', '.join(bad)}, which failed it: {error}")
            return False
        self._ledger.append("requeued", job=self._job, how=self._successor, durable=True)
        return True

    def _arrange_successor(self, *, running: bool) -> None:
        """Arrange, once, that the run goes on after this job."""
        if self._successor:
            return
        bad: list[str] = []
        with contextlib.suppress(JobkitError):
            bad = nodes.avoid(run_status.events(self._quick), time.time())
        self._successor = requeue.again(self._quick, self._spec, self._job, running=running, avoid=bad)
        self._ledger.append("requeued", job=self._job, how=self._successor, durable=True)

    def _lift_hold(self) -> None:
        """See to it, once, that the job, which SLURM has requeued, is not held back for minutes."""
        for _ in range(0 if self._lifted else 3):  # SLURM's SIGTERM may hit sbatch too
            try:
                waker = requeue.wake(self._store, self._spec, self._job)
                self._lifted = True
                if waker is not None:
                    self._ledger.append("waker", job=self._job, id=waker, durable=True)
                return
            except JobkitError as error:
                say(f"the job is held back for a while: {error}")

    def _superseded(self) -> str | None:
        """Name what has taken over from this job: a later job of the run, or an attempt that it did not start."""
        newest = max(queue.jobs(self._store), key=scontrol.number, default=self._job)
        if scontrol.number(newest) > scontrol.number(self._job) and newest not in self._successor.split():
            return f"job {newest}"
        return super()._superseded()

    def _leave(self, reason: str, code: int) -> int:
        if code != Exit.PREEMPTED:  # nothing is to come of this job
            scontrol.never_requeue(self._job)
        return super()._leave(reason, code)

    def _while_running(self) -> None:
        """Look after the run's future when SLURM ends the job under a program that may not be through in time.

        Its SIGTERM is no end by itself: why it came is asked when the step is over.
        """
        if self._signals.first is not None:
            self._look_ahead((Cause.TIME_LIMIT, Cause.GONE), running=False)

    def _done_here(self) -> bool:
        return super()._done_here() or bool(self._successor)

    def _bide(self, seconds: float) -> None:
        # SLURM may end the job meanwhile, and tells this process nothing of it.
        self._nap(seconds)
        self._look_ahead((Cause.PREEMPTED, Cause.TIME_LIMIT, Cause.GONE), running=self._signals.first is None)

    def _look_ahead(self, causes: tuple[Cause, ...], *, running: bool) -> None:
        """Arrange that the run goes on, where SLURM ends the job for one of some causes; again, where that fails."""
        if self._successor or self._cancelled() or time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + _LOOK_S
        try:
            why = self._cause()
            if why in causes:
                self._arrange_successor(running=running and why is not Cause.GONE)
            elif why is Cause.REQUEUED:
                self._lift_hold()
            self._signals.first = None
        except JobkitError as error:
            say(str(error))

    def _cause(self) -> Cause:
        job = scontrol.show_job(self._job)
        return scontrol.cause(
            job,
            restarts=self._restarts,
            now=time.time(),
            warned_s=self._spec.grace_s + WARNING_S + 35.0,
            preempt_mode=scontrol.preempt_mode(job),
        )

    def _cause_of(self, outcome: Outcome) -> Cause:
        """Ask SLURM why the step has ended."""
        if outcome is Outcome.DONE or self._cancelled():
            return Cause.PROGRAM
        stopped = outcome in (Outcome.PREEMPTED, Outcome.KILLED)
        deadline = time.monotonic() + (_ASK_S if stopped else 0.0)
        cause = Cause.PROGRAM
        while True:
            try:
                cause = self._cause()
            except SlurmError as error:
                say(str(error))
            if cause is not Cause.PROGRAM or time.monotonic() >= deadline:
                break
            self._nap(0.25)
        limit = cause is Cause.TIME_LIMIT and not stopped and outcome is not Outcome.STORAGE
        return Cause.PROGRAM if limit else cause

    def _cancelled_before(self) -> str | None:
        """Tell whether a person cancelled the job that this one is the successor of."""
        if self._cancelled():
            return run_status.cancel_reason(self._store)
        life = [event for event in run_status.events(self._store) if event["event"] in ("submitted", "resumed", "job")]
        mine = [str(event.get("id")) for event in life].index(self._job)
        if mine == 0 or life[mine - 1]["event"] != "job":  # submitted or resumed by a person, not by a job
            return None
        before = str(life[mine - 1]["id"])
        try:
            state = scontrol.show_job(before).get("JobState", "")
        except JobkitError:  # SLURM has forgotten it: this job has waited for long
            ended = scontrol.accounted([before]).get(before)
            state = "" if ended is None else ended.state
        return f"job {before} was cancelled (scancel)" if state == "CANCELLED" else None

    def _end(self, state: State, reason: str) -> int:
        code = super()._end(state, reason)
        self.empty_home()  # a node keeps its disk; a VM's goes with it
        return code

    # One attempt is one step.

    def _processes(self) -> list[dict[str, str]]:
        tasks = self._tasks()
        if tasks == 1:
            return [{}]
        # Anew for every attempt: the port of the one before may still be taken, and its processes alive.
        where = f"{scontrol.address(os.environ['SLURMD_NODENAME'])}:{processes.free_port()}"
        return [{contract.ENV_PROCESSES: str(tasks), contract.ENV_COORDINATOR: where}]

    def _tasks(self) -> int:
        return int(os.environ.get("SLURM_JOB_NUM_NODES") or 1) * self._spec.tasks_per_node

    def _apart(self) -> bool:
        """Whether tasks on several nodes, which need not share a disk, each make themselves ready."""
        words_of_srun = self._spec.container is not None and self._spec.container.runtime == container.PYXIS
        return self._store.remote is not None and self._tasks() > 1 and not words_of_srun

    def _prepare(self, environ: dict[str, str]) -> tuple[list[str], dict[str, str]]:
        if not self._apart():
            return super()._prepare(environ)
        path = environ.get("PYTHONPATH", "")
        ready = [sys.executable, "-P", "-m", "launch.backends.slurm.step", self._store.url]
        return ready, environment(self._store, environ, path=path) | self._grace()

    def _launcher(self) -> list[str]:
        nodes, per_node = os.environ.get("SLURM_JOB_NUM_NODES") or "1", self._spec.tasks_per_node
        step = ["srun", "--kill-on-bad-exit=1", "--unbuffered", "--export=ALL", f"--nodes={nodes}"]
        step += [f"--ntasks={self._tasks()}", f"--ntasks-per-node={per_node}", "--distribution=block"]
        step += ["--chdir=/"] if self._apart() else []  # the directory that we are in is this node's alone
        cpus = os.environ.get("SLURM_CPUS_PER_TASK")  # srun does not take it from sbatch by itself, since 22.05
        return [*step, f"--cpus-per-task={cpus}"] if cpus else step

    def _hand_down(self, environ: dict[str, str]) -> dict[str, str]:
        return environ  # a step may be on another node, and outlives this process for the time it needs to save

    def _follow(self, started: list[int]) -> int:
        # srun exits 0 when it loses a node: only the supervisors' own word says that a run is done.
        return super()._follow(started) or KILLED

    def _close(self, attempt: int, code: int) -> None:
        read = orphans.read_outcome if self._tasks() == 1 else orphans.of_all_processes
        deadline = time.monotonic() + _ASK_S  # srun may be gone before the supervisors have written how it ended
        while read(self._store, attempt) is None and time.monotonic() < deadline:
            self._nap(0.1)
        super()._close(attempt, code)

    def _grace(self) -> dict[str, str]:
        # SIGTERM comes KillWait before SIGKILL, of a preemption GraceTime earlier still; which one it was is not known.
        grace_s = min(self._spec.grace_s, scontrol.kill_wait_s())
        return {contract.ENV_GRACE: f"{grace_s:g}", contract.ENV_WARNED: f"{self._spec.grace_s:g}"} | self._ends_at()

    def _ends_at(self) -> dict[str, str]:
        """Return when the job's time limit is up, which SLURM itself tells a job only from 23.02 on."""
        try:
            ends_at = parse_time(scontrol.show_job(self._job).get("EndTime", ""))
        except JobkitError:
            return {}
        return {} if ends_at is None else {contract.ENV_ENDS_AT: f"{ends_at:.0f}"}

    def _ask_to_stop(self, started: list[int]) -> None:
        try:
            scontrol.run("scancel", "--signal=TERM", self._job)
        except JobkitError as error:
            say(str(error))


_WORDS = {
    Cause.PROGRAM: "the job goes on",
    Cause.PREEMPTED: "SLURM preempts the job",
    Cause.REQUEUED: "SLURM has requeued the job",
    Cause.TIME_LIMIT: "the job's time limit",
    Cause.CANCELLED: "the job was cancelled",
    Cause.GONE: "SLURM has ended the job",
}


def _nodes() -> str:
    return os.environ.get("SLURM_JOB_NODELIST", "")


class _Waiting:
    """A job whose run cannot be read yet, because its storage does not answer.

    Of such a run no successor can be submitted, since nobody knows how; SLURM can start this very job again.

    Args:
        job: SLURM_JOB_ID.
        restarts: SLURM_RESTART_COUNT.
    """

    def __init__(self, job: str, restarts: int) -> None:
        self._job, self._restarts = job, restarts

    def nap(self, seconds: float) -> None:
        """Wait; where SLURM lets the job run and is about to end it, have it requeued, which ends this process."""
        time.sleep(seconds)
        try:
            job = scontrol.show_job(self._job)
            why = scontrol.cause(job, restarts=self._restarts, now=time.time(), warned_s=_WAITING_END_S)
            if why in (Cause.PREEMPTED, Cause.TIME_LIMIT) and job.get("JobState") == "RUNNING":
                say(f"the run's storage does not answer, and {_WORDS[why]}: requeues the job")
                scontrol.requeue(self._job)
        except JobkitError as error:
            say(str(error))


def main(arguments: list[str]) -> int:
    """Run a run's attempts in this job.

    Args:
        arguments: The run.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)  # meant for the step, which gets it too
    # Of what the job itself was given, not of the run directory: others may write there.
    lines = tuple(map(str, json.loads(os.environ.get(contract.ENV_SETUP) or "[]")))
    for name in set(os.environ) - contract.handed_on(os.environ).keys():
        del os.environ[name]
    job = os.environ.get("SLURM_JOB_ID")
    if len(arguments) != 1 or not job:
        raise ConfigError("this runs inside a SLURM job: use jobkit submit --on slurm")
    told = os.environ.get("SLURM_RESTART_COUNT", "0")
    restarts = int(told) if told.isdecimal() else 0
    patience = Patience(nap=_Waiting(job, restarts).nap)
    store = patience(lambda: open_run(arguments[0])).patient(patience)
    if specs.read(store).sweep:
        task = os.environ["SLURM_ARRAY_TASK_ID"]
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
        point = store.at(f"{store.url}/{contract.POINTS}/{task}")
        if not begin_point(store, point):
            say("the sweep was cancelled")
            return int(Exit.DONE)
        store = point
    spec = msgspec.structs.replace(specs.read(store), setup=lines)
    return SlurmRunner(store, spec, job, restarts).run()


if __name__ == "__main__":
    run_as_program(main)
