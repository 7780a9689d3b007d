"""The loop that counts a run's steps, and what is looked at between two of them."""

import time
from collections.abc import Generator

from jobkit.drill.settings import OPEN
from jobkit.errors import ConfigError
from jobkit.preemption.stop_step import STOP
from jobkit.run.boundary import Boundary, Loop
from jobkit.run.ending import Ending
from jobkit.run.leaving import by_break
from jobkit.run.saving import Saving
from jobkit.run.session import Session


def steps(
    session: Session,
    saving: Saving,
    boundary: Boundary,
    ending: Ending,
    total: int,
    *,
    key: tuple[str, int, str] | None = None,
    expected: int | None = None,
) -> Generator[int, int | None, None]:
    """Count the run's steps; see `Run.steps`.

    Args:
        session: What the attempt has open.
        saving: Saves.
        boundary: What is due between two steps.
        ending: How the training ends.
        total: Steps of the whole run; OPEN where only the data tells. What is sent to the generator takes its place.
        key: Kind, total and data by which an early stop knows the loop, if it is one of epochs.
        expected: What the total will be, as far as the data tells where it is OPEN; None if it does not.
    """
    parts = saving.parts
    if isinstance(total, bool) or not isinstance(total, int) or total < 0:
        raise ConfigError(f"steps({total!r}): give the number of steps of the whole run")
    key = key or ("steps", total, "")
    ending.settle_before(*key)
    if boundary.loop is Loop.OURS:
        raise ConfigError("steps() is already running: one loop at a time")
    saving.warn_of_draws()
    step, probe, ends = session.step, session.probe, expected if total == OPEN else total
    if step < total and ending.stopped_early(*key):
        total = step
    elif probe is not None:
        total = probe.begin_loop(total, expected)
    look, heartbeat, strategy, checkpoints = session.look, session.heartbeat, saving.strategy, session.checkpoints
    if step < total and (
        boundary.stopping or (look.noticed and (session.agreement is None or STOP in session.barrier()))
    ):
        ending.stop()
    again = boundary.loop is Loop.DONE and step >= total
    boundary.loop, boundary.step_begun = Loop.OURS, True
    if not again:
        ending.take_back()
    boundary.look_at_signals()
    session.deadline_saver.enter(step, parts)
    if probe is None and ends is not None:  # a drill's own has the whole
        session.ledger.append("loop", step=step, total=ends)
    hand, given = session.deadline_saver.boundaries, saving.given
    try:
        while step < total:
            if probe is not None:
                probe.begin_step(step, parts, given)
            total = (yield step) or total
            if probe is not None:
                probe.end_step()
            # The work per step when nothing is due: keep it under a microsecond or two.
            step = heartbeat.step = step + 1
            heartbeat.beat()
            now = time.monotonic()
            if (
                look.noticed
                or boundary.asked is not None
                or step >= strategy.next_step
                or now >= strategy.next_s
                or now >= boundary.next_look_s
                or checkpoints.failed
                or not boundary.stepped
            ):
                boundary.come(last=step >= total, stop=ending.stop)
            if not step & hand.between or now - hand.held_s >= hand.from_s:
                hand.hold(step, parts)
            else:
                hand.skip()
    except GeneratorExit:
        ending.leaving.leave(ending.left_steps, sure=by_break())
        raise
    ending.finish()
