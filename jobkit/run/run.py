"""Run: the front door of the training side.

The loop stays the user's. `steps()` is where everything happens, between two steps: look at the notice, save when due,
and on a notice commit and leave.
"""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

import jax
import msgspec

from jobkit import compilecache, contract, faults, names, versions
from jobkit.checkpoint import from_orbax, interval, state
from jobkit.checkpoint.checkpointer import Checkpoints
from jobkit.checkpoint.first_step_check import FirstStep, FirstStepCheck
from jobkit.checkpoint.kinds import Held, Part, ValuePart, part_of
from jobkit.checkpoint.restore import bring, find_step, restore
from jobkit.checkpoint.schedule import SaveEvery
from jobkit.drill.settings import drill_from
from jobkit.errors import (
    ConfigError,
    JobkitError,
    PackageError,
    Preempted,
    StorageError,
    SupersededError,
    UnsavedError,
    flush,
    say,
)
from jobkit.group import lost_process, open_group
from jobkit.preemption.deadline_saver import DeadlineSaver
from jobkit.preemption.emergency_save import Emergency
from jobkit.preemption.notice import Listener, Notice
from jobkit.preemption.stop_step import SAVE, STOP, Agreement
from jobkit.run.leaving import Leaving, by_break
from jobkit.run.optimizer_check import has_optimizer
from jobkit.run.state_view import Values
from jobkit.rundir import commits, mirror, remote_steps
from jobkit.rundir.control import Control, says_stop
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.loops import EarlyStop, Loops
from jobkit.rundir.retention import Keep
from jobkit.rundir.store import Store
from jobkit.rundir.uploader import Uploader
from jobkit.supervise import stacks, unsaved
from jobkit.supervise.heartbeat import Heartbeat, Phase
from jobkit.supervise.unsaved import Unsaved
from jobkit.tracking import adapters
from jobkit.tracking.log_buffer import EVERYTHING, LogBuffer
from jobkit.tracking.trackers import Tracker, TrackerFeed

if TYPE_CHECKING:
    from jobkit.drill.fingerprints import Probe

_Item = TypeVar("_Item")
_LOOK_S = 2.0
"""How often an attempt looks whether a newer one has taken over, and whether somebody asks something of it."""
_UPLOAD_S = 600.0
"""How long the last uploads of a run without a supervisor may take."""
_SHARED_S = 60.0
"""How long a shared disk may take to show one node what another one wrote."""
_ASKED_S = 120.0
"""How far apart the processes may call `save`."""
_END_S = 1800.0
"""How far apart the processes may come to the end of `steps()`."""
_TRACKERS_S, _TRACKERS_NOTICED_S = 60.0, 5.0
"""How long trackers may take to have the last values, at the end of a run and of an attempt."""
_ALONE_S = 5.0
"""How long a process that fails waits for a save that the others may be dead to."""
_PARTING_S = 3.0
"""How long the first process, if it does not end in order, waits for the others to be gone."""


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
        start_from: URL of a checkpoint that plain Orbax wrote, to begin with where the run has none of its own yet.
        trackers: Where `log` goes besides the ledger, as one run over all attempts: 'tensorboard', 'wandb', 'mlflow',
            or objects like jobkit.tracking.trackers.Tracker. By default TensorBoard, where tensorboardX is installed.

    Raises:
        ConfigError: If an argument makes no sense or the run directory cannot be used.

    Signals: from entering to leaving, SIGTERM, SIGUSR1, SIGUSR2 and SIGINT are notices; earlier handlers come back.
        Where a library takes one later, the loop sees and says so within 2 s, and both hear of it from then on.
    """

    _opened_here = 0
    """How many Runs were opened in this process."""
    _left_alone = False
    """Whether this one of several processes has failed, and must not wait for others that may be dead."""

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        save_every: str | int | tuple[str | int, ...] | None = "10m",
        keep: int = 3,
        keep_best: tuple[str, str] | None = None,
        start_from: str | os.PathLike[str] | None = None,
        trackers: Sequence[str | Tracker] | None = None,
    ) -> None:
        launched = os.environ.get(contract.ENV_RUN)
        if url is None and not launched:
            raise ConfigError(
                "Run() has no run directory: give one, Run('runs/mnist'), or start the program with jobkit submit"
            )
        self._store = Store(launched or url or "")
        if "\\" in self._store.url:  # as no submit lets through: what follows would take every checkpoint for damaged
            names.check_place(self._store.url)
        if launched and url is not None and Store(url).path != self._store.path:
            if Run._opened_here:
                raise ConfigError(
                    f"a second Run, {os.fspath(url)}, in a program that was submitted as the one run "
                    f"{self._store.url}: submit each run on its own"
                )
            say(f"the launcher's run directory {self._store.url} is used instead of {os.fspath(url)}")
        self._strategy = SaveEvery.parse(save_every, keep_best=keep_best)
        self._drill = drill_from()
        if self._drill is not None:
            self._drill.adapt(self._strategy)
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ConfigError(f"keep={keep!r} is not a number of checkpoints; at least 1 always stays")
        self._keep = Keep(keep, keep_best)
        self._start_from = start_from
        self._trackers = adapters.resolve(trackers)
        self._parts: dict[str, Part] | None = None
        self._opened = False
        self._log_buffer = LogBuffer()
        self._asked: dict[str, float] | None = None
        self._next_look_s = time.monotonic() + _LOOK_S
        self._leaving = Leaving()
        self._depth = self._saved_by_hand = 0
        self._said = False
        self._looping = self._finished = self._stepped_by_hand = self._stepped = self._stopping = self._save_wanted = (
            self._told
        ) = self._own = False
        self._looks = self._asks = self._rounds = 0
        self.step = 0
        """Completed steps (optimizer updates) of the run."""
        self.attempt = 0
        """Number of this attempt, counted from 0."""

    # Opening and closing.

    def __enter__(self) -> Self:
        """Open the run: claim an attempt, listen for notices."""
        if self._opened:
            raise ConfigError("this Run was opened before: make a new one")
        self._opened = True
        Run._opened_here += 1
        _take_over(said=jax.distributed.is_initialized())
        self._group = open_group(Run._opened_here)
        supervisor = os.environ.get(contract.ENV_SUPERVISOR)
        directory = Path(supervisor) if supervisor else None
        self._supervised = directory is not None
        self._listener = Listener(directory)
        self._listener.open()
        try:
            self._heartbeat = Heartbeat(directory)
            self._end_stacks = stacks.answer(directory)
            self._heartbeat.enter(Phase.LISTENING)
            self._listener.hear_earlier()
            given = contract.attempt_from()
            self._control = Control.of_attempt(self._store, given) if self._group.first else None
            self.attempt = self._group.share("attempt", lambda: self._claim(given))
            self._ledger = Ledger(self._store.file(contract.events_file(self.attempt, self._group.index)))
            # Under a supervisor the uploads are its own, so that they survive this process.
            alone = given is None and self._group.first
            self._uploader = Uploader(self._store, self.attempt, self._ledger) if alone else None
            if self._uploader is not None:
                self._uploader.start()
            self._ledger.append("opened", pid=os.getpid(), host=os.uname().nodename, versions=versions.found())
            if self._group.first:
                self._store.tidy(contract.STRATEGY)
                self._store.write(contract.STRATEGY, self._strategy.to_json(self._keep))
            compilecache.use(self._store)
            self._probe = self._new_probe()
            self._unsaved = Unsaved(self._ledger, self._heartbeat)
            self._checkpoints = Checkpoints(
                self._store,
                attempt=self.attempt,
                keep=self._keep,
                ledger=self._ledger,
                unsaved=self._unsaved,
                busy=lambda: self._listener.noticed,
                before_commit=lambda step: self._log_buffer.flush(self._ledger, below=step),
                group=self._group,
            )
            self._tracker_feed = TrackerFeed(self._store, self.attempt, self._trackers)
            self._deadline_saver = self._watch()
            self._agreement = self._agree() if self._group.count > 1 else None
            self._look = self._agreement.rounds if self._agreement is not None else self._listener
            self._listener.on_notice = self._pass_on
            if self._listener.notice is not None:  # it came before there was anybody to tell
                self._pass_on(self._listener.notice)
        except BaseException:
            self._listener.close()
            raise
        return self

    def _claim(self, given: int | None) -> int:
        """Return the attempt's number; an attempt of an older jobkit than the run's ends none that is alive."""
        place = self._store if given is not None else self._store.remote or self._store
        # Without a run.json it was started by hand; a damaged one is for the launching side to tell.
        with contextlib.suppress(FileNotFoundError, ValueError):
            versions.check_run(place.read(contract.RUN_JSON), f"{self._store.url}/{contract.RUN_JSON}")
        return mirror.claim(self._store) if given is None else given

    def _watch(self) -> DeadlineSaver:
        """Make what saves where the training thread cannot."""
        emergency = Emergency(
            self._store,
            checkpoints=self._checkpoints,
            ledger=self._ledger,
            listener=self._listener,
            attempt=self.attempt,
            alone=self._group.count == 1,
        )
        return DeadlineSaver(
            emergency,
            listener=self._listener,
            group=self._group,
            take=self._checked,
            begin=self._begin_stop,
            leave=self._leave,
            lost=lambda: lost_process(self._store, self.attempt),
        )

    def _pass_on(self, notice: Notice) -> None:
        """Tell of a notice, once, on a thread of the listener's or the agreement's."""
        if self._agreement is not None:
            self._agreement.ask(STOP, source=notice.source, reason=notice.reason, deadline_s=notice.left_s())
        self._deadline_saver.begin()

    def _heard(self, told: dict[str, Any]) -> None:
        """Take the notice that another process, or this one, has told all of."""
        self._listener.note(f"process {told['from']}: {told['source']}", told["reason"], told.get("deadline_s"))
        self._deadline_saver.begin()

    def _new_probe(self) -> "Probe | None":
        if self._drill is None:
            return None
        from jobkit.drill.fingerprints import Probe

        return Probe(self._drill, self._ledger)

    def _agree(self) -> Agreement:
        """Begin to agree with the other processes of the attempt."""
        self._group.share("opened", lambda: True)
        first = contract.events_file(self.attempt, 0)
        deadline = time.monotonic() + _SHARED_S
        while not self._store.exists(first):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"process {self._group.index} does not see what process 0 wrote to {self._store.path}: several "
                    f"processes need a disk that all of them share, as run directory or as {contract.ENV_HOME}"
                )
            time.sleep(0.2)
        return Agreement(
            self._group,
            lambda: self.step + self._looks,
            heard=self._heard,
            lost=lambda: lost_process(self._store, self.attempt),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the run: finish what is being saved, put signal handlers back."""
        try:
            if error is None:
                self._end()
        finally:
            self._leaving.close()
            self._deadline_saver.close()
            if self._probe is not None:
                self._probe.close()
            alone = error is not None and not isinstance(error, SystemExit) and self._group.count > 1
            try:
                if alone:  # the others may be dead: nothing that needs them can be waited for
                    Run._left_alone = True
                    self._checkpoints.wait(_ALONE_S)
                else:
                    self._checkpoints.close()
                self._log_buffer.flush(self._ledger, below=EVERYTHING if error is None else 0)
                self._tell_compiled()
                if self._agreement is not None:
                    self._agreement.close()
                self._close_trackers()
                if self._uploader is not None:
                    self._uploader.close(deadline_s=_UPLOAD_S)
                if error is not None and not isinstance(error, SystemExit | KeyboardInterrupt):
                    self._ledger.append("raised", error=f"{type(error).__name__}: {error}"[:2000], step=self.step)
                elif error is None:
                    self._heartbeat.enter(Phase.FINISHED)
                if alone:
                    self._group.leave(_PARTING_S)
            finally:
                self._ledger.close()
                self._listener.close()
                if error is None:  # what cannot leave may hang in its last breath
                    self._end_stacks()
                if self._listener.notice is not None and self._listener.notice.source == "supervisor":
                    self._heartbeat.bury()

    def _close_trackers(self) -> None:
        """Let the trackers have the rest; after a notice only for a moment, since the next attempt sends it as well."""
        if self._heartbeat.phase == Phase.STOPPED:
            self._tracker_feed.close("preempted", wait_s=_TRACKERS_NOTICED_S)
        elif sys.exc_info()[0] is None:
            self._tracker_feed.close("done", wait_s=_TRACKERS_S)
        else:
            self._tracker_feed.close("failed", wait_s=_TRACKERS_NOTICED_S)

    def _end(self) -> None:
        """End normally: commit what a loop that was left early, or a loop of the user's own, still holds."""
        self._leaving.settle()
        if self._looping:  # a variable holds what was left with `break`
            self._break()
        elif not self._finished and (self._stopping or (self._agreement is None and self._listener.noticed)):
            self._stop()
        elif self._parts is not None:
            self._checkpoints.wait()
            self._raise_failure()
            # Where an earlier attempt has saved steps the program knows how; perhaps there was nothing left to do.
            if self.step == 0 and not (self._stepped or self._finished or self._stepped_by_hand):
                self._tell_unsaved()
            elif self._stepped_by_hand and not self._finished:
                self._tell_finished()

    def _tell_unsaved(self) -> None:
        """Say that the run saw nothing of what the program did: a loop of its own, or no training at all."""
        if not self._group.first:
            return
        self._ledger.append("unsaved", durable=True, step=self.step)
        say(
            "warning: the program ended without one step of the run: what it trained is not saved, the state at the "
            "start alone is. Loop with 'for step in run.steps(n)', or call run.save(step) with the number of completed "
            "steps; to evaluate only, jobkit.load(...) takes no part in the run"
        )

    # Leaving a loop early.

    def _told_to_stop(self) -> bool:
        """Tell whether a notice may be the reason for leaving a loop: only if the program knew of it, from a library
        perhaps that hears of signals as well.
        """
        return self._said or (self._agreement is None and self._listener.noticed and self._listener.shared)

    def _break(self, another: bool = False) -> None:
        """Serve a `break` in `steps()`: the step in progress counts as completed, and the training has ended."""
        self.step = self._heartbeat.step = self.step + 1
        if self._told_to_stop():
            self._stop()
        if not another:
            self._checkpoints.loops.stop(self.step)
        self._finish()

    def _break_through(self, another: bool) -> None:
        """Serve a `break` in `through()`: the training has ended with the last save."""
        if self._told_to_stop():
            self._stop()
        self._finish_by_hand()
        if not another and self._checkpoints.committed_step == self.step:
            self._checkpoints.loops.stop(self.step)
            self._checkpoints.mark()

    def _stopped_early(self, kind: str, total: int) -> bool:
        """Begin a loop; return whether an earlier attempt has left it early, so that nothing of it is left."""
        stop = self._checkpoints.loops.begin(kind, total)
        if stop is None:
            return False
        if stop.again:
            with contextlib.suppress(StorageError):  # every later commit tells as well
                self._checkpoints.mark()
            return False
        if self._group.first:
            say(f"the training was stopped early after step {stop.step}; to train on, give {kind}() another end")
        return True

    # The state.

    def resume(self, **parts: Any) -> Values:
        """Take the run's parts, and restore them if there is a checkpoint.

        NNX objects, iterators and generators are changed in place; pytrees and numbers live in `run.state` from here
        on, and may become something else as training goes on (another dtype, a list that grows): give what they are at
        the start, in every attempt. A damaged checkpoint is set aside, loudly, and the next older one is used.

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
        if not self._opened:
            raise ConfigError("open the run first: with jobkit.Run(...) as run: run.resume(...)")
        if self._parts is not None:
            raise ConfigError("resume() was called twice: give all parts in one call")
        without = "optimizer" in parts and parts["optimizer"] is None
        if without:
            parts = {name: value for name, value in parts.items() if name != "optimizer"}
        made = {name: part_of(name, value) for name, value in parts.items()}
        if not without and "optax" in sys.modules and not has_optimizer(parts):
            raise ConfigError(
                "resume() was given no optimizer state, without which a resumed training goes another way: "
                "resume(..., optimizer=optimizer), or optimizer=None if this run has none"
            )
        if "step" in parts:
            raise ConfigError("no part can be named 'step': that is load()'s own word; choose another name")
        self._given = parts if self._drill is not None else {}
        values = {name: part for name, part in made.items() if isinstance(part, ValuePart)}
        self._heartbeat.enter(Phase.RESTORING)
        # A drill has to know it of its last step too.
        self._checkpoints.first_step_check = FirstStepCheck(
            self._store, parts, busy=lambda: self._listener.noticed and self._drill is None
        )
        begun = time.monotonic()
        snapshot = self._take(made)
        self._checkpoints.check_space(snapshot.nbytes)
        restored = self._checkpoints.restore_newest(made, prepare=self._bring_newest)
        started = None
        if restored is None and self._start_from is not None:
            started = from_orbax.start(self._start_from, made)
            snapshot = self._take(made)
        seconds = round(time.monotonic() - begun, 6)
        self._parts = made
        self.state = Values(values)
        self.step = restored if restored is not None else started.step if started is not None else 0
        self._heartbeat.step, self._heartbeat.committed_step = self.step, self._checkpoints.committed_step
        self._heartbeat.enter(Phase.FIRST_STEP)
        if self._strategy.auto and self._group.first:
            self._open_interval()
        self._begin_interval()
        if restored is None:
            self._ledger.append("fresh", bytes=snapshot.nbytes, step=self.step)
            if started is not None:
                self._tell_start(started)
            # At once, so that storage is proven before hours are spent, and a state that was not seeded survives.
            self._checkpoints.save(snapshot, self.step, reason="start", metrics={})
        else:
            self._ledger.append("restored", step=restored, seconds=seconds, bytes=snapshot.nbytes)
            say(f"attempt {self.attempt} resumes at step {restored} of {self._store.url}")
            self._checkpoints.loops = Loops(self._early_stops(restored))
            self._unsaved.go_on(self._store, self.attempt, restored)
        self._started_with = None if without else FirstStep(made)
        if self._group.first:
            self._tracker_feed.start(self.step)
        self._deadline_saver.found_state(snapshot.nbytes)
        faults.reach("resumed")
        return self.state

    def _early_stops(self, step: int) -> list[EarlyStop]:
        """Return the early stops that a restored step knows of, the same in all processes."""

        def read() -> Any:
            return msgspec.to_builtins(commits.read(self._store, step).early_stops)

        return msgspec.convert(self._group.share("early_stops", read), list[EarlyStop])

    def _bring_newest(self) -> None:
        """Bring the newest step into the home, after tidying up there."""
        commits.sweep(self._store, attempt=self.attempt)
        if self._store.remote is not None:
            remote_steps.fetch_newest(self._store, self._ledger, attempt=self.attempt)
            self._checkpoints.elsewhere = remote_steps.metrics(self._store.remote)

    def _take(self, parts: Mapping[str, Part | Held]) -> state.Snapshot:
        return state.take(parts, shared=self._group.count > 1)

    def _tell_start(self, started: from_orbax.Start) -> None:
        url = os.fspath(self._start_from or "")
        self._ledger.append("started_from", url=url, parts=started.parts, fresh=started.fresh, step=self.step)
        rest = f"; as the program made it: {', '.join(started.fresh)}" if started.fresh else ""
        say(f"begins at step {self.step} with {', '.join(started.parts)} of {url}{rest}")

    def restore(self, step: int | str = "best") -> int:
        """Put a committed step into the live parts, outside the loop: the best one for a final evaluation.

        Args:
            step: A committed step, 'best' (by `keep_best`) or 'latest'.

        Returns:
            The step that was restored. `run.step` stays: nothing of this is saved.

        Raises:
            Preempted: If the training has not come to its end and a stop was said: what is committed goes on later.
            ConfigError: Inside `steps()`, or if there is no such step.
            StorageError: If the step is damaged.
        """
        parts = self._resumed()
        self._leaving.settle()
        if self._looping:
            raise ConfigError(
                "restore() would change the state under the loop: call it after steps() has ended; where a variable or "
                "a progress bar holds what was left with `break`, close it: loop = run.steps(...), loop.close()"
            )
        if not self._finished and self.should_stop:
            self._stop()
        self._checkpoints.wait()
        self._asks += 1
        number: int = self._group.share(f"find/{self._asks}", lambda: self._find(step))
        restore(self._store, number, parts)
        return number

    def _find(self, step: int | str) -> int:
        """Return the step that is meant, once it is in the home: it may be on the run's URL alone."""
        remote = self._store.remote
        wanted = self._checkpoints.best_step() if step == "best" else step
        absent = isinstance(wanted, int) and wanted not in commits.steps(self._store)
        if remote is not None and absent and wanted in remote_steps.steps(remote):
            bring(self._store, int(wanted), attempt=self.attempt)
        return find_step(self._store, step)

    def _resumed(self) -> dict[str, Part]:
        if self._parts is None:
            raise ConfigError("call run.resume(model=..., optimizer=..., data=...) before the first step")
        return self._parts

    # The loop.

    @property
    def notice(self) -> Notice | None:
        """The preemption notice, None while there is none."""
        notice = self._listener.notice
        self._said |= notice is not None and self._agreement is None
        return notice

    @property
    def should_stop(self) -> bool:
        """Whether the loop is to end because of a notice; for what takes long between two looks of `through`.

        Once it was True, the next `save` commits and raises `Preempted`; `restore` and the end of the `with` raise it
        as well, so that what follows a training is not done with half of one.

        In a run of several processes the answer is the same in all of them at the same look, if all look equally often.
        """
        stop = self._shall_stop()
        self._said |= stop
        if not self._looping and self._parts is not None:
            self._rounds += 1
            if self._probe is not None and not self._depth and not stop:
                self._probe.begin_round(self.step, self._parts, self._given)
            if self._rounds == 2:  # what lies between two looks is a round
                self._own_loop()
            self._heartbeat.beat()
        return stop

    def _shall_stop(self) -> bool:
        if not self._looping and time.monotonic() >= self._next_look_s:
            self._next_look_s = time.monotonic() + _LOOK_S
            self._look_at_signals()
            self._hear_control()
        if self._agreement is None:
            return self._listener.noticed
        if not self._looping:  # steps() looks by itself
            self._looks += 1
            if self._look.noticed:
                self._stopping |= STOP in self._barrier()
        return self._stopping

    @property
    def url(self) -> str:
        """The run directory."""
        return self._store.url

    @property
    def committed_step(self) -> int:
        """Newest committed step, -1 if there is none."""
        return self._checkpoints.committed_step

    def beat(self) -> None:
        """Say that the loop is alive, inside what takes long between two steps: an evaluation, a download.

        Whoever watches for a program that hangs counts the time from here again. Needed only with a short `--stall`, or
        for what takes an hour and more.
        """
        if not self._opened:
            raise ConfigError("open the run first: with jobkit.Run(...) as run: ... run.beat()")
        self._heartbeat.beat()

    def steps(self, total: int) -> Iterator[int]:
        """Count the run's steps: `for step in run.steps(10_000)` yields what is left of 0..9999.

        Between two steps the run saves when a save is due, and on a notice commits and leaves. After the last one the
        final state is committed before the loop ends.

        Leaving with `break` ends the training: the step in progress counts as completed and is committed, and the run
        remembers it. Whatever ends the attempt afterwards, and after `jobkit resume`, the loop yields nothing. To train
        on, give it another total.

        Args:
            total: Steps of the whole run, over all attempts.

        Raises:
            Preempted: On a notice, once the state is committed: SystemExit with code 75.
            ConfigError: If `resume` was not called; if a part became what could not be put back after a restart; at the
                second interval in a row whose state cannot be saved, or is the same as before (data positions and
                generators aside), since training on would be lost.
            DonatedError: If the program gave the state away in the first step, or in the one after which it stops.
            StorageError: If the state could not be committed on notice or at the end.
        """
        self._resumed()
        if isinstance(total, bool) or not isinstance(total, int) or total < 0:
            raise ConfigError(f"steps({total!r}): give the number of steps of the whole run")
        self._leaving.settle(another=True)
        if self._looping:
            raise ConfigError("steps() is already running: one loop at a time")
        if self.step < total and self._stopped_early("steps", total):
            total = self.step
        elif self._probe is not None:
            total = self._probe.begin_loop(total)
        probe, given = self._probe, self._given
        look, heartbeat, strategy, checkpoints = self._look, self._heartbeat, self._strategy, self._checkpoints
        if self.step < total and (
            self._stopping or (look.noticed and (self._agreement is None or STOP in self._barrier()))
        ):
            self._stop()
        self._looping, self._finished = True, self._finished and self.step >= total
        if not self._finished:
            self._go_on()
        self._look_at_signals()
        saver, parts = self._deadline_saver, self._resumed()
        saver.enter(self.step, parts)
        try:
            while self.step < total:
                if probe is not None:
                    probe.begin_step(self.step, self._resumed(), given)
                yield self.step
                if probe is not None:
                    probe.end_step()
                # The work per step when nothing is due: keep it under a microsecond or two.
                self.step = heartbeat.step = self.step + 1
                heartbeat.beat()
                now = time.monotonic()
                if (
                    look.noticed
                    or self._asked is not None
                    or self.step >= strategy.next_step
                    or now >= strategy.next_s
                    or now >= self._next_look_s
                    or checkpoints.failed
                    or not self._stepped
                ):
                    self._boundary(last=self.step >= total)
                if not self.step & saver.between or now - saver.held_s >= saver.from_s:
                    saver.hold(self.step, parts)
                else:
                    saver.skip()
        except GeneratorExit:
            self._leaving.leave(self._break, sure=by_break())
            raise
        self._finish()

    def through(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Go through a loop of one's own, which saves by itself: `for epoch in run.through(range(state.epoch, 40))`.

        Before each item it looks whether to stop, and then leaves with `Preempted`; so does `save`, after its commit:
        end each round with `run.save(epoch + 1)`. After the last item what is being saved is committed.

        Leaving a `range` with `break` ends the training, as in `steps`, with what was saved last; to train on, give one
        that ends elsewhere. Inside another `through`, of batches in epochs, it ends nothing. What was not saved when
        it stops is done again.

        Args:
            items: What to go through: what is left of the run's epochs, say.

        Raises:
            Preempted: On a notice: SystemExit with code 75.
            ConfigError: If `resume` was not called, or inside `steps()`.
            StorageError: If the last save could not be committed.
        """
        self._resumed()
        self._leaving.settle(another=True)
        if self._looping:
            raise ConfigError(
                "through() inside steps(), which looks for notices and saves by itself: loop as usual there"
            )
        training, saved, none = not self._depth, self._saved_by_hand, True
        if training and isinstance(items, range) and items and self._stopped_early("through", items.stop):
            items = ()
        self._depth += 1
        try:
            for item in items:
                if self.should_stop:
                    self._stop()
                if self._probe is not None:
                    self._probe.begin_round(self.step, self._resumed(), self._given)
                none, self._finished = False, self._finished and not training
                if training:
                    self._go_on()
                yield item
        except GeneratorExit:
            if training and isinstance(items, range) and self._saved_by_hand > saved:
                self._leaving.leave(self._break_through, sure=by_break())
            raise
        finally:
            self._depth -= 1
        if training and (none or self._saved_by_hand > saved):
            self._finish_by_hand()

    def save(self, step: int | None = None, /, *, wait: bool = False, **metrics: float) -> None:
        """Save now, whatever `save_every` says.

        Inside `steps()` the save is made at the boundary that ends this step, where the state is whole. In a loop of
        one's own, give the number of completed steps; on a notice they are committed, and it leaves.

        Of a step that is committed already the metrics are kept beside the commit, which is never changed: after the
        last step, `run.save(val_loss=...)` scores it.

        Args:
            step: Completed steps; only in a loop of one's own.
            wait: Return only when the save is committed; only in a loop of one's own.
            metrics: Named numbers kept with the checkpoint; `keep_best` chooses by one of them.

        Raises:
            Preempted: In a loop of one's own, on a notice, once the step is committed: SystemExit with code 75.
            ConfigError: If called before `resume`, or with a step inside `steps()`.
            StorageError: With `wait`, if the save could not be committed.
        """
        self._resumed()
        values = {name: _number(name, value) for name, value in metrics.items()}
        best = self._keep.best
        if self._strategy.only_best and best is not None and best[0] not in values:
            given = f"it was given {', '.join(values)}" if values else "it was given none"
            raise ConfigError(f"save() needs the metric {best[0]!r}, by which keep_best chooses; {given}")
        self._leaving.settle()
        if self._looping:
            if step is not None or wait:
                raise ConfigError("inside steps() call save() without step and wait: it saves when this step ends")
            self._asked = {**(self._asked or {}), **values}
            return
        if step is not None:
            if isinstance(step, bool) or not isinstance(step, int) or step < self.step:
                raise ConfigError(f"save({step!r}): the run has completed {self.step} steps; give as many or more")
            self.step = self._heartbeat.step = step
            self._finished, self._stepped_by_hand = False, True
            self._saved_by_hand += 1
            self._own_loop()
            self._go_on()
            self._heartbeat.enter(Phase.STEPPING)
        elif not (self._finished or self._stepped_by_hand or self._stepped):
            raise ConfigError(
                "save() before any step that the run knows of: loop with `for step in run.steps(n)`, or, in a loop of "
                "your own, give the number of completed steps, save(step)"
            )
        if not self._finished and self.should_stop:
            self._asked = values
            self._stop(at_save=True)
        if (agreed := self._agreed(values)) is not None:
            self._save("asked", agreed)
        if wait:
            self._checkpoints.wait()
            self._raise_failure()

    def log(self, **values: Any) -> None:
        """Record named numbers for the step in progress, in the ledger, and from there in the trackers.

        JAX arrays are converted later, so that logging does not wait for the device. What is logged up to a step is
        on storage before that step is committed; a step that an interruption makes run twice counts once.

        Args:
            values: Numbers or 0-d arrays.

        Raises:
            ConfigError: If a value is not a number; never after a notice, when nothing may keep a step from its commit.
        """
        for name, value in list(values.items()):
            if not hasattr(type(value), "__float__") or getattr(value, "shape", ()) != ():
                wrong = f"log({name}=...) takes a number or a 0-d array, not {_kind(value)}"
                if not self._listener.noticed:
                    raise ConfigError(wrong)
                say(wrong)
                del values[name]
        if not self._group.first:
            return
        if self._log_buffer.add(self.step, values):
            self._log_buffer.flush(self._ledger)

    # Between two steps.

    def _boundary(self, *, last: bool) -> None:
        if self._look.noticed or self._asked is not None or self._strategy.due(self.step, time.monotonic()):
            # A program that runs far ahead of its device would wait for it with the lock in hand.
            self._deadline_saver.wait_for_device(self.step, self._resumed())
        with self._deadline_saver.lock:
            self._deadline_saver.idle = False
            self._do_what_is_due(last=last)

    def _do_what_is_due(self, *, last: bool) -> None:
        if not self._stepped:
            self._first_step()
        if time.monotonic() >= self._next_look_s:
            self._next_look_s = time.monotonic() + _LOOK_S
            self._look_at_signals()
            try:
                commits.check_newest(self._store, self.attempt, "go on")
            except SupersededError:
                raise
            except JobkitError:
                pass  # a shared disk that does not answer just now
            self._adapt_interval()
            self._hear_control()
        self._hear_failure()
        stop, save = self._due()
        if stop and not last:
            self._stop()
        self._stopping |= stop  # if another loop follows: this is said once
        asked, self._asked = self._asked, None
        if asked is not None and (agreed := self._agreed(asked)) is not None:
            self._save("asked", agreed)
        elif save and not last:
            reason, self._save_wanted = "asked" if self._save_wanted else "interval", False
            self._deadline_saver.barrier(f"save/{self.step}")
            self._save(reason, {})
        self._heartbeat.committed_step = self._checkpoints.committed_step

    def _look_at_signals(self) -> None:
        """Take back the signals that JAX or a library have taken since the run was opened."""
        if _take_over(said=True):
            self._listener.retake()
        self._listener.look()

    def _hear_control(self) -> None:
        """Hear what is asked from outside, in process 0: the others hear it from there."""
        if self._control is None:
            return
        if (request := self._control.new(contract.SAVE)) is not None:
            step = self.step if self._looping else self.step + 1  # in a loop of its own the next save is the program's
            self._ledger.append("save_asked", durable=True, id=request.get("id"), by=request.get("by"), step=step)
            self._save_wanted = True
            if self._agreement is not None:
                self._agreement.ask(SAVE)
        if not self._supervised and (request := self._control.new(contract.CANCEL)) is not None:
            self._listener.note("stop", says_stop(request))
            if self._agreement is not None:
                self._agreement.ask(STOP, source="stop", reason=says_stop(request))

    def _due(self) -> tuple[bool, bool]:
        """Tell whether to stop and whether to save at this boundary; the same in all processes of the attempt."""
        now = time.monotonic()
        if self._agreement is None:
            save = (self._save_wanted or self._strategy.due(self.step, now)) and not self._checkpoints.saving
            return self._listener.noticed, save
        if now >= self._strategy.next_s:  # by the clock of process 0 alone
            self._strategy.next_s = math.inf
            self._agreement.ask(SAVE)
        due = self._barrier()
        return STOP in due, SAVE in due or self.step >= self._strategy.next_step

    def _barrier(self) -> set[str]:
        """Wait until the processes agree; return what is to be done at this boundary.

        Raises:
            StorageError: If they cannot: one of them is dead.
        """
        assert self._agreement is not None
        try:
            return self._agreement.barrier(self.step + self._looks)
        except JobkitError as error:
            raise StorageError(f"{error}; the newest committed step is {self._checkpoints.committed_step}") from None

    def _agreed(self, metrics: dict[str, float]) -> dict[str, float] | None:
        """Return the metrics to save with, as process 0 has them; None if only the best step counts and this is not it.

        Raises:
            ConfigError: If not every process asked to save.
        """

        def verdict() -> dict[str, float] | None:
            return metrics if not self._strategy.only_best or self._checkpoints.improves(metrics) else None

        if self._group.count == 1:
            return verdict()
        self._asks += 1
        try:
            self._deadline_saver.barrier(f"asked/{self._asks}", _ASKED_S)
            agreed: dict[str, float] | None = self._group.share(f"verdict/{self._asks}", verdict, _ASKED_S)
        except TimeoutError:
            raise ConfigError(
                f"save() was called at step {self.step} by process {self._group.index} and not by every process: call "
                "it in all of them, process 0's metrics count"
            ) from None
        return agreed

    def _begin_interval(self) -> None:
        """Count the interval of periodic saves from here."""
        self._strategy.begin(self.step, time.monotonic())
        if not self._group.first:
            self._strategy.next_s = math.inf

    def _open_interval(self) -> None:
        """Begin to follow what saves cost; what earlier attempts tell of it is read meanwhile."""
        opened = self._strategy.interval = interval.open_interval()

        def read() -> None:
            with contextlib.suppress(JobkitError, OSError):
                mirror.fetch_ledgers(self._store, self.attempt)
            with contextlib.suppress(JobkitError, OSError):
                opened.past = interval.read_past(self._store, self.attempt)

        threading.Thread(target=read, name="jobkit-past", daemon=True).start()

    def _adapt_interval(self) -> None:
        """Let the interval follow what the newest save cost."""
        opened, last = self._strategy.interval, self._checkpoints.last
        if opened is None or last is None:
            return
        if self._store.remote is not None:
            with contextlib.suppress(JobkitError, OSError):
                opened.upload_s = interval.read_upload_s(self._store, self.attempt)
        news = self._strategy.adapt(last.step, interval.Cost(last.blocking_s, last.durable_s), time.monotonic())
        if news is not None:
            self._ledger.append("interval", **news)

    def _first_step(self) -> None:
        self._stepped = True
        self._deadline_saver.measure_room()
        self._heartbeat.enter(Phase.STEPPING)
        self._ledger.append("first_step", step=self.step)
        self._tell_compiled()
        state.check_savable(self._resumed())
        if self._started_with is not None and (warning := self._started_with.warning()):
            say(warning)

    def _own_loop(self) -> None:
        """Write down, once, that the program trains in a loop of its own, whose steps only its saves tell."""
        if not (self._own or self._stepped or self._finished):
            self._own = True
            self._heartbeat.enter(Phase.STEPPING)
            self._ledger.append("own_loop", step=self.step)
            self._tell_compiled()

    def _tell_compiled(self) -> None:
        if (report := compilecache.report(self._store, self.attempt)) is not None:
            self._ledger.append("compiled", step=self.step, **report)

    def _save(self, reason: str, metrics: dict[str, float]) -> None:
        """Start a save; training goes on if it fails, loudly."""
        self._deadline_saver.measure_room()
        self._deadline_saver.wait_while(lambda: self._checkpoints.saving)
        at_fault = unsaved.STATE
        try:
            with self._heartbeat.during(Phase.SAVING):
                snapshot = self._snapshot()
                at_fault = unsaved.STORAGE
                self._checkpoints.save(snapshot, self.step, reason=reason, metrics=metrics)
        except SupersededError:
            raise
        except JobkitError as error:
            if self._group.count > 1:  # the others may have begun it
                raise
            committed = self._checkpoints.committed_step
            self._bear(self._unsaved.failed(self.step, at_fault, str(error), committed_step=committed) or error)
        self._begin_interval()

    def _snapshot(self) -> state.Snapshot:
        if self._probe is not None:
            self._probe.saved(self.step)
        return self._checked(self._resumed())

    def _checked(self, parts: Mapping[str, Part | Held]) -> state.Snapshot:
        snapshot = self._take(parts)
        snapshot.check_whole()
        return snapshot

    def _commit(self) -> None:
        """Commit the last step and wait for it.

        Raises:
            JobkitError: If it could not be committed.
        """
        self._checkpoints.wait()
        self._hear_failure()
        asked, self._asked = self._asked or {}, None
        if self._checkpoints.committed_step != self.step or asked:
            self._checkpoints.save(self._snapshot(), self.step, reason="end", metrics=asked)
            self._checkpoints.wait()
            self._raise_failure()
        self._heartbeat.committed_step = self._checkpoints.committed_step
        self._heartbeat.beat()

    def _stop(self, *, at_save: bool = False) -> NoReturn:
        """Serve the notice: commit the completed steps and leave.

        Args:
            at_save: In a loop of the program's own, whether its state is that of the completed steps.
        """
        with self._deadline_saver.lock:
            self._begin_stop()
            served = self._deadline_saver.arrive()
            asked, self._asked = self._asked or {}, None
            if not (self._looping or at_save):
                # Which step the live state belongs to, only who counts the steps knows: what was begun counts.
                self._checkpoints.wait()
                self._raise_failure()
            elif served and (self._checkpoints.committed_step >= self.step or not self._deadline_saver.fits_deadline()):
                pass  # what the guard has committed is what can be
            else:
                self._deadline_saver.emergency.commit(
                    self.step, self._snapshot, by="boundary", metrics=asked, hear=self._hear_failure
                )
            summary = self._tell_stopped()
            self._looping = False
        if self._probe is not None:
            self._probe.stopped(self.step, self._resumed(), self._given)
        raise Preempted(summary)

    def _leave(self, why: str) -> None:
        """End the process where the training thread cannot: what is committed is all that can be.

        Args:
            why: Why the last boundary is not, '' if it is.
        """
        self._tell_stopped(why)
        if self._uploader is not None:
            with contextlib.suppress(JobkitError):  # then the saves wait in the home
                self._uploader.close(deadline_s=0.0)
        sys.stdout.flush()
        sys.stderr.flush()
        self._group.leave(_PARTING_S)
        self._checkpoints.tidy()
        os._exit(contract.Exit.PREEMPTED)

    def _begin_stop(self) -> None:
        """Write down, once, which notice is being served, and at which step."""
        notice = self._listener.notice
        assert notice is not None
        self._heartbeat.enter(Phase.STOPPING)
        if not self._told:
            self._told = True
            age_s, left_s = round(time.monotonic() - notice.at_s, 6), notice.left_s()
            self._ledger.append(
                "notice",
                source=notice.source,
                reason=notice.reason,
                age_s=age_s,
                deadline_s=None if left_s is None else round(left_s, 6),
                step=self.step,
            )

    def _tell_stopped(self, why: str = "") -> str:
        """Write down how the notice was served; return it in a sentence."""
        notice, step = self._listener.notice, self._checkpoints.committed_step
        assert notice is not None
        if step < 0:  # in the middle of a restore
            step = max(commits.steps(self._store), default=0)
        self._heartbeat.committed_step = self._checkpoints.committed_step
        committed_s = round((self._deadline_saver.saved_at or time.monotonic()) - notice.at_s, 6)
        self._log_buffer.flush(self._ledger, below=step)
        lost = {"lost_steps": self.step - step, "why": why} if why else {}
        self._ledger.append("stopped", durable=True, step=step, notice_to_commit_s=committed_s, **lost)
        line = f"{notice.source}: stopped after step {step}, committed {committed_s:.2f} s after the notice"
        if why:
            line = f"{notice.source}: stopped with step {step}, committed before, of {self.step} completed ones: {why}"
        say(line)
        self._heartbeat.enter(Phase.STOPPED)
        return line

    def _finish(self) -> None:
        """Commit the last step."""
        with self._deadline_saver.lock, self._heartbeat.during(Phase.SAVING):
            try:
                self._deadline_saver.barrier(f"end/{self.step}", _END_S)
            except TimeoutError:
                raise ConfigError(
                    f"process {self._group.index} ended its loop after {self.step} steps, and another process did not: "
                    "all have to leave it at the same step"
                ) from None
            self._deadline_saver.watching = self._looping = False
            self._commit()
        self._tell_finished()

    def _finish_by_hand(self) -> None:
        """Wait for the last save of a loop of the program's own."""
        self._checkpoints.wait()
        self._raise_failure()
        self._heartbeat.committed_step = self._checkpoints.committed_step
        if self.step > 0:  # else it was no training
            self._tell_finished()

    def _tell_finished(self) -> None:
        self._finished = True
        self._begin_interval()  # if another loop follows
        self._heartbeat.enter(Phase.FINISHED)
        self._log_buffer.flush(self._ledger, below=EVERYTHING)
        self._ledger.append("finished", durable=True, step=self.step)
        faults.reach("finished")

    def _go_on(self) -> None:
        """Take back that the run has come to its end, where another loop follows the last one."""
        if self._heartbeat.phase == Phase.FINISHED:
            self._heartbeat.enter(Phase.STEPPING)
            self._ledger.append("goes_on", step=self.step)

    def _hear_failure(self) -> None:
        """Say what went wrong with a save in the background; a take-over by a newer attempt ends the training, too."""
        error = self._checkpoints.take_error()
        if isinstance(error, SupersededError):
            raise error
        if self._uploader is not None and self._uploader.superseded is not None:
            raise self._uploader.superseded
        if error is not None:
            self._bear(error)

    def _bear(self, error: JobkitError) -> None:
        """Say why a save failed: training goes on, unless no save of this program can do better."""
        if isinstance(error, UnsavedError) or (isinstance(error, PackageError) and self._checkpoints.last is None):
            raise error
        say(f"{error}; training goes on, the newest committed step is {self._checkpoints.committed_step}")

    def _raise_failure(self) -> None:
        error = self._checkpoints.take_error()
        if error is not None:
            raise error


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name}={_kind(value)} is not a number") from None


def _take_over(*, said: bool) -> bool:
    """Turn JAX's own preemption notifier off; tell whether it was on.

    It would replace our SIGTERM handler without a word when jax.distributed starts, and end the run's notices there.
    """
    if not getattr(jax.config, "jax_enable_preemption_service", False):
        return False
    jax.config.update("jax_enable_preemption_service", False)  # type: ignore[no-untyped-call]
    if said:
        say("JAX's own preemption notifier was on: it is off from here, since the run serves the signals")
    return True


def _kind(value: Any) -> str:
    shape = value.shape if hasattr(type(value), "shape") else None
    return f"an array of shape {tuple(shape)}" if shape is not None else f"a {type(value).__name__}"


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End an uncaught error of ours with one sentence and its exit code; leave all others as they were."""
    ours = isinstance(error, JobkitError)
    code = int(error.exit_code) if isinstance(error, JobkitError) else 1
    if ours:
        say(str(error))
    else:
        _earlier_hook(kind, error, trace)
    if Run._left_alone:  # JAX and Orbax would wait for the others for minutes
        flush()
        os._exit(code)
    if ours:
        raise SystemExit(code)


_earlier_hook = sys.excepthook
sys.excepthook = _hook
