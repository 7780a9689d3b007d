"""The processes of one attempt: which one this is, and how they tell each other a few words.

Words go through the key-value store of JAX's coordination service, which process 0 serves: no device takes part, so
that a thread may talk while the main thread computes. A run of one process has a group of one, which talks to nobody.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jobkit import contract
from jobkit.contract import Exit
from jobkit.errors import ConfigError, JobkitError, OutsideError, PackageError, StorageError, SupersededError
from jobkit.rundir.ledger import read_json
from jobkit.rundir.store import Store

_HEARTBEAT_S = 20
"""A process that the others have not heard of for so long is dead to them (JAX's default is 100 s)."""
_CONNECT_S = 300
_EVER_S = 24 * 3600.0
_LAST_BREATH_S = 0.2
"""How long a process takes to end when it has said so."""


def initialize() -> None:
    """Join the other processes of this attempt; the first thing a program of several processes does.

    Like `jax.distributed.initialize()`, with what the launcher knows: who the processes are and where they meet, anew
    for every attempt. Without a launcher, or in a run of one process, it does nothing.

    Raises:
        ConfigError: If JAX has computed something already.
        JobkitError: If the others cannot be reached.
    """
    index, count = contract.process_from()
    if count == 1 or jax.distributed.is_initialized():
        return
    coordinator = os.environ.get(contract.ENV_COORDINATOR)
    if not coordinator:
        named = contract.ENV_COORDINATOR
        raise ConfigError(f"{contract.ENV_PROCESSES}={count} but {named} is not set: start the run with jobkit submit")
    # JAX's own notifier would take SIGTERM from us.
    jax.config.update("jax_enable_preemption_service", False)  # type: ignore[no-untyped-call]
    try:
        jax.distributed.initialize(
            coordinator, count, index, heartbeat_timeout_seconds=_HEARTBEAT_S, initialization_timeout=_CONNECT_S
        )
    except RuntimeError as error:
        if "before" in str(error):
            raise ConfigError(
                "JAX has computed something before its processes met: call jobkit.initialize() first in the program"
            ) from None
        raise JobkitError(f"process {index} of {count} cannot join the others at {coordinator}: {error}") from None


class Group:
    """The processes of one Run, as one of them sees them.

    Args:
        name: Tells the words of one Run from those of another in the same processes; the same in all of them.
        index: Index of this process.
        count: Number of processes.
    """

    def __init__(self, name: str, *, index: int = 0, count: int = 1) -> None:
        self.index, self.count = index, count
        self._name = name
        self._client = _client() if count > 1 else None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes what is written once."""
        return self.index == 0

    def put(self, key: str, value: Any) -> bool:
        """Say something under a key that nobody has used yet; tell whether it was the first to be said there.

        Raises:
            StorageError: If the others cannot be reached.
        """
        assert self._client is not None
        try:
            self._client.key_value_set(f"{self._name}/{key}", json.dumps(value))
        except Exception as error:
            if "ALREADY_EXISTS" in str(error):
                return False
            raise _lost(error) from None
        return True

    def get(self, key: str, timeout_s: float = _EVER_S) -> Any:
        """Wait for what is said under a key.

        Raises:
            TimeoutError: If nothing is said within `timeout_s`.
            StorageError: If the others cannot be reached.
        """
        assert self._client is not None
        try:
            return json.loads(self._client.blocking_key_value_get(f"{self._name}/{key}", int(timeout_s * 1000)))
        except Exception as error:
            if "DEADLINE_EXCEEDED" in str(error):
                raise TimeoutError(f"no process put {key} within {timeout_s:g} s") from None
            raise _lost(error) from None

    def share(self, key: str, make: Callable[[], Any], timeout_s: float = _EVER_S) -> Any:
        """Have process 0 make a value, and return it in every process; its error of ours is everybody's.

        Raises:
            JobkitError: What `make` raised in process 0.
            TimeoutError: If process 0 says nothing within `timeout_s`.
        """
        if self.count == 1:
            return make()
        if self.first:
            try:
                value = make()
            except JobkitError as error:
                self.put(key, told_error(error))
                raise
            self.put(key, {"value": value})
            return value
        reply = self.get(key, timeout_s)
        raise_told(reply)
        return reply["value"]

    def gather(self, key: str, value: Any, timeout_s: float = _EVER_S) -> list[Any]:
        """Return every process's value, in the order of the processes, in process 0; elsewhere an empty list.

        Raises:
            TimeoutError: If one of them says nothing within `timeout_s`, naming it.
        """
        if self.count == 1:
            return [value]
        if not self.first:
            self.put(f"{key}/{self.index}", value)
            return []
        deadline, values = time.monotonic() + timeout_s, [value]
        for other in range(1, self.count):
            try:
                values.append(self.get(f"{key}/{other}", max(0.01, deadline - time.monotonic())))
            except TimeoutError:
                raise TimeoutError(
                    f"process {other} of {self.count} has not put {key} within {timeout_s:g} s"
                ) from None
        return values

    def leave(self, timeout_s: float) -> None:
        """Say that this process is about to end, failing or on notice; the first one waits until the others have.

        JAX ends them by SIGABRT as soon as what it serves is gone, and how they ended would look like that.
        """
        if self.count == 1:
            return
        if not self.first:
            with contextlib.suppress(JobkitError):
                self.put(f"parted/{self.index}", True)
            return
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(JobkitError, TimeoutError):
            for other in range(1, self.count):
                self.get(f"parted/{other}", max(0.01, deadline - time.monotonic()))
            time.sleep(_LAST_BREATH_S)


_KINDS = {kind.__name__: kind for kind in (ConfigError, OutsideError, PackageError, SupersededError)}


def told_error(error: JobkitError) -> dict[str, str]:
    """Write an error of ours down for another process."""
    return {"error": str(error), "kind": type(error).__name__}


def raise_told(told: Mapping[str, Any]) -> None:
    """Raise the error that another process wrote down, if it did; of a kind that ends every process alike."""
    if "error" in told:
        raise _KINDS.get(told["kind"], StorageError)(told["error"])


def open_group(number: int) -> Group:
    """Return the group of the Run that is opened as the `number`-th in this process.

    Raises:
        ConfigError: If the launcher started several processes and JAX was not told before it computed.
    """
    index, count = contract.process_from()
    if count > 1:
        initialize()
    if not jax.distributed.is_initialized():
        return Group("")
    group = Group(f"jobkit/{number}", index=jax.process_index(), count=jax.process_count())
    if count > 1 and (group.index, group.count) != (index, count):
        raise ConfigError(
            f"the launcher calls this process {index} of {count} and JAX {group.index} of {group.count}: call "
            "jobkit.initialize() instead of jax.distributed.initialize()"
        )
    return group


def lost_process(store: Store, attempt: int) -> str:
    """Name a process of an attempt that has ended badly, as its supervisor wrote down; '' if none has.

    A shared disk that does not answer just now names nobody.
    """
    with contextlib.suppress(JobkitError):
        if (
            broken := read_json(store, contract.broken_file(attempt))
        ) is not None:  # of one that shares no disk with us
            return f"process {broken.get('process')} ended: {broken.get('reason')}"
        for name in store.names(contract.attempt_dir(attempt)):
            if name.startswith("process-"):
                outcome = read_json(store, f"{contract.attempt_dir(attempt)}/{name}") or {}
                if outcome.get("exit_code") not in (Exit.DONE, Exit.PREEMPTED):
                    return (
                        f"process {name.removeprefix('process-').removesuffix('.json')} ended: {outcome.get('reason')}"
                    )
    return ""


def _client() -> Any:
    """Return the client of JAX's coordination service, whose key-value store has no public name (a test holds it)."""
    from jax._src import distributed

    return distributed.global_state.client


def _lost(error: Exception) -> StorageError:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return StorageError(f"the processes of this attempt cannot talk to each other any more: {text[:200]}")
