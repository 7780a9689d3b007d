"""Ledgers written by hand: a run directory with exactly the events that a test names, at the times it names."""

import json
from pathlib import Path
from typing import Any

from jobkit import contract
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.store import Store


class Written:
    """A run directory whose history a test makes up.

    Args:
        path: The run directory.
        price: `price_per_hour` in run.json.
    """

    def __init__(self, path: Path, *, price: float | None = None, grace_s: float = 30.0) -> None:
        self.path, self.store = path, Store(path)
        spec = {"command": ["python", "train.py"], "run": str(path), "name": path.name, "grace_s": grace_s}
        told: dict[str, Any] = {"version": 1, "jobkit": "0.1.0", "backend": "local", "created": 0.0, "spec": spec}
        self.store.write(contract.RUN_JSON, json.dumps(told | ({} if price is None else {"price_per_hour": price})))

    def launcher(self, t: float, event: str, **fields: Any) -> None:
        """Write an event of the launching side."""
        self._append(contract.EVENTS, t, event, fields)

    def supervisor(self, attempt: int, t: float, event: str, **fields: Any) -> None:
        """Write an event of an attempt's supervisor."""
        self._append(contract.events_file(attempt, "supervisor"), t, event, fields)

    def program(self, attempt: int, t: float, event: str, **fields: Any) -> None:
        """Write an event of an attempt's process 0."""
        self._append(contract.events_file(attempt, 0), t, event, fields)

    def writer(self, attempt: int, writer: str, t: float, event: str, **fields: Any) -> None:
        """Write an event of any writer of an attempt."""
        self._append(contract.events_file(attempt, writer), t, event, fields)

    def outcome(self, attempt: int, **fields: Any) -> None:
        """Write how an attempt ended."""
        self.store.write(
            f"{contract.attempt_dir(attempt)}/{contract.OUTCOME}", json.dumps({"attempt": attempt} | fields)
        )

    def write(self, name: str, events: list[dict[str, Any]]) -> None:
        """Write a whole ledger at once, for a history that is long."""
        path = self.store.file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(event, separators=(",", ":")) + "\n" for event in events))

    def _append(self, name: str, t: float, event: str, fields: dict[str, Any]) -> None:
        ledger = Ledger(self.store.file(name), clock=lambda: t)
        ledger.append(event, **fields)
        ledger.close()


def smooth(path: Path) -> Written:
    """Write the history of a run that nothing interrupted: 100 steps, one save at step 50."""
    run = Written(path)
    run.launcher(1000, "submitted", command=["python", "train.py"])
    run.supervisor(0, 1010, "started", pid=1)
    run.program(0, 1012, "opened")
    run.program(0, 1015, "fresh", bytes=4_000, step=0)
    run.program(0, 1018, "saved", step=0, reason="start", blocking_s=1.0, durable_s=2.0, bytes=4_000)
    run.program(0, 1020, "first_step", step=1)
    run.program(0, 1020, "compiled", hits=3, misses=1, seconds=2.5)
    for step in range(1, 100, 7):
        run.program(0, 1020 + step * 0.75, "metrics", step=step, values={"loss": 3 / step})
    run.program(0, 1060, "saved", step=50, reason="interval", blocking_s=2.0, durable_s=5.0, bytes=4_000)
    run.program(0, 1100, "saved", step=100, reason="end", blocking_s=0.5, durable_s=5.0, bytes=4_200)
    run.program(0, 1100, "finished", step=100)
    run.supervisor(0, 1102, "exited", exit_code=0, outcome="done", reason="finished")
    run.outcome(0, outcome="done", reason="finished", exit_code=0, step=100, committed_step=100, ended=1102.0)
    run.launcher(1103, "decision", action="stop", delay_s=0.0, reason="done")
    run.launcher(1103, "ended", state="done", reason="done")
    return run


def interrupted(path: Path) -> Written:
    """Write the history of a run on a cluster that was killed, then preempted; a node costs 36 an hour."""
    run = Written(path, price=36.0)
    run.launcher(0, "submitted")
    run.launcher(60, "job_started", job="7", restarts=0, nodes="n1")
    # Attempt 0 is killed at step 80 of which 50 are committed.
    run.supervisor(0, 70, "started", pid=1)
    run.program(0, 75, "opened")
    run.program(0, 80, "fresh", bytes=1_000, step=0)
    run.program(0, 90, "first_step", step=1)
    run.program(0, 144, "saved", step=50, reason="interval", blocking_s=1.0, durable_s=4.0, bytes=1_000)
    for step in range(0, 80, 5):
        run.program(0, 90 + step, "metrics", step=step, values={"loss": 5 / (1 + step / 20)})
    run.supervisor(0, 171, "exited", exit_code=137, outcome="killed", reason="killed by SIGKILL")
    run.outcome(
        0,
        outcome="killed",
        reason="killed by SIGKILL",
        exit_code=137,
        step=80,
        committed_step=50,
        ended=171.0,
        node="n1",
    )
    run.launcher(171, "decision", action="restart", delay_s=9.0, reason="killed")
    # Attempt 1 goes on in the same job and is preempted at step 100.
    run.supervisor(1, 180, "started", pid=2)
    run.program(1, 185, "opened")
    run.program(1, 192, "restored", step=50, seconds=4.0, bytes=1_000)
    run.program(1, 200, "first_step", step=51)
    for step in range(55, 100, 5):
        run.program(1, 150 + step, "metrics", step=step, values={"loss": 5 / (1 + step / 20)})
    run.supervisor(1, 249, "notice", source="SIGTERM")
    run.program(1, 250, "notice", source="SIGTERM", reason="signal", age_s=1.0, step=100)
    run.program(1, 253, "saved", step=100, reason="notice", blocking_s=0.5, durable_s=3.0, bytes=1_000)
    run.program(1, 254, "stopped", step=100, notice_to_commit_s=4.0)
    run.supervisor(1, 255, "exited", exit_code=75, outcome="preempted", reason="stopped on SIGTERM")
    run.outcome(
        1, outcome="preempted", reason="stopped on SIGTERM", exit_code=75, step=100, committed_step=100, ended=255.0
    )
    run.launcher(256, "decision", action="restart", delay_s=0.0, reason="preempted; SLURM preempts the job")
    run.launcher(256, "requeued", job="7", how="requeue")
    # The job waits until 355 and gets to the end.
    run.launcher(355, "job_started", job="7", restarts=1, nodes="n2")
    run.supervisor(2, 357, "started", pid=3)
    run.program(2, 362, "opened")
    run.program(2, 364, "restored", step=100, seconds=1.0, bytes=1_000)
    run.program(2, 370, "first_step", step=101)
    for step in range(105, 130, 5):
        run.program(2, 270 + step, "metrics", step=step, values={"loss": 5 / (1 + step / 20)})
    run.program(2, 400, "saved", step=130, reason="end", blocking_s=0.5, durable_s=1.0, bytes=1_000)
    run.program(2, 400, "finished", step=130)
    run.supervisor(2, 402, "exited", exit_code=0, outcome="done", reason="finished")
    run.outcome(2, outcome="done", reason="finished", exit_code=0, step=130, committed_step=130, ended=402.0)
    run.launcher(402, "ended", state="done", reason="done")
    return run


def troubled(path: Path) -> Written:
    """Write a history without supervisor's words in places: a stall, a notice too late, a resume by hand, a damage."""
    run = Written(path)
    run.launcher(0, "submitted")
    # Attempt 0 hangs at step 40 (committed: 30) and its watchdog ends it.
    run.supervisor(0, 1, "started", pid=1)
    run.program(0, 2, "fresh", step=0)
    run.program(0, 10, "first_step", step=1)
    run.program(0, 42, "saved", step=30, reason="interval", blocking_s=0.0, durable_s=2.0, bytes=10)
    run.program(0, 50, "metrics", step=40, values={"loss": 1.0})
    run.supervisor(0, 110, "stalled", phase="stepping", waited_s=60.0, budget_s=60.0)
    run.supervisor(0, 110, "notice", source="watchdog", reason="no progress for 60 s", deadline_s=30.0)
    run.supervisor(0, 112, "exited", exit_code=76, outcome="stalled", reason="no step for 60 s")
    run.outcome(0, outcome="stalled", reason="no step for 60 s", exit_code=76, step=40, committed_step=30, ended=112.0)
    # Attempt 1 gets a notice that it cannot serve in time; its machine goes down with its supervisor.
    run.supervisor(1, 114, "started", pid=2)
    run.program(1, 118, "restored", step=30, seconds=2.0)
    run.program(1, 120, "first_step", step=31)
    run.program(1, 140, "metrics", step=50, values={"loss": 0.9})
    run.supervisor(1, 141, "notice", source="gce", reason="preempted")
    run.program(1, 142, "notice", source="gce", reason="preempted", age_s=1.0, step=52)
    run.outcome(
        1, outcome="killed", reason="the supervisor was killed", exit_code=137, step=52, committed_step=30, ended=150.0
    )
    run.launcher(151, "ended", state="failed", reason="too many failures")
    # A person resumes it after a while; the newest checkpoint is damaged, and everything begins again.
    run.launcher(1151, "resumed")
    run.supervisor(2, 1152, "started", pid=3)
    run.program(2, 1154, "set_aside", step=30, reason="default/d/0 has another checksum")
    run.program(2, 1155, "fresh", step=0)
    run.program(2, 1160, "first_step", step=1)
    run.program(2, 1170, "metrics", step=11, values={"loss": 2.0})
    return run


def many(path: Path, attempts: int, *, events: int = 200) -> Written:
    """Write the history of a run that is killed again and again; each attempt logs, and loses what it had not saved."""
    run, lines = Written(path), [{"t": 0.0, "event": "submitted"}]
    kept, t = 0, 10.0
    for number in range(attempts):
        begun = "restored" if number else "fresh"
        own: list[dict[str, Any]] = [
            {"t": t + 1, "event": "opened", "pid": 1, "host": "n"},
            {"t": t + 2, "event": begun, "step": kept, "seconds": 0.5, "bytes": 1_000},
            {"t": t + 3, "event": "first_step", "step": kept + 1},
            {"t": t + 3, "event": "compiled", "step": kept + 1, "hits": 1, "misses": 0, "seconds": 0.1},
        ]
        logged = events - 12
        for step in range(kept, kept + logged):
            values = {"loss": 5 / (1 + step), "accuracy": 0.5, "rate": 1e-3}
            own.append({"t": t + 3 + (step - kept) / 4, "event": "metrics", "step": step, "values": values})
        end, reached, kept = t + 4 + logged / 4, kept + logged, kept + logged - logged // 10
        saved = {"reason": "interval", "blocking_s": 0.01, "durable_s": 0.1, "bytes": 1_000}
        own.append({"t": end - 2, "event": "saved", "step": kept, **saved})
        killed = {"exit_code": 137, "outcome": "killed", "reason": "killed by SIGKILL"}
        watched = [
            {"t": t, "event": "started", "pid": 1, "command": "python train.py"},
            {"t": end - 1, "event": "notice", "source": "SIGTERM", "reason": "signal", "deadline_s": 30.0},
            {"t": end, "event": "exited", **killed, "longest_s": {"first_step": 1.5}},
        ]
        run.write(contract.events_file(number, 0), own)
        run.write(contract.events_file(number, "supervisor"), watched)
        run.outcome(number, **killed, step=reached, committed_step=kept, started=t, ended=end, node="n")
        lines.append({"t": end, "event": "decision", "action": "restart", "delay_s": 1.0, "reason": "killed"})
        t = end + 1
    run.write(contract.EVENTS, [*lines, {"t": t, "event": "ended", "state": "failed", "reason": "too many failures"}])
    return run
