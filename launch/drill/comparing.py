"""Two runs compared bit for bit, and what a comparison says. jax is in a process of its own."""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from jobkit import contract
from jobkit.errors import JobkitError

COMPARE_S = 900.0
"""How long a comparison of two runs may take."""

Comparison = Mapping[str, Any]
"""`jobkit.compare.Comparison` as JSON has it."""
Compare = Callable[[str, str], Comparison]


def first_difference(comparison: Comparison) -> str:
    """Say the first difference of a comparison: of the state if there is one, else of a metric."""
    each = comparison.get("leaf") or comparison.get("metric")
    return f"{each['name']} at step {each['step']}: {each['a']} / {each['b']}" if each else ""


def same(comparison: Comparison, aside: Collection[str] = ()) -> bool:
    """Tell whether two runs have the same state, and the same metrics but for some."""
    return bool(comparison["equal"]) or (comparison["leaf"] is None and {*comparison["metrics"]} <= {*aside})


def varying(comparison: Comparison) -> frozenset[str]:
    """Return the metrics that differ between two undisturbed runs of equal state: times, memory, the host's name."""
    return frozenset(comparison["metrics"]) if comparison["leaf"] is None else frozenset()


class Comparer:
    """Compares runs in one process of its own, since reading checkpoints needs jax.

    Args:
        home: An empty directory: from a bucket it reads what has got there, as another machine would.
    """

    def __init__(self, home: Path) -> None:
        self._mutex = threading.Lock()
        self._home = home
        self._process = self._start()

    def _start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "jobkit.compare", "-", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, start_new_session=True,  # a Ctrl-C is ours to hear
            env=os.environ | {"JAX_PLATFORMS": "cpu", contract.ENV_HOME: str(self._home)},
        )  # fmt: skip

    def compare(self, a: str, b: str) -> Comparison:
        """Compare two runs.

        Raises:
            JobkitError: If there is nothing to compare.
        """
        with self._mutex:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            try:
                self._process.stdin.write(f"{a}\t{b}\n")
                self._process.stdin.flush()
                if not select.select([self._process.stdout], [], [], COMPARE_S)[0]:
                    raise TimeoutError
                reply: dict[str, Any] = json.loads(self._process.stdout.readline())
            except (OSError, ValueError):  # it died, or it hangs: the next comparison is another one's
                self.close()
                self._process = self._start()
                raise JobkitError(f"{a} and {b} could not be compared: python -m jobkit.compare {a} {b}") from None
        if "error" in reply:
            raise JobkitError(f"the two runs could not be compared: {reply['error']}")
        return reply

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def comparer() -> Iterator[Comparer]:
    """Give a comparer with a home of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="jobkit-compare-") as home,
        contextlib.closing(Comparer(Path(home))) as made,
    ):
        yield made
