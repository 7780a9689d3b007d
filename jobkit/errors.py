"""The errors that a user is told, each with the exit code it ends a process with.

A message says the fact, the values found and the remedy; the command line and `Run` print it as one sentence,
without a traceback.
"""

import contextlib
import os
import sys
from types import TracebackType
from typing import NoReturn

from jobkit.contract import Exit
from jobkit.printable import printable


class JobkitError(Exception):
    """Base of every error that jobkit raises on purpose."""

    exit_code: int = Exit.FAILED


class ConfigError(JobkitError):
    """Something only a person can mend: a restart would fail the same way (exit code 78 inside a job)."""

    exit_code = Exit.CONFIG


class SupersededError(ConfigError):
    """A newer attempt of the run has begun: this one is a leftover and may neither commit nor remove anything."""


class OutsideError(ConfigError):
    """A name leads out of the run it is used in, by itself or through a symbolic link (see names.py)."""


class PackageError(ConfigError):
    """A package that reads and writes for us failed as no storage makes it fail: another version of it is needed."""


class UnsavedError(ConfigError):
    """What is trained cannot be saved, at two intervals in a row: to train on would be lost."""


class StorageError(JobkitError):
    """A checkpoint could not be committed or read; a later attempt may succeed (exit code 74)."""

    exit_code = Exit.STORAGE


class DamagedError(StorageError):
    """What the storage holds is not what was committed; asking it again changes nothing."""


DONATED = "the program gave it away"
"""What `DonatedError` says in any case."""


class DonatedError(JobkitError):
    """A step cannot be saved: its arrays were given away, with `donate_argnums`, and nothing was put in their place.

    Args:
        leaf: One of them, by part and name.
    """

    def __init__(self, leaf: str) -> None:
        super().__init__(
            f"{leaf} is gone: {DONATED} (donate_argnums) and put nothing in its place: assign the new values in the "
            "same step, run.state.NAME = ..., or update the NNX object itself"
        )


class Preempted(SystemExit):
    """The run stopped on a preemption notice and everything promised is committed (exit code 75).

    Args:
        message: What was committed, for a person; kept as the exception's first argument is the exit code.
    """

    def __init__(self, message: str = "stopped on notice") -> None:
        super().__init__(int(Exit.PREEMPTED))
        self.message = message


def end_in_words() -> None:
    """From here on an uncaught error of ours ends this process with one sentence and its exit code, not a traceback."""
    earlier = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, JobkitError):
            earlier(kind, error, trace)
            return
        say(str(error))
        raise SystemExit(int(error.exit_code))

    sys.excepthook = hook


def leave(code: int) -> NoReturn:
    """End this process with a code that nothing which cannot be printed any more changes."""
    flush()
    sys.exit(code)


def flush() -> None:
    """Print what waits to be, or give it up: Python ends a process that cannot with a code of its own, 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def say(message: str) -> None:
    """Tell the person reading the log; nothing that happens to the log is an error."""
    if sys.stderr is not None:  # closed; `print` would take standard output instead
        with contextlib.suppress(OSError, ValueError):  # it may lie on the disk that is full, or be closed by now
            print(f"jobkit: {printable(message)}", file=sys.stderr, flush=True)
