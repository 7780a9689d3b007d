"""Supervisors that share nothing but a bucket: how they find each other, lose each other, and meet again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from jobkit import contract
from jobkit.contract import Exit
from jobkit.rundir import mirror
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store
from tests.fakes.gcs_server import GcsServer
from tests.fakes.metadata_server import Gce
from tests.harness import machines
from tests.harness.jobs import children, until

MEETS = "import os; print('meets at', os.environ['JOBKIT_COORDINATOR'])"
HANGS = "import time; print('runs', flush=True); time.sleep(600)"
FAILS = "import time; time.sleep(1); raise SystemExit('its own failure')"


class Attempt:
    """Attempts of a run whose processes are on nodes of their own.

    Args:
        url: The run.
        environment: What leads to the bucket.
        homes: Directories standing for the disks of nodes.
        server: The bucket's.
    """

    def __init__(self, url: str, environment: Mapping[str, str], homes: Path, server: GcsServer) -> None:
        self.url, self.remote, self.server = url, Remote(url), server
        self._environment, self._homes = environment, homes
        self.started: list[subprocess.Popen[str]] = []

    def claim(self) -> int:
        """Claim the next attempt as process 0's node does."""
        return mirror.claim(Store(self.url))

    def start(
        self, index: int, count: int, code: str, *, number: int = 0, node: str = "", **more: str
    ) -> subprocess.Popen[str]:
        """Start the supervisor of one process, on a node that is its own."""
        home = self._homes / (node or f"node-{index}")
        process = subprocess.Popen(
            [sys.executable, "-m", "jobkit.supervise", "--", sys.executable, "-c", code],
            env={
                **os.environ,
                **self._environment,
                contract.ENV_RUN: self.url,
                contract.ENV_HOME: str(home),
                contract.ENV_ATTEMPT: str(number),
                contract.ENV_PROCESS: str(index),
                contract.ENV_PROCESSES: str(count),
                contract.ENV_GATHER: "30",
                **more,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def outcome(self, index: int, number: int = 0) -> dict[str, Any]:
        """Return how a process ended, as its supervisor said on the URL."""
        return dict(json.loads(self.remote.read(contract.process_outcome(number, index))))

    def joined(self, index: int, number: int = 0) -> bool:
        """Tell whether a process has its place."""
        return contract.joined_file(number, index) in self.remote.find(contract.attempt_dir(number))


def end(process: "subprocess.Popen[str]", timeout_s: float = 60.0) -> tuple[int, str]:
    """Wait for a supervisor; return its exit code and what it printed."""
    printed, _ = process.communicate(timeout=timeout_s)
    return process.returncode, printed


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[Attempt]:
    """Yield a run in a new bucket, whose attempt 0 is claimed."""
    with machines.bucket(tmp_path / "node-0") as server:
        made = Attempt(f"gs://bucket/runs/{tmp_path.name}", server.environment(), tmp_path, server)
        assert made.claim() == 0
        yield made
        for process in made.started:
            if process.poll() is None:
                for child in children(process.pid):
                    os.kill(child, signal.SIGKILL)
                process.kill()
                process.communicate()


@pytest.mark.slow
def test_a_late_one_is_waited_for(attempt: Attempt, tmp_path: Path) -> None:
    """Three processes, one of them late, begin together and are told the same place; each home is one's own."""
    early = [attempt.start(index, 3, MEETS, node="one") for index in (0, 2)]
    until(lambda: attempt.joined(0) and attempt.joined(2), "two have come")
    assert [process.poll() for process in early] == [None, None]
    ends = [end(process) for process in (*early, attempt.start(1, 3, MEETS))]
    assert [code for code, _ in ends] == [0, 0, 0], ends
    places = {printed.strip().splitlines()[-1] for _, printed in ends}
    assert len(places) == 1
    assert "meets at " in places.pop()
    assert [attempt.outcome(index)["outcome"] for index in range(3)] == ["done"] * 3
    homes = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(homes) == 2
    assert homes[1] == f"{homes[0]}.process-2"
    assert (tmp_path / "one" / homes[1] / "attempts/0/log-2.txt").exists()
    logs = [name for name in attempt.remote.find("attempts/0") if "/log-" in name]
    assert {name.split("/")[2] for name in logs} == {f"log-{index}.txt.d" for index in range(3)}


@pytest.mark.slow
def test_one_that_never_comes(attempt: Attempt) -> None:
    """All end within the bound as preempted, whom they missed is said, and the one that comes later is too late."""
    here = [attempt.start(index, 3, MEETS, **{contract.ENV_GATHER: "3"}) for index in (0, 1)]
    ends = [end(process) for process in here]
    assert [code for code, _ in ends] == [Exit.PREEMPTED] * 2, ends
    for index in (0, 1):
        told = attempt.outcome(index)
        assert (told["outcome"], told["reason"]) == ("preempted", "process 2 of 3 did not come within 3 s")
    late, printed = end(attempt.start(2, 3, MEETS))
    assert (late, "meets" in printed) == (Exit.PREEMPTED, False)
    assert attempt.outcome(2)["reason"] == "process 2 of 3 did not come within 3 s"


@pytest.mark.slow
def test_a_process_of_an_old_attempt(attempt: Attempt) -> None:
    """What comes for an attempt that a newer one has followed, or for a place that is taken, begins nothing."""
    first = attempt.start(1, 2, MEETS)
    until(lambda: attempt.joined(1), "it has come")
    twin, printed = end(attempt.start(1, 2, MEETS, node="another"))
    assert (twin, "meets" in printed) == (Exit.CONFIG, False)
    assert attempt.claim() == 1
    code, printed = end(first)
    assert (code, "meets" in printed) == (Exit.CONFIG, False)
    assert attempt.outcome(1)["reason"] == "attempt 0 is over: attempt 1 has begun"
    ends = [end(process) for process in [attempt.start(index, 2, MEETS, number=1) for index in (0, 1)]]
    assert [code for code, _ in ends] == [0, 0], ends


POINTS = ("before_join", "after_join", "before_gathered", "after_gathered")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "index"),
    [(point, index) for point in POINTS for index in (0, 1) if (point, index) != ("before_gathered", 1)],
)
def test_sigkill_at_each_point(attempt: Attempt, point: str, index: int) -> None:
    """One is killed while they gather: the other ends within the bound, and both are whole in the next attempt."""
    quick = {contract.ENV_GATHER: "4"}
    killed = attempt.start(index, 2, HANGS, **quick, **{contract.ENV_FAULT: f"{point}@0"})
    other = attempt.start(1 - index, 2, HANGS, **quick)
    assert end(killed)[0] == -signal.SIGKILL
    if point == "after_gathered":  # it waits for one that is dead, as JAX does for a while; a newer attempt tells it
        until(lambda: children(other.pid), "the other one has begun")
    assert attempt.claim() == 1
    before = time.monotonic()
    code, printed = end(other)
    assert time.monotonic() - before < 20
    assert code in (Exit.CONFIG, Exit.PREEMPTED), printed
    ends = [end(process) for process in [attempt.start(one, 2, MEETS, number=1) for one in (0, 1)]]
    assert [code for code, _ in ends] == [0, 0], ends


@pytest.mark.slow
def test_one_that_fails_ends_all(attempt: Attempt) -> None:
    """When one fails the others are ended within 15 s though they hang, and say whose fault it was."""
    failing, hanging = attempt.start(1, 2, FAILS), attempt.start(0, 2, HANGS)
    assert end(failing)[0] == Exit.FAILED
    before = time.monotonic()
    end(hanging)
    assert time.monotonic() - before < 15
    assert attempt.outcome(1)["reason"] == "exit code 1: its own failure"
    notice = attempt.outcome(0)["notice"]
    assert notice == {"source": "peer", "reason": "process 1 ended: exit code 1: its own failure"}


@pytest.mark.slow
def test_a_notice_while_they_gather(attempt: Attempt) -> None:
    """SIGTERM to process 0 before all are there ends all of them at once, as preempted."""
    first, second = attempt.start(0, 3, MEETS), attempt.start(1, 3, MEETS)
    until(lambda: attempt.joined(0) and attempt.joined(1), "two have come")
    before = time.monotonic()
    first.send_signal(signal.SIGTERM)
    ends = [end(process) for process in (first, second)]
    assert [code for code, _ in ends] == [Exit.PREEMPTED] * 2, ends
    assert time.monotonic() - before < 25, "they waited for the third"
    assert attempt.outcome(1)["reason"].startswith("process 0 was stopped: stopped on SIGTERM")


@pytest.mark.slow
def test_process_0_leaves_last(attempt: Attempt) -> None:
    """Process 0 ends when the others have said how they ended, so that whoever reads the outcome has all of them."""
    slow = "import time; time.sleep(4)"
    last, first = attempt.start(1, 2, slow), attempt.start(0, 2, MEETS)
    until(lambda: contract.process_outcome(0, 0) in attempt.remote.find("attempts/0"), "process 0 is through")
    assert contract.process_outcome(0, 1) not in attempt.remote.find("attempts/0")
    assert end(first)[0] == 0
    assert contract.process_outcome(0, 1) in attempt.remote.find("attempts/0")
    assert end(last)[0] == 0


JOINS = "import jobkit; jobkit.initialize()"


@pytest.mark.slow
def test_a_notice_to_one_that_has_not_begun(attempt: Attempt) -> None:
    """SIGTERM during one's imports ends the other, which waits for it in initialize(), at once and as preempted."""
    first, second = attempt.start(0, 2, JOINS), attempt.start(1, 2, HANGS)
    until(lambda: children(first.pid) and children(second.pid), "both have begun", seconds=60)
    before = time.monotonic()
    second.send_signal(signal.SIGTERM)
    ends = [end(process) for process in (first, second)]
    assert [code for code, _ in ends] == [Exit.PREEMPTED] * 2, ends
    assert time.monotonic() - before < 30, "it waited for one that was gone"
    assert attempt.outcome(0)["notice"] == {"source": "peer", "reason": "process 1 ended: stopped on SIGTERM"}


@pytest.mark.slow
def test_one_that_dies_before_jax_knows_it(attempt: Attempt) -> None:
    """A supervisor that is killed when all have come: JAX aborts who waits for it, and that is no failure of theirs."""
    impatient = f"from jobkit import group; group._CONNECT_S = 4; {JOINS}"
    dies = attempt.start(1, 2, JOINS, **{contract.ENV_FAULT: "after_gathered"})
    waits = attempt.start(0, 2, impatient)
    assert end(dies)[0] == -signal.SIGKILL
    until(lambda: contract.process_outcome(0, 0) in attempt.remote.find("attempts/0"), "it has ended", seconds=90)
    assert attempt.claim() == 1  # it waits no longer for the other one's word
    assert end(waits)[0] == Exit.PREEMPTED
    said = attempt.outcome(0)
    assert (said["outcome"], said["notice"]) == ("preempted", None)
    assert said["reason"] == "the processes of this attempt did not all come to jobkit.initialize()"


@pytest.mark.slow
def test_a_notice_to_one_when_all_have_come(attempt: Attempt) -> None:
    """SIGTERM to one that has joined, and has not read yet that all are there, ends the others too."""
    second = attempt.start(1, 2, HANGS)
    until(lambda: attempt.joined(1), "it has come", seconds=60)
    first = attempt.start(0, 2, HANGS)
    until(lambda: contract.gathered_file(0) in attempt.remote.find("attempts/0"), "all have come", seconds=60)
    second.send_signal(signal.SIGTERM)
    ends = [end(process) for process in (first, second)]
    assert [code for code, _ in ends] == [Exit.PREEMPTED] * 2, ends


@pytest.mark.slow
def test_a_machine_that_is_taken_away(attempt: Attempt) -> None:
    """The supervisor stays on it when all is said and done: nothing of the next attempt begins there."""
    with Gce() as cloud:
        there = attempt.start(0, 2, HANGS)
        leaves = attempt.start(1, 2, HANGS, **{contract.ENV_METADATA: "gce"}, **cloud.environment)
        until(lambda: children(there.pid) and children(leaves.pid), "both have begun", seconds=60)
        cloud.preempt()
        assert end(there)[0] == Exit.PREEMPTED
        until(
            lambda: contract.process_outcome(0, 1) in attempt.remote.find("attempts/0"),
            "it has said how it ended",
            seconds=60,
        )
        time.sleep(1.0)
        assert leaves.poll() is None
        leaves.terminate()
        assert end(leaves)[0] == Exit.PREEMPTED
