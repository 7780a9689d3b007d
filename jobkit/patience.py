"""Asking a storage again until it answers: a shared disk that fails over takes seconds or minutes, and is no end.

Whoever has to go on gives its `Store` a patience (`Store.patient`): every look and every write then waits for the
answer, and a person is told of it once.
"""

import math
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

import tenacity

from jobkit.errors import DamagedError, StorageError, say

T = TypeVar("T")
_FIRST_S, _LONGEST_S = 0.1, 5.0


class Insist(Protocol):
    """Calls a function, and may call it again."""

    def __call__(self, do: Callable[[], T], /) -> T:
        """Return what the function returns in the end, or raise what it raises."""


def at_once(do: Callable[[], T]) -> T:
    """Call once: for who is asked again anyway."""
    return do()


class Patience:
    """Calls again, at growing intervals, while the storage does not answer.

    What is damaged stays so, and what only a person can mend is said at once: neither is asked for again.

    Args:
        nap: Waits for some seconds; may come back sooner.
        over: Tells whether there is no time left to wait: then the error stands.
        deadline_s: How long an outage may last; after that every call is made once until one succeeds.
    """

    def __init__(
        self,
        *,
        nap: Callable[[float], None] = time.sleep,
        over: Callable[[], bool] = lambda: False,
        deadline_s: float = math.inf,
    ) -> None:
        self._nap, self._over, self._deadline_s = nap, over, deadline_s
        self._since: float | None = None

    def __call__(self, do: Callable[[], T]) -> T:
        """Call until the storage answers.

        Raises:
            StorageError: If it does not in the time there is.
        """
        asking = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            wait=tenacity.wait_exponential(_FIRST_S, _LONGEST_S) + tenacity.wait_random(0, _FIRST_S),
            stop=lambda tried: self._over() or self._lasted_s() >= self._deadline_s,
            sleep=self._nap,
            before_sleep=self._tell,
            reraise=True,
        )
        answer = asking(do)
        if self._since is not None:
            say(f"the storage answers again, after {self._lasted_s():.0f} s")
            self._since = None
        return answer

    def _lasted_s(self) -> float:
        return 0.0 if self._since is None else time.monotonic() - self._since

    def _tell(self, tried: tenacity.RetryCallState) -> None:
        if self._since is None:
            self._since = time.monotonic()
            say(f"{tried.outcome.exception() if tried.outcome else ''}; asking again until the storage answers")


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, StorageError) and not isinstance(error, DamagedError)
