"""Logs and ledgers on object stores: sent in parts, read as one, whatever is killed when."""

import contextlib
import itertools
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobkit import contract
from jobkit.errors import StorageError
from jobkit.rundir import growing_files, mirror, remote_steps, uploader
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store
from tests.fakes.gcs_server import GcsServer
from tests.harness.jobs import until
from tests.training.test_remote import _commit

LOG = contract.log_file(0)


class _KilledError(BaseException):
    """What a SIGKILL is to the code that it hits."""


class _Mortal(Remote):
    """A store on whose n-th change its client is killed: before, or after it has taken effect."""

    left: float = float("inf")
    after = False
    sent = 0

    def write(self, name: str, content: bytes) -> None:
        """Count, and be killed when it is time."""
        self._pass(lambda: Remote.write(self, name, content))
        self.sent += len(content)

    def remove(self, objects: object) -> None:
        """Count each object."""
        for name in list(objects):  # type: ignore[call-overload]
            self._pass(lambda name=name: Remote.remove(self, [name]))  # type: ignore[misc]

    def _pass(self, change: object) -> None:
        self.left -= 1
        if self.left < 0 and not self.after:
            raise _KilledError
        change()  # type: ignore[operator]
        if self.left < 0:
            raise _KilledError


_numbers = itertools.count()


def _stores(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, Store]:
    """Return a run as its node and as another one see it."""
    url = f"memory://parts-{next(_numbers)}-{random.randrange(10**9)}"
    found = []
    for node in ("here", "there"):
        monkeypatch.setenv(contract.ENV_HOME, str(path / node))
        found.append(Store(url))
    return found[0], found[1]


def _sender(store: Store) -> growing_files.Sender:
    assert store.remote is not None
    return growing_files.Sender(store, LOG, growing_files.grouped(store.remote.find()).get(LOG, {}))


def _append(store: Store, content: bytes) -> None:
    path = store.file(LOG)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as log:
        log.write(content)


def _seen(store: Store) -> bytes:
    """Bring what is on the URL into another home, and return it."""
    mirror.fetch_logs(store)
    return store.read(LOG) if store.exists(LOG) else b""


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 3000)),
        st.tuples(st.just("send"), st.just(0)),
        st.tuples(st.just("killed before"), st.integers(0, 3)),
        st.tuples(st.just("killed after"), st.integers(0, 3)),
        st.tuples(st.just("read"), st.just(0)),
    ),
    max_size=40,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(steps=STEPS)
def test_whatever_is_killed_a_reader_sees_the_beginning(
    steps: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """After any history of appends, sends and kills a reader has a beginning of the log, never less than before."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(growing_files, "PART_BYTES", 2000)
        here, there = _stores(tmp_path_factory.mktemp("parts"), monkeypatch)
        whole, seen, pattern = b"", b"", random.Random(5)
        here.remote = remote = _Mortal(here.url)
        sender = _sender(here)
        for what, number in steps:
            if what == "append":
                content = pattern.randbytes(number)
                _append(here, content)
                whole += content
            elif what == "read":
                now = _seen(there)
                assert whole.startswith(now)
                assert now.startswith(seen)
                seen = now
            else:
                remote.left, remote.after = (number if "killed" in what else float("inf")), "after" in what
                with contextlib.suppress(_KilledError):
                    sender.send(lambda: True)
                remote.left = float("inf")
                if "killed" in what:
                    sender = _sender(here)
        assert sender.send(lambda: True)
        assert _seen(there) == whole
        assert growing_files.size_of(growing_files.grouped(remote.find()).get(LOG, {})) == len(whole)


@pytest.mark.slow
def test_a_log_is_sent_a_few_times_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand lines, each sent as it comes: few parts, and the traffic is a small multiple of the log."""
    monkeypatch.setattr(growing_files, "PART_BYTES", 1 << 16)
    here, there = _stores(tmp_path, monkeypatch)
    here.remote = remote = _Mortal(here.url)
    sender, line = _sender(here), b"x" * 99 + b"\n"
    for _ in range(10_000):
        _append(here, line)
        assert sender.send(lambda: True)
    found = growing_files.grouped(remote.find())[LOG]
    assert len(found) <= 2 * len(line) * 10_000 / growing_files.PART_BYTES + 16
    assert remote.sent <= 12 * len(line) * 10_000
    assert _seen(there) == line * 10_000


def test_a_log_that_is_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sent of a log stays when somebody empties the file; what is written then follows it."""
    here, there = _stores(tmp_path, monkeypatch)
    sender = _sender(here)
    _append(here, b"before\n" * 10)
    sender.send(lambda: True)
    here.file(LOG).write_bytes(b"")
    sender.send(lambda: True)
    _append(here, b"after\n")
    sender.send(lambda: True)
    assert _seen(there) == b"before\n" * 10 + b"after\n"


def test_a_gap_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after a part that has vanished does not count as sent, and whoever sends next begins there."""
    monkeypatch.setattr(growing_files, "PART_BYTES", 10)
    here, there = _stores(tmp_path, monkeypatch)
    assert here.remote is not None
    _append(here, bytes(range(40)))
    _sender(here).send(lambda: True)
    here.remote.remove([f"{LOG}.d/000000000000010"])
    assert growing_files.size_of(growing_files.grouped(here.remote.find())[LOG]) == 10
    assert _seen(there) == bytes(range(10))
    _sender(here).send(lambda: True)
    assert _seen(there) == bytes(range(40))


def test_a_log_of_an_older_jobkit_is_read_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One object under the log's own name is the beginning; parts may follow it."""
    here, there = _stores(tmp_path, monkeypatch)
    assert here.remote is not None
    here.remote.write(LOG, b"old\n")
    assert _seen(there) == b"old\n"
    _append(here, b"old\nnew\n")
    _sender(here).send(lambda: True)
    assert here.remote.read(LOG) == b"old\n"
    assert _seen(there) == b"old\nnew\n"


@pytest.mark.parametrize(
    "name",
    [
        "attempts/0/log-0.txt.d/x",
        "attempts/0/log-0.txt.d/1",
        "attempts/0/x.d/000000000000000",
        f"{LOG}.d/000000000000009",
    ],
)
def test_strange_parts_are_left_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object that is no part, or comes after a gap, adds nothing to a log."""
    here, there = _stores(tmp_path, monkeypatch)
    assert here.remote is not None
    here.remote.write(f"{LOG}.d/000000000000000", b"log\n")
    here.remote.write(name, b"strange")
    assert _seen(there) == b"log\n"


def test_parts_that_are_put_together_while_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader whose part is gone looks again, and finds it inside another one."""
    here, there = _stores(tmp_path, monkeypatch)
    assert here.remote is not None
    assert there.remote is not None
    sender = _sender(here)
    for line in (b"one\n" * 9, b"two\n" * 4):
        _append(here, line)
        sender.send(lambda: True)
    found = growing_files.grouped(there.remote.find())[LOG]
    assert len(found) == 2
    _append(here, b"three\n" * 20)
    sender.send(lambda: True)
    growing_files.fetch(there, LOG, {place: told for place, told in found.items() if place})
    growing_files.fetch(there, LOG, found)
    assert there.read(LOG) == here.read(LOG)


def test_parts_that_are_listed_and_never_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that goes on listing what it does not serve is an error, and no loop."""
    here, there = _stores(tmp_path, monkeypatch)
    assert here.remote is not None
    assert there.remote is not None
    here.remote.write(f"{LOG}.d/000000000000000", b"log\n")
    found = growing_files.grouped(there.remote.find())[LOG]
    monkeypatch.setattr(growing_files, "grouped", lambda listed: {LOG: found})
    here.remote.remove([f"{LOG}.d/000000000000000"])
    with pytest.raises(StorageError, match=r"lists parts of .* that are not there when they are read"):
        growing_files.fetch(there, LOG, found)


def test_ledgers_are_brought_in_parts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that begins an attempt has the ledgers of earlier ones, and `refresh` brings them, but no logs."""
    here, there = _stores(tmp_path, monkeypatch)
    attempt = mirror.claim(here)
    ledger = Ledger(here.file(contract.events_file(attempt, 0)))
    carrier = uploader.Uploader(here, attempt, ledger)
    _append(here, b"printed\n")
    for step in range(3):
        ledger.append("metrics", step=step)
        carrier.upload_files()
    assert mirror.claim(there) == 1
    mirror.fetch_ledgers(there, 1)
    name = contract.events_file(attempt, 0)
    assert there.read(name) == here.read(name)
    there.remove(name)
    mirror.refresh(there)
    assert there.read(name) == here.read(name)
    assert not there.exists(LOG)
    assert _seen(there) == b"printed\n"


def test_the_next_attempt_sends_what_a_killed_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the supervisor of an earlier attempt on this node had not sent when it was killed, the next one's sends."""
    here, there = _stores(tmp_path, monkeypatch)
    first = mirror.claim(here)
    _append(here, b"half\n")
    carrier = uploader.Uploader(here, first, Ledger(here.file(contract.events_file(first, "supervisor"))))
    carrier.upload_files()
    _append(here, b"the other half\n")
    here.write("attempts/0/outcome.json", "{}")
    second = mirror.claim(here)
    ledger = Ledger(here.file(contract.events_file(second, "supervisor")))
    uploader.Uploader(here, second, ledger).upload_files()
    assert _seen(there) == b"half\nthe other half\n"
    assert here.remote is not None
    assert here.remote.read("attempts/0/outcome.json") == b"{}"


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsServer]:
    """Run a GCS server of one bucket."""
    with GcsServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.mark.slow
def test_a_slow_log_keeps_nothing_waiting(gcs: GcsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While each part of a long log takes seconds, a checkpoint gets through and a cancel is heard."""
    monkeypatch.setenv(contract.ENV_HOME, str(tmp_path / "here"))
    monkeypatch.setattr(growing_files, "PART_BYTES", 10_000)
    store = Store("gs://bucket/slow")
    assert store.remote is not None
    attempt = mirror.claim(store)
    _append(store, bytes(500_000))
    gcs.faults.stall(3.0, None, match="log-0")
    carrier = uploader.Uploader(store, attempt, Ledger(store.file("test.jsonl")))
    carrier.start()
    until(lambda: gcs.faults.fired["stall"], "the log is being sent")
    _commit(store, 10, attempt, "step 10")
    store.remote.write(contract.CANCEL, b"{}")
    until(lambda: remote_steps.steps(store.remote) == [10] and store.exists(contract.CANCEL), "both", seconds=60)  # type: ignore[arg-type]
    assert growing_files.size_of(growing_files.grouped(store.remote.find()).get(LOG, {})) < 500_000
    gcs.faults.clear()
    carrier.close(deadline_s=60)
    assert growing_files.size_of(growing_files.grouped(store.remote.find())[LOG]) == 500_000


MEASURED = """
import os, resource, sys, time
from jobkit.rundir import mirror, uploader
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.store import Store
store = Store(sys.argv[1])
attempt = mirror.claim(store)
store.remote.find()  # gcsfs is imported
with open(store.file("attempts/0/log-0.txt"), "wb") as log:
    for number in range(120):
        log.write(os.urandom(1 << 20))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
carrier = uploader.Uploader(store, attempt, Ledger(store.file("attempts/0/events-supervisor.jsonl")))
carrier.upload_files(until=time.monotonic() + 300)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.slow
def test_a_large_log_takes_little_memory(gcs: GcsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log of 120 MiB is sent once, with less than 40 MiB of memory, and comes back as it was."""
    monkeypatch.setenv(contract.ENV_HOME, str(tmp_path / "here"))
    told = subprocess.run(
        [sys.executable, "-c", MEASURED, "gs://bucket/large"], capture_output=True, text=True, check=True
    ).stdout
    assert int(told) < 40
    sizes = [len(gcs.read(name)) for name in gcs.names(prefix="large/attempts/0/log-0.txt.d/")]
    assert sum(sizes) == 120 << 20
    monkeypatch.setenv(contract.ENV_HOME, str(tmp_path / "there"))
    store = Store("gs://bucket/large")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (home,) = (tmp_path / "here").iterdir()
    assert _seen(store) == (home / LOG).read_bytes()
    assert before
