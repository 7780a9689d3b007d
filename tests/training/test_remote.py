"""Runs on object stores, against servers that speak their protocols: our own for GCS, moto for S3."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest

from jobkit import contract
from jobkit.errors import ConfigError, JobkitError, SupersededError
from jobkit.rundir import commits, mirror, remote_steps, uploader
from jobkit.rundir.ledger import Ledger, read_events, read_metrics
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store
from launch.lifecycle import submission
from tests.fakes.gcs_server import GcsServer
from tests.harness import machines, training
from tests.harness.jobs import until


@dataclass
class Place:
    """A bucket on a server of this machine.

    Args:
        url: Where runs may lie.
        environment: What a client needs to find the server.
        homes: Directories standing for the local disks of nodes.
    """

    url: str
    environment: dict[str, str]
    homes: Path

    def node(self, name: str) -> dict[str, str]:
        """Return the environment of a process on a node of that name."""
        return self.environment | {contract.ENV_HOME: str(self.homes / name)}


@pytest.fixture
def gcs() -> Iterator[GcsServer]:
    """Run a GCS server of one bucket."""
    with GcsServer() as server:
        yield server


@pytest.fixture(params=["gs", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Yield a new bucket."""
    monkeypatch.setenv(contract.ENV_HOME, str(tmp_path / "here"))
    if request.param == "gs":
        environment = request.getfixturevalue("gcs").environment()
        url = f"gs://bucket/runs/one-{random.randrange(10**9)}"  # a run is known by its URL on the whole machine
    else:
        environment = request.getfixturevalue("moto")
        url = f"s3://bucket-{random.randrange(10**9)}/runs/one"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fsspec.config.conf.clear()
    fsspec.config.set_conf_env(fsspec.config.conf)
    fsspec.filesystem(request.param).clear_instance_cache()
    if request.param == "s3":
        fsspec.filesystem("s3").mkdir(url.split("/")[2])
    return Place(url, environment, tmp_path)


def attempt(place: Place, node: str, **named: Any) -> tuple[int, str]:
    """Run one attempt on a node of its own local disk."""
    return training.attempt(place.url, environment=place.node(node), log=place.homes / f"{node}.log", **named)


def test_create_is_exclusive(place: Place) -> None:
    """Of twenty creators of one object exactly one wins, and its content is what is read."""
    remote = Remote(place.url)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(20) as pool:
        won = list(pool.map(lambda index: remote.create("lease", b"%d" % index), range(20)))
    assert sum(won) == 1
    assert remote.read("lease") == b"%d" % won.index(True)


def test_find_read_write_remove(place: Place) -> None:
    """Objects are listed with their sizes, read back, replaced and removed."""
    remote = Remote(place.url)
    assert remote.find() == {}
    remote.write("a/one", b"1")
    remote.write("a/two", b"22")
    remote.write("a/two", b"222")
    assert remote.find("a") == {"a/one": 1, "a/two": 3}
    assert remote.read("a/two") == b"222"
    remote.remove(["a/one", "a/never"])
    assert remote.find() == {"a/two": 3}
    with pytest.raises(FileNotFoundError):
        remote.read("a/one")


def test_attempts_are_listed_by_one_request(tmp_path: Path) -> None:
    """However much the attempts of a run have written, who asks which is the newest takes one request."""
    with machines.bucket(tmp_path / "here") as server:
        for number in range(12):
            for name in range(120):
                server.write(f"run/attempts/{number}/log-0.txt.d/{name}", b"x")
        remote, before = Remote("gs://bucket/run"), len(server.log)
        assert remote.numbers("attempts") == list(range(12))
        assert len(server.log) - before == 1
        assert remote.numbers("checkpoints") == []


def test_an_object_is_removed_by_its_content(place: Place) -> None:
    """What has the content goes, once; what has another stays, and is told, also where none was to be there."""
    remote = Remote(place.url)
    remote.write(contract.CANCEL, b"mine")
    assert not remote.remove_this(contract.CANCEL, b"another")
    assert not remote.remove_this(contract.CANCEL, None)
    assert remote.read(contract.CANCEL) == b"mine"
    assert remote.remove_this(contract.CANCEL, b"mine")
    assert remote.find() == {}
    assert remote.remove_this(contract.CANCEL, b"mine")
    assert remote.remove_this(contract.CANCEL, None)


@pytest.mark.parametrize("place", ["gs"], indirect=True)
def test_a_cancel_that_comes_as_one_is_taken_back_stays(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancel from another machine between the look at the old one and its removal is told of, and stays."""
    store = Store(place.url)
    old = submission.ask(store, contract.CANCEL)
    read = store.bucket.read

    def reading(name: str) -> bytes:
        content = read(name)
        Remote(place.url).write(name, b"of another machine")
        return content

    monkeypatch.setattr(store.bucket, "read", reading)
    with pytest.raises(ConfigError, match="was cancelled on another machine this very moment"):
        submission.take_back_cancel(store, old)
    assert read(contract.CANCEL) == b"of another machine"
    assert store.read(contract.CANCEL) == old


def test_uploads_of_dead_attempts_are_ended(moto: dict[str, str], tmp_path: Path) -> None:
    """A multipart upload that a killed attempt began is ended by the next one; others' in the bucket are not."""
    import boto3

    client = boto3.client("s3", endpoint_url=moto["AWS_ENDPOINT_URL"], aws_access_key_id="test",
                          aws_secret_access_key="test", region_name="us-east-1")  # fmt: skip
    bucket = f"bucket-{random.randrange(10**9)}"
    client.create_bucket(Bucket=bucket)
    for key in ("runs/one/checkpoints/5/x", "runs/other/x"):
        client.create_multipart_upload(Bucket=bucket, Key=key)
    code, printed = training.attempt(
        f"s3://{bucket}/runs/one", function=_plain, environment=moto | {contract.ENV_HOME: str(tmp_path / "a")},
        log=tmp_path / "log", steps=5,
    )  # fmt: skip
    assert code == 0, printed
    left = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert [upload["Key"] for upload in left] == ["runs/other/x"]


def test_find_names_no_directories(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place whose first object appears while it is being listed is not taken for an object of its own."""
    remote = Remote(place.url)
    remote.write("checkpoints/5/x", b"1")
    fs, root = remote._fs()
    directory = {"name": f"{root}/checkpoints", "size": 0, "type": "directory"}
    monkeypatch.setattr(fs, "find", lambda path, detail, **_: {directory["name"]: directory})
    assert remote.find("checkpoints") == {}


def test_an_emulated_bucket_is_not_asked_for_credentials(gcs: GcsServer, tmp_path: Path) -> None:
    """Where STORAGE_EMULATOR_HOST says that it is one, none are looked for, and nothing warns of them; those that
    fsspec is given are used.
    """
    script = "import logging; logging.basicConfig(); from jobkit.rundir.remote import Remote; "
    script += "Remote('gs://bucket/x', deadline_s=2).write('a', b'1')"
    environment = {**os.environ, **gcs.environment(), "HOME": str(tmp_path)}
    del environment["FSSPEC_GS"]
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert gcs.read("x/a") == b"1"
    environment["FSSPEC_GS"] = '{"token": "/nonexistent.json"}'
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1


def test_a_bucket_that_does_not_exist_is_said_so(place: Place) -> None:
    """Writing to a bucket that does not exist is one sentence, not a retry for minutes."""
    begun = time.monotonic()
    with pytest.raises(ConfigError) as refused:
        Remote(f"{place.url.split(':')[0]}://no-such-bucket-anywhere/run").write("x", b"1")
    assert time.monotonic() - begun < 20
    assert "no-such-bucket" in str(refused.value)


def test_a_run_moves_from_node_to_node(place: Place, undisturbed: Path) -> None:
    """Three nodes without a shared disk: preempted, killed, finished; the bits are the undisturbed run's."""
    assert attempt(place, "a", at={20: "SIGTERM"}, pause_s=0.01)[0] == 75
    assert 21 in remote_steps.steps(Remote(place.url))
    code, printed = attempt(place, "b", at={45: "SIGKILL"}, pause_s=0.05)
    assert code == -9
    assert "resumes at step 21" in printed
    code, printed = attempt(place, "c")
    assert code == 0, printed
    remote = Remote(place.url)
    steps = remote_steps.steps(remote)
    assert steps[-1] == training.STEPS
    assert len(steps) <= 2
    store = Store(place.homes / "c" / next(path.name for path in (place.homes / "c").iterdir()))
    assert training.digest(store.path) == training.digest(undisturbed)


@pytest.mark.slow
def test_the_same_node_restores_what_was_not_uploaded(place: Place, undisturbed: Path) -> None:
    """A step that was committed locally but never uploaded is used by the next attempt on that node, and uploaded."""
    code, _ = attempt(place, "a", at={30: "SIGKILL"}, pause_s=0.03)
    assert code == -9
    (home,) = (place.homes / "a").iterdir()
    newest = commits.steps(Store(home))[-1]
    Remote(place.url).remove(Remote(place.url).find(contract.step_dir(newest)))
    code, printed = attempt(place, "a")
    assert code == 0
    assert f"resumes at step {newest}" in printed
    assert training.digest(home) == training.digest(undisturbed)


@pytest.mark.slow
def test_supervisor_uploads_what_a_killed_program_committed(place: Place) -> None:
    """SIGKILL of the program right after its local commit: the step is in the bucket when the attempt has ended."""
    script = place.homes / "train.py"
    script.write_text(
        "import os, signal, numpy as np, jobkit\n"
        "with jobkit.Run(save_every=None) as run:\n"
        "    state = run.resume(w=np.arange(1_000_000), n=0)\n"
        "    for step in run.steps(100):\n"
        "        state.n += 1\n"
        "        if step == 5: run.save()\n"
        "        if run.committed_step == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        import time; time.sleep(0.01)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-m", "jobkit.supervise", "--run", place.url, "--", sys.executable, str(script)],
        env=os.environ | place.node("a"),
        check=False,
    )
    assert ended.returncode == 137
    remote = Remote(place.url)
    assert 6 in remote_steps.steps(remote)
    assert json.loads(remote.read("attempts/0/outcome.json"))["outcome"] == "killed"
    there = _elsewhere(place, 0)
    mirror.refresh(there)
    assert b"uploaded" in there.read("attempts/0/events-supervisor.jsonl")


_ON_ANOTHER_NODE = """
import os, pathlib, sys, time
import numpy as np
home, until = pathlib.Path(os.environ["JOBKIT_HOME"]), time.monotonic() + 60
while sys.argv[1:] and not list(home.glob("*/checkpoints/2/commit.json")):  # the program starts
    assert time.monotonic() < until
    time.sleep(0.02)
import jobkit
with jobkit.Run(save_every=None) as run:
    state = run.resume(w=np.zeros(3_000_000), n=0, optimizer=None)
    for step in run.steps(3 if sys.argv[1:] else 2):
        state.n += 1
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["gs"], indirect=True)
def test_the_step_is_brought_while_the_program_starts(place: Place, gcs: GcsServer) -> None:
    """On a node without it the supervisor brings the newest step before the program has a run, and nobody again."""
    script = place.homes / "train.py"
    script.write_text(_ON_ANOTHER_NODE)
    supervised = [sys.executable, "-m", "jobkit.supervise", "--run", place.url, "--", sys.executable, str(script)]
    subprocess.run(supervised, env=os.environ | place.node("a"), check=True)
    gcs.log.clear()
    subprocess.run([*supervised, "again"], env=os.environ | place.node("b"), check=True)
    read = [subject for kind, subject in gcs.log if kind == "object.media" and "/checkpoints/2/" in subject]
    brought = sorted(subject for subject in read if contract.COMMIT not in subject)
    assert any("/values/" in subject for subject in brought)
    assert brought == sorted(set(brought))
    (home,) = (place.homes / "b").iterdir()
    assert commits.steps(Store(home))[-1] == 3
    restored = next(event for event in read_events(Store(home)) if event["event"] == "restored")
    assert restored["step"] == 2


@pytest.mark.parametrize("place", ["gs"], indirect=True)
def test_requests_of_a_save(place: Place, gcs: GcsServer) -> None:
    """A save takes a request for each of its files, and three; retention and ledgers have their own."""
    import numpy as np

    import jobkit

    with jobkit.Run(place.url, save_every=None) as run:
        run.resume(w=np.zeros(3_000_000), n=0, optimizer=None)
        run._session.checkpoints.wait()
        assert run._session.uploader is not None
        run._session.uploader.close(deadline_s=60)
        run.state.n += 1
        run.save(1, wait=True)
        gcs.log.clear()
        store = Store(place.url)
        assert remote_steps.push(store, 1, attempt=run.attempt, ledger=Ledger(store.file("test.jsonl")))
        counted = sum(gcs.requests.values())
    files = commits.read(store, 1).files
    assert len(list(filter(contract.is_values, files))) > 1
    assert counted <= len(files) + 3  # commit.json, and whether it is there and this is the newest attempt


@pytest.mark.slow
def test_the_same_step_with_other_bytes_stays_as_committed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that comes back with its own version of a step, never uploaded, does not touch the one in the bucket."""
    import numpy as np

    import jobkit

    def attempt_on(node: str, add: float, save: int) -> None:
        monkeypatch.setenv(contract.ENV_HOME, str(place.homes / node))
        with jobkit.Run(place.url, save_every=None, keep=9) as run:
            state = run.resume(w=np.zeros(1000), optimizer=None)
            for step in run.steps(save):
                state.w = state.w + add
                if step + 1 == save:
                    run.save()

    remote = Remote(place.url)
    attempt_on("a", 1.0, 3)
    remote.remove(remote.find(contract.step_dir(3)))  # as if node a had died before the upload
    attempt_on("b", 2.0, 3)
    before = {name: remote.read(name) for name in remote.find(contract.step_dir(3))}
    attempt_on("a", 1.0, 4)
    assert {name: remote.read(name) for name in remote.find(contract.step_dir(3))} == before
    assert remote_steps.problems(_elsewhere(place, 3), 3) == []
    assert remote_steps.problems(_elsewhere(place, 4), 4) == []


def _damage(place: Place, kind: str, name: str, remote: Remote) -> None:
    content = bytearray(remote.read(name))
    if kind == "flip":
        content[len(content) // 2] ^= 1
        remote.write(name, bytes(content))
    elif kind == "truncate":
        remote.write(name, bytes(content[:-1]))
    else:
        remote.remove([name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flip", "truncate", "delete"])
def test_damage_in_the_bucket_is_found_and_the_older_step_used(kind: str, place: Place) -> None:
    """Every file of the newest step in turn, damaged in the bucket: found, set aside, the older step is restored."""
    import numpy as np

    import jobkit

    with jobkit.Run(place.url, save_every=None, keep=5) as run:
        state = run.resume(w=np.zeros(1000), n=0, optimizer=None)
        for step in run.steps(2):
            state.n += 1
            state.w = state.w + 1
            if step == 0:
                run.save()
    remote = Remote(place.url)
    originals = {name: remote.read(name) for name in remote.find(contract.step_dir(2))}
    assert len(originals) > 5
    for index, name in enumerate(originals):
        for restored in remote.find(contract.CHECKPOINTS):
            if restored.split("/")[1] not in ("0", "1"):
                remote.remove([restored])
        for original, content in originals.items():
            remote.write(original, content)
        _damage(place, kind, name, remote)
        store = _elsewhere(place, index)
        ledger = Ledger(store.file("events.jsonl"))
        # A deleted commit.json is a step that was never committed; everything else is damage.
        assert remote_steps.fetch_newest(store, ledger, attempt=9) == 1
        assert commits.problems(store, 1) == []
        told = [event for event in read_events(store) if event["event"] == "set_aside"]
        if not (kind == "delete" and name.endswith(contract.COMMIT)):
            assert [event["step"] for event in told] == [2], name
            assert any(name.startswith(contract.SET_ASIDE) for name in remote.find(contract.CHECKPOINTS))


def _elsewhere(place: Place, index: int) -> Store:
    """Return the run as a node with an empty disk sees it."""
    before = os.environ[contract.ENV_HOME]
    os.environ[contract.ENV_HOME] = str(place.homes / f"elsewhere-{index}")
    store = Store(place.url)
    os.environ[contract.ENV_HOME] = before
    return store


def test_an_old_attempt_cannot_commit_to_the_bucket(place: Place) -> None:
    """Once a newer attempt has claimed the run, the mirror of an older one refuses to commit."""
    store = Store(place.url)
    old = mirror.claim(store)
    elsewhere = _elsewhere(place, 1)
    assert mirror.claim(elsewhere) == old + 1
    with pytest.raises(ConfigError, match=f"attempt {old + 1} has taken over"):
        commits.check_newest(Remote(place.url), old, "commit")


def test_submit_status_and_cancel_on_a_bucket(place: Place) -> None:
    """The local backend runs a run on a bucket; another machine sees its status, cancels it, and it stays cancelled."""
    script = place.homes / "work" / "train.py"
    script.parent.mkdir()
    script.write_text(
        "import time, numpy as np, jobkit\n"
        "with jobkit.Run(save_every='20 steps') as run:\n"
        "    state = run.resume(n=0)\n"
        "    for step in run.steps(100_000):\n"
        "        state.n += 1\n"
        "        time.sleep(0.01)\n"
        "        run.log(loss=1.0)\n"
    )

    def jobkit(node: str, *arguments: str) -> dict[str, Any]:
        ended = subprocess.run(
            [sys.executable, "-m", "launch", *arguments],
            cwd=script.parent,
            env=os.environ | place.node(node),
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        told: dict[str, Any] = json.loads(ended.stdout) if "--json" in arguments else {}
        return told

    jobkit("laptop", "submit", "--run", place.url, "--json", "--", "python", "train.py")
    deadline = time.monotonic() + 60
    while (jobkit("laptop", "status", place.url, "--json").get("committed_step") or 0) < 20:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(3)
    seen = jobkit("other", "status", place.url, "--json")
    assert seen["attempts"] == 1
    jobkit("other", "cancel", place.url)
    while jobkit("laptop", "status", place.url, "--json")["state"] != "cancelled":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert jobkit("other", "status", place.url, "--json")["state"] == "cancelled"


def test_a_run_that_ends_while_it_is_looked_at(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads in the home that a run has ended finds its whole log there, however the two came into the bucket."""
    bucket, home = Remote(place.url), Store(place.url)
    log = contract.log_file(0)
    life = [b'{"t": %d, "event": "%s"}\n' % told for told in ((1, b"submitted"), (2, b"decision"), (3, b"ended"))]
    bucket.write(contract.EVENTS, life[0])
    bucket.write(log, b"begin\n")
    mirror.refresh(home)
    mirror.fetch_logs(home)
    bucket.write(contract.EVENTS, b"".join(life[:2]))
    find = Remote.find

    def find_and_end(remote: Remote, name: str = "") -> dict[str, int]:
        found = find(remote, name)
        bucket.write(log, b"begin\nend\n")
        bucket.write(contract.EVENTS, b"".join(life))
        return found

    monkeypatch.setattr(Remote, "find", find_and_end)
    mirror.refresh(home)
    ended = b"ended" in home.read(contract.EVENTS)
    mirror.fetch_logs(home)
    assert home.read(log) == b"begin\nend\n" or not ended
    mirror.refresh(home)
    assert b"ended" in home.read(contract.EVENTS)
    assert home.read(log) == b"begin\nend\n"


@pytest.mark.slow
@pytest.mark.parametrize("kills", [20, 50])
def test_random_kills_with_uploads(kills: int, place: Place, undisturbed: Path) -> None:
    """SIGKILLs a store at random moments of saves and uploads, two nodes in turn: nothing wrong, nothing lost."""
    moments = random.Random(11)
    newest = -1
    for kill in range(kills):
        node = "ab"[kill % 2]
        process = training.start(
            training.train,
            place.url,
            log=place.homes / "log",
            environment=place.node(node),
            pause_s=0.04,
            save_every="3 steps",
        )
        process.join(moments.uniform(0.8, 2.2))
        process.kill()
        process.join()
        steps = remote_steps.steps(Remote(place.url))
        assert max(steps, default=-1) >= newest, "a commit was lost"
        newest = max(steps, default=-1)
    code, printed = attempt(place, "c")
    assert code == 0, printed
    (home,) = (place.homes / "c").iterdir()
    assert training.digest(home) == training.digest(undisturbed)
    for again in read_metrics(Store(home)).repeated.values():
        assert all(len(set(values)) == 1 for values in again.values())
    found = remote_steps.group(Remote(place.url).find(contract.CHECKPOINTS))
    assert sorted(found) == remote_steps.steps(Remote(place.url)), "an unfinished upload was left"
    shutil.rmtree(home)


def _plain(url: str, steps: int = 30, pause_s: float = 0.05) -> None:
    import numpy as np

    import jobkit

    with jobkit.Run(url, save_every="5 steps", keep=2) as run:
        state = run.resume(w=np.zeros(100_000), n=0, optimizer=None)
        for _ in run.steps(steps):
            state.n += 1
            state.w = state.w + 1
            time.sleep(pause_s)


@pytest.fixture
def gs(gcs: GcsServer, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Yield a bucket of the GCS server whose faults the test sets."""
    for name, value in gcs.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(contract.ENV_HOME, str(tmp_path / "here"))
    fsspec.filesystem("gs").clear_instance_cache()
    return Place("gs://bucket/runs/one", gcs.environment(), tmp_path)


def test_no_retry_passes_the_fence(gs: Place, gcs: GcsServer) -> None:
    """What a retry would create is not created any more once the fence, which is asked before each, raises."""
    remote, asked = Remote(gs.url), []

    def fence() -> None:
        asked.append(True)
        raise SupersededError("attempt 1 has taken over")

    assert remote.create("first", b"1", fence=fence)
    assert not asked
    gcs.faults.fail(503, count=1, match="second")
    with pytest.raises(SupersededError, match="taken over"):
        remote.create("second", b"2", fence=fence)
    assert remote.find() == {"first": 1}


def _arm(server: GcsServer, fault: str) -> None:
    faults = server.faults
    if fault == "503 burst":
        faults.fail(503, count=12)
    elif fault == "429 burst":
        faults.fail(429, count=6, match="upload")
    elif fault == "reset":
        faults.reset_mid_body(4, after_bytes=1000)
    elif fault == "lost answers":
        faults.lose_answer(6, match="upload")
    elif fault == "401":
        faults.expire_tokens(4)
    elif fault == "stall":
        faults.stall(2.0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503 burst", "429 burst", "reset", "lost answers", "401", "stall"])
def test_passing_faults_are_retried(fault: str, gs: Place, gcs: GcsServer) -> None:
    """Bursts of refusals, resets, lost answers, expired tokens and stalls: everything is committed in the end."""
    gcs.faults.latency_s = 0.005
    _arm(gcs, fault)
    code, printed = training.attempt(
        gs.url, function=_plain, environment=gs.node("a"), log=gs.homes / "log", timeout_s=120
    )
    assert code == 0, printed
    assert sum(gcs.faults.fired.values()) > 0, "the fault never fired"
    assert remote_steps.steps(Remote(gs.url))[-1] == 30
    assert remote_steps.problems(_elsewhere(gs, 0), 30) == []


@pytest.mark.slow
def test_a_dead_bucket_does_not_stop_the_training(gs: Place, gcs: GcsServer) -> None:
    """While the bucket is down training goes on and saves stay here, loudly; when it is back everything lands."""
    log = gs.homes / "log"
    process = training.start(_plain, gs.url, log=log, environment=gs.node("a"), steps=400)
    until(lambda: remote_steps.steps(Remote(gs.url)), "a step is in the bucket", seconds=90)
    deadline = time.monotonic() + 90
    gcs.faults.down = "503"
    (home,) = (gs.homes / "a").iterdir()
    begun = max(commits.steps(Store(home)))
    while max(commits.steps(Store(home))) < begun + 30:  # training and local commits go on
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while "saves wait in" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    gcs.faults.down = None
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    assert remote_steps.steps(Remote(gs.url))[-1] == 400
    assert remote_steps.problems(_elsewhere(gs, 0), 400) == []


def test_no_permission_is_said_at_once(gs: Place, gcs: GcsServer) -> None:
    """403 is not retried: one sentence naming the account and the permission, exit code 78."""
    gcs.faults.forbid()
    begun = time.monotonic()
    code, printed = training.attempt(gs.url, function=_plain, environment=gs.node("a"), log=gs.homes / "log")
    assert code == contract.Exit.CONFIG
    assert time.monotonic() - begun < 30
    assert "permission denied for" in printed
    assert "roles/storage.objectUser" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_a_continued_old_attempt_changes_nothing_in_the_bucket(place: Place, undisturbed: Path) -> None:
    """SIGSTOP on one node, a whole new attempt on another, SIGCONT: the old one ends itself and changes nothing."""
    log = place.homes / "old"
    old = training.start(
        training.train, place.url, log=log, environment=place.node("a"), pause_s=0.05, save_every="2 steps"
    )
    remote, deadline = Remote(place.url), time.monotonic() + 60
    while max(remote_steps.steps(remote), default=0) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert old.pid is not None
    os.kill(old.pid, signal.SIGSTOP)
    code, printed = attempt(place, "b")
    assert code == 0, printed
    before = {name: remote.read(name) for name in remote.find(contract.CHECKPOINTS)}
    os.kill(old.pid, signal.SIGCONT)
    old.join(60)
    assert old.exitcode == contract.Exit.CONFIG, log.read_text()
    assert "attempt 1 has taken over" in log.read_text().splitlines()[-1]
    told = "".join(path.read_text() for path in place.homes.rglob("events-*.jsonl"))
    assert "superseded" in told
    committed = {name.rpartition("/")[0] for name in before if name.endswith(contract.COMMIT)}
    after = {name: remote.read(name) for name in remote.find(contract.CHECKPOINTS)}
    kept = {name: content for name, content in after.items() if any(name.startswith(step + "/") for step in committed)}
    assert kept == before
    assert {name for name in after if name.endswith(contract.COMMIT)} == {f"{step}/commit.json" for step in committed}


# What an adversary tried, on homes of nodes that know little of each other.


def _node(place: Place, name: str) -> Store:
    """Return the run as a node sees it."""
    before = os.environ[contract.ENV_HOME]
    os.environ[contract.ENV_HOME] = str(place.homes / name)
    try:
        return Store(place.url)
    finally:
        os.environ[contract.ENV_HOME] = before


def _commit(store: Store, step: int, attempt: int, text: str) -> None:
    """Commit a step in a home, of a file that every step has."""
    stage = commits.new_stage(store, step, attempt)
    (stage / "default").mkdir(parents=True)
    (stage / "default" / "manifest.ocdbt").write_text(text)
    made = commits.Commit(step=step, attempt=attempt, at=time.time(), reason="test", files={}, metrics={})
    commits.publish(store, stage, state={"by": text}, commit=made)


def _keep(store: Store, keep: int) -> None:
    store.write(contract.STRATEGY, json.dumps({"keep": keep, "keep_best": None}))


def _ledger(store: Store) -> Ledger:
    return Ledger(store.file("test.jsonl"))


def test_a_superseded_attempt_leaves_its_successor_s_steps_alone(place: Place) -> None:
    """An old attempt that uploads and tidies up after a newer one began takes nothing of it away."""
    a, b = _node(place, "a"), _node(place, "b")
    old = mirror.claim(a)
    _keep(a, 9)
    _commit(a, 20, old, "by a")
    _commit(a, 30, old, "by a")
    carrier = uploader.Uploader(a, old, _ledger(a))
    _keep(a, 9)
    assert remote_steps.push(a, 30, attempt=old, ledger=_ledger(a))
    new = mirror.claim(b)
    _commit(b, 20, new, "by b")
    assert b.remote is not None
    b.remote.create(f"{contract.step_dir(10)}/state.json", b"being uploaded by b")
    assert remote_steps.push(b, 20, attempt=new, ledger=_ledger(b))
    remote_steps.push(a, 20, attempt=old, ledger=_ledger(a))
    with pytest.raises(ConfigError, match="has taken over"):
        carrier._retain()
    assert remote_steps.problems(b, 20) == []
    assert b.remote.find(contract.step_dir(10))


def test_an_old_home_s_strategy_removes_nothing(place: Place) -> None:
    """What a node was told to keep in an attempt of long ago does not rule this one."""
    a, b = _node(place, "a"), _node(place, "b")
    _keep(a, 1)
    os.utime(a.file(contract.STRATEGY), (1, 1))
    number = mirror.claim(b)
    _keep(b, 9)
    for step in (10, 20, 30):
        _commit(b, step, number, "by b")
    carrier = uploader.Uploader(b, number, _ledger(b))
    _keep(b, 9)
    carrier.close(deadline_s=0.0)
    later = mirror.claim(a)
    uploader.Uploader(a, later, _ledger(a)).close(deadline_s=0.0)
    assert b.remote is not None
    assert remote_steps.steps(b.remote) == [10, 20, 30]
    assert json.loads(b.remote.read(contract.STRATEGY))["keep"] == 9


def test_a_damaged_local_step_holds_nothing_up(place: Place) -> None:
    """With an old step damaged on this node, newer ones are carried and a cancel is heard."""
    a = _node(place, "a")
    number = mirror.claim(a)
    for step in (10, 20):
        _commit(a, step, number, "by a")
    victim = a.file(f"{contract.step_dir(10)}/{contract.COMMIT}")
    victim.write_bytes(victim.read_bytes()[:-5])
    assert a.remote is not None
    a.remote.write(contract.CANCEL, b"{}")
    with pytest.raises(JobkitError):
        uploader.Uploader(a, number, _ledger(a)).close(deadline_s=0.0)
    assert remote_steps.steps(a.remote) == [20]
    assert a.exists(contract.CANCEL)


def test_one_bad_download_costs_no_step(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that comes one byte short once is made again; a step that goes away meanwhile is passed over."""
    a, b = _node(place, "a"), _node(place, "b")
    number = mirror.claim(a)
    for step in (10, 20, 30):
        _commit(a, step, number, "by a")
    uploader.Uploader(a, number, _ledger(a)).close(deadline_s=0.0)
    assert b.remote is not None
    read, short = b.remote.read, []

    def reading(name: str) -> bytes:
        if name.endswith("30/commit.json"):
            remote_steps.remove(b.remote, 30)  # type: ignore[arg-type]
        if name.endswith("20/state.json") and not short:
            short.append(name)
            return read(name)[:-1]
        return read(name)

    monkeypatch.setattr(b.remote, "read", reading)
    assert remote_steps.fetch_newest(b, _ledger(b), attempt=mirror.claim(b)) == 20
    assert short
    assert remote_steps.steps(b.remote) == [10, 20]


def test_a_url_that_is_used_again_is_another_run(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """What a node still has of an earlier run at the same URL is set aside, not continued."""
    a = _node(place, "a")
    _commit(a, 31, mirror.claim(a), "the old run")
    remote = Remote(place.url)
    remote.remove(remote.find())
    b = _node(place, "b")
    number = mirror.claim(b)
    _commit(b, 13, number, "the new run")
    uploader.Uploader(b, number, _ledger(b)).close(deadline_s=0.0)
    mirror.claim(a)
    assert commits.steps(a) == []
    assert remote_steps.fetch_newest(a, _ledger(a), attempt=9) == 13
    assert "held another run of the same URL" in capfd.readouterr().err


@pytest.mark.slow
def test_every_step_damaged_is_no_new_start(place: Place) -> None:
    """Where every step of the bucket is damaged a new node says so instead of training from scratch."""
    code, printed = attempt(place, "a", at={5: "SIGTERM"}, keep=1)
    assert code == 75, printed
    remote = Remote(place.url)
    (step,) = [step for step in remote_steps.steps(remote) if step > 0] or [0]
    for name in remote.find(contract.CHECKPOINTS):
        if name.endswith("state.json"):
            remote.write(name, b"{}")
    code, printed = attempt(place, "b")
    assert code == contract.Exit.CONFIG, printed
    assert "every checkpoint of" in printed.splitlines()[-1]
    assert step


def test_the_best_step_is_found_from_another_node(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """`restore('best')` on a node that has only the newest step brings the best one from the bucket."""
    import jobkit

    def train(node: str, losses: dict[int, float], total: int) -> int:
        monkeypatch.setenv(contract.ENV_HOME, str(place.homes / node))
        with jobkit.Run(place.url, save_every=None, keep=1, keep_best=("loss", "min")) as run:
            state = run.resume(n=0, optimizer=None)
            for step in run.steps(total):
                state.n += 1
                if step + 1 in losses:
                    run.save(loss=losses[step + 1])
            return run.restore("best") and state.n

    assert train("a", {2: 1.0, 4: 6.0}, 4) == 2
    assert train("b", {5: 7.0}, 6) == 2


def test_a_last_evaluation_counts_on_every_node(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics that come after the last step was committed make it the best: for retention, `restore` and `load`."""
    import jobkit

    def train(node: str, total: int, last: dict[str, float]) -> int:
        monkeypatch.setenv(contract.ENV_HOME, str(place.homes / node))
        with jobkit.Run(place.url, save_every="1 steps", keep=1, keep_best=("loss", "min")) as run:
            state = run.resume(n=0, optimizer=None)
            for step in run.steps(total):
                state.n += 1
                run.save(loss=9.0 - step)
            run.save(**last)
            return run.restore("best") and state.n

    assert train("a", 3, {"loss": 1.0}) == 3
    assert train("b", 5, {"accuracy": 0.5}) == 3
    assert remote_steps.steps(Remote(place.url)) == [3, 5]
    monkeypatch.setenv(contract.ENV_HOME, str(place.homes / "c"))
    assert jobkit.load(place.url, step="best", n=0).n == 3
    assert commits.metrics(Store(place.url)) == {3: {"loss": 1.0}}
    assert remote_steps.metrics(Remote(place.url)) == {3: {"loss": 1.0}, 5: {"loss": 5.0, "accuracy": 0.5}}


# Names that others have put there.


def test_objects_that_lead_out_of_a_run_are_left_alone(place: Place, request: pytest.FixtureRequest) -> None:
    """On either store an object whose name climbs, or is absolute, is listed nowhere and reaches no file here."""
    bucket, _, run = place.url.partition("://")[2].partition("/")
    victim = place.homes / "yours"
    victim.write_text("mine")
    for name in ("run.id", f"/{victim}", str(victim), "../../pwn", "attempts/0/../../../../pwn", "scores//pwn", "a\\b"):
        if place.url.startswith("gs"):
            request.getfixturevalue("gcs").write(f"{run}/{name}", b"theirs, and longer")
        else:
            fsspec.filesystem("s3").call_s3(
                "put_object", Bucket=bucket, Key=f"{run}/{name}", Body=b"theirs, and longer"
            )
    store = Store(place.url)
    assert store.remote is not None
    assert list(store.remote.find()) == ["run.id"]
    mirror.refresh(store)
    mirror.fetch_ledgers(store, 9)
    assert victim.read_text() == "mine"
    assert not list(place.homes.rglob("*pwn*"))
