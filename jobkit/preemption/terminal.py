"""What a closed terminal takes with it: the output of a program that was started there, whose step is to be committed.

The kernel takes the terminal away a moment before it says so with SIGHUP, and a print in between would end the program.
"""

import errno
import io
import os
import select
import sys

_STREAMS = ("stdout", "stderr")


class _Terminal(io.FileIO):
    """A terminal to which writing is no error once it is closed."""

    def write(self, content: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        """Write, or drop what has nowhere to go."""
        try:
            return super().write(content) or 0
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(content)


class Output:
    """The standard output and error of this process, as long as a closed terminal is to be survived."""

    def __init__(self) -> None:
        self._before: dict[str, object] = {}
        self._ours: dict[str, object] = {}

    def open(self) -> None:
        """Have Python's own streams, where they are a terminal's, bear that it is closed."""
        for name in _STREAMS:
            stream = getattr(sys, name)
            if stream is None or stream is not getattr(sys, f"__{name}__") or stream.closed or not stream.isatty():
                continue
            stream.flush()
            raw = io.BufferedWriter(_Terminal(stream.fileno(), "w", closefd=False))  # type: ignore[type-var]
            bears = io.TextIOWrapper(raw, encoding=stream.encoding, errors=stream.errors, line_buffering=True)
            bears.mode = "w"  # type: ignore[misc]
            self._before[name], self._ours[name] = stream, bears
            setattr(sys, name, bears)

    def close(self) -> None:
        """Put back the streams that were there, unless something has replaced them since."""
        for name, stream in self._ours.items():
            stream.flush()  # type: ignore[attr-defined]
            if getattr(sys, name) is stream:
                setattr(sys, name, self._before[name])
        self._before.clear()
        self._ours.clear()

    @staticmethod
    def drop() -> None:
        """Give output that has nowhere to go any more, to a closed terminal or a pipe into one, a place to vanish."""
        for descriptor in (1, 2):
            poll = select.poll()
            poll.register(descriptor, 0)
            if any(state & (select.POLLHUP | select.POLLERR) for _, state in poll.poll(0)):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
