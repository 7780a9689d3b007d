"""What is in hand of the last boundaries, should the training thread not reach the next one in time.

At a boundary the parts are held by reference (JAX's arrays never change); the step in progress may do with the live
ones what it likes. A program that donates its state destroys it with every step: then the newest commit has to do.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jobkit.checkpoint import orbax_io
from jobkit.checkpoint.kinds import Held, Part

_SHARE = 0.01
"""What holding may cost of the time of a step."""
_ROOM_BYTES = 1 << 30
"""What may be held of boundaries before the newest: those that the device has yet to get past, and those where another
process may be stuck."""
_SPARE = 0.5
"""How much of the memory that has never been used one boundary of a larger state may take."""
_RUNGS = tuple(4**power for power in range(7))
"""Of the multiples of each, several processes go on holding the last two."""


class Boundaries:
    """The newest boundaries of a loop, by reference.

    Args:
        noticed: Tells whether there is a notice: from then on each boundary is held, whatever that costs.
        several: Whether other processes train too, and may be stuck a step behind.
    """

    def __init__(self, *, noticed: Callable[[], bool], several: bool) -> None:
        self._noticed, self._several = noticed, several
        self.held: dict[int, Mapping[str, Held]] = {}
        """Completed steps -> the parts as they were then: of the newest boundary, and of those before it that the
        device has not got past, or another process perhaps."""
        self.begun = 0
        """Where the loop began, which every process holds, however few of the others."""
        self.from_s = 0.0
        """A boundary is held when the last one that was is so long ago; more often would cost too much."""
        self.held_s = 0.0
        """When a boundary was last held, on the clock of `time.monotonic`."""
        self.between = 0
        """Every boundary is held whose step has none of these bits. Whatever the clocks say, several processes hold the
        same ones so, though they may find holding to cost more or less."""
        self.nbytes = 0
        """Size of the state; 0 before it is known."""
        self.why = "the last boundary was not held: holding one takes longer than a step"
        """Why there may be none to save."""
        self._room = 0
        """How many boundaries may be held before the newest. A large state may have no room beside itself."""
        self._cost_s = float("inf")
        self._held_step = 0

    def begin(self, step: int, parts: Mapping[str, Part]) -> None:
        """Come to the beginning of a loop."""
        self.measure_room()
        self.begun = step
        for _ in range(2):  # the first time tells nothing about the cost
            self.hold(step, parts)

    def hold(self, step: int, parts: Mapping[str, Part]) -> None:
        """Hold the parts as they are at this boundary."""
        begun = time.thread_time()  # of the clock on the wall a busy machine takes more than holding costs
        before = self.held
        try:
            now = {name: part.hold() for name, part in parts.items()}
            # The program may run ahead of the device, and further in one process than in another: what was computed
            # last is held until there is something newer, and what was begun since as far as it is small.
            room = self._room
            keep: list[int] = []
            if self._several:
                keep = kept(before, room, self.begun)
            elif self._noticed() and room:
                keep = sorted(before)[-1:]
            if before and room and not _ready(now):
                computed = max((number for number in before if _ready(before[number])), default=min(before))
                newer = sorted(number for number in before if number > computed)
                keep += [computed, *newer[max(0, len(newer) - room) :]]
            self.held = {number: before[number] for number in sorted({*keep})} | {step: now}
        except Exception as error:  # a part's own get_state may raise anything
            self.why, self.held = f"the last boundary could not be held: {error}", {}
        # A garbage collection must not pass for the cost of it.
        self._cost_s = min(time.thread_time() - begun, 2 * self._cost_s)
        self.from_s = 0.0 if self._noticed() else self._cost_s / _SHARE
        self._space(step)

    def _space(self, step: int) -> None:
        """Find how far apart the steps are that are held, from how long the last ones took."""
        now_s = time.monotonic()
        if step > self._held_step:
            apart = max(1.0, self.from_s * (step - self._held_step) / max(1e-9, now_s - self.held_s))
            self.between = (1 << min(30, math.ceil(math.log2(apart)))) - 1
        self._held_step, self.held_s = step, now_s

    def skip(self) -> None:
        """Come to a boundary too soon after the last one that was held; that one stays, if there is room for both."""
        if self.held and not self._room:
            self.held = {}

    def measure_room(self) -> None:
        """See how much room there is, once the program has used what it uses."""
        self._room = _ROOM_BYTES // max(1, self.nbytes)
        if self._room == 0 and self.nbytes <= _SPARE * orbax_io.spare_bytes():
            self._room = 1

    def wait_for_device(self, step: int, parts: Mapping[str, Part]) -> None:
        """Wait until the device has computed this boundary; meanwhile one that it has can be saved."""
        self.hold(step, parts)
        for leaf in _arrays(self.held.get(step, {})):
            with contextlib.suppress(RuntimeError):  # donated, or failed: who saves it says so
                leaf.block_until_ready()

    def usable(self, held: Mapping[int, Mapping[str, Held]]) -> list[int]:
        """Return the steps that can be saved: those that are computed, or the newest if none is."""
        whole = [step for step in held if not any(leaf.is_deleted() for leaf in _arrays(held[step]))]
        if held and not whole:
            self.why = f"the arrays of step {max(held)} are gone: the step in progress has donated them"
        return [step for step in whole if _ready(held[step])] or whole[-1:]


def kept(steps: Iterable[int], room: int, begun: int) -> list[int]:
    """Return which of the boundaries that one of several processes holds it goes on holding, with the newest one.

    Another process may be stuck a step behind, and hold fewer: every second one, every fourth, ... Of what both could
    hold one is among these, as far as there is room.

    Args:
        steps: The boundaries.
        room: For how many there is room.
        begun: Where the loop began: held by all, it counts as a multiple of everything.
    """
    held = sorted(steps)
    chosen: set[int] = set()
    for rung in _RUNGS:
        chosen.update([step for step in held if step % rung == 0 or step == begun][-2:])
    return sorted(chosen)[-room:] if room else []


def _arrays(held: Mapping[str, Held]) -> list[Any]:
    leaves = (getattr(leaf, "_base_array", leaf) for part in held.values() for leaf in part.leaves)  # of a typed key
    return [leaf for leaf in leaves if hasattr(leaf, "is_ready")]


def _ready(held: Mapping[str, Held]) -> bool:
    """Tell whether the device has computed what is held; the newest first, since that fails soonest."""
    return all(leaf.is_deleted() or leaf.is_ready() for leaf in reversed(_arrays(held)))
