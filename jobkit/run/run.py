"""Run: the front door of the training side.

The loop stays the user's. `steps()` is where everything happens, between two steps: look at the notice, save when due,
and on a notice commit and leave. It lies in stepping.py, epochs in epochs.py, what is open in session.py, what is due
in boundary.py, how it is saved in saving.py, and how a training ends in ending.py.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from jobkit import faults
from jobkit.checkpoint.kinds import ValuePart
from jobkit.checkpoint.schedule import SaveEvery
from jobkit.data.epoch import Epoch
from jobkit.drill.settings import drill_from
from jobkit.errors import ConfigError, say
from jobkit.preemption.notice import Notice
from jobkit.run import resuming, stepping
from jobkit.run.boundary import Boundary, Loop
from jobkit.run.ending import Ending
from jobkit.run.epochs import epochs
from jobkit.run.rounds import Rounds
from jobkit.run.saving import Saving
from jobkit.run.session import Session, store_of
from jobkit.run.state_view import Values
from jobkit.rundir.retention import Keep
from jobkit.supervise.heartbeat import Phase
from jobkit.tracking import adapters, log_buffer
from jobkit.tracking.trackers import Tracker

_Item = TypeVar("_Item")


class Run:
    """One training, surviving every interruption. Use as `with jobkit.Run(...) as run`.

    Args:
        url: The run directory: a path or a file:// URL. Under a launcher its `JOBKIT_RUN` is used instead.
        save_every: '500 steps' or 500, '10m', 'auto' (as often as costs least, from what saves cost and how often this
            run loses work without notice, and once before the time limit), several of these in a tuple, 'best' (only
            when `save(metric=...)` improves on the metric of `keep_best`), or None (only when asked, on notice, and at
            the end).
        keep: How many of the newest checkpoints stay; at least 1.
        keep_best: A metric and 'min' or 'max': the best checkpoint by it stays too.
        start_from: URL of what the run begins with where it has no checkpoint of its own yet: any layout that plain
            Orbax writes, or another run; of several steps the newest.
        trackers: Where `log` goes besides the ledger, as one run over all attempts: 'tensorboard', 'wandb', 'mlflow',
            or objects like jobkit.tracking.trackers.Tracker. By default TensorBoard, where tensorboardX is installed.
        writer: 'jobkit', or 'orbax' to have stock Orbax write the checkpoints, which takes longer; both restore.

    Raises:
        ConfigError: If an argument makes no sense or the run directory cannot be used.

    Signals: from entering to leaving, SIGTERM, SIGUSR1, SIGUSR2 and SIGINT are notices, and SIGHUP, a closed terminal,
        where the program was started by hand, not with nohup, and has no handler for it; earlier handlers come back.
        Where a library takes one later, the loop sees and says so within 2 s, and both hear of it from then on.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        save_every: str | int | tuple[str | int, ...] | None = "10m",
        keep: int = 3,
        keep_best: tuple[str, str] | None = None,
        start_from: str | os.PathLike[str] | None = None,
        trackers: Sequence[str | Tracker] | None = None,
        writer: Literal["jobkit", "orbax"] = "jobkit",
    ) -> None:
        self._store = store_of(url)
        self._strategy = SaveEvery.parse(save_every, keep_best=keep_best)
        if (drill := drill_from()) is not None:
            drill.adapt(self._strategy)
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ConfigError(f"keep={keep!r} is not a number of checkpoints; at least 1 always stays")
        self._keep = Keep(keep, keep_best)
        if writer not in ("jobkit", "orbax"):
            raise ConfigError(f"writer={writer!r} is neither 'jobkit' nor 'orbax'")
        self._start_from, self._stock = start_from, writer == "orbax"
        self._trackers = adapters.resolve(trackers)
        self._open: Session | None = None
        self._asks = 0
        self.state: Values
        """The value parts of the run, from `resume` on."""

    # Opening and closing.

    def __enter__(self) -> Self:
        """Open the run: claim an attempt, listen for notices."""
        if self._open is not None:
            raise ConfigError("this Run was opened before: make a new one")
        self._open = session = Session(self._store, self._strategy, self._keep, self._trackers, stock=self._stock)
        self._saving = Saving(session, self._strategy)
        self._boundary = Boundary(session, self._saving)
        self._ending = Ending(session, self._saving, self._boundary)
        self._rounds = Rounds(
            session, self._saving, self._boundary, self._ending, stop=lambda: self.should_stop, save=self.save
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the run: finish what is being saved, put signal handlers back."""
        alone = error is not None and not isinstance(error, SystemExit)
        try:
            if error is None:
                self._ending.leaving.settle()
                self._rounds.settle()
                self._ending.settle()
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._ending.leaving.close()
            self._session.close(error, alone=alone)

    @property
    def _session(self) -> Session:
        if self._open is None:
            raise ConfigError("open the run first: with jobkit.Run(...) as run: run.resume(...)")
        return self._open

    @property
    def url(self) -> str:
        """The run directory."""
        return self._store.url

    @property
    def attempt(self) -> int:
        """Number of this attempt, counted from 0."""
        return self._open.attempt if self._open is not None else 0

    @property
    def step(self) -> int:
        """Completed steps (optimizer updates) of the run."""
        return self._open.step if self._open is not None else 0

    @property
    def committed_step(self) -> int:
        """Newest committed step, -1 if there is none."""
        return self._session.checkpoints.committed_step

    # The state.

    def resume(self, **parts: Any) -> Values:
        """Take the run's parts, and restore them if there is a checkpoint.

        NNX objects, iterators and generators are changed in place; pytrees and numbers live in `run.state` from here
        on, and may become something else as training goes on (another dtype, a list that grows): give what they are at
        the start, in every attempt. An array comes back with its dtype, its shape and the sharding that it has in what
        is given, whatever that was when it was saved. A damaged checkpoint is set aside, loudly, and the next older one
        is used.

        Args:
            parts: Everything the next step depends on, by name: model, optimizer, RNGs, data iterator, ... Give
                `optimizer=None` if the run has none.

        Returns:
            `run.state`, the value parts.

        Raises:
            ConfigError: If a part cannot be saved and rewound, if the optimizer is missing, if shapes or structure
                differ from the checkpoint's, if every checkpoint is damaged, or if the disk has no room for one in the
                run's first attempt.
            StorageError: If a checkpoint cannot be read, or the disk has no room for one any more.
        """
        session = self._session
        if self._saving.resumed:
            raise ConfigError("resume() was called twice: give all parts in one call")
        resuming.resume(session, self._saving, self._boundary, parts, self._start_from)
        self.state = Values({name: part for name, part in self._saving.parts.items() if isinstance(part, ValuePart)})
        faults.reach("resumed")
        return self.state

    def restore(self, step: int | str = "best") -> int:
        """Put a committed step into the live parts, outside the loop: the best one for a final evaluation.

        Args:
            step: A committed step, 'best' (by `keep_best`) or 'latest'.

        Returns:
            The step that was restored. `run.step` stays: nothing of this is saved.

        Raises:
            Preempted: If the training has not come to its end and a stop was said: what is committed goes on later.
            ConfigError: Before `resume`, inside `steps()`, or if there is no such step.
            StorageError: If the step is damaged.
        """
        session, parts = self._session, self._saving.parts
        self._ending.leaving.settle()
        self._rounds.settle()
        if self._boundary.loop is Loop.OURS:
            raise ConfigError(
                "restore() would change the state under the loop: call it after steps() has ended; where a variable or "
                "a progress bar holds what was left with `break`, close it: loop = run.steps(...), loop.close()"
            )
        if self._boundary.loop is not Loop.DONE and self.should_stop:
            self._ending.stop()
        session.checkpoints.wait()
        self._asks += 1
        number: int = session.group.share(f"find/{self._asks}", lambda: resuming.find(session, step))
        session.checkpoints.read(number, parts)()
        return number

    # The loop.

    @property
    def notice(self) -> Notice | None:
        """The preemption notice, None while there is none."""
        notice = self._session.listener.notice
        self._ending.known |= notice is not None and self._session.agreement is None
        return notice

    @property
    def should_stop(self) -> bool:
        """Whether the loop is to end because of a notice; for what takes long between two looks of `through`.

        Once it was True, the next `save` commits and raises `Preempted`; `restore` and the end of the `with` raise it
        as well, so that what follows a training is not done with half of one.

        In a run of several processes the answer is the same in all of them at the same look, if all look equally often.
        """
        session, saving = self._session, self._saving
        stop = self._boundary.should_stop()
        self._ending.known |= stop
        if self._boundary.loop is not Loop.OURS and saving.resumed:
            if session.probe is not None and not self._rounds.depth and not stop:
                session.probe.begin_round(session.step, saving.parts, saving.given)
            self._boundary.begin_round()
        return stop

    def should_save(self, step: int) -> bool:
        """Tell, in a loop of one's own, whether to save now, by `save_every`: `if run.should_save(n): run.save(n)`.

        It is True as well on a notice and after `jobkit save`. What a loop ends with is saved in any case. In a run of
        several processes the answer is the same in all; all have to ask.

        Args:
            step: Completed steps.

        Returns:
            Whether to save.

        Raises:
            ConfigError: If `resume` was not called, or inside `steps()`, which saves by itself.
        """
        self._saving.parts  # noqa: B018  (there are any)
        if self._boundary.loop is Loop.OURS:
            raise ConfigError("should_save() inside steps() or epochs(), which save by themselves; to save now: save()")
        return self._boundary.should_save(step, stop=self.should_stop)

    def beat(self) -> None:
        """Say that the loop is alive, inside what takes long between two steps: an evaluation, a download.

        Whoever watches for a program that hangs counts the time from here again. Needed only with a short `--stall`, or
        for what takes an hour and more.
        """
        self._session.heartbeat.beat()

    def steps(self, total: int) -> Iterator[int]:
        """Count the run's steps: `for step in run.steps(10_000)` yields what is left of 0..9999.

        Between two steps the run saves when a save is due, and on a notice commits and leaves. After the last one the
        final state is committed before the loop ends.

        Leaving with `break` ends the training: the step in progress counts as completed and is committed, and the run
        remembers it. Whatever ends the attempt afterwards, and after `jobkit resume`, the loop yields nothing. To train
        on, give it another total.

        Args:
            total: Steps of the whole run, over all attempts.

        Yields:
            The number of the step in progress, counted from 0: so many steps are completed.

        Raises:
            Preempted: On a notice, once the state is committed: SystemExit with code 75.
            ConfigError: If `resume` was not called; if a part became what could not be put back after a restart; at the
                second interval in a row whose state cannot be saved, or is the same as before (data positions and
                generators aside), since training on would be lost.
            DonatedError: If the program gave the state away in the first step, or in the one after which it stops.
            StorageError: If the state could not be committed on notice or at the end.
        """
        return stepping.steps(self._session, self._saving, self._boundary, self._ending, total)

    def epochs(self, count: int, data: Any = None, *, steps_per_epoch: int | None = None) -> Iterator[Epoch]:
        """Count the run's epochs, and their steps or batches: a loop in a loop, with room for a validation between.

            for epoch in run.epochs(10, batches):  # or run.epochs(10, steps_per_epoch=100)
                for batch in epoch:  # then: for step in epoch
                    train_step(model, optimizer, batch)
                run.save(val_loss=evaluate(model))

        An epoch is an integer, its number. Between two steps, inside of an epoch or not, happens what `steps` says: the
        next attempt goes on in the middle of the epoch. What follows the last step of an epoch belongs to that step:
        `save` saves when it is through, and where it was interrupted it is done again. Leaving the outer loop with
        `break` ends the training.

        Args:
            count: Epochs of the whole run, over all attempts.
            data: A part of the run to go through: `jobkit.Batches`, whose epochs end where they do, also where the
                inner loop is left with `break`; a loader with a length and `state_dict`; or, with `steps_per_epoch`, an
                iterator.
            steps_per_epoch: Steps of an epoch, where the data does not tell.

        Yields:
            An epoch: an integer from 0 on, and an iterator over what is left of its batches, as the data gives them, or
            without data of its steps, numbered as in `steps`.

        Raises:
            Preempted: On a notice, once the state is committed: SystemExit with code 75.
            ConfigError: As in `steps`; if the end of an epoch is not known, the data is no part of the run, or an epoch
                was not gone through.
            DonatedError: As in `steps`.
            StorageError: As in `steps`.
        """
        return epochs(
            self._session, self._saving, self._boundary, self._ending, count, data, steps_per_epoch
        )  # fmt: skip

    def through(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Go through a loop of one's own, which saves by itself: `for epoch in run.through(range(state.epoch, 40))`.

        Before each item it looks whether to stop, and then leaves with `Preempted`; so does `save`, after its commit:
        end each round with `run.save(epoch + 1)`, or a short one with `if run.should_save(n + 1): run.save(n + 1)`,
        which on a notice gets one round more to be asked in before it leaves. After the last item what is being saved
        is committed.

        Leaving a `range` with `break` ends the training, as in `steps`, with what was saved last, or with what it is
        then where `should_save` is asked: `break` belongs behind that. To train on, give one that ends elsewhere.
        Inside another `through`, of batches in epochs, it ends nothing. What was not saved when it stops is done again.

        Args:
            items: What to go through: what is left of the run's epochs, say.

        Yields:
            The items.

        Raises:
            Preempted: On a notice: SystemExit with code 75.
            ConfigError: If `resume` was not called, or inside `steps()`.
            StorageError: If the last save could not be committed.
        """
        self._session  # noqa: B018  (it is open)
        return self._rounds.through(items)

    def save(self, step: int | None = None, /, *, wait: bool = False, **metrics: float) -> None:
        """Save now, whatever `save_every` says.

        Inside `steps()` the save is made at the boundary that ends this step, where the state is whole. In a loop of
        one's own, give the number of completed steps; on a notice they are committed, and it leaves.

        Of a step that is committed already the metrics are kept beside the commit, which is never changed: after the
        last step, `run.save(val_loss=...)` scores it.

        Args:
            step: Completed steps; only in a loop of one's own.
            wait: Return only when the save is committed; only in a loop of one's own.
            metrics: Named numbers, or arrays of shape (), kept with the checkpoint; `keep_best` chooses by one of them.

        Raises:
            Preempted: In a loop of one's own, on a notice, once the step is committed: SystemExit with code 75.
            ConfigError: If called before `resume`, or with a step inside `steps()`; if the step is less than were
                completed, a metric is no number, or the one of `keep_best` is missing where only the best is saved.
            StorageError: With `wait`, if the save could not be committed.
        """
        session, boundary, ending, saving = self._session, self._boundary, self._ending, self._saving
        saving.parts  # noqa: B018  (there are any)
        values = {name: log_buffer.number(name, value) for name, value in metrics.items()}
        best = self._keep.best
        if self._strategy.only_best and best is not None and best[0] not in values:
            given = f"it was given {', '.join(values)}" if values else "it was given none"
            raise ConfigError(f"save() needs the metric {best[0]!r}, by which keep_best chooses; {given}")
        ending.leaving.settle()
        if boundary.loop is Loop.OURS:
            if step is not None or wait:
                raise ConfigError("inside steps() call save() without step and wait: it saves when this step ends")
            boundary.asked = {**(boundary.asked or {}), **values}
            return
        if step is not None:
            if isinstance(step, bool) or not isinstance(step, int) or step < session.step:
                raise ConfigError(f"save({step!r}): the run has completed {session.step} steps; give as many or more")
            session.heartbeat.step = step
            boundary.loop = Loop.THEIRS
            self._rounds.saves += 1
            boundary.note_own_loop()
            boundary.saved_by_hand()
            ending.take_back()
            session.heartbeat.enter(Phase.STEPPING)
        elif boundary.loop is Loop.NONE:
            raise ConfigError(
                "save() before any step that the run knows of: loop with `for step in run.steps(n)`, or, in a loop of "
                "your own, give the number of completed steps, save(step)"
            )
        if boundary.loop is not Loop.DONE and self.should_stop:
            boundary.asked = values
            ending.stop(at_save=True)
        if (agreed := saving.agreed(values)) is not None:
            saving.save("asked", agreed)
        if wait:
            saving.finish()

    def log(self, **values: Any) -> None:
        """Record named numbers for the step in progress, in the ledger, and from there in the trackers.

        JAX arrays are converted later, so that logging does not wait for the device. What is logged up to a step is
        on storage before that step is committed; a step that an interruption makes run twice counts once.

        Args:
            values: Numbers, or arrays of shape (), of any dtype that is a number.

        Raises:
            ConfigError: Before the run is open, or if a value is not a number; never after a notice, when nothing may
                keep a step from its commit.
        """
        session = self._session
        for name, value in list(values.items()):
            if not hasattr(type(value), "__float__") or getattr(value, "shape", ()) != ():
                wrong = f"log({name}=...) takes a number or a 0-d array, not {log_buffer.kind_of(value)}"
                if not session.listener.noticed:
                    raise ConfigError(wrong)
                say(wrong)
                del values[name]
        self._boundary.note_log()
        if session.group.first and session.log_buffer.add(session.step, values):
            session.log_buffer.flush(session.ledger)
