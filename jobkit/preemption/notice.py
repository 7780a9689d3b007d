"""Where a preemption notice comes from, as the program sees it: signals, and the death of its supervisor.

A handler sets a flag and nothing else; the flag is a level that stays set, and the first notice wins. While the main
thread is inside a long XLA call Python runs no handler, but the C half writes the signal's number to the wakeup
descriptor at once, so that a thread of ours knows within a millisecond.

Libraries install handlers, too, and one that does so later than we silences all of this without a word. `look` sees it,
takes the signals back, and from then on calls what the library wanted called.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from jobkit import contract
from jobkit.errors import say
from jobkit.preemption import os_handlers
from jobkit.preemption.os_handlers import CHandler
from jobkit.preemption.terminal import Output
from jobkit.supervise.heartbeat import open_alive, read_notice

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
"""SLURM and docker send TERM, `--signal` users USR1 or USR2, a person INT."""
TERMINAL = signal.SIGHUP
"""The terminal was closed: a notice for a program that was started by hand, unless it was to ignore that (nohup), or
has a handler of its own for it."""
_GONE_S = 0.2
"""How often to look, once the terminal was closed, what has gone with it."""


@dataclass(frozen=True)
class Notice:
    """A word that this attempt has to end soon.

    Args:
        source: 'SIGTERM', 'SIGUSR1', 'SIGUSR2', 'SIGINT', 'SIGHUP', 'supervisor', or what the supervisor heard of.
        reason: What is known of the cause, for a person.
        at_s: When it came, on the clock of `time.monotonic`.
        deadline_s: Seconds from `at_s` until the process is killed, None where nobody said.
    """

    source: str
    reason: str
    at_s: float
    deadline_s: float | None = None

    @property
    def deadline_at(self) -> float | None:
        """When the process is killed, on the clock of `time.monotonic`; None where nobody said."""
        return None if self.deadline_s is None else self.at_s + self.deadline_s

    def left_s(self) -> float | None:
        """Return the seconds until then, below 0 when it is over; None where nobody said."""
        return None if self.deadline_at is None else self.deadline_at - time.monotonic()


_listening: "set[Listener]" = set()


def _forget_in_child() -> None:
    """Give a forked child its parent's earlier handlers back.

    The wakeup pipe is shared across a fork: a SIGTERM with which a `multiprocessing.Pool` ends its workers would reach
    the parent's watcher as a notice, and the worker would ignore it.
    """
    for listener in _listening:
        listener.let_go()
    _listening.clear()


os.register_at_fork(after_in_child=_forget_in_child)


class Listener:
    """Listens for notices from `open` to `close`.

    Signals: `open` and `close` belong on the main thread; elsewhere signals are left alone and only the supervisor is
    watched. Handlers that were there before come back on `close`.

    Args:
        supervisor: The supervisor's directory, None without one.
    """

    def __init__(self, supervisor: Path | None = None) -> None:
        self.on_notice: Callable[[Notice], None] | None = None
        """Called with the first notice, on a thread of the listener's own."""
        self.noticed = False
        """Whether a notice has come; the one thing a training loop looks at."""
        self._supervisor = supervisor
        self._first: tuple[str, str, float, float | None] | None = None
        self._interrupts = 0
        self._insist = False
        self._earlier: dict[signal.Signals, Any] = {}
        self._earlier_wakeup: tuple[int, Any] = (-1, None)
        self._ours: dict[int, int] = {}
        self._others: dict[int, Any] = {}
        self._calling = False
        self._output = Output()
        self._alive: int | None = None
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None

    @property
    def notice(self) -> Notice | None:
        """The first notice that came, None while there is none.

        What the supervisor knows of it comes in a file beside the signal, and may be told more nearly later.
        """
        if self._first is None:
            return None
        source, reason, at_s, grace_s = self._first
        report = read_notice(self._supervisor) if self._supervisor is not None else None
        if report is None:
            return Notice(source, reason, at_s, grace_s)
        return Notice(
            report.source, report.reason, at_s, None if report.deadline_at is None else report.deadline_at - at_s
        )

    def open(self) -> None:
        """Start listening."""
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._pipe = (reader, writer)
        self._insist = sys.stdin is not None and not sys.stdin.closed and os.isatty(0)
        if self._supervisor is not None:
            self._alive = open_alive(self._supervisor)
        if threading.current_thread() is threading.main_thread():
            self._wake_up()
            wanted = self._wanted()
            if TERMINAL in wanted:
                self._output.open()
            for number in wanted:
                self._earlier[number] = signal.signal(number, self._handle)
                self._ours[number] = os_handlers.address(os_handlers.installed(number))
        self._thread = threading.Thread(target=self._watch, name="jobkit-notice", daemon=True)
        self._thread.start()
        _listening.add(self)

    def _wanted(self) -> tuple[signal.Signals, ...]:
        """Return the signals that are notices to this program."""
        earlier = signal.getsignal(TERMINAL)
        free = earlier == signal.SIG_DFL or isinstance(getattr(earlier, "__self__", None), Listener)
        return (*SIGNALS, TERMINAL) if free and self._supervisor is None else SIGNALS

    def hear_earlier(self) -> None:
        """Take the notice that the supervisor has given already: whoever it signalled then may have kept it to itself,
        such as a shell that waits for this program. Called once the supervisor can see that somebody listens; from then
        on it signals this process.
        """
        report = read_notice(self._supervisor) if self._supervisor is not None else None
        if report is not None:
            self.note(report.source, report.reason)

    def close(self) -> None:
        """Stop listening and put earlier handlers back."""
        if self._pipe is None or self._thread is None:
            return
        _listening.discard(self)
        self.let_go()
        self._output.close()
        reader, writer = self._pipe
        self._pipe = None
        os.write(writer, b"\0")  # no signal has number 0: ends the thread
        self._thread.join()
        for descriptor in (reader, writer, self._alive):
            if descriptor is not None:
                os.close(descriptor)

    @property
    def shared(self) -> bool:
        """Whether a library hears of the signals as well, and may have the program stop in its own way."""
        return any(callable(other) for other in self._others.values())

    def retake(self) -> None:
        """Install the handlers again: something has replaced them since `open`. Earlier ones still come back."""
        if self._earlier and threading.current_thread() is threading.main_thread():
            for number in self._earlier:
                signal.signal(number, self._handle)

    def look(self) -> None:
        """Take back the signals that something has taken since; what it installed is called from now on after ours.

        What is not seen: C code's doing elsewhere than on Linux, signals that are blocked to be read with `sigwait` or
        `signalfd`, and a notice that came before this.

        Signals: on the main thread; elsewhere there is nothing to do.
        """
        if not self._earlier or threading.current_thread() is not threading.main_thread():
            return
        self._wake_up()
        for number in self._earlier:
            action, handler = os_handlers.installed(number), signal.getsignal(number)
            in_c = os_handlers.address(action) != self._ours[number]
            if handler == self._handle and not in_c:
                continue
            other = CHandler(action) if in_c and handler == self._handle else handler
            if os_handlers.address(action) == 1:
                other = signal.SIG_IGN
            signal.signal(number, self._handle)
            if other != self._others.get(number, self._handle):
                say(f"{_name(other)} has taken {number.name} from the run: taken back, {_then(other)}")
            self._earlier[number] = self._others[number] = other

    def _wake_up(self) -> None:
        """Have the numbers of signals written to our pipe; who had them before hears of them from us."""
        assert self._pipe is not None
        writer = self._pipe[1]
        earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        if earlier != writer:
            self._earlier_wakeup = (earlier, _identity(earlier))

    def let_go(self) -> None:
        """Put earlier handlers back; elsewhere than on the main thread there is nothing to do."""
        if not self._earlier or threading.current_thread() is not threading.main_thread():
            return
        earlier, identity = self._earlier_wakeup
        signal.set_wakeup_fd(earlier if identity is not None and _identity(earlier) == identity else -1)
        for number, handler in self._earlier.items():
            if isinstance(handler, CHandler):
                signal.signal(number, signal.SIG_DFL)
                os_handlers.put(number, handler.action)
            else:
                # None stands for a handler that C code installed before, which Python cannot put back.
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._earlier.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._calling:  # the library's calls what it found, which is this
            return
        self._note_signal(number)
        other = self._others.get(number)
        if callable(other) and other is not signal.default_int_handler:
            self._calling = True
            try:
                # One that ends the program would do so in the middle of a step.
                with contextlib.suppress(BaseException):
                    other(number, frame)
            finally:
                self._calling = False
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts >= 3 and self._insist:
                raise KeyboardInterrupt

    def _note_signal(self, number: int) -> None:
        self.note(signal.Signals(number).name, "signal", contract.grace_s_from(number))

    def note(self, source: str, reason: str, grace_s: float | None = None) -> None:
        """Take a notice, unless there was one before.

        Args:
            source: Where it came from.
            reason: What is known of the cause.
            grace_s: Seconds from now until the process is killed, None where nobody said.
        """
        if self._first is None:
            self._first = (source, reason, time.monotonic(), grace_s)
        self.noticed = True

    def _watch(self) -> None:
        assert self._pipe is not None
        reader = self._pipe[0]
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        if self._alive is not None:
            poll.register(self._alive, 0)  # POLLHUP is always reported
        closed = False
        while True:
            for descriptor, _ in poll.poll(_GONE_S * 1000 if closed else None):
                if descriptor == self._alive:
                    poll.unregister(descriptor)
                    gone = "the supervisor of this attempt is gone"
                    self.note("supervisor", gone, contract.grace_s_from(signal.SIGTERM))
                    self._pass_on()
                    continue
                numbers = os.read(reader, 512)
                if 0 in numbers:
                    return
                for number in numbers:
                    if number in self._ours:
                        closed |= number == TERMINAL
                        self._note_signal(number)
                        self._pass_on()
                earlier, identity = self._earlier_wakeup
                # It may have been closed since, and its number be a file's now.
                if identity is not None and _identity(earlier) == identity:
                    with contextlib.suppress(OSError):
                        os.write(earlier, numbers)
            if closed:
                self._output.drop()

    def _pass_on(self) -> None:
        """Tell the notice once; here, since a handler may not talk to anybody."""
        tell, self.on_notice = self.on_notice, None
        if tell is not None and self.notice is not None:
            tell(self.notice)


def _identity(descriptor: int) -> Any:
    """Tell an open file from one that has its number later; None for none."""
    with contextlib.suppress(OSError):
        status = os.fstat(descriptor)
        return status.st_dev, status.st_ino, status.st_mode
    return None


def _name(handler: Any) -> str:
    if isinstance(handler, CHandler):
        return "C code"
    if callable(handler):
        return f"{getattr(handler, '__module__', '?')}.{getattr(handler, '__qualname__', type(handler).__name__)}"
    return "something"


def _then(handler: Any) -> str:
    if not callable(handler):
        return "where it was to be ignored or to end the program"
    if handler is signal.default_int_handler or (isinstance(handler, CHandler) and not handler.callable):
        return "and its handler is not called"
    return "and its handler is still called"
