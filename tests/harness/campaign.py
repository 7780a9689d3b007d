"""Faults drawn by a seed, put into runs of several machines that share nothing but a bucket; what becomes of the runs.

    python -m tests.harness.campaign --faults 500 --seed 7

A *life* is one run from its first attempt to its end. Each attempt but the last has one fault, at a named point that
one of its processes passes: it stops there (SIGSTOP), the fault is done to whom it is meant for, and who lives goes on.
What would start the run again is done as the runners of VMs do it: process 0's claims the next attempt, and a machine
that comes back says so (`gathering.open_attempt`).

Held of every life: what was once committed on the URL stays, whole, until newer steps replace it; no attempt goes on
from an older step than the newest one there; every attempt ends within a bound; and the end is, bit for bit, that of a
run that nothing befell.
"""

import argparse
import contextlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from jobkit import contract
from jobkit.checkpoint.restore import fetch
from jobkit.errors import JobkitError
from jobkit.rundir import mirror, remote_steps
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from jobkit.supervise.together import gathering
from tests.fakes.gcs_server import GcsServer
from tests.harness import training
from tests.harness.machines import Machines, environment, supervise

OF_PROGRAMS = (
    "before_write", "during_write", "after_data", "before_rename", "after_rename", "before_retention",
    "during_retention", "during_restore", "resumed", "finished",
)  # fmt: skip
OF_SUPERVISORS = ("before_join", "after_join", "before_gathered", "after_gathered", "before_part", "after_part")
KINDS = ("notice to one", "notice to all", "process", "supervisor", "machine", "machine and disk")
BUCKETS = ("well", "slow", "failing")
STEPS, EVERY = 24, 2
_OF_THE_FIRST = ("before_gathered", "before_retention")
_ONCE = ("during_restore", "resumed", "finished", "before_join", "after_join", "before_gathered", "after_gathered")
_REACHED_S = 900.0
"""How long an attempt may take until its fault comes, or its end without one."""
BOUND_S = 240.0
"""How long an attempt may last after its fault, on a machine that has more to do."""
PROGRAM = f"""
import os
from tests.harness import training
training.train_many(os.environ["JOBKIT_RUN"], steps={STEPS}, save_every="{EVERY} steps", pause_s=0.05)
"""


class Fault(NamedTuple):
    """What befalls one attempt: who passes which point for the how-manieth time, what happens then, and to whom."""

    at: int
    point: str
    passes: int
    kind: str
    victim: int
    bucket: str

    def __str__(self) -> str:
        return f"{self.kind} {self.victim} as {self.at} passes {self.point}:{self.passes}, bucket {self.bucket}"


def drawn(chance: random.Random, count: int, *, restored: bool) -> Fault:
    """Draw a fault for an attempt of so many processes.

    Args:
        restored: Whether the attempt has something to restore.
    """
    points = [point for point in OF_PROGRAMS + OF_SUPERVISORS if restored or point != "during_restore"]
    point = chance.choice([point for point in points if point != "finished"])
    at = 0 if point in _OF_THE_FIRST or chance.random() < 0.4 else chance.randrange(count)
    victim = at if chance.random() < 0.5 else chance.randrange(count)
    passes = 1 if point in _ONCE else chance.choice((1, 2, 2))
    return Fault(at, point, passes, chance.choice(KINDS), victim, chance.choice((*BUCKETS, "well")))


class DefectError(AssertionError):
    """Something that must not be."""


class Life:
    """One run on some machines, from its first attempt to its end.

    Args:
        machines: On which it lives.
        server: Of the bucket.
        url: The run.
        say: Gets a line for each attempt.
    """

    def __init__(self, machines: Machines, server: GcsServer, url: str, say: Callable[[str], None]) -> None:
        self._machines, self._server, self._url, self._say = machines, server, url, say
        self._remote = Remote(url)
        self._count = len(list(machines))
        self._number = self._claim()
        self._supervisors: list[subprocess.Popen[bytes]] = []
        self._newest = -1
        self.fired: list[Fault] = []
        self.slowest_s = 0.0
        """From a fault to the end of its attempt, at most."""

    def run(self, chance: random.Random, faults: int) -> None:
        """Live through so many attempts with a fault, and to the end.

        Raises:
            DefectError: If something is not as it must be.
        """
        for _ in range(faults):
            if not self._attempt(drawn(chance, self._count, restored=self._newest >= 0)):
                break
        else:
            if self._attempt(None):
                raise DefectError("an attempt that nothing befell did not end")
        self._check(last=True)

    def _attempt(self, fault: Fault | None) -> bool:
        """Run an attempt to its end; tell whether the run goes on."""
        begun = time.monotonic()
        self._befall_bucket(fault.bucket if fault else "well")
        self._supervisors = [
            supervise(
                machine, self._url, PROGRAM, attempt=self._number, count=self._count,
                **({contract.ENV_FAULT: f"{fault.point}:{fault.passes}@{self._number}=STOP"}
                   if fault and fault.at == machine.index else {}),
            )
            for machine in self._machines
        ]  # fmt: skip
        number = self._number
        stopped = self._until_stopped(fault.at) if fault else 0
        if fault and stopped:
            self._befall(fault, stopped)
            self.fired.append(fault)
        since = time.monotonic()
        while any(supervisor.poll() is None for supervisor in self._supervisors):
            if time.monotonic() - since > BOUND_S:
                raise DefectError(f"attempt {number} has not ended {BOUND_S:g} s after {fault or 'its start'}")
            time.sleep(0.05)
        ended = time.monotonic()
        self.slowest_s = max(self.slowest_s, ended - since if stopped else 0.0)
        self._server.faults.clear()
        codes = [supervisor.returncode for supervisor in self._supervisors]
        what = f"{fault}{'' if stopped else ': not reached'}" if fault else "nothing befalls it"
        self._say(f"attempt {number}: {what}; {codes}, {since - begun:.0f} + {ended - since:.0f} s")
        if older := [step for step in self._resumed(number) if step < self._newest]:
            raise DefectError(f"attempt {number} went on from step {older[0]}; {self._newest} was on the URL")
        self._check(last=False)
        if self._number == number and codes == [0] * self._count and self._is_done():
            return False
        if fault is None:
            raise DefectError(f"an attempt that nothing befell ended with {codes}")
        if self._number == number:
            self._number = self._claim()
        return True

    def _claim(self) -> int:
        """Claim the next attempt, as process 0's runner does."""
        with environment(self._machines[0].environment):
            return mirror.claim(Store(self._url))

    def _is_done(self) -> bool:
        return self._newest == STEPS

    def _until_stopped(self, at: int) -> int:
        """Return the process that has stopped at its point; 0 if the attempt ends, or goes on, without."""
        deadline = time.monotonic() + _REACHED_S
        supervisor = self._supervisors[at]
        while any(one.poll() is None for one in self._supervisors) and time.monotonic() < deadline:
            for pid in (supervisor.pid, *processes.descendants(supervisor.pid)):
                if _state(pid) == "T":
                    return pid
            time.sleep(0.02)
        if any(one.poll() is None for one in self._supervisors):
            raise DefectError(f"attempt {self._number} has neither come to its fault nor ended within {_REACHED_S:g} s")
        return 0

    def _befall(self, fault: Fault, stopped: int) -> None:
        """Do what is to happen, and have who stopped for it go on."""
        victim, machine = self._supervisors[fault.victim], self._machines[fault.victim]
        program = processes.descendants(victim.pid)
        if fault.kind == "notice to one":
            processes.send(victim.pid, signal.SIGTERM)
        elif fault.kind == "notice to all":
            for supervisor in self._supervisors:
                processes.send(supervisor.pid, signal.SIGTERM)
        elif fault.kind == "process" and program:
            for pid in program:
                processes.send(pid, signal.SIGKILL)
        elif fault.kind in ("process", "supervisor"):
            processes.send(victim.pid, signal.SIGKILL)
        else:
            machine.lose(disk=fault.kind.endswith("disk"))
        processes.send(stopped, signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            if not fault.kind.startswith("notice") and victim.wait(1.0 if program else 5.0) == -signal.SIGKILL:
                self._come_back(fault.victim)

    def _come_back(self, index: int) -> None:
        """Do what a runner does whose supervisor, or whose machine, was lost."""
        if index == 0:
            self._number = self._claim()
        else:
            with contextlib.suppress(JobkitError):
                gathering.open_attempt(self._remote, index)

    def _befall_bucket(self, how: str) -> None:
        faults = self._server.faults
        faults.clear()
        if how == "slow":
            faults.latency_s, faults.bandwidth_total = 0.15, 1 << 20
        elif how == "failing":
            faults.fail(503, count=12, match="checkpoints/")
            faults.fail(503, count=6, match="attempts/")
            faults.reset_mid_body(4, match="checkpoints/")
            faults.lose_answer(3, match="^upload")

    def _check(self, *, last: bool) -> None:
        """Look at what is on the URL."""
        there = remote_steps.steps(self._remote)
        newest = max(there, default=-1)
        if newest < self._newest:
            raise DefectError(f"step {self._newest} was committed on the URL; now there are {there}")
        for step in there if last else there[-1:]:
            if wrong := remote_steps.problems(Store(self._url), step):
                raise DefectError(f"step {step} on the URL is damaged: {wrong}")
        self._newest = newest
        if last and newest != STEPS:
            raise DefectError(f"the run ended at step {newest} of {STEPS}")

    def _resumed(self, attempt: int) -> Iterator[int]:
        for machine in self._machines:
            for match in re.finditer(rb"attempt %d resumes at step (\d+) of" % attempt, machine.log.read_bytes()):
                yield int(match[1])


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


class Campaign:
    """Lives, one after the other, on so many machines each.

    Args:
        place: Where their disks and logs are; those of a life in which nothing was wrong go.
        seed: For what is drawn.
        say: Gets a line for each attempt.
    """

    def __init__(self, place: Path, seed: str, say: Callable[[str], None] = print) -> None:
        self._place, self._seed, self._say = place, seed, say
        self._undisturbed: dict[int, str] = {}
        self.fired: list[Fault] = []
        self.defects: list[str] = []
        self.slowest_s = 0.0

    def undisturbed(self, count: int) -> str:
        """Return the digest of what so many processes train that nothing befalls."""
        if count not in self._undisturbed:
            whole = self._place / f"undisturbed-{count}"
            codes = training.join_many(training.start_many(whole, count, steps=STEPS, save_every="12 steps"), 300)
            assert codes == [0] * count, codes
            self._undisturbed[count] = training.digest(whole)
        return self._undisturbed[count]

    def live(self, number: int, count: int, faults: int) -> None:
        """Live one life; write down what of it must not be."""
        place = self._place / f"life-{number}"
        place.mkdir()
        chance = random.Random(f"{self._seed}-{number}")
        self._say(f"life {number} of seed {self._seed}: {count} machines")
        wanted = self.undisturbed(count)
        with Machines(place, count) as machines, machines.bucket() as server:
            life = Life(machines, server, f"gs://bucket/life-{number}", self._say)
            try:
                life.run(chance, faults)
                _gone(machines)
                fetch(Store(f"gs://bucket/life-{number}"), "latest")
                if training.digest(f"gs://bucket/life-{number}") != wanted:
                    raise DefectError("the end is not that of a run that nothing befell")
            except DefectError as defect:
                self.defects.append(f"life {number} of seed {self._seed}: {defect}; its logs are in {place}")
                self._say(f"DEFECT: {self.defects[-1]}")
                for name in server.names():
                    (target := place / "bucket" / name).parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(server.read(name))
            finally:
                self.fired += life.fired
                self.slowest_s = max(self.slowest_s, life.slowest_s)
        if not self.defects or not self.defects[-1].startswith(f"life {number} "):
            shutil.rmtree(place)

    def summary(self) -> str:
        """Say how many faults of which kind there were, and what they did."""
        kinds = Counter((fault.kind, fault.bucket) for fault in self.fired)
        points = Counter(fault.point for fault in self.fired)
        lines = [f"{'':18}" + "".join(f"{bucket:>9}" for bucket in BUCKETS)]
        lines += [f"{kind:18}" + "".join(f"{kinds[kind, bucket]:9}" for bucket in BUCKETS) for kind in KINDS]
        lines += ["", ", ".join(f"{point} {points[point]}" for point in OF_PROGRAMS + OF_SUPERVISORS)]
        lines += [f"{len(self.fired)} faults, {self.slowest_s:.0f} s at most until an attempt had ended"]
        return "\n".join([*lines, f"{len(self.defects)} defects", *self.defects])


def _gone(machines: Machines) -> None:
    """Wait until nothing runs on any machine any more."""
    deadline = time.monotonic() + 60
    while left := [pid for machine in machines for pid in machine.pids()]:
        if time.monotonic() > deadline:
            raise DefectError(f"processes {left} outlive the run")
        time.sleep(0.2)


def main() -> int:
    """Run lives until there were so many faults; return 1 if something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.harness.campaign")
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", default=str(random.randrange(10**6)))
    parser.add_argument("--first", type=int, default=0, help="the first life")
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="jobkit-campaign-"))
    begun = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - begun:6.0f} s {len(campaign.fired):4} faults  {line}", flush=True)

    campaign = Campaign(place, given.seed, say)
    number = given.first
    while len(campaign.fired) < given.faults:
        campaign.live(number, 4 if number % 3 == 2 else 2, faults=6)
        number += 1
    print(campaign.summary())
    if not campaign.defects:
        shutil.rmtree(place)
    return 1 if campaign.defects else 0


if __name__ == "__main__":
    sys.exit(main())
