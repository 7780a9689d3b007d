"""The home of a run in a bucket is emptied once the run has ended, and never of what the bucket does not have."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from jobkit import contract
from jobkit.rundir import commits, emptying, mirror, remote_steps, uploader
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store
from launch.lifecycle import orphans
from tests.fakes.gcs_server import GcsServer
from tests.harness.jobs import until
from tests.training.test_remote import _commit


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[GcsServer]:
    """Run a GCS server of one bucket, which this process's clients use."""
    with GcsServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv(contract.ENV_HOME, str(tmp_path / "here"))
        fsspec.filesystem("gs").clear_instance_cache()
        yield server


def _archive(files: dict[str, bytes]) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return written.getvalue()


def _ended(url: str) -> Store:
    """Make a run that has ended, everything of it on its URL."""
    store = Store(url)
    attempt = mirror.claim(store)
    store.write(contract.STRATEGY, json.dumps({"keep": 9, "keep_best": None}))
    carrier = uploader.Uploader(store, attempt, Ledger(store.file(contract.events_file(attempt, "supervisor"))))
    store.write(contract.STRATEGY, json.dumps({"keep": 9, "keep_best": None}))
    for step in (10, 20):
        _commit(store, step, attempt, f"step {step}")
    store.write(contract.log_file(attempt), b"printed\n" * 1000)
    store.write(f"attempts/{attempt}/outcome.json", '{"outcome": "done"}')
    store.write("code/abc.tar.gz", _archive({"train.py": b"print()"}))
    store.write("code/abc/train.py", b"print()")
    store.write("cache/x/y-cache", b"compiled")
    store.write("tensorboard/events.out.tfevents.1", b"drawn")
    store.write("samples/own.txt", b"the program's own")
    store.write(contract.EVENTS, b'{"t": 1, "event": "ended", "state": "done", "reason": "finished"}\n')
    carrier.close(deadline_s=0.0)
    return store


def test_an_attempt_whose_machine_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine writes its outcome down: what it had committed is what the URL has, not what is at hand."""
    monkeypatch.setenv(contract.ENV_HOME, str(tmp_path / "lost"))
    store = Store(f"memory://lost-{random.randrange(10**9)}")
    attempt = mirror.claim(store)
    carrier = uploader.Uploader(store, attempt, Ledger(store.file(contract.events_file(attempt, "supervisor"))))
    _commit(store, 10, attempt, "step 10")
    carrier.close(deadline_s=5.0)
    monkeypatch.setenv(contract.ENV_HOME, str(tmp_path / "here"))
    here = Store(store.url)
    mirror.refresh(here)
    assert commits.steps(here) == []
    orphans.close_attempts(here, "the machine is gone")
    told = orphans.read_outcome(here, attempt)
    assert told is not None
    assert (told["outcome"], told["committed_step"]) == ("killed", 10)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Yield such a run."""
    monkeypatch.setenv(contract.ENV_HOME, str(tmp_path / "here"))
    return _ended(f"memory://ended-{random.randrange(10**9)}")


def _files(store: Store) -> dict[str, bytes]:
    return {str(path.relative_to(store.path)): path.read_bytes() for path in store.path.rglob("*") if path.is_file()}


def test_what_takes_room_goes_and_comes_back(run: Store) -> None:
    """Checkpoints, logs, code and cache go; what tells of the run and the program's own stays; the rest is fetched."""
    before = _files(run)
    assert emptying.empty(run)
    left = _files(run)
    gone = {name.partition("/")[0] for name in before.keys() - left.keys()}
    assert gone == {"checkpoints", "attempts", "code", "cache", "tensorboard"}
    assert left["samples/own.txt"] == b"the program's own"
    assert {name for name in before if name.startswith("attempts")} - left.keys() == {"attempts/0/log-0.txt"}
    assert commits.steps(run) == []
    mirror.refresh(run)
    mirror.fetch_logs(run)
    assert remote_steps.fetch_newest(run, Ledger(run.file("test.jsonl")), attempt=1) == 20
    again = _files(run)
    kept = {name for name in before if not name.startswith(("checkpoints/10", "cache", "code/abc/"))}
    assert {name: again.get(name) for name in kept} == {name: before[name] for name in kept}
    assert mirror.claim(run) == 1


def test_homes_of_other_processes_are_emptied_too(run: Store) -> None:
    """What other processes had on this machine goes as well, but for a part of a step that the URL does not have."""
    other = run.of_process(1)
    for step in (10, 20, 30):
        other.write(f"checkpoints/{step}/part-1.json", b"a part")
    other.write("attempts/0/log-1.txt", b"printed\n")
    other.write("cache/x/y-cache", b"compiled")
    other.write("samples/own.txt", b"the program's own")
    before = _files(other)
    assert not emptying.empty(run)
    assert _files(other) == before
    commits.remove(other, 30)
    assert emptying.empty(run)
    assert _files(other) == {"samples/own.txt": b"the program's own"}
    assert run.bucket.find("attempts/0/log-1.txt.d")


@pytest.mark.parametrize("name", ["model.npz", "out/results.csv", "train.py"])
def test_what_the_program_wrote_below_its_code_stays(name: str, run: Store) -> None:
    """A program runs in the unpacked code: what it wrote into its working directory is nowhere else."""
    run.write(f"code/abc/{name}", b"results")
    assert emptying.empty(run)
    assert _files(run)[f"code/abc/{name}"] == b"results"
    assert run.exists("code/abc/train.py"), "half a tree would count as whole"
    assert commits.steps(run) == []


def test_unpacked_code_goes_with_what_python_compiled(run: Store) -> None:
    """What Python leaves beside the code is no result; a link leads to what stays."""
    run.write("code/abc/__pycache__/train.cpython-312.pyc", b"compiled")
    os.symlink("/etc", run.file("code/abc/data"))
    assert emptying.empty(run)
    assert run.names("code") == []


def test_code_is_never_half_removed(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while the code is removed leaves nothing where the next attempt looks for it."""

    def die(path: Path) -> None:
        if path.name.startswith("abc"):
            raise KeyboardInterrupt
        remove(path)

    remove = emptying.remove_tree
    monkeypatch.setattr(emptying, "remove_tree", die)
    with pytest.raises(KeyboardInterrupt):
        emptying.empty(run)
    assert not run.exists("code/abc")


@pytest.mark.parametrize("how", ["missing", "short"])
@pytest.mark.parametrize("name", ["checkpoints/20/commit.json", "checkpoints/10/default/manifest.ocdbt"])
def test_nothing_goes_before_every_step_is_up(name: str, how: str, run: Store) -> None:
    """One object of a step that is missing, or short, keeps all of the home."""
    assert run.remote is not None
    content, before = run.remote.read(name), _files(run)
    run.remote.remove([name])
    if how == "short":
        run.remote.write(name, content[:-1])
    assert not emptying.empty(run)
    assert _files(run) == before
    run.remote.write(name, content)
    assert emptying.empty(run)


@pytest.mark.parametrize("name", ["attempts/0/outcome.json", "attempts/0/claim.json"])
def test_nothing_goes_before_every_file_is_up(name: str, run: Store) -> None:
    """A file of an attempt that is short on the URL keeps all of the home; one that is missing goes up first."""
    assert run.remote is not None
    content, before = run.remote.read(name), _files(run)
    run.remote.write(name, content[:-1])
    assert not emptying.empty(run)
    assert _files(run) == before
    run.remote.remove([name])
    assert emptying.empty(run)
    assert run.remote.read(name) == content


def test_a_log_that_was_not_sent_is_sent_first(run: Store) -> None:
    """What a killed supervisor had not sent of its log goes up before it goes here."""
    with run.file(contract.log_file(0)).open("ab") as log:
        log.write(b"last words\n")
    whole = run.read(contract.log_file(0))
    assert emptying.empty(run)
    mirror.fetch_logs(run)
    assert run.read(contract.log_file(0)) == whole


def test_a_ledger_that_is_not_up_keeps_the_home(run: Store) -> None:
    """While the end of the run is not on the URL nothing goes."""
    run.write(contract.EVENTS, run.read(contract.EVENTS) + b'{"t": 2, "event": "ended"}\n')
    before = _files(run)
    assert not emptying.empty(run)
    assert _files(run) == before


def test_a_step_that_the_url_would_not_keep_goes_too(run: Store) -> None:
    """A step that retention has removed from the bucket, and not here yet, keeps nothing waiting."""
    assert run.remote is not None
    run.write(contract.STRATEGY, json.dumps({"keep": 1, "keep_best": None}))
    remote_steps.remove(run.remote, 10)
    assert emptying.empty(run)
    assert commits.steps(run) == []


KILLED = """
import sys
from jobkit.rundir import emptying
from jobkit.rundir.store import Store
emptying.empty(Store(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_a_kill_while_it_is_emptied_harms_nothing(times: int, gcs: GcsServer) -> None:
    """Killed with a step half removed, the home has less in it and nothing damaged; a second try finishes."""
    store = _ended("gs://bucket/killed")
    environ = os.environ | {contract.ENV_FAULT: f"during_retention:{times}"}
    done = subprocess.run([sys.executable, "-c", KILLED, store.url], env=environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert commits.steps(store) == [20][times - 1 :]
    assert all(commits.problems(store, step) == [] for step in commits.steps(store))
    mirror.refresh(store)
    ledger = Ledger(store.file("test.jsonl"))
    assert remote_steps.fetch_newest(store, ledger, attempt=1) == (None if times == 1 else 20)
    assert commits.problems(store, 20) == []
    assert emptying.empty(store)


TRAIN = """
import sys, time, numpy as np, jobkit
with jobkit.Run(save_every=None, keep=2) as run:
    state = run.resume(n=0, h=np.zeros(1000))
    for step in run.steps(40):
        state.n += 1
        state.h = state.h + step
        if step == 20:
            run.save()
        if step == 25 and len(sys.argv) > 1 and run.attempt == 0:
            while run.committed_step < 21:
                time.sleep(0.01)
            sys.exit("failed on purpose")
print("trained", state.n)
"""


@pytest.mark.slow
def test_every_command_works_on_an_emptied_home(gcs: GcsServer, tmp_path: Path) -> None:
    """A run that failed for good leaves an emptied home; status, checkpoints, logs, load and resume work there."""
    (tmp_path / "train.py").write_text(TRAIN)
    url = "gs://bucket/runs/emptied"

    def jobkit(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "launch", *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    jobkit("submit", "--run", url, "--max-failures", "0", "--wait", "--", sys.executable, "train.py", "fail", code=1)
    (home,) = (tmp_path / "here").iterdir()
    until(lambda: not (home / contract.log_file(0)).exists(), "the home is emptied", seconds=60)
    assert list((home / "checkpoints").glob("*/commit.json")) == []
    assert list((home / "code").iterdir()) == []
    told = json.loads(jobkit("status", url, "--json"))
    assert (told["state"], told["committed_step"]) == ("failed", 21)
    assert "21" in jobkit("checkpoints", url)
    assert "failed on purpose" in jobkit("logs", url)
    loaded = f"import jobkit, numpy as np; print(jobkit.load({url!r}, n=0, h=np.zeros(1000)).n)"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, check=True).stdout.strip() == b"21"
    jobkit("resume", "--wait", url)
    assert remote_steps.steps(Remote(url))[-1] == 40
    assert "trained 40" in jobkit("logs", url)
    until(lambda: list((home / "checkpoints").glob("*/commit.json")) == [], "it is emptied again", seconds=60)
