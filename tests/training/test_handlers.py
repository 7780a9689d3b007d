"""Libraries that take the signals of a run after it was opened, in Python and in C."""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobkit import contract
from jobkit.preemption import os_handlers
from jobkit.preemption.notice import SIGNALS, TERMINAL, Listener
from jobkit.rundir import commits
from jobkit.rundir.ledger import read_events
from jobkit.rundir.store import Store
from jobkit.supervise import heartbeat
from tests.harness import training

CALLED: list[int] = []


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def in_c(number: int) -> None:
    """Stand for a library's handler in C."""
    CALLED.append(number)


@pytest.fixture
def listener() -> Iterator[Listener]:
    """Yield a listener that is open; afterwards the handlers are pytest's again."""
    before = {number: os_handlers.installed(number) for number in SIGNALS}
    known = {number: signal.getsignal(number) for number in SIGNALS}
    CALLED.clear()
    made = Listener()
    made.open()
    yield made
    made.close()
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, known[number])
        os_handlers.put(number, before[number])


def raised(number: int, listener: Listener) -> bool:
    """Send this process a signal; tell whether it was a notice."""
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 5
    while not listener.noticed and time.monotonic() < deadline:
        time.sleep(0.01)
    return listener.noticed


def _python(number: int) -> None:
    signal.signal(number, lambda number, frame: CALLED.append(number))


def _chained(number: int) -> None:
    earlier = signal.getsignal(number)

    def call(number: int, frame: Any) -> None:
        CALLED.append(number)
        earlier(number, frame)  # type: ignore[operator,misc]

    signal.signal(number, call)


def _exits(number: int) -> None:
    def leave(number: int, frame: Any) -> None:
        CALLED.append(number)
        raise SystemExit(1)

    signal.signal(number, leave)


def _c(number: int) -> None:
    libc = ctypes.CDLL(None)
    libc.signal.restype = libc.signal.argtypes = None
    libc.signal(number, in_c)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("take", [_python, _chained, _exits, _c])
def test_a_library_takes_a_signal(
    listener: Listener, capfd: pytest.CaptureFixture[str], number: signal.Signals, take: Callable[[int], None]
) -> None:
    """It is taken back, said once, the notice is heard, and the library's handler is called, whatever that does."""
    take(number)
    for _ in range(2):
        listener.look()
    said = capfd.readouterr().err
    assert said.count(f"has taken {number.name} from the run") == 1
    assert "still called" in said
    assert raised(number, listener)
    assert listener.notice is not None
    assert listener.notice.source == number.name
    assert [number] == CALLED
    assert listener.shared


@pytest.mark.parametrize("to", [signal.SIG_IGN, signal.SIG_DFL])
@pytest.mark.parametrize("in_python", [True, False])
def test_a_library_ignores_a_signal(listener: Listener, to: signal.Handlers, in_python: bool) -> None:
    """Where a signal was to be ignored, or to end the program, the run serves it all the same."""
    if in_python:
        signal.signal(signal.SIGTERM, to)
    else:
        ctypes.CDLL(None).signal(int(signal.SIGTERM), ctypes.c_void_p(int(to)))
    listener.look()
    assert raised(signal.SIGTERM, listener)


def test_a_handler_that_wants_details(listener: Listener, capfd: pytest.CaptureFixture[str]) -> None:
    """A handler in C with three arguments is not called, which is said, and is put back at the end."""
    _c(signal.SIGTERM)
    action = bytearray(os_handlers.installed(signal.SIGTERM))
    flags = struct.unpack_from("=i", action, os_handlers._FLAGS_AT)[0]
    struct.pack_into("=i", action, os_handlers._FLAGS_AT, flags | os_handlers._SA_SIGINFO)
    os_handlers.put(signal.SIGTERM, bytes(action))
    theirs = os_handlers.address(os_handlers.installed(signal.SIGTERM))
    listener.look()
    assert "C code has taken SIGTERM from the run: taken back, and its handler is not called" in capfd.readouterr().err
    assert raised(signal.SIGTERM, listener)
    assert CALLED == []
    listener.close()
    assert os_handlers.address(os_handlers.installed(signal.SIGTERM)) == theirs


def test_asyncio_takes_handler_and_descriptor(listener: Listener) -> None:
    """`add_signal_handler` takes both: taken back, and its callback is still called."""

    async def main() -> None:
        heard = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, heard.set)
        listener.look()
        assert raised(signal.SIGTERM, listener)
        await asyncio.wait_for(heard.wait(), 10)

    asyncio.run(main())


def test_a_descriptor_that_was_closed(listener: Listener, tmp_path: Path) -> None:
    """Numbers of signals are never written to a file that has got the descriptor since."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno())
        listener.look()
        number = theirs.fileno()
    with contextlib.ExitStack() as files:
        names = [tmp_path / f"{n}" for n in range(4)]
        opened = [files.enter_context(name.open("wb")) for name in names]
        assert number in [file.fileno() for file in opened]
        assert raised(signal.SIGTERM, listener)
    assert [name.read_bytes() for name in names] == [b""] * 4


def _library_takes_sigterm(url: str, how: str) -> None:
    import jobkit

    flag: list[int] = []
    with jobkit.Run(url, save_every=None) as run:
        state = run.resume(total=0, optimizer=None)
        for epoch in run.through(range(state.total, 100)) if how == "own" else run.steps(100):
            state.total += 1
            if how == "own":
                run.save(epoch + 1)
            if run.attempt == 0 and state.total == 3:
                _c(signal.SIGTERM)
                time.sleep(2.1)
            if how == "flag" and state.total == 3:
                signal.signal(signal.SIGTERM, lambda number, frame: flag.append(number))
            if run.attempt == 0 and state.total == 5:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)
                CALLED or flag or os._exit(99)
            if flag:
                break


@pytest.mark.slow
@pytest.mark.parametrize("how", ["steps", "own", "flag"])
def test_a_run_takes_its_signal_back(tmp_path: Path, how: str) -> None:
    """At the next look of either loop; and a program that a library has told to stop has not stopped early."""
    url = tmp_path / "run"
    code, printed = training.attempt(url, function=_library_takes_sigterm, how=how)
    assert code == contract.Exit.PREEMPTED, printed
    assert commits.steps(Store(url))[-1] == 5
    assert "has taken SIGTERM from the run: taken back" in printed
    code, printed = training.attempt(url, function=_library_takes_sigterm, how=how)
    assert (code, commits.steps(Store(url))[-1]) == (0, 100), printed


def _hears_of_terminals(supervisor: Path | None = None) -> bool:
    made = Listener(supervisor)
    made.open()
    try:
        heard = signal.getsignal(TERMINAL) == made._handle
        return heard and raised(TERMINAL, made) and made.notice is not None and made.notice.source == "SIGHUP"
    finally:
        made.close()


def test_a_closed_terminal_is_a_notice_to_who_was_started_by_hand(tmp_path: Path) -> None:
    """SIGHUP is one, unless it was ignored when the program started, as nohup does, or the program has a handler for
    it; a supervisor hears of it itself.
    """
    earlier = signal.getsignal(TERMINAL)
    try:
        signal.signal(TERMINAL, signal.SIG_DFL)
        assert _hears_of_terminals()
        link = heartbeat.Link(tmp_path, 0)
        try:
            assert not _hears_of_terminals(link.directory)
        finally:
            link.close()
        signal.signal(TERMINAL, signal.SIG_IGN)
        assert not _hears_of_terminals()
        assert signal.getsignal(TERMINAL) == signal.SIG_IGN
        signal.signal(TERMINAL, own := lambda number, frame: None)
        assert not _hears_of_terminals()
        assert signal.getsignal(TERMINAL) == own
    finally:
        signal.signal(TERMINAL, earlier)


def _on_a_terminal(url: str, terminal: str) -> None:
    """Train at a terminal of one's own, to which each step prints."""
    os.setsid()
    descriptor = os.open(terminal, os.O_RDWR)
    for standard in range(3):
        os.dup2(descriptor, standard)
    signal.signal(TERMINAL, signal.SIG_DFL)
    training.train(url, steps=100_000, save_every=None, hook=lambda point, run: print(point, run.step, flush=True))


@pytest.mark.slow
def test_the_terminal_is_closed(tmp_path: Path) -> None:
    """A program that prints to a terminal which is closed commits its step and exits with 75, for all its printing."""
    ours, theirs = os.openpty()
    process = training.start(_on_a_terminal, str(tmp_path / "run"), os.ttyname(theirs), log=tmp_path / "log")
    seen = b""
    while b"step 5" not in seen:
        seen += os.read(ours, 1000)
    os.close(theirs)
    os.close(ours)
    process.join(60)
    assert process.exitcode == contract.Exit.PREEMPTED
    assert commits.steps(Store(tmp_path / "run"))[-1] >= 5
    (stopped,) = [event for event in read_events(Store(tmp_path / "run")) if event["event"] == "stopped"]
    assert not stopped.get("lost_steps")
