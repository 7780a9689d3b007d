"""The Python stacks of a program that answers nothing any more: how its supervisor gets them, and reads them.

The program registers faulthandler for SIGQUIT, which is no notice anywhere and prints the threads of other virtual
machines too. Its handler is C: it runs between two instructions of whatever thread the kernel picks and takes no lock,
so that it works while C code holds the interpreter, where no Python handler and no thread of ours would ever run.
"""

import contextlib
import faulthandler
import os
import re
import signal
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SIGNAL = signal.SIGQUIT
_FILE = "stacks"
"""In the directory that the supervisor shares with its program."""
_ANSWER_S, _WHOLE_S = 2.0, 10.0
"""How long a program may take to begin to answer, and to be through with it, on a busy machine."""
_MAIN = "main thread"
_THREAD = re.compile(r"(?:Current thread|Thread) (0x[0-9a-f]+)")
_FRAME = re.compile(r'  File "(.*)", line (\d+|\?\?\?) in (.*)')
_LIBRARY = re.compile(r"/lib(?:64)?/python3[^/]*/|^<frozen ")
_OURS = str(Path(__file__).parent.parent) + os.sep
_STDLIB = sysconfig.get_path("stdlib") + os.sep


def answer(directory: Path | None) -> Callable[[], None]:
    """Write the stacks of all threads for the supervisor at every SIGQUIT.

    Args:
        directory: What the supervisor shares with this program; None without one, then SIGQUIT stays what it was.

    Returns:
        What ends it and puts the earlier handler back.
    """
    if directory is None:
        return lambda: None
    try:
        file = os.open(directory / _FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.write(file, f"{_MAIN} {threading.main_thread().ident or 0:#018x}\n".encode())
    except OSError:
        return lambda: None
    faulthandler.register(SIGNAL, file=file, all_threads=True)

    def end() -> None:
        faulthandler.unregister(SIGNAL)
        os.close(file)

    return end


def take(directory: Path, pid: int) -> str:
    """Ask a program for its stacks; '' if it does not answer, because it never registered or hangs in the kernel.

    The caller wakes it if it was stopped: a stopped process handles nothing but SIGCONT and SIGKILL.
    """
    path = directory / _FILE
    if not path.exists():
        return ""  # SIGQUIT would kill it
    before, blocked = path.stat().st_size, _blocking(pid)
    # A signal to a stopped process goes to whichever thread wakes first, which would read the main thread's stack while
    # that runs on; else it goes to the main thread, which stands still then.
    for number in (signal.SIGCONT, SIGNAL):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return ""
    begun = time.monotonic()
    while (waited_s := time.monotonic() - begun) < _WHOLE_S:
        time.sleep(0.01)
        begins = path.stat().st_size > before
        # A handler that runs has its signal blocked: where no thread has any more, the last line is written.
        if (begins and not _blocking(pid) - blocked) or (not begins and waited_s > _ANSWER_S):
            break
    content = path.read_bytes()
    heading = content.partition(b"\n")[0] + b"\n"
    return (heading + content[before:]).decode(errors="replace") if len(content) > before else ""


def _blocking(pid: int) -> set[str]:
    """Return the threads of a process in which our signal is blocked."""
    threads = set()
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/task/{task}/status").read_text()
                mask = re.search(r"^SigBlk:\s*([0-9a-f]+)", status, re.MULTILINE)
                if mask is not None and int(mask[1], 16) >> (SIGNAL - 1) & 1:
                    threads.add(task)
    return threads


def innermost(text: str) -> str:
    """Name the place in the user's own code where the main thread is: 'train.py:33 in join'; '' if it is not known.

    Of a thread that is in no code of the user's, the innermost frame of all.
    """
    frames = list(_main_frames(text))
    ours = [frame for frame in frames if not _of_library(frame[0])]
    for path, line, name in ours or frames:
        return f"{Path(path).name}:{line} in {name}"
    return ""


def _main_frames(text: str) -> Iterator[tuple[str, str, str]]:
    main = re.search(rf"^{_MAIN} (0x[0-9a-f]+)", text, re.MULTILINE)
    inside = False
    for line in text.splitlines():
        if thread := _THREAD.match(line):
            inside = main is not None and int(thread[1], 16) == int(main[1], 16)
        elif inside and (frame := _FRAME.match(line)):
            yield frame[1], frame[2], frame[3]


def _of_library(path: str) -> bool:
    return bool(_LIBRARY.search(path)) or path.startswith((_OURS, _STDLIB))
