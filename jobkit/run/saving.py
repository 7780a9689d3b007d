"""The saves of a run that are no emergency: taking the state, saving it, and bearing it where that fails."""

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from jobkit.checkpoint import interval, state
from jobkit.checkpoint.kinds import Held, Part
from jobkit.checkpoint.schedule import SaveEvery
from jobkit.data.batches import Batches
from jobkit.errors import ConfigError, JobkitError, PackageError, SupersededError, UnsavedError, say
from jobkit.run.session import Session
from jobkit.rundir import mirror
from jobkit.supervise import unsaved
from jobkit.supervise.heartbeat import Phase

_ASKED_S = 120.0
"""How far apart the processes may call `save`."""


class Saving:
    """Saves the parts of a run.

    Args:
        session: What the attempt has open.
        strategy: When to save.
    """

    def __init__(self, session: Session, strategy: SaveEvery) -> None:
        self._session, self.strategy = session, strategy
        self.given: Mapping[str, Any] = {}
        """What `resume` was given, for a drill; else nothing."""
        self.positions: dict[str, Any] = {}
        """The objects among what `resume` was given, by name: data, generators."""
        self._resumed_at: dict[str, tuple[int, int]] = {}
        self._parts: dict[str, Part] | None = None
        self._asks = 0

    @property
    def resumed(self) -> bool:
        """Whether the run has its parts."""
        return self._parts is not None

    @property
    def parts(self) -> dict[str, Part]:
        """The run's parts, live.

        Raises:
            ConfigError: If `resume` was not called.
        """
        if self._parts is None:
            raise ConfigError("call run.resume(model=..., optimizer=..., data=...) before the first step")
        return self._parts

    @parts.setter
    def parts(self, parts: dict[str, Part]) -> None:
        self._parts = parts

    def note_batches(self) -> None:
        """Remember where `Batches` are as `resume` leaves them."""
        self._resumed_at = {name: (one.epoch, one.index) for name, one in self._batches()}

    def warn_of_draws(self) -> None:
        """Say, as the first loop begins, which `Batches` were drawn from since `resume`: each restart does it again."""
        resumed_at, self._resumed_at = self._resumed_at, {}
        for name, one in self._batches():
            if resumed_at.get(name, (one.epoch, one.index)) != (one.epoch, one.index):
                say(
                    f"warning: {name} was drawn from between resume() and the loop, which every restart does again and "
                    "so passes over a batch: take what is needed there from another jobkit.Batches, or before resume()"
                )

    def _batches(self) -> Iterator[tuple[str, Batches]]:
        return ((name, one) for name, one in self.positions.items() if isinstance(one, Batches))

    def take(self, parts: Mapping[str, Part | Held]) -> state.Snapshot:
        """Take parts apart; see `state.take`."""
        return state.take(parts, shared=self._session.group.count > 1)

    def snapshot(self) -> state.Snapshot:
        """Return the live state, ready to be written.

        Raises:
            DonatedError: If an array is gone.
        """
        if self._session.probe is not None:
            self._session.probe.saved(self._session.step)
        return state.take_whole(self.parts, shared=self._session.group.count > 1)

    def save(self, reason: str, metrics: dict[str, float]) -> None:
        """Start a save; training goes on if it fails, loudly."""
        session, checkpoints = self._session, self._session.checkpoints
        session.deadline_saver.boundaries.measure_room()
        session.deadline_saver.wait_while(lambda: checkpoints.saving)
        at_fault = unsaved.STATE
        try:
            with session.heartbeat.during(Phase.SAVING):
                snapshot = self.snapshot()
                at_fault = unsaved.STORAGE
                checkpoints.save(snapshot, session.step, reason=reason, metrics=metrics)
        except SupersededError:
            raise
        except JobkitError as error:
            if session.group.count > 1:  # the others may have begun it
                raise
            committed = checkpoints.committed_step
            self._bear(session.unsaved.failed(session.step, at_fault, str(error), committed_step=committed) or error)
        self.begin_interval()

    def agreed(self, metrics: dict[str, float]) -> dict[str, float] | None:
        """Return the metrics to save with, as process 0 has them; None if only the best step counts and this is not it.

        Raises:
            ConfigError: If not every process asked to save.
        """
        session = self._session

        def verdict() -> dict[str, float] | None:
            return metrics if not self.strategy.only_best or session.checkpoints.improves(metrics) else None

        if session.group.count == 1:
            return verdict()
        self._asks += 1
        try:
            session.deadline_saver.barrier(f"asked/{self._asks}", _ASKED_S)
            agreed: dict[str, float] | None = session.group.share(f"verdict/{self._asks}", verdict, _ASKED_S)
        except TimeoutError:
            raise ConfigError(
                f"save() was called at step {session.step} by process {session.group.index} and not by every process: "
                "call it in all of them, process 0's metrics count"
            ) from None
        return agreed

    def commit(self, metrics: dict[str, float]) -> None:
        """Commit the last step, with the metrics that were to be saved with it, and wait for it.

        Raises:
            JobkitError: If it could not be committed.
        """
        session, checkpoints = self._session, self._session.checkpoints
        checkpoints.wait()
        self.hear_failure()
        if checkpoints.committed_step != session.step or metrics:
            checkpoints.save(self.snapshot(), session.step, reason="end", metrics=metrics)
            self.finish()
        session.heartbeat.committed_step = checkpoints.committed_step
        session.heartbeat.beat()

    def finish(self) -> None:
        """Wait for what is being saved.

        Raises:
            JobkitError: If it could not be committed.
        """
        self._session.checkpoints.wait()
        if (error := self._session.checkpoints.take_error()) is not None:
            raise error

    def hear_failure(self) -> None:
        """Say what went wrong with a save in the background; a take-over by a newer attempt ends the training, too."""
        error, uploader = self._session.checkpoints.take_error(), self._session.uploader
        if isinstance(error, SupersededError):
            raise error
        if uploader is not None and uploader.superseded is not None:
            raise uploader.superseded
        if error is not None:
            self._bear(error)

    def _bear(self, error: JobkitError) -> None:
        """Say why a save failed: training goes on, unless no save of this program can do better."""
        checkpoints = self._session.checkpoints
        if isinstance(error, UnsavedError) or (isinstance(error, PackageError) and checkpoints.last is None):
            raise error
        say(f"{error}; training goes on, the newest committed step is {checkpoints.committed_step}")

    # How often.

    def begin_interval(self) -> None:
        """Count the interval of periodic saves from here."""
        self.strategy.begin(self._session.step, time.monotonic())
        if not self._session.group.first:
            self.strategy.next_s = math.inf

    def open_interval(self) -> None:
        """Begin to follow what saves cost; what earlier attempts tell of it is read meanwhile."""
        if not (self.strategy.auto and self._session.group.first):
            return
        opened = self.strategy.interval = interval.open_interval()
        store, attempt = self._session.store, self._session.attempt

        def read() -> None:
            with contextlib.suppress(JobkitError, OSError):
                mirror.fetch_ledgers(store, attempt)
            with contextlib.suppress(JobkitError, OSError):
                opened.past = interval.read_past(store, attempt)

        threading.Thread(target=read, name="jobkit-past", daemon=True).start()

    def adapt_interval(self) -> None:
        """Let the interval follow what the newest save cost."""
        session, opened, last = self._session, self.strategy.interval, self._session.checkpoints.last
        if opened is None or last is None:
            return
        if session.store.remote is not None:
            with contextlib.suppress(JobkitError, OSError):
                opened.upload_s = interval.read_upload_s(session.store, session.attempt)
        news = self.strategy.adapt(last.step, interval.Cost(last.blocking_s, last.durable_s), time.monotonic())
        if news is not None:
            session.ledger.append("interval", **news)
