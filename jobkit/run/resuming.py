"""How a run gets its parts: those that the program gives, and what a checkpoint holds of them."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from jobkit.checkpoint import from_orbax
from jobkit.checkpoint.first_step_check import FirstStep, FirstStepCheck
from jobkit.checkpoint.kinds import part_of
from jobkit.checkpoint.restore import bring, find_step
from jobkit.errors import ConfigError, say
from jobkit.run.boundary import Boundary
from jobkit.run.optimizer_check import has_optimizer
from jobkit.run.saving import Saving
from jobkit.run.session import Session
from jobkit.rundir import commits, remote_steps
from jobkit.rundir.apart.parts import drop_partial
from jobkit.rundir.commits import sweep
from jobkit.rundir.loops import EarlyStop, Loops
from jobkit.supervise.heartbeat import Phase


def resume(
    session: Session,
    saving: Saving,
    boundary: Boundary,
    given: Mapping[str, Any],
    start_from: str | os.PathLike[str] | None,
) -> None:
    """Take the run's parts, and restore them if there is a checkpoint; see `Run.resume`."""
    without = "optimizer" in given and given["optimizer"] is None
    if without:
        given = {name: value for name, value in given.items() if name != "optimizer"}
    parts = {name: part_of(name, value) for name, value in given.items()}
    if not without and "optax" in sys.modules and not has_optimizer(given):
        raise ConfigError(
            "resume() was given no optimizer state, without which a resumed training goes another way: "
            "resume(..., optimizer=optimizer), or optimizer=None if this run has none"
        )
    if "step" in given:
        raise ConfigError("no part can be named 'step': that is load()'s own word; choose another name")
    saving.positions = {name: value for name, value in given.items() if parts[name].kind == "object"}
    if session.probe is not None:
        saving.given = given
    checkpoints, heartbeat = session.checkpoints, session.heartbeat
    heartbeat.enter(Phase.RESTORING)
    # A drill has to know it of its last step too.
    checkpoints.first_step_check = FirstStepCheck(
        session.store, given, busy=lambda: session.listener.noticed and session.probe is None
    )
    begun = time.monotonic()
    snapshot = saving.take(parts)
    checkpoints.check_space(snapshot.nbytes)
    restored = checkpoints.restore_newest(parts, prepare=lambda: _bring_newest(session))
    started = None
    if restored is None and start_from is not None:
        started = from_orbax.start(start_from, parts)
        snapshot = saving.take(parts)
    seconds = round(time.monotonic() - begun, 6)
    saving.parts = parts
    saving.note_batches()
    heartbeat.step = restored if restored is not None else started.step if started is not None else 0
    heartbeat.committed_step = checkpoints.committed_step
    heartbeat.enter(Phase.FIRST_STEP)
    saving.open_interval()
    saving.begin_interval()
    if restored is None:
        session.ledger.append("fresh", bytes=snapshot.nbytes, step=session.step)
        if started is not None:
            _note_start(session, os.fspath(start_from or ""), started)
        # At once, so that storage is proven before hours are spent, and a state that was not seeded survives.
        checkpoints.save(snapshot, session.step, reason="start", metrics={})
    else:
        session.ledger.append("restored", step=restored, seconds=seconds, bytes=snapshot.nbytes)
        say(f"attempt {session.attempt} resumes at step {restored} of {session.store.url}")
        checkpoints.loops = Loops(_early_stops(session, restored))
        session.unsaved.go_on(session.store, session.attempt, restored)
    boundary.started_with = None if without else FirstStep(parts)
    if session.group.first:
        session.tracker_feed.start(session.step)
    session.deadline_saver.found_state(snapshot.nbytes)


def _early_stops(session: Session, step: int) -> list[EarlyStop]:
    """Return the early stops that a restored step knows of, the same in all processes."""

    def read() -> Any:
        return msgspec.to_builtins(remote_steps.known(session.store, step).early_stops)

    return msgspec.convert(session.group.share("early_stops", read), list[EarlyStop])


def _bring_newest(session: Session) -> None:
    """Bring the newest step into the home, after tidying up there."""
    sweep(session.store, attempt=session.attempt)
    if session.store.remote is not None:
        if session.group.count == 1:
            drop_partial(session.store)
            remote_steps.fetch_newest(session.store, session.ledger, attempt=session.attempt)
        session.checkpoints.elsewhere = remote_steps.metrics(session.store.remote)


def _note_start(session: Session, url: str, started: from_orbax.Start) -> None:
    session.ledger.append("started_from", url=url, parts=started.parts, fresh=started.fresh, step=session.step)
    rest = f"; as the program made it: {_some(started.fresh)}" if started.fresh else ""
    rest += f"; not taken: {_some(started.unused)}" if started.unused else ""
    say(f"begins at step {session.step} with {', '.join(started.parts)} of {url}{rest}")


def _some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def find(session: Session, step: int | str) -> int:
    """Return the step that `Run.restore` means, once it is in the home: it may be on the run's URL alone.

    Of several processes that share no disk each reads it from there, as far as its own home does not have it.
    """
    remote = session.store.remote
    wanted = session.checkpoints.best_step() if step == "best" else step
    if remote is not None and session.group.count > 1:
        return find_step(session.store, step, apart=True)
    absent = isinstance(wanted, int) and wanted not in commits.steps(session.store)
    if remote is not None and absent and wanted in remote_steps.steps(remote):
        bring(session.store, int(wanted), attempt=session.attempt)
    return find_step(session.store, step)
