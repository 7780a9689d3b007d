"""What the operating system really calls for a signal: C code may have changed it behind Python's back.

Read and written with `sigaction`, on Linux with 64 bits; elsewhere only what Python code installs is seen.
"""

import ctypes
import struct
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

_SIZE = 256
"""More than any C library's `struct sigaction`: the handler's address, a mask of 128 bytes, flags, a restorer."""
_FLAGS_AT = 8 + 128
_SA_SIGINFO = 4


def installed(number: int) -> bytes:
    """Return what is installed for a signal, as C describes it; empty where it cannot be read."""
    action = ctypes.create_string_buffer(_SIZE)
    return action.raw if _seen() and _libc().sigaction(number, None, action) == 0 else b""


def address(action: bytes) -> int:
    """Return the address that is called: 0 for the default action, 1 to ignore the signal."""
    return int(struct.unpack_from("=Q", action)[0]) if action else 0


def put(number: int, action: bytes) -> None:
    """Install what `installed` has returned before."""
    _libc().sigaction(number, ctypes.create_string_buffer(action, _SIZE), None)


@dataclass(frozen=True)
class CHandler:
    """A handler in C, to be called from Python.

    Args:
        action: As `installed` returns it.
    """

    action: bytes

    @property
    def callable(self) -> bool:
        """Whether it can be called from here: one that asks for details of the signal would be given none."""
        return address(self.action) > 1 and not struct.unpack_from("=i", self.action, _FLAGS_AT)[0] & _SA_SIGINFO

    def __call__(self, number: int, frame: Any) -> None:
        """Call it as the operating system would, if that can be done."""
        if self.callable:
            ctypes.CFUNCTYPE(None, ctypes.c_int)(address(self.action))(number)


def _seen() -> bool:
    return sys.platform == "linux" and struct.calcsize("P") == 8


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)
