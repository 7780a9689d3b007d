"""The compile cache: on by default, out of the way, and a restart with a warm one compiles nothing again."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from jobkit import compilecache, contract
from jobkit.drill.settings import Drill
from jobkit.rundir.ledger import attempt_events
from jobkit.rundir.store import Store
from launch.backends.local import Local
from launch.lifecycle import run_status, verbs
from launch.spec.jobspec import JobSpec
from tests.fakes.gcs_server import GcsServer
from tests.harness.jobs import until, until_over

SCRIPTS = Path(__file__).parent.parent / "drill_scripts"


def test_on_by_default(tmp_path: Path) -> None:
    """A program gets a cache below its run, with thresholds that small programs pass."""
    told = compilecache.environment(Store(tmp_path), {})
    place = Path(told["JAX_COMPILATION_CACHE_DIR"])
    assert place.is_dir()
    assert place.parent == tmp_path / "cache"
    assert told["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"
    assert told["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] == "-1"


@pytest.mark.parametrize("environ", [{"JAX_COMPILATION_CACHE_DIR": "/mine"}, {"JAX_ENABLE_COMPILATION_CACHE": "false"}])
def test_users_own_choice_stays(tmp_path: Path, environ: dict[str, str]) -> None:
    """A cache that the user has configured, or turned off, is left alone."""
    assert compilecache.environment(Store(tmp_path), environ) == {}
    assert not list(tmp_path.iterdir())


def test_disk_that_cannot_be_written(tmp_path: Path) -> None:
    """Where no cache can be made the program runs without one."""
    (tmp_path / "cache").write_text("a file")
    assert compilecache.environment(Store(tmp_path), {}) == {}


def test_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest entries go when there are too many."""
    store = Store(tmp_path)
    place = Path(compilecache.environment(store, {})["JAX_COMPILATION_CACHE_DIR"])
    for age, name in enumerate(("new", "old", "older")):
        (place / f"{name}-cache").write_bytes(bytes(100))
        os.utime(place / f"{name}-cache", (1e9 - age, 1e9 - age))
    monkeypatch.setattr(compilecache, "_LIMIT_BYTES", 250)
    compilecache.environment(store, {})
    assert sorted(path.name for path in place.iterdir()) == ["new-cache", "old-cache"]


def compiled(store: Store, attempt: int) -> list[dict[str, Any]]:
    """Return what an attempt told of compiling."""
    return [event for event in attempt_events(store, attempt) if event["event"] == "compiled"]


def test_why_it_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier attempt had compiled in another version is named, and the reason where it is known."""
    import jax

    store = Store(tmp_path)
    place = tmp_path / "programs"
    place.mkdir()
    for name, at in (("jit_step-aaa-cache", 1e9), ("jit_step-bbb-cache", 2e9), ("jit_new-ccc-cache", 2e9)):
        (place / name).write_bytes(b"x")
        os.utime(place / name, (at, at))
    built = compilecache._built_with() | {"jax": "0.0.1"}
    event = {"t": 1.0, "event": "compiled", "hits": 0, "misses": 3, "built_with": built}
    store.write("attempts/0/events-0.jsonl", json.dumps(event) + "\n")
    counter = compilecache.Counter()
    counter.started_at, counter.hits, counter.misses = 1.5e9, 3, 2
    monkeypatch.setattr(compilecache, "counter", counter)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(place))
    try:
        told = compilecache.report(store, 1)
        assert told is not None
        assert (told["again"], told["why"]) == (["jit_step"], f"jax was 0.0.1 and is {jax.__version__}")
        assert compilecache.report(store, 1) is None, "nothing was compiled since"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.timing
def test_carried_to_another_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a bucket what one node compiled is there on the next, and nobody waits for it."""
    with GcsServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        homes = []
        for number in (1, 2):
            monkeypatch.setenv(contract.ENV_HOME, str(tmp_path / f"home{number}"))
            store = Store("gs://bucket/run")
            homes.append(compilecache.directory(store))
            if number == 1:
                homes[0].mkdir(parents=True)
                (homes[0] / "jit_step-aaa-cache").write_bytes(b"compiled")
            begun = time.monotonic()
            compilecache.share(store)
            assert time.monotonic() - begun < 1.0
            if number == 1:
                until(lambda: any("jit_step-aaa-cache" in name for name in server.names()), "it was carried")
        assert homes[0] != homes[1]
        arrived = homes[1] / "jit_step-aaa-cache"
        until(arrived.exists, "it arrived")
        assert arrived.read_bytes() == b"compiled"


@pytest.mark.slow
def test_warm_restart_compiles_nothing(tmp_path: Path) -> None:
    """A restart compiles nothing again, and the one after it nothing at all: counted, in the ledger."""
    environ = {
        contract.ENV_DRILL: Drill(until=30).to_json(),
        contract.ENV_FAULT: "step:12=TERM",
        "JAX_PLATFORMS": "cpu",
    }
    spec = JobSpec(command=("python", "sound.py"), run=str(tmp_path / "r"), cwd=str(SCRIPTS), snapshot=False)
    store = verbs.submit(Local(environ), spec)
    status = until_over(store, seconds=120)
    assert (str(status.state), status.attempts) == ("done", 3), run_status.to_json(status)
    cold, warm, warmer = (
        {name: sum(event[name] for event in compiled(store, attempt)) for name in ("hits", "misses")}
        for attempt in range(3)
    )
    assert cold["misses"] > 10
    # The first restart runs what no start does: restoring has a few tiny programs of its own.
    assert not [event for event in compiled(store, 1) if "again" in event]
    assert warm["misses"] <= cold["misses"] / 3
    assert warm["hits"] > cold["misses"] / 2
    assert warmer["misses"] == 0
