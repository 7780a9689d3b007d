"""The supervisor's eye on its program's progress: when stall.py calls it stalled, where it hangs, and its end."""

import contextlib
import signal
import time
from pathlib import Path
from typing import Any

from jobkit import contract, names
from jobkit.rundir.ledger import Ledger
from jobkit.supervise import processes, stacks
from jobkit.supervise.heartbeat import Beat, Phase
from jobkit.supervise.pace import Silence
from jobkit.supervise.stall import Known, Stall, Watchdog

_ASKED_S = 30.0
"""A stalled program gets this long to commit what it can, which its threads may still be able to, before SIGKILL."""
_STACKS = 30_000
"""Characters of the stacks that the ledger keeps; the log has all."""


class StallMonitor:
    """Watches over one program.

    Args:
        known: What earlier attempts of the run tell.
        directory: What supervisor and program share.
        ledger: The supervisor's.
        log: The program's log.
    """

    def __init__(self, known: Known, directory: Path, ledger: Ledger, log: Path) -> None:
        self._dog = Watchdog(known, stall_s=contract.stall_s_from())
        self._directory, self._ledger, self._log = directory, ledger, log
        self._kill_at = 0.0
        self._silent_since = 0.0
        self._silence: Silence | None = None
        self.stall: Stall | None = None
        """What was noticed; it stays."""
        self.reason = ""
        """What was noticed, with the place where the program hangs, for a person."""

    def look(self, beat: Beat) -> float | None:
        """Look for a stall; end the program, with all that the supervisor started, when its time is up.

        Returns:
            Once, when a stall is noticed: the seconds that the program has left if it is asked to end; 0 where asking
            is in vain. None at all other times.
        """
        if self.stall is not None:
            if time.monotonic() >= self._kill_at:
                for pid in processes.descendants():
                    processes.send(pid, signal.SIGKILL)
            return None
        # In "t" a debugger holds it: somebody is looking already.
        counts = processes.state(beat.pid) not in ("", "Z", "X", "t")
        self.stall = self._dog.look(beat, time.monotonic(), counts=counts)
        self._note_silence()
        if self.stall is None:
            return None
        self._write_down(self.stall, beat.pid)
        grace_s = contract.grace_s_from(signal.SIGTERM)
        patience_s = _ASKED_S if grace_s is None else min(grace_s, _ASKED_S)
        if self.stall.phase in (Phase.STOPPING, Phase.STOPPED):  # it was asked before
            patience_s = 0.0
        self._kill_at = time.monotonic() + patience_s
        return patience_s

    def _note_silence(self) -> None:
        """Write down once that the program makes no step any more, and once that it does again."""
        before, self._silence = self._silence, self._dog.silence()
        if self._silence is not None and before is None:
            budget_s = self._dog.budget_s(Phase.STEPPING, self._silence.step)
            self._ledger.append(
                "silent",
                step=self._silence.step,
                waited_s=round(self._silence.waited_s, 3),
                usual_s=round(self._silence.usual_s, 6),
                budget_s=None if budget_s is None else round(budget_s, 3),
            )
        elif before is not None and self._silence is None:
            self._ledger.append("heard_again", after_s=round(before.waited_s, 3))

    def _write_down(self, stall: Stall, pid: int) -> None:
        """Find out where a stalled program hangs, and say so in the log and in the ledger."""
        self._silent_since = time.time() - stall.waited_s
        state = processes.state(pid)
        text = stacks.take(self._directory, pid)
        frame = stacks.innermost(text)
        how = {"T": "stopped by a signal", "D": "hanging in the kernel, on a disk or device"}.get(state, "")
        self.reason = ", ".join(word for word in (str(stall), frame and f"in {frame}", how) if word)
        with contextlib.suppress(OSError), open(self._log, "ab", buffering=0, opener=names.opener) as log:
            log.write(f"jobkit: {self.reason}; its Python stacks:\n{text or 'it does not answer'}\n".encode())
        self._ledger.append(
            "stalled",
            durable=True,
            phase=stall.phase.name.lower(),
            step=stall.step,
            waited_s=round(stall.waited_s, 3),
            budget_s=round(stall.budget_s, 3),
            frame=frame,
            state=state,
            stacks=text[:_STACKS],
        )

    @property
    def outcome(self) -> dict[str, Any]:
        """What an attempt's outcome says of a stall: since when there was no progress, in seconds since the epoch."""
        return {} if self.stall is None else {"silent_since": self._silent_since}

    @property
    def longest(self) -> dict[str, Any]:
        """What `exited` says for later attempts to learn from.

        That is the longest time without progress in each phase that ended well, and the longest step.
        """
        phases = {
            phase.name.lower(): round(seconds, 3) for phase, seconds in self._dog.longest_s.items() if seconds >= 1
        }
        return {"longest_s": phases, "longest_step_s": round(self._dog.pace.longest_s, 3)}
