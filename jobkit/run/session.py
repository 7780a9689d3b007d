"""What one attempt of a run has open, from entering to leaving it: one of each, opened and closed in this order."""

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import jax

from jobkit import compilecache, contract, names, versions
from jobkit.checkpoint.checkpointer import Checkpoints
from jobkit.checkpoint.schedule import SaveEvery
from jobkit.drill.settings import drill_from
from jobkit.errors import ConfigError, JobkitError, StorageError, flush, say
from jobkit.group import lost_process, open_group
from jobkit.preemption.deadline_saver import DeadlineSaver
from jobkit.preemption.emergency_save import Emergency
from jobkit.preemption.notice import Listener, Notice
from jobkit.preemption.stop_step import STOP, Agreement, Rounds
from jobkit.preemption.stopping import PARTING_S, Stopping
from jobkit.rundir import mirror
from jobkit.rundir.control import Control
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.retention import Keep
from jobkit.rundir.store import Store
from jobkit.rundir.uploader import Uploader
from jobkit.supervise import stacks
from jobkit.supervise.heartbeat import Heartbeat, Phase
from jobkit.supervise.unsaved import Unsaved
from jobkit.tracking.log_buffer import EVERYTHING, LogBuffer
from jobkit.tracking.trackers import Tracker, TrackerFeed

if TYPE_CHECKING:
    from jobkit.drill.fingerprints import Probe

_UPLOAD_S = 600.0
"""How long the last uploads of a run without a supervisor may take."""
_SHARED_S = 60.0
"""How long a shared disk may take to show one node what another one wrote."""
_TRACKERS_S, _TRACKERS_NOTICED_S = 60.0, 5.0
"""How long trackers may take to have the last values, at the end of a run and of an attempt."""
_ALONE_S = 5.0
"""How long a process that fails waits for a save that the others may be dead to."""


class Session:
    """One attempt of a run, opened; nothing of it is left open where that fails.

    Args:
        store: The run directory.
        strategy: When to save.
        keep: What stays.
        trackers: Where logged values go.
        stock: Whether stock Orbax writes the checkpoints.

    Raises:
        ConfigError: If the run directory cannot be used, or the processes of the attempt do not find each other.

    Signals: from here to `close`, SIGTERM, SIGUSR1, SIGUSR2 and SIGINT are notices; SIGHUP in a program that
        was started by hand.
    """

    opened_here = 0
    """How many were opened in this process."""
    left_alone = False
    """Whether this one of several processes has failed, and must not wait for others that may be dead."""

    def __init__(
        self, store: Store, strategy: SaveEvery, keep: Keep, trackers: Sequence[Tracker], *, stock: bool = False
    ) -> None:
        Session.opened_here += 1
        silence_jax(said=jax.distributed.is_initialized())
        self.store, self.group = store, open_group(Session.opened_here)
        supervisor = os.environ.get(contract.ENV_SUPERVISOR)
        directory = Path(supervisor) if supervisor else None
        self.supervised = directory is not None
        self.listener = Listener(directory)
        self.listener.open()
        try:
            self.heartbeat = Heartbeat(directory)
            self._end_stacks = stacks.answer(directory)
            self.heartbeat.enter(Phase.LISTENING)
            self.listener.hear_earlier()
            given = contract.attempt_from()
            self._check_carried()
            self.control = Control.of_attempt(store, given) if self.group.first else None
            self.attempt: int = self.group.share("attempt", lambda: _claim(store, given))
            self.ledger = Ledger(store.file(contract.events_file(self.attempt, self.group.index)))
            # Under a supervisor the uploads are its own, so that they survive this process.
            alone = given is None and self.group.first
            self.uploader = Uploader(store, self.attempt, self.ledger) if alone else None
            if self.uploader is not None:
                self.uploader.start()
            self.ledger.append("opened", pid=os.getpid(), host=os.uname().nodename, versions=versions.found())
            if self.group.first:
                store.tidy(contract.STRATEGY)
                store.write(contract.STRATEGY, strategy.to_json(keep))
            compilecache.use(store)
            self.probe = _probe(self.ledger)
            self.unsaved = Unsaved(self.ledger, self.heartbeat)
            self.log_buffer = LogBuffer()
            self.checkpoints = Checkpoints(
                store,
                attempt=self.attempt,
                keep=keep,
                ledger=self.ledger,
                unsaved=self.unsaved,
                busy=lambda: self.listener.noticed,
                before_commit=lambda step: self.log_buffer.flush(self.ledger, below=step),
                group=self.group,
                stock=stock,
            )
            self.tracker_feed = TrackerFeed(store, self.attempt, trackers)
            self.looks = 0
            """How often several processes have looked, in a loop of the program's own, whether to stop."""
            self._watch()
        except BaseException:
            self.listener.close()
            raise

    def _watch(self) -> None:
        """Make what serves a notice where the training thread cannot, and agree with the other processes on it."""
        emergency = Emergency(
            self.store,
            checkpoints=self.checkpoints,
            ledger=self.ledger,
            listener=self.listener,
            attempt=self.attempt,
            alone=self.group.count == 1,
        )
        self.stopping = Stopping(
            self.store,
            group=self.group,
            listener=self.listener,
            heartbeat=self.heartbeat,
            ledger=self.ledger,
            checkpoints=self.checkpoints,
            log_buffer=self.log_buffer,
            uploader=self.uploader,
        )
        self.deadline_saver = DeadlineSaver(
            emergency, listener=self.listener, group=self.group, stopping=self.stopping, lost=self._lost
        )
        self.agreement = self._agree() if self.group.count > 1 else None
        self.listener.on_notice = self._pass_on
        if self.listener.notice is not None:  # it came before there was anybody to tell
            self._pass_on(self.listener.notice)

    def _agree(self) -> Agreement:
        """Begin to agree with the other processes of the attempt."""
        self.group.share("opened", lambda: True)
        if self.store.remote is None:
            self._check_shared()
        return Agreement(self.group, lambda: self.step + self.looks, on_stop=self._note, lost=self._lost)

    def _check_carried(self) -> None:
        """Refuse several processes on a URL of which nobody carries there what each of them saves."""
        carried = self.supervised and contract.process_from()[1] == self.group.count
        if self.group.count > 1 and self.store.remote is not None and not carried:
            raise ConfigError(
                f"{self.group.count} processes save to {self.store.url}, and "
                "each needs a supervisor that carries its part there: start them with jobkit submit, or let the run "
                "directory be on a disk that all of them share"
            )

    def _check_shared(self) -> None:
        """Refuse to go on where a process does not see what process 0 writes."""
        first = contract.events_file(self.attempt, 0)
        deadline = time.monotonic() + _SHARED_S
        while not self.store.exists(first):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"process {self.group.index} does not see what process 0 wrote to {self.store.path}: several "
                    "processes need a disk that all of them share, or a URL as run directory"
                )
            time.sleep(0.2)

    def _lost(self) -> str:
        return lost_process(self.store, self.attempt)

    def _pass_on(self, notice: Notice) -> None:
        """Tell of a notice, once, on a thread of the listener's or the agreement's."""
        if self.agreement is not None:
            self.agreement.ask(STOP, source=notice.source, reason=notice.reason, deadline_s=notice.left_s())
        self.deadline_saver.begin()

    def _note(self, message: dict[str, Any]) -> None:
        """Take the notice that another process, or this one, has told all of."""
        source = f"process {message['from']}: {message['source']}"
        self.listener.note(source, message["reason"], message.get("deadline_s"))
        self.deadline_saver.begin()

    @property
    def step(self) -> int:
        """Completed steps."""
        return self.heartbeat.completed

    @property
    def look(self) -> Listener | Rounds:
        """Whose `noticed` tells a loop that there is something to look at: the one thing it reads at every step."""
        return self.listener if self.agreement is None else self.agreement.rounds

    def barrier(self) -> set[str]:
        """Wait until the processes agree; return what is to be done at this boundary.

        Raises:
            StorageError: If they cannot: one of them is dead.
        """
        assert self.agreement is not None
        try:
            return self.agreement.barrier(self.step + self.looks)
        except JobkitError as error:
            raise StorageError(f"{error}; the newest committed step is {self.checkpoints.committed_step}") from None

    def note_compiled(self) -> None:
        """Write down what the compile cache has done."""
        if (report := compilecache.report(self.store, self.attempt)) is not None:
            self.ledger.append("compiled", step=self.step, **report)

    def close(self, error: BaseException | None, *, alone: bool) -> None:
        """Finish what is being saved and put signal handlers back.

        Args:
            error: What ends the attempt, None if it came to its end.
            alone: Whether the program failed, which in a run of several processes the others know nothing of.
        """
        self.deadline_saver.close()
        if self.probe is not None:
            self.probe.close()
        alone &= self.group.count > 1
        try:
            if alone:  # the others may be dead: nothing that needs them can be waited for
                Session.left_alone = True
                self.checkpoints.wait(_ALONE_S)
            else:
                self.checkpoints.close()
            self.log_buffer.flush(self.ledger, below=EVERYTHING if error is None else 0)
            self.note_compiled()
            if self.agreement is not None:
                self.agreement.close()
            self._close_trackers(error)
            if self.uploader is not None:
                self.uploader.close(deadline_s=_UPLOAD_S)
            if error is not None and not isinstance(error, SystemExit | KeyboardInterrupt):
                self.ledger.append("raised", error=f"{type(error).__name__}: {error}"[:2000], step=self.step)
            elif error is None:
                self.heartbeat.enter(Phase.FINISHED)
            if alone:
                self.group.leave(PARTING_S)
        finally:
            self.ledger.close()
            self.listener.close()
            if error is None:  # what cannot leave may hang in its last breath
                self._end_stacks()
            if self.listener.notice is not None and self.listener.notice.source == "supervisor":
                self.heartbeat.bury()

    def _close_trackers(self, error: BaseException | None) -> None:
        """Let the trackers have the rest; after a notice only for a moment, since the next attempt sends it as well."""
        if self.heartbeat.phase == Phase.STOPPED:
            self.tracker_feed.close("preempted", wait_s=_TRACKERS_NOTICED_S)
        elif error is None:
            self.tracker_feed.close("done", wait_s=_TRACKERS_S)
        else:
            self.tracker_feed.close("failed", wait_s=_TRACKERS_NOTICED_S)


def store_of(url: str | os.PathLike[str] | None) -> Store:
    """Return the run directory: under a launcher its own."""
    launched = os.environ.get(contract.ENV_RUN)
    if url is None and not launched:
        raise ConfigError(
            "Run() has no run directory: give one, Run('runs/mnist'), or start the program with jobkit submit"
        )
    store = Store(launched or url or "")
    if "\\" in store.url:  # as no submit lets through: what follows would take every checkpoint for damaged
        names.check_place(store.url)
    if launched and url is not None and Store(url).path != store.path:
        if Session.opened_here:
            raise ConfigError(
                f"a second Run, {os.fspath(url)}, in a program that was submitted as the one run "
                f"{store.url}: submit each run on its own"
            )
        say(f"the launcher's run directory {store.url} is used instead of {os.fspath(url)}")
    return store


def _claim(store: Store, given: int | None) -> int:
    """Return the attempt's number; an attempt of an older jobkit than the run's ends none that is alive."""
    place = store if given is not None else store.remote or store
    # Without a run.json it was started by hand; a damaged one is for the launching side to tell.
    with contextlib.suppress(FileNotFoundError, ValueError):
        versions.check_run(place.read(contract.RUN_JSON), f"{store.url}/{contract.RUN_JSON}")
    return mirror.claim(store) if given is None else given


def _probe(ledger: Ledger) -> "Probe | None":
    if (settings := drill_from()) is None:
        return None
    from jobkit.drill.fingerprints import Probe

    return Probe(settings, ledger)


def silence_jax(*, said: bool) -> bool:
    """Turn JAX's own preemption notifier off; tell whether it was on.

    It would replace our SIGTERM handler without a word when jax.distributed starts, and end the run's notices there.
    """
    if not getattr(jax.config, "jax_enable_preemption_service", False):
        return False
    jax.config.update("jax_enable_preemption_service", False)  # type: ignore[no-untyped-call]
    if said:
        say("JAX's own preemption notifier was on: it is off from here, since the run serves the signals")
    return True


def _on_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End an uncaught error of ours with one sentence and its exit code; leave all others as they were."""
    ours = isinstance(error, JobkitError)
    code = int(error.exit_code) if isinstance(error, JobkitError) else 1
    if ours:
        say(str(error))
    else:
        _earlier_hook(kind, error, trace)
    if Session.left_alone:  # JAX and Orbax would wait for the others for minutes
        flush()
        os._exit(code)
    if ours:
        raise SystemExit(code)


_earlier_hook = sys.excepthook
sys.excepthook = _on_error
