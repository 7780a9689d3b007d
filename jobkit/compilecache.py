"""The compile cache of a run: what one attempt compiled, the next one loads.

JAX's own persistent cache, in the run's `cache/`, with thresholds so that small programs count too. The supervisor sets
it in the program's environment, so that what is compiled before the `Run` opens is in it; a program without a
supervisor gets it when the `Run` opens. A cache that the user has configured is left alone.

For a run on a bucket the directory is in the home on this node. The supervisor brings what the bucket has while the
program imports, and carries what is new, in a thread that nobody waits for.

Names neither jax nor numpy at import: the supervisor uses it too.
"""

import contextlib
import os
import platform
import threading
import time
from collections import Counter as Counts
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c

from jobkit import contract
from jobkit.errors import JobkitError
from jobkit.rundir.ledger import attempt_events
from jobkit.rundir.store import Store

_DIRECTORY = "JAX_COMPILATION_CACHE_DIR"
_SETTINGS = {
    # JAX's own thresholds, 1 s and what the file system likes, leave out most of what a restart compiles again.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
_LIMIT_BYTES = 2 << 30
"""What a run's cache may hold; the oldest entries go first."""
_SHARE_S = 20.0
"""How often what is new is carried to a bucket."""
_HITS, _MISSES = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"
_COMPILED = "/jax/core/compile/backend_compile_duration"


def directory(store: Store) -> Path:
    """Return where a run's compiled programs lie for machines like this one.

    A program compiled for a CPU uses all that this CPU can do; on another kind it would die of SIGILL.
    """
    features = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    kind = google_crc32c.value(f"{platform.machine()} {features}".encode())
    return store.file(f"{contract.CACHE}/{platform.machine()}-{kind:08x}")


def environment(store: Store, environ: Mapping[str, str]) -> dict[str, str]:
    """Return what turns the cache on for a program; empty where the user has configured one, or turned it off.

    Args:
        store: The run.
        environ: What the program has in its environment without this.
    """
    if environ.get(_DIRECTORY) or environ.get("JAX_ENABLE_COMPILATION_CACHE", "").lower() in ("0", "false", "off"):
        return {}
    place = directory(store)
    try:
        place.mkdir(parents=True, exist_ok=True)
        _prune(place)
    except OSError:
        return {}  # a disk that is full or does not answer: the program compiles as it would without us
    return _SETTINGS | {_DIRECTORY: str(place)}


def _prune(place: Path) -> None:
    """Remove the oldest entries of a cache that has grown too large."""
    entries = [(entry.stat(), entry.path) for entry in os.scandir(place) if entry.is_file()]
    total = sum(info.st_size for info, _ in entries)
    for info, path in sorted(entries, key=lambda entry: entry[0].st_mtime):
        if total <= _LIMIT_BYTES:
            return
        total -= info.st_size
        with contextlib.suppress(OSError):
            os.unlink(path)


class Counter:
    """Counts what this process compiles and what it finds in the cache, from `start` on."""

    def __init__(self) -> None:
        self.hits = self.misses = 0
        self.seconds = 0.0
        self.started_at: float | None = None
        self._told = (0, 0, 0.0)

    def start(self) -> None:
        """Begin to count, once; jax must have been imported."""
        if self.started_at is not None:
            return
        import jax

        self.started_at = time.time()
        jax.monitoring.register_event_listener(self._event)
        jax.monitoring.register_event_duration_secs_listener(self._duration)

    def since_last(self, *, cached: bool) -> dict[str, Any] | None:
        """Return what was counted since the last call; None if nothing was.

        Args:
            cached: Whether there is a cache: then what it neither had nor took, small programs, is told with the next
                that it did.
        """
        hits, misses, seconds = self._told
        now = (self.hits, self.misses, self.seconds)
        if self.started_at is None or now == self._told or (cached and now[:2] == self._told[:2]):
            return None
        self._told = now
        new_s = round(self.seconds - seconds, 3)
        return {"hits": self.hits - hits, "misses": self.misses - misses, "seconds": new_s}

    def _event(self, event: str, **_: Any) -> None:
        self.hits += event == _HITS
        self.misses += event == _MISSES

    def _duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED:
            self.seconds += duration_secs


counter: Counter = Counter()
"""Of this process: JAX has one set of listeners."""


_ours: str | None = None
"""The directory that `use` configured in this process."""


def use(store: Store) -> None:
    """Turn the cache on in this process, unless it is on; and count."""
    global _ours
    import jax

    counter.start()
    config: Any = jax.config
    known = config.jax_compilation_cache_dir
    if known is not None and known != _ours:
        return
    if not (env := environment(store, {name: value for name, value in os.environ.items() if name != _DIRECTORY})):
        return
    from jax.experimental.compilation_cache import compilation_cache

    _ours = env[_DIRECTORY]
    config.update("jax_compilation_cache_dir", _ours)
    config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # JAX decided at its first compilation that there is none


def report(store: Store, attempt: int) -> dict[str, Any] | None:
    """Return what this process compiled and what came from the cache since the last call, for the ledger.

    Returns:
        `hits`, `misses`, `seconds` (in the backend's compiler, loading included), `built_with`; and where a restart
        compiled again what an earlier attempt had: `again`, the names that the cache had in another version, and
        `why`. None if there is nothing new.
    """
    new = counter.since_last(cached=_is_on())
    if new is None:
        return None
    now = _built_with()
    record = new | {"built_with": now}
    earlier = [e for one in range(attempt) for e in attempt_events(store, one) if e["event"] == "compiled"]
    before: Counts[int] = Counts()
    for event in earlier:
        before[event["attempt"]] += event.get("misses", 0)
    # A restart runs a few tiny programs that no start does; compiled again is what takes as much as before.
    if before and new["misses"] and counter.misses > max(before.values()) / 2:
        record["again"] = sorted(_compiled_again())[:20]
        record["why"] = _why(earlier[-1].get("built_with"), now)
    return record


def _is_on() -> bool:
    import jax

    config: Any = jax.config
    return bool(config.jax_compilation_cache_dir and config.jax_enable_compilation_cache)


def _why(before: Any, now: Mapping[str, str]) -> str:
    """Say why nothing in the cache fitted."""
    changed = [name for name in now if isinstance(before, dict) and before.get(name) != now[name]]
    if changed:
        return "; ".join(f"{name} was {before.get(name)} and is {now[name]}" for name in changed)
    return "the cache is not the one of the attempt before, or the program, its shapes or its sharding have changed"


def _built_with() -> dict[str, str]:
    """Return what decides, besides the program, whether a compiled program fits."""
    from importlib.metadata import version

    import jax

    devices = jax.devices()
    return {
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "devices": f"{len(devices)} {devices[0].device_kind}",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def _compiled_again() -> set[str]:
    """Return the names of programs that this process compiled and of which the cache had another version."""
    import jax

    config: Any = jax.config
    place, since = config.jax_compilation_cache_dir, counter.started_at
    if place is None or since is None or "://" in place:
        return set()
    old: set[str] = set()
    new: set[str] = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(place):
            name, _, rest = entry.name.rpartition("-")
            if rest == "cache":
                (new if entry.stat().st_mtime >= since else old).add(name.rpartition("-")[0])
    return new & old


def share(store: Store) -> None:
    """Bring what a bucket has of the cache, and carry what is new, in a thread that nobody waits for."""
    if store.remote is not None:
        threading.Thread(target=_share, args=(store,), name="jobkit-cache", daemon=True).start()


def _share(store: Store) -> None:
    place, remote = directory(store), store.remote
    assert remote is not None
    prefix = f"{contract.CACHE}/{place.name}"
    there: set[str] = set()
    first = True
    while True:
        with contextlib.suppress(JobkitError, OSError):
            place.mkdir(parents=True, exist_ok=True)
            if first:
                there = {name.rpartition("/")[2] for name in remote.find(prefix)}
                for name in sorted(there - set(os.listdir(place))):
                    temporary = place / f".{name}.tmp"
                    remote.fetch(f"{prefix}/{name}", temporary)
                    os.rename(temporary, place / name)
                first = False
            for name in sorted(set(os.listdir(place)) - there):
                if name.endswith("-cache"):
                    remote.write(f"{prefix}/{name}", (place / name).read_bytes())
                    there.add(name)
        time.sleep(_SHARE_S)
