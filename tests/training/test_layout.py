"""Orbax's layout written by our handler: stock Orbax reads it bit for bit, and no flipped bit reaches a program."""

import contextlib
import errno
import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.metadata.checkpoint import metadata_store

import jobkit
from jobkit import contract
from jobkit.checkpoint import orbax_io, saving, state
from jobkit.checkpoint.layout import ocdbt, probe, reading, texts, writing
from jobkit.checkpoint.layout.handler import DirectCheckpointHandler, DirectRestore, DirectSave
from jobkit.checkpoint.layout.table import Chunked, cut
from jobkit.checkpoint.leaves import DTYPES
from jobkit.checkpoint.restore import restore
from jobkit.errors import ConfigError, DamagedError, StorageError
from jobkit.rundir import commits
from jobkit.rundir.retention import Keep
from jobkit.rundir.store import Store
from tests.harness import jobs, training
from tests.training.test_checkpoint import ROOT, Life
from tests.training.test_state import parts_of


def _bits(tree: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return [(array.dtype.name, array.shape, array.tobytes()) for array in arrays]


@st.composite
def _arrays(draw: st.DrawFn) -> np.ndarray:
    shape = draw(st.lists(st.integers(1, 5), max_size=3))
    dtype = draw(st.sampled_from(sorted(DTYPES - {"int2", "uint2"})))
    count = int(np.prod(shape, dtype=int))
    numbers = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    return np.array(numbers).reshape(shape).astype(jnp.dtype(dtype) if dtype != "bool" else bool)


_NAMES = st.text(st.characters(exclude_characters="./", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=5)
_TREES = st.dictionaries(_NAMES, st.one_of(_arrays(), st.dictionaries(_NAMES, _arrays(), min_size=1)), min_size=1)


@pytest.mark.slow
@given(tree=_TREES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_reader_of_orbax_reads_it(tree: dict[str, Any], tmp_path: Path) -> None:
    """A tree of any dtypes, shapes and names, through a manager: all readers of stock Orbax get the same bits."""
    place = Path(tempfile.mkdtemp(dir=tmp_path))
    with ocp.CheckpointManager(place, item_handlers=DirectCheckpointHandler()) as manager:
        manager.save(1, args=DirectSave(tree))
        manager.wait_until_finished()
        assert _bits(manager.restore(1, args=DirectRestore(tree))) == _bits(tree)
    like = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)
    with ocp.CheckpointManager(place) as stock:
        assert _bits(stock.restore(1, args=ocp.args.StandardRestore(like))) == _bits(tree)
        assert _bits(stock.restore(1, args=ocp.args.StandardRestore())) == _bits(tree)
    item = place / "1" / "default"
    with ocp.PyTreeCheckpointer() as one, ocp.StandardCheckpointer() as other:
        assert _bits(one.restore(item)) == _bits(tree)
        assert _bits(other.restore(item, like)) == _bits(tree)


_KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
_CONTENTS = st.tuples(st.binary(min_size=1, max_size=300), st.sampled_from(["", "values/0", "values/1"]))


@given(values=st.dictionaries(_KEYS, _CONTENTS, min_size=1, max_size=40), arity=st.sampled_from([2, 3, 10_000]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tensorstore_reads_the_tree(values: dict[str, tuple[bytes, str]], arity: int, tmp_path: Path) -> None:
    """A store of any keys, values in the tree and outside of it, nodes of any size: tensorstore lists and reads all."""
    place = Path(tempfile.mkdtemp(dir=tmp_path))
    files = {"values/0": b"", "values/1": b""}
    entries = []
    for key, (content, file) in values.items():
        at = ocdbt.Place(file, len(files.get(file, b"")), len(content), b"" if file else content)
        files |= {file: files[file] + content} if file else {}
        entries.append((key, at))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ocdbt, "_ARITY", arity)
        files[ocdbt.NODES], files[ocdbt.MANIFEST] = ocdbt.tree(tuple(entries))
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content)
    found = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{place}/"}).result()
    assert sorted(found.list().result()) == sorted(key.encode() for key in values)
    assert {key: found.read(key).result().value for key in values} == {key: one for key, (one, _) in values.items()}
    root = ts.ocdbt.dump(found.base).result()["versions"][0]["root"]["statistics"]
    outside = sum(len(content) for content, file in values.values() if file)
    size = len(files[ocdbt.NODES])
    assert root == {"num_keys": len(values), "num_indirect_value_bytes": outside, "num_tree_bytes": size}


def test_a_disk_that_fails_meanwhile_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk refuses while the rest is still written is heard: later, nobody would be told of it."""
    monkeypatch.setattr(writing, "_SYNC_BYTES", 1 << 16)
    life = Life(tmp_path / "run")
    life.parts |= parts_of(big={f"w{at}": jnp.arange(1 << 15) for at in range(8)})
    life.save(1)
    life.raise_error()
    calls = itertools.count()
    synced = os.fdatasync

    def refuse(descriptor: int) -> None:
        if next(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        synced(descriptor)

    monkeypatch.setattr(os, "fdatasync", refuse)
    life.save(2)
    with pytest.raises(StorageError, match="Input/output error"):
        life.raise_error()
    assert commits.steps(life.store) == [1]
    assert next(calls) == 8


def _many(count: int) -> dict[str, np.ndarray]:
    return {f"w{at}": np.full(1 << 15, at, np.int32) for at in range(count)}


def _open_below(place: Path) -> int:
    """Count the descriptors that this process has of files below a directory."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found += os.readlink(f"/proc/self/fd/{number}").startswith(f"{place}/")
    return found


def test_a_slow_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that does not keep up has four parts before it, and is given no more: nothing piles up."""
    monkeypatch.setattr(writing, "_SYNC_BYTES", 1 << 16)
    opened = []

    def slow(descriptor: int) -> None:
        time.sleep(0.02)
        opened.append(_open_below(tmp_path))

    monkeypatch.setattr(os, "fdatasync", slow)
    tree = _many(64)
    DirectCheckpointHandler().save(tmp_path, DirectSave(tree, sync=False))
    assert len(opened) == 64
    assert 2 <= max(opened) <= writing._SYNCS + 1
    assert _open_below(tmp_path) == 0
    assert _bits(DirectCheckpointHandler().restore(tmp_path, DirectRestore(tree))) == _bits(tree)


@pytest.mark.parametrize("count", [3, 64])
def test_a_slow_disk_holds_no_notice_up(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save is broken off at once, whatever the disk still has to take of it, in its middle and at its end."""
    monkeypatch.setattr(writing, "_SYNC_BYTES", 1 << 16)
    life = Life(tmp_path / "run")
    life.save(1)
    life.raise_error()
    life.parts |= parts_of(big={name: jnp.asarray(array) for name, array in _many(count).items()})
    begun, released = threading.Semaphore(0), threading.Event()
    monkeypatch.setattr(saving, "silence", lambda: None)  # it is for a process that ends

    def stuck(descriptor: int) -> None:
        begun.release()
        assert released.wait(60)

    with monkeypatch.context() as planted:
        planted.setattr(os, "fdatasync", stuck)
        life.checkpoints.save(state.take(life.parts), 2, reason="interval", metrics={})
        for _ in range(min(count, writing._SYNCS)):
            assert begun.acquire(timeout=60)
        asked = time.monotonic()
        assert life.checkpoints.abandon()
        seconds = time.monotonic() - asked
        assert not released.is_set()
        released.set()
        jobs.until(lambda: _open_below(tmp_path / "run/checkpoints") == 0, "what was under way is closed")
    assert seconds < 1
    assert not begun.acquire(blocking=False), "the disk is given nothing more"
    assert commits.steps(life.store) == [1]
    life.save(3)
    life.raise_error()
    life.checkpoints.close()
    assert commits.steps(life.store) == [1, 3]


def test_half_an_array_is_no_item(tmp_path: Path) -> None:
    """Arrays of which a shard is missing are refused: nothing could tell later that they were never whole."""
    for shards in ([((0,), np.ones(2))], [((0,), np.ones(2)), ((2,), np.ones(2))]):
        place = Path(tempfile.mkdtemp(dir=tmp_path))
        with pytest.raises(ValueError, match=rf"x\.a has 3 chunks, of which {len(shards)} are here"):
            writing.write(
                place,
                [writing.Taken(("x", "a"), (6,), shards)],
                file_bytes=1 << 20,
                cancel=writing.Cancel(),
                measured={},
            )
        assert not (place / contract.CHUNKS).exists()


def test_a_small_save_waits_for_the_disk_three_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not depend on one another is synced at once: the files, then the name of the step."""
    waits: list[tuple[float, float]] = []
    life, synced = Life(tmp_path / "run"), os.fsync

    def slow(descriptor: int) -> None:
        begun = time.monotonic()
        time.sleep(0.2)
        synced(descriptor)
        waits.append((begun, time.monotonic()))

    life.save(1)
    monkeypatch.setattr(os, "fsync", slow)
    life.save(2)
    life.raise_error()
    rounds, until = 0, 0.0
    for begun, ended in sorted(waits):
        if begun >= until:
            rounds, until = rounds + 1, ended
    assert len(waits) > 3
    assert rounds <= 3


def _spread(array: np.ndarray, *axes: str | None) -> jax.Array:
    mesh = jax.make_mesh((jax.device_count() // 2, 2), ("x", "y"))
    return jax.device_put(jnp.asarray(array), NamedSharding(mesh, PartitionSpec(*axes)))


@pytest.mark.slow
def test_shards_are_chunks_and_go_anywhere(tmp_path: Path) -> None:
    """Sharded and partly replicated arrays are written shard by shard, and read into every other sharding."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    code = f"import pathlib, tests.training.test_layout as it; it.check_shards(pathlib.Path({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | flags, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def check_shards(tmp_path: Path) -> None:
    """Do what the test above says, on eight devices."""
    assert jax.device_count() == 8
    small = np.arange(8 * 16, dtype=np.float32).reshape(8, 16)
    for name, values in ("small", small), ("large", np.repeat(small[:, :, None], 1 << 14, axis=2)):
        _check_shards(tmp_path / name, values)


def _check_shards(place: Path, values: np.ndarray) -> None:
    place.mkdir()
    tree = {"both": _spread(values, "x", "y"), "one": _spread(values, None, "y"), "none": _spread(values)}
    DirectCheckpointHandler().save(place, DirectSave(tree))
    table = reading.table_of(place)
    assert table is not None
    shards = {name: array.addressable_shards[0].data.shape for name, array in tree.items()}
    assert {name: tuple(array.chunk) for name, array in table.items()} == shards
    others = [_spread(values, "y", "x"), _spread(values, "y"), _spread(values), jnp.asarray(values)]
    for other in others:
        for name in tree:
            got = reading.read(place, table, {(name,): other.sharding})[(name,)]
            assert got.sharding == other.sharding
            assert np.array_equal(got, values), name
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=others[0].sharding), tree)
    with ocp.StandardCheckpointer() as stock:
        assert _bits(stock.restore(place, like)) == _bits(tree)


@pytest.mark.parametrize("aligned", [False, True])
def test_memory_that_is_read_into_is_nobodys(aligned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays that are read into the same memory one after another stay what they were, even if JAX kept that memory."""
    random_bytes = np.random.default_rng(0)
    tree = {f"{dtype}{at}": random_bytes.integers(0, 99, 1 << 18).astype(dtype) for at in range(3) for dtype in _WIDE}
    tree |= {f"small{at}": np.full(at + 1, at, np.int32) for at in range(20)}
    DirectCheckpointHandler().save(tmp_path, DirectSave(tree))
    table = reading.table_of(tmp_path)
    assert table is not None
    if aligned:
        monkeypatch.setattr(reading, "_OFF", 0)
    reading._kept.cache_clear()
    assert reading._kept(None) is aligned
    placed = reading.read(tmp_path, table, {(name,): reading.UNCOMMITTED for name in tree}, budget_bytes=1)
    reading._kept.cache_clear()
    whole = reading.read(tmp_path, table, {(name,): None for name in tree}, budget_bytes=1)
    for name, values in tree.items():
        array = placed[(name,)]
        assert isinstance(array, jax.Array)
        assert not array.committed
        assert array.dtype == jnp.asarray(values).dtype
        assert np.array_equal(array, values), name
        assert whole[(name,)].dtype == values.dtype
        assert np.array_equal(whole[(name,)], values), name
        whole[(name,)][...] = 0  # the program's own


_WIDE = ("float32", "bfloat16", "int64", "float64", "uint8")


@given(shape=st.lists(st.integers(1, 400), max_size=3), most=st.integers(1, 4000))
def test_chunks_fill_an_array(shape: list[int], most: int) -> None:
    """An array is cut into chunks that fill it without rest and are small enough, or not at all."""
    chunk = cut(tuple(shape), 4, most)
    assert all(size % step == 0 for size, step in zip(shape, chunk, strict=True))
    assert chunk == tuple(shape) or int(np.prod(chunk)) * 4 <= most < int(np.prod(shape)) * 4
    assert len(list(Chunked("int32", shape, list(chunk)).indices)) == int(np.prod(shape)) // int(np.prod(chunk))


def test_large_arrays_are_cut(tmp_path: Path) -> None:
    """An array above the size of a file lies in several files of about that size, and comes back."""
    values = np.random.default_rng(0).random((1024, 512))
    DirectCheckpointHandler().save(tmp_path, DirectSave({"a": values}, file_bytes=1 << 20))
    sizes = [file.stat().st_size for file in (tmp_path / contract.VALUES).iterdir()]
    assert len(sizes) >= 4
    assert max(sizes) <= 1.5 * (1 << 20)
    assert np.array_equal(DirectCheckpointHandler().restore(tmp_path)["a"], values)
    assert np.array_equal(ocp.PyTreeCheckpointHandler().restore(tmp_path)["a"], values)


FLIPS = 150


@pytest.mark.slow
def test_no_flipped_bit_reaches_a_program(tmp_path: Path) -> None:
    """One bit flipped anywhere in a step: a check finds it; what a restore reads is refused, or has the same values."""
    life = Life(tmp_path / "run")
    life.parts = parts_of(x={"a": np.random.default_rng(0).random((3, 400_000)), "b": jnp.arange(7.0), "n": 0})
    life.checkpoints.save(state.take(life.parts), 1, reason="asked", metrics={})
    life.checkpoints.close()
    expected = _bits(life.parts["x"].value)  # type: ignore[attr-defined]
    root = life.store.file(contract.step_dir(1))
    files = [path for path in root.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) > 1 << 22, "a file of values that is not read twice"
    choose, refused = random.Random(0), 0
    for _ in range(FLIPS):
        path = choose.choice(files)
        at, bit = choose.randrange(path.stat().st_size), 1 << choose.randrange(8)
        _flip(path, at, bit)
        assert commits.problems(life.store, 1), f"bit {bit} of byte {at} of {path.name}"
        if commits.problems(life.store, 1, values=False):
            refused += 1
        else:
            try:
                restore(life.store, 1, life.parts)
                assert _bits(life.parts["x"].value) == expected, f"bit {bit} of byte {at} of {path.name}"  # type: ignore[attr-defined]
            except DamagedError:
                refused += 1
        _flip(path, at, bit)
    assert refused > 0.9 * FLIPS
    restore(life.store, 1, life.parts)


def _flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ bit]))


def test_a_damaged_chunk_falls_back_to_the_older_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped bit that only the restore itself meets: the step is set aside and said, the older one restored."""
    life = Life(tmp_path / "run")
    big = np.random.default_rng(0).random(1 << 20)
    for step in (1, 2):
        life.parts = parts_of(x={"big": big + step})
        life.checkpoints.save(state.take(life.parts), step, reason="asked", metrics={})
        life.checkpoints.wait()
    life.checkpoints.close()
    values = life.store.file(contract.step_dir(2)) / contract.ORBAX_ITEM / contract.VALUES
    largest = max(values.iterdir(), key=lambda path: path.stat().st_size)
    _flip(largest, largest.stat().st_size // 2, 1)
    assert commits.problems(life.store, 2, values=False) == []
    again = Life(tmp_path / "run", attempt=1)
    again.parts = parts_of(x={"big": big})
    assert again.checkpoints.restore_newest(again.parts) == 1
    assert np.array_equal(again.parts["x"].value["big"], big + 1)  # type: ignore[attr-defined]
    assert "x.big/c/0 has crc32c" in capsys.readouterr().err
    assert [event["step"] for event in again.events("set_aside")] == [2]
    assert commits.steps(again.store) == [1]


def test_a_cancelled_save_stops_at_a_chunk(tmp_path: Path) -> None:
    """A save that is cancelled writes no further chunk, and leaves nothing that could be taken for an item."""
    cancel = writing.Cancel()
    cancel.set()
    with pytest.raises(writing.CancelledError):
        DirectCheckpointHandler().save(tmp_path, DirectSave({"a": np.ones(4)}, cancel=cancel))
    assert not (tmp_path / contract.CHUNKS).exists()


def test_an_orbax_that_cannot_read_it_writes_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where stock Orbax fails to read what we write, it writes the checkpoints, a line says so, and nothing is lost."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    probe.stock_reads_ours.cache_clear()
    with monkeypatch.context() as planted:
        planted.setattr(texts, "tree_text", lambda paths: "{}")
        with jobkit.Run(tmp_path / "run") as run:
            run.resume(x={"w": jnp.ones(3)}, optimizer=None)
    probe.stock_reads_ours.cache_clear()
    assert "does not read what jobkit writes by itself" in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoints/0/default" / contract.CHUNKS).exists()
    assert jobkit.load(tmp_path / "run", x={"w": jnp.zeros(3)}).x["w"].tolist() == [1, 1, 1]
    assert probe.stock_reads_ours()
    assert (tmp_path / "cache/jobkit/layout.json").exists()
    probe.stock_reads_ours.cache_clear()
    with monkeypatch.context() as planted:
        planted.setattr(probe, "_wrong", lambda: "tried again")
        assert probe.stock_reads_ours(), "it is remembered"


def test_both_writers_in_one_run(tmp_path: Path) -> None:
    """Steps of stock Orbax and of our own, in turn in one run, restore and check out; a third writer is refused."""
    for total, writer in enumerate(("orbax", "jobkit", "orbax", "jobkit"), 1):
        with jobkit.Run(tmp_path / "run", save_every=1, keep=10, writer=writer) as run:  # type: ignore[arg-type]
            run.resume(x={"w": jnp.zeros(3)}, optimizer=None)
            assert run.step == total - 1
            assert run.state.x["w"].tolist() == [total - 1] * 3
            for _ in run.steps(total):
                run.state.x = {"w": run.state.x["w"] + 1}
    store = Store(tmp_path / "run")
    written = {step: (tmp_path / f"run/checkpoints/{step}/default" / contract.CHUNKS).exists() for step in range(5)}
    assert written == {0: False, 1: False, 2: True, 3: False, 4: True}
    assert [commits.problems(store, step) for step in range(5)] == [[]] * 5
    with pytest.raises(ConfigError, match="writer='fast' is neither"):
        jobkit.Run(tmp_path / "run", writer="fast")  # type: ignore[arg-type]


def test_a_stage_without_its_first_date_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What Orbax warns of while a checkpoint is being written, and mends itself, is in no log; of others it warns."""
    with jobkit.Run(tmp_path) as run:
        run.resume(x={"w": jnp.ones(3)}, optimizer=None)
    dates = metadata_store(enable_write=False)
    with caplog.at_level("WARNING", "absl"):
        assert dates.read(tmp_path / contract.STAGE / "1-0-a.orbax-checkpoint-tmp/_CHECKPOINT_METADATA") is None
        assert not caplog.records
        assert dates.read(tmp_path / "checkpoints/1/_CHECKPOINT_METADATA") is None
        assert len(caplog.records) == 1


def test_a_failed_save_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a save that failed was to write is free at once, though Orbax keeps the error; the next writer goes on."""

    def full(*_: Any) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer, array = orbax_io.Writer(), np.ones(1 << 16)
    held = weakref.ref(array)
    with monkeypatch.context() as planted:
        planted.setattr(texts, "array_text", full)
        writer.start(tmp_path / "stage", {("x", "a"): array}, array.nbytes, for_upload=False)
        del array
        with pytest.raises(OSError, match="No space left"):
            writer.wait()
    gc.collect()
    assert held() is None
    again = writer.another()
    assert again.cancel(), "nothing runs yet: it cancels no later save"
    again.start(tmp_path / "again", {("x", "a"): np.ones(3)}, 24, for_upload=False)
    again.wait()
    for one in (writer, again):
        one.close()
    assert reading.table_of(tmp_path / "again" / contract.ORBAX_ITEM)


def test_a_tree_is_as_it_was_at_the_save(tmp_path: Path) -> None:
    """Arrays of numpy's that the program writes into during a save are saved as they were; shapes are compared."""
    tree = {"a": np.zeros(1 << 20)}
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=DirectCheckpointHandler()) as manager:
        manager.save(1, args=DirectSave(tree))
        tree["a"] += 1
        manager.wait_until_finished()
        like = {"a": jax.ShapeDtypeStruct((1 << 20,), np.float64)}
        assert not manager.restore(1, args=DirectRestore(like))["a"].any()
        with pytest.raises(ConfigError, match=r"a is float64 \(1048576,\) in .*, and float32 \(3,\) here"):
            manager.restore(1, args=DirectRestore({"a": jax.ShapeDtypeStruct((3,), np.float32)}))


def test_what_no_array_is_is_refused(tmp_path: Path) -> None:
    """A tree for a plain manager: names with dots, and leaves that are no arrays, are refused with the remedy."""
    for tree, said in (
        ({"a.b": np.ones(1)}, "rename it"),
        ({"a": object()}, "cannot be saved so"),
        ({"a": "text"}, "cannot be saved so"),
        ({"a": np.ones((0, 3))}, "cannot be saved so"),
        ({"a": jax.random.key(0)}, "key_data"),
    ):
        with pytest.raises(ConfigError, match=said):
            DirectCheckpointHandler().save(tmp_path, DirectSave(tree))
    with ocp.StandardCheckpointer() as stock:
        stock.save(tmp_path / "stock", {"a": np.ones(1)})
    with pytest.raises(ConfigError, match="not written by jobkit"):
        DirectCheckpointHandler().restore(tmp_path / "stock")
    DirectCheckpointHandler().save(tmp_path, DirectSave({"a": [np.ones(1), 2]}))
    assert DirectCheckpointHandler().restore(tmp_path, DirectRestore({"a": [np.zeros(1), 0]}))["a"][1] == 2
    with pytest.raises(ConfigError, match="has no b"):
        DirectCheckpointHandler().restore(tmp_path, DirectRestore({"b": 0}))


def _save_on(url: str, attempt: int) -> None:
    """Go on from the newest step, and save one step after the other; say so before the first and after each."""
    life = Life(Path(url), keep=Keep(2), attempt=attempt)
    life.parts |= parts_of(big={f"w{at}": np.full(1 << 17, at, np.float32) for at in range(8)})
    commits.sweep(life.store, attempt=attempt)
    step = life.restored() or 0
    with (Path(url) / "said").open("a", buffering=1) as said:
        print(f"begun {attempt}", file=said)
        while True:
            step += 1
            life.save(step)
            life.raise_error()
            print(step, file=said)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [10, 200])
def test_random_kills_lose_no_commit(kills: int, tmp_path: Path) -> None:
    """SIGKILL at random moments of saves that follow one another: what was committed is there, whole, and restores."""
    url, store, moments = tmp_path / "run", Store(tmp_path / "run"), random.Random(kills)
    torn = newest = 0
    for attempt in range(kills):
        process = training.start(_save_on, str(url), attempt, log=tmp_path / "log")
        until = time.monotonic() + 120
        while f"begun {attempt}\n" not in ((url / "said").read_text() if (url / "said").exists() else ""):
            assert process.is_alive(), (tmp_path / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        said = [int(line) for line in (url / "said").read_text().split("\n") if line.isdecimal()]
        steps = commits.steps(store)
        assert max(steps, default=0) >= max(said, default=0)
        assert [commits.problems(store, step) for step in steps] == [[]] * len(steps)
        torn += bool(store.names(contract.STAGE))
        newest = max(steps, default=0)
    assert newest
    assert torn
