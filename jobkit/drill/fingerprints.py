"""A drill's eyes inside the program: fingerprints of all that the next step may depend on, saved or not.

At a step boundary it looks at the parts, at Python's and numpy's global generators, at what else the program holds, at
the files that it reads and writes, and at its threads. Two runs that differ can then be told apart by the first thing
in which they do.
"""

import os
import random
import statistics
import sys
import threading
import time
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jobkit import contract, faults
from jobkit.checkpoint import state
from jobkit.checkpoint.kinds import Part
from jobkit.drill.held import LIBRARIES, Outside, crc_of, kind_of, leaves, of_torch, own
from jobkit.drill.looks import Kind, Look
from jobkit.drill.settings import OPEN, Drill
from jobkit.rundir.ledger import Ledger

_LONG_S = 0.1
"""A step is a long one if it takes that much longer than the usual, and four times as long."""


class Probe:
    """Looks at the steps that a drill names, and does what else a drill asks at each step.

    Args:
        drill: What is asked.
        ledger: Where fingerprints go, as `probed` events.
    """

    def __init__(self, drill: Drill, ledger: Ledger) -> None:
        self._drill, self._ledger = drill, ledger
        self._wanted = set(drill.probe)
        self._looked: set[int] = set()
        self._begun = self._found_donated = False
        self._files = _Files(ledger.path.parents[2]) if drill.probe else None
        self._first_step, self._step_began = 0, 0.0
        self._took = array("d")

    def begin_loop(self, total: int, expected: int | None) -> int:
        """Begin a loop of `steps()` or `epochs()`; return at which step it ends in this drill.

        Args:
            total: Steps of the whole run; OPEN where only the data tells.
            expected: What the total will be then, as far as the data tells.
        """
        known = expected if total == OPEN else total
        self._ledger.append("loop", **{"open": True} if known is None else {"total": known})
        return self.ends(total)

    def ends(self, total: int) -> int:
        """Return at which step a loop of `total` steps, of the whole run, ends in this drill."""
        return self._drill.ends(total)

    def saved(self, step: int) -> None:
        """Look at a step that is being saved and at the two after it: the next attempt may begin there."""
        if self._drill.probe:
            self._wanted |= {step, step + 1, step + 2}

    def stopped(self, step: int, parts: Mapping[str, Part], given: Mapping[str, Any]) -> None:
        """Look at the step after which an attempt ends on a notice."""
        if self._drill.probe:
            self._look_once(step, parts, given)

    def begin_step(self, step: int, parts: Mapping[str, Part], given: Mapping[str, Any]) -> None:
        """Do what is due before a step of `steps()`.

        Args:
            step: Completed steps.
            parts: The run's parts.
            given: What the program gave as parts, by name.
        """
        if not self._found_donated and (gone := state.donated(parts)):
            self._found_donated = True  # the first boundary that cannot be saved, whether or not something is due there
            self._ledger.append("donated", durable=True, step=step, leaves=gone[:9])
        self.begin_round(step, parts, given)
        if self._drill.pace_s:
            time.sleep(self._drill.pace_s)
        faults.reach("step")
        if not self._took:
            self._first_step = step
        self._step_began = time.monotonic()

    def end_step(self) -> None:
        """Measure what the program did in a step."""
        self._took.append(time.monotonic() - self._step_began)

    def close(self) -> None:
        """Write down which steps took much longer than usual, an evaluation, say; the first one compiles."""
        took = list(enumerate(self._took, self._first_step))[1:]
        if took:
            usual_s = statistics.median(seconds for _, seconds in took)
            slow = [
                (step, round(seconds, 3)) for step, seconds in took if seconds > usual_s + max(3 * usual_s, _LONG_S)
            ]
            self._ledger.append("step_times", usual_s=round(usual_s, 6), slow=slow[-9:])

    def begin_round(self, step: int, parts: Mapping[str, Part], given: Mapping[str, Any]) -> None:
        """Look if it is due, before a step, or before a round of a loop of the program's own."""
        if not self._begun:
            self._begun = True
            self.saved(step)
        if step in self._wanted:
            self._look_once(step, parts, given)

    def _look_once(self, step: int, parts: Mapping[str, Part], given: Mapping[str, Any]) -> None:
        if step in self._looked:
            return
        self._looked.add(step)
        try:
            self.look(step, parts, given)
        except Exception as error:  # whatever the program's own objects raise: it must not end the training
            self._ledger.append("probe_failed", step=step, error=f"{type(error).__name__}: {error}"[:300])

    def look(self, step: int, parts: Mapping[str, Part], given: Mapping[str, Any]) -> None:
        """Write down fingerprints of all there is."""
        # A pytree lives in `run.state`: what the program calls by the same name is another thing after the first step.
        seen = {id(value) for name, value in given.items() if parts[name].kind != "value"}
        each = {name: list(leaves(part)) for name, part in parts.items()}
        outside = Outside(seen, {crc for part in each.values() for _, crc in part})
        outside.walk(sys._getframe(1))
        look = Look(
            step=step,
            parts={f"{name}/{key}".rstrip("/"): crc for name, part in each.items() for key, crc in part},
            outside=outside.variables,
            rngs=[name for name, part in parts.items() if kind_of(name, given.get(name), part) is Kind.RNG],
            random=crc_of(repr(random.getstate())),
            numpy=crc_of(repr(np.random.get_state())),
            torch=of_torch(getattr(sys.modules.get("torch"), "default_generator", None)) or "",
            drawn=_drawn_from(),
            files=self._files.used() if self._files is not None else {},
            threads=_threads(),
        )
        self._ledger.append("probed", **look.to_event())


class _Files:
    """What files the program has opened, for reading and for writing, from here on: an audit hook tells.

    Args:
        run: The run directory.
    """

    _NOT = ("/proc/", "/sys/", "/dev/", "/etc/", "/usr/", f"{sys.prefix}/", f"{sys.base_prefix}/")
    _MOST = 1000

    def __init__(self, run: Path) -> None:
        self._run = f"{run}/"
        self._opened: dict[str, set[str]] = {}
        sys.addaudithook(self._note)

    def used(self) -> dict[str, str]:
        """Return by name how each was opened: 'r', 'w' or 'rw'; below the run directory the name is relative."""
        files = {}
        for path, ways in list(self._opened.items()):
            name = path.removeprefix(self._run)
            if not os.path.isabs(name):
                parts = name.split("/")
                if parts[0] == contract.CODE:
                    name = "/".join(parts[2:])
                elif contract.is_own(parts[0]):
                    continue
            if name:
                files[name] = "".join(sorted(ways))
        return files

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or len(self._opened) >= self._MOST:
            return
        path, _, flags = arguments
        if not isinstance(path, str | bytes) or threading.current_thread().name.startswith("jobkit"):
            return
        name = os.path.abspath(os.fsdecode(path))
        foreign = name.startswith(self._NOT) or any(part in name for part in LIBRARIES)
        if not foreign and not name.endswith((".py", ".pyc", ".so")):
            ways = {os.O_RDONLY: "r", os.O_WRONLY: "w"}.get(flags & os.O_ACCMODE, "rw")
            self._opened.setdefault(name, set()).update(ways)


def _drawn_from() -> list[str]:
    """Name the global generators that have been drawn from: where they are seeded, they stand at the end of a block."""
    ends = (623, 624)  # numpy begins at 623 where nobody has seeded it
    positions = {"random": random.getstate()[1][-1], "numpy": np.random.get_state()[2]}  # type: ignore[index]
    return [name for name, position in positions.items() if position not in ends]


def _threads() -> list[str]:
    """Name the program's own functions that run in threads."""
    frames, names = sys._current_frames(), set()
    for thread in threading.enumerate():
        frame, outermost = frames.get(thread.ident or 0), None
        while frame is not None:
            outermost = frame.f_code if own(frame.f_code.co_filename) else outermost
            frame = frame.f_back
        if outermost is not None and thread is not threading.main_thread():
            names.add(f"{outermost.co_name} in {Path(outermost.co_filename).name}")
    return sorted(names)
