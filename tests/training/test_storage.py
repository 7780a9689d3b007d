"""Durable writes: whole or not at all, one winner, nothing left behind, errors in words."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobkit.errors import ConfigError, JobkitError, StorageError
from jobkit.rundir import remote
from jobkit.rundir.files import checksum, files_below, free_bytes, remove_tree, sync_tree
from jobkit.rundir.store import Store, explain, local_path

_SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A run directory that does not exist yet."""
    return Store(tmp_path / "runs" / "a")


# Where a run lies.


def test_every_form_of_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute, relative and home paths and file:// URLs name the same absolute path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    forms = [tmp_path / "r", str(tmp_path / "r"), "r", "./r", "~/r", f"file://{tmp_path}/r"]
    forms += [f"file://localhost{tmp_path}/r", "file:r"]
    assert {local_path(form) for form in forms} == {tmp_path / "r"}


names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda s: s != "."
)


@given(st.lists(names, min_size=1, max_size=3))
def test_a_quoted_file_url_names_any_path(parts: list[str]) -> None:
    """Every path has a file:// URL: percent-encoded characters come back as they were."""
    path = "/" + "/".join(parts)
    assert local_path("file://" + quote(path)) == Path(path)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("gs://bucket/run", "not on a file system"),
        ("s3://bucket/run", "not on a file system"),
        ("memory://run", "not on a file system"),
        ("http://host/run", "not on a file system"),
        (Path("gs://bucket/run"), "lost a slash"),
        ("s3:/bucket/run", "lost a slash"),
        ("gs//bucket/run", "looks like a URL without its"),
        ("gs:bucket/run", "looks like a URL without its"),
        ("file://host/run", "another host"),
        ("file:///run#2", "%23"),
        ("file:///run?x=1", "%3F"),
        ("file://", "names no path"),
        ("a\0b", "names no path"),
        ("file:///a%00b", "names no path"),
        ("~no-such-user-here/run", "write the path in full"),
    ],
)
def test_what_is_no_place_of_this_machine_is_refused(url: Any, told: str) -> None:
    """Other schemes, other hosts and no path at all: refused in words, never a directory named 'gs:'."""
    with pytest.raises(ConfigError, match=told):
        local_path(url)


# Whole files.


@given(st.binary(max_size=300), st.text(max_size=300), st.booleans())
def test_what_is_written_is_read(content: bytes, text: str, twice: bool) -> None:
    """Bytes and text come back, an older content is gone, and nothing else is in the directory."""
    with tempfile.TemporaryDirectory() as directory:
        store = Store(directory)
        if twice:
            store.write("sub/x", b"older, and longer than what follows" * 10)
        store.write("sub/x", content)
        assert store.read("sub/x") == content
        try:
            encoded = text.encode()
        except UnicodeEncodeError:
            with pytest.raises(UnicodeEncodeError):
                store.write("sub/x", text)
            encoded = content
        else:
            store.write("sub/x", text)
        assert store.read("sub/x") == encoded
        assert store.names("sub") == ["x"]


def test_create_never_replaces(store: Store) -> None:
    """The second create of a name is told so and changes nothing."""
    assert store.create("x", "first")
    assert not store.create("x", "second")
    assert store.read("x") == b"first"
    assert store.names("") == ["x"]


def test_absent_names(store: Store) -> None:
    """What is not there: no error where it may be absent, FileNotFoundError where it is read."""
    assert not store.exists("x")
    assert store.names("x") == store.numbers("x") == []
    store.remove("x")
    with pytest.raises(FileNotFoundError):
        store.read("x")
    store.write("x", "")
    assert store.names("x/y") == store.names("x") == []
    store.remove("x")
    assert store.names("") == []


def test_numbers_are_canonical(store: Store) -> None:
    """Only names that a number of ours can have count, in the order of numbers."""
    for name in ["0", "7", "10", "007", "-1", "+1", "1.5", "٣", "x", ".stage", "7.reason", "1" * 5000]:
        if len(name) < 200:
            store.write(name, "")
    assert store.numbers("") == [0, 7, 10]


# Several at once: real processes.


def _race(url: str, gate: Any, answers: Any, name: str) -> None:
    store = Store(url)
    gate.wait()
    answers.put([store.create(f"{name}{round_}", f"{os.getpid()}") for round_ in range(20)])
    answers.put([store.claim("attempts") for _ in range(10)])


def test_one_of_several_processes_wins(store: Store) -> None:
    """Of four processes exactly one creates each name, with its content; each claim gives a number of its own."""
    gate, answers = _SPAWN.Barrier(4), _SPAWN.Queue()
    processes = [_SPAWN.Process(target=_race, args=(store.url, gate, answers, "x"), daemon=True) for _ in range(4)]
    for process in processes:
        process.start()
    told = [answers.get(timeout=30) for _ in range(8)]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    created = [answer for answer in told if isinstance(answer[0], bool)]
    assert [sum(column) for column in zip(*created, strict=True)] == [1] * 20
    pids = {str(process.pid).encode() for process in processes}
    assert all(store.read(f"x{round_}") in pids for round_ in range(20))
    claimed = [number for answer in told if not isinstance(answer[0], bool) for number in answer]
    assert sorted(claimed) == list(range(40)) == store.numbers("attempts")
    assert store.names("") == sorted(["attempts", *(f"x{round_}" for round_ in range(20))])


def _write_for_ever(url: str) -> None:
    store = Store(url)
    for round_ in range(10**9):
        store.write("x", bytes([round_ % 256]) * 200_000)


def test_a_killed_writer_leaves_a_whole_file(store: Store) -> None:
    """Whenever a writer is killed, the file has one content as a whole, and readers see no other name."""
    store.write("x", b"")
    for moment in range(3):
        writer = _SPAWN.Process(target=_write_for_ever, args=(store.url,), daemon=True)
        writer.start()
        while not store.read("x"):
            assert writer.is_alive()
        for _ in range(50 + 40 * moment):
            content = store.read("x")
            assert len(content) == 200_000
            assert len(set(content)) == 1
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        assert len(set(store.read("x"))) == 1
        assert [name for name in store.names("") if not name.startswith(".")] == ["x"]


# Errors.


def test_below_a_file_nothing_can_be_written(tmp_path: Path) -> None:
    """A run directory below a regular file: every operation says what to do, and retrying is not suggested."""
    (tmp_path / "file").write_text("mine")
    store = Store(tmp_path / "file" / "run")
    for doing in (
        lambda: store.write("a", "x"),
        lambda: store.create("a", "x"),
        lambda: store.claim("attempts"),
        lambda: store.remove("a"),
    ):
        with pytest.raises(ConfigError, match=r"file.*a part of that path is a file: choose another run directory"):
            doing()
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]


def test_a_directory_of_the_same_name(store: Store) -> None:
    """A file cannot replace a directory: said in words, and no temporary name stays."""
    store.write("x/inner", "kept")
    with pytest.raises(ConfigError, match="there is a directory of that name"):
        store.write("x", "new")
    assert not store.create("x", "new")
    assert store.names("") == ["x"]
    assert store.read("x/inner") == b"kept"


_LIMITED = """
import resource, sys
from jobkit.errors import JobkitError
from jobkit.rundir.store import Store
store = Store(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
for doing in (store.write, store.create):
    try:
        doing("x" if doing == store.write else "y", b"z" * 5000)
    except JobkitError as error:
        print(type(error).__name__, error)
store.write("x", b"z" * 900)
"""


def test_a_write_that_breaks_off(store: Store) -> None:
    """A write that fails half-way raises, leaves the old content and no other name; later ones succeed."""
    store.write("x", "old")
    done = subprocess.run([sys.executable, "-c", _LIMITED, store.url], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("StorageError cannot write") and "File too large" in line for line in lines)
    assert store.names("") == ["x"]
    assert store.read("x") == b"z" * 900


@pytest.mark.parametrize(
    ("number", "kind", "told"),
    [
        (errno.ENOSPC, StorageError, "the disk is full: free space there"),
        (errno.EDQUOT, StorageError, "quota"),
        (errno.EROFS, ConfigError, "read-only: choose another"),
        (errno.EACCES, ConfigError, "permission denied: make it readable and writable"),
        (errno.EPERM, ConfigError, "not permitted"),
        (errno.EIO, StorageError, "Input/output error"),
        (errno.ESTALE, StorageError, "[Ss]tale"),
        (errno.ENAMETOOLONG, StorageError, "too long"),
    ],
)
def test_system_errors_in_words(number: int, kind: type[JobkitError], told: str) -> None:
    """What a person must mend is a `ConfigError` with the remedy; what may pass is a `StorageError`."""
    error = explain(OSError(number, os.strerror(number), "/the/file"), "cannot write it")
    assert type(error) is kind
    assert str(error).startswith("cannot write it (/the/file): ")
    with pytest.raises(kind, match=told):
        raise error


def test_a_full_device_in_words() -> None:
    """The system's own error of a full device becomes the sentence about a full disk."""
    with pytest.raises(OSError, match="No space") as caught, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    assert "cannot write x: the disk is full" in str(explain(caught.value, "cannot write x"))


# Trees.


def test_a_tree_is_listed_summed_and_removed(tmp_path: Path) -> None:
    """Every file and link of a tree is listed in order; checksums are crc32c; removal is complete and repeatable."""
    root = tmp_path / "tree"
    for name in ["b", "a/c", "a/b/d", ".hidden"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"123456789")
    (root / "empty").mkdir()
    (root / "link").symlink_to(root / "a", target_is_directory=True)
    (root / "dangling").symlink_to("nowhere")
    assert list(files_below(root)) == [".hidden", "a/b/d", "a/c", "b", "dangling", "link"]
    (root / "dangling").unlink()
    sync_tree(root)
    assert checksum(root / "b") == (9, "e3069283")  # the check value of crc32c, RFC 3720 appendix B.4
    (root / "b").write_bytes(b"")
    assert checksum(root / "b") == (0, "00000000")
    remove_tree(root)
    assert not root.exists()
    remove_tree(root)
    assert free_bytes(root / "not" / "there") > 0


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    """What lies beside a file because its writer was killed goes; the file itself and what is another's stay."""
    store = Store(tmp_path)
    store.write("strategy.json", "{}")
    for name in (".strategy.json.0123456789ab.tmp", ".strategy.json.ba9876543210.tmp", ".run.json.0123456789ab.tmp"):
        store.file(name).touch()
    store.tidy("strategy.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.json.0123456789ab.tmp", "strategy.json"]


# To a bucket and from it.


def test_files_on_their_way_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files that are carried no more bytes are in memory than agreed; a file larger than that goes alone."""
    monkeypatch.setattr(remote, "IN_MEMORY_BYTES", 100)
    sizes = {f"small{at}": 1 + at % 40 for at in range(60)} | {"large": 250, "half": 50, "other half": 50, "empty": 0}
    lock, here, seen, most = threading.Lock(), set[str](), set[int](), 0

    def one(name: str) -> str:
        nonlocal most
        with lock:
            here.add(name)
            nbytes = sum(sizes[other] for other in here)
            assert nbytes <= 100 or {other for other in here if sizes[other]} == {"large"}
            most = max(most, len(here))
            seen.add(nbytes)
        time.sleep(0.002)
        with lock:
            here.remove(name)
        return name.upper()

    assert remote.carry("", sizes, one, shown=False) == [name.upper() for name in sizes]
    assert most > 1
    assert max(seen) >= 250


def test_a_file_that_fails_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first error ends it: nobody waits for the memory of what has failed."""
    monkeypatch.setattr(remote, "IN_MEMORY_BYTES", 10)

    def one(name: str) -> None:
        raise StorageError(name)

    with pytest.raises(StorageError, match="0"):
        remote.carry("", {str(at): 10 for at in range(40)}, one, shown=False)
