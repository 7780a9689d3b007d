"""What one process of many asks of a bucket, which is not to grow with their number, nor with the run's history."""

import os
from pathlib import Path

import pytest

from jobkit import contract
from jobkit.rundir import commits
from jobkit.rundir.apart import parts
from jobkit.rundir.apart.sending import Sender
from jobkit.rundir.files import crc32c
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.store import Store
from jobkit.rundir.uploader import Outbox
from tests.training.test_gathering import Attempt, attempt  # noqa: F401


@pytest.fixture
def home(attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:  # noqa: F811
    """Return the home of process 1, which has a part of step 5 and what an earlier attempt has left."""
    assert attempt.claim() == 1
    monkeypatch.setenv(contract.ENV_PROCESS, "1")
    monkeypatch.setenv(contract.ENV_PROCESSES, "2")
    store = Store(attempt.url)
    store.write("attempts/0/process-1.json", "{}")
    store.write("attempts/0/events-supervisor-1.jsonl", "{}\n")
    stage = commits.new_stage(store, 5, 1)
    (stage / "default").mkdir(parents=True)
    (stage / "default/x").write_bytes(os.urandom(1000))
    record = commits.FileRecord(1000, crc32c((stage / "default/x").read_bytes()))
    parts.publish(store, stage, parts.Part(step=5, attempt=1, process=1, files={"default/x": record}))
    return store


def crowd(run: Attempt, count: int) -> None:
    """Put into the bucket what so many other processes have there: of ten attempts, and of two steps."""
    for process in range(2, count):
        for number in range(10):
            run.server.write(f"{run.remote.url.removeprefix('gs://bucket/')}/attempts/0/log-{process}.d/{number}", b"x")
        for step in (5, 6):
            run.server.write(f"{run.remote.url.removeprefix('gs://bucket/')}/{parts.name_of(step, process)}", b"{}")


@pytest.mark.parametrize("count", [2, 400])
def test_of_one_process_they_are_few(attempt: Attempt, home: Store, count: int) -> None:  # noqa: F811
    """It carries its files and its part, and waits for the commit, with no request more beside 400 others."""
    crowd(attempt, count)
    begun = len(attempt.server.log)
    Outbox(home, 1).upload([], final=False, go_on=lambda: True)
    carried = len(attempt.server.log)
    sender = Sender(home, 1, 1, Ledger(home.file("ledger.jsonl")))
    looks = []
    for _ in range(3):
        sender._looked, before = 0.0, len(attempt.server.log)
        assert not sender.carry_parts()
        looks.append(len(attempt.server.log) - before)
    # Of two files what is there (of a ledger in two requests) and their content; of the part a look, a file, a fence,
    # the part, a look.
    assert (carried - begun, looks) == (5, [5, 1, 1])
    assert parts.name_of(5, 1) in attempt.remote.find()


def test_what_is_known_to_be_there_is_not_asked_for(attempt: Attempt, home: Store) -> None:  # noqa: F811
    """The next attempt asks for nothing of an earlier one whose files have all been sent, and sends what has grown."""
    assert Outbox(home, 1).upload([], final=True, go_on=lambda: True)
    before = len(attempt.server.log)
    assert Outbox(home, 2).upload([], final=True, go_on=lambda: True)
    assert len(attempt.server.log) == before
    with home.file("attempts/0/events-supervisor-1.jsonl").open("a") as ledger:
        ledger.write("{}\n")
    assert Outbox(home, 2).upload([], final=True, go_on=lambda: True)
    pieces = [name for name in attempt.remote.find("attempts/0") if name.startswith("attempts/0/events-supervisor-1")]
    assert b"".join(attempt.remote.read(name) for name in sorted(pieces)) == b"{}\n{}\n"


def test_a_part_whose_files_are_replaced_is_none(attempt: Attempt, home: Store) -> None:  # noqa: F811
    """Where an earlier attempt left a part with other bytes, it is gone before the first of its files is."""
    attempt.remote.write(parts.name_of(5, 1), b"{}")
    attempt.remote.write("checkpoints/5/default/x", b"of an earlier attempt")
    before = len(attempt.server.log)
    assert not Sender(home, 1, 1, Ledger(home.file("ledger.jsonl"))).carry_parts()
    gone = [
        subject.split(" ")[2].rpartition("/5/")[2] for kind, subject in attempt.server.log[before:] if "del" in kind
    ]
    assert gone == ["part-1.json", "default/x"]
    assert attempt.remote.read("checkpoints/5/default/x") == home.read("checkpoints/5/default/x")
    assert attempt.remote.read(parts.name_of(5, 1)) == home.read(parts.name_of(5, 1))
