"""A shared disk that does not answer for a while: for real processes, by a library that is loaded before libc."""

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("outage.c")


class Outage:
    """A directory whose file system can be made to fail, in processes started with `environ`.

    Args:
        place: A directory of the test's own.
        below: What fails: everything from here down.
    """

    def __init__(self, place: Path, below: Path) -> None:
        compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
        if compiler is None:
            missing = pytest.fail if os.environ.get("CI") else pytest.skip
            missing("a C compiler is missing, which makes a disk that does not answer: install gcc or clang")
        library = place / "outage.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
        self._flag = place / "outage"
        self.environ = {
            "LD_PRELOAD": str(library),
            "OUTAGE_BELOW": os.path.realpath(below),
            "OUTAGE_WHILE": str(self._flag),
        }

    def begin(self, number: int = errno.ESTALE, *, writes: bool = False) -> None:
        """Let calls fail from now on; `writes`: those on files that are open already, too."""
        new = self._flag.with_suffix(".new")
        new.write_text(f"{number}{' writes' * writes}")
        new.rename(self._flag)

    def end(self) -> None:
        """Let the file system answer again."""
        self._flag.unlink(missing_ok=True)

    @contextmanager
    def during(self, number: int = errno.ESTALE, *, writes: bool = False) -> Iterator[None]:
        """Fail inside the block."""
        self.begin(number, writes=writes)
        try:
            yield
        finally:
            self.end()

    def end_after(self, seconds: float) -> None:
        """Answer again after a while."""
        threading.Timer(seconds, self.end).start()
