"""What the VMs but the first run of a job with several: a process of each attempt that the first one's runner begins.

They have no launcher. Each looks on the run's URL for an attempt in which its place is free, joins it, and when that
has ended waits for the next one, until the run is over: so none of them decides anything, and what a VM exits with
never starts a run again that has ended.
"""

import os
import signal
import subprocess
import time
from typing import Protocol

from jobkit import contract, names
from jobkit.contract import Exit
from jobkit.errors import JobkitError, say
from jobkit.rundir import mirror
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from jobkit.supervise.together import gathering

_ASK_S, _SELDOM_S = 2.0, 10.0
"""How often the URL is asked for the next attempt, at first and later."""
_ALONE_S = 3600.0
"""Without an attempt for so long this VM is given back; the service may start it again."""


def count_restart(remote: Remote, job: str, index: int, restarts: int) -> None:
    """Write down, for the first VM, how often this one was started again.

    Args:
        remote: The run's URL.
        job: The job.
        index: Of this process.
        restarts: How often, in this job.

    Raises:
        JobkitError: If the URL cannot be written.
    """
    if restarts:
        remote.create(f"{contract.RESTARTED}/{job}/{index}-{restarts}", b"\n")


def restarts(remote: Remote, job: str) -> dict[int, int]:
    """Return, of each VM but the first, how often it was started again in a job; see `count_restart`.

    Raises:
        JobkitError: If the URL cannot be read.
    """
    most: dict[int, int] = {}
    for name in remote.find(f"{contract.RESTARTED}/{job}"):
        index, count = map(names.number, name.rpartition("/")[2].partition("-")[::2])
        if index is not None and count is not None:
            most[index] = max(count, most.get(index, 0))
    return most


class Prepares(Protocol):
    """A runner, of which a member takes how an attempt is started."""

    def prepare(self, environ: dict[str, str]) -> tuple[list[str], dict[str, str]]:
        """Make the code ready; return the supervisor's command and environment."""

    def over_here(self) -> int | None:
        """Return the exit code, once no attempt is to come in this job, as far as the ledger of the home says."""


class Member:
    """One VM of several, from its start to the end of the run or of the VM.

    Args:
        store: The run; its home is this process's own.
        runner: Knows how an attempt is started.
        index: Of this process.
    """

    def __init__(self, store: Store, runner: Prepares, index: int) -> None:
        self._store, self._runner, self._index = store, runner, index
        self._signals = processes.Signals(signal.SIGTERM, signal.SIGINT)
        self._since = time.monotonic()

    def run(self) -> int:
        """Take part until the run or the VM ends; return the exit code of the container.

        Signals: main thread only; SIGTERM and SIGINT stop the process of the attempt in good order.
        """
        self._signals.listen()
        while self._signals.first is None:
            try:
                mirror.fetch_decisions(self._store)
                if (code := self._runner.over_here()) is not None:
                    return code
                attempt = gathering.open_attempt(self._store.bucket, self._index)
                if attempt is not None:
                    self._take_part(attempt)
                    self._since = time.monotonic()
            except JobkitError as error:
                say(str(error))
                if error.exit_code == Exit.CONFIG:
                    return int(Exit.FAILED)
            waited_s = time.monotonic() - self._since
            if waited_s > _ALONE_S:
                say(f"no attempt for {waited_s:.0f} s: the first VM does not come back")
                break
            self._signals.wait(_ASK_S if waited_s < 60 else _SELDOM_S)
        return int(Exit.PREEMPTED)

    def _take_part(self, attempt: int) -> None:
        """Run this process of an attempt to its end."""
        mirror.fetch_described(self._store)  # it may go on with other code
        command, environ = self._runner.prepare(dict(os.environ))
        environ |= {contract.ENV_ATTEMPT: str(attempt), contract.ENV_RUNNER: str(os.getpid())}
        supervisor = subprocess.Popen(command, cwd=self._store.path, env=environ, stdin=subprocess.DEVNULL)
        asked = False
        while supervisor.poll() is None:
            self._signals.wait(0.25)
            if self._signals.first is not None and not asked:
                asked = True
                supervisor.send_signal(signal.SIGTERM)
