"""Who has a run: leases on every kind of storage, and runners on two machines that share nothing but a bucket."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from jobkit import contract
from jobkit.contract import State
from jobkit.errors import ConfigError, StorageError
from jobkit.rundir import mirror, remote_steps
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store
from launch.backends import registry
from launch.lifecycle import lease, lock, run_status, submission
from launch.spec import jobspec as specs
from launch.spec.jobspec import JobSpec
from tests.fakes.gcs_server import GcsServer
from tests.harness.jobs import Project, until, until_over


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsServer]:
    """Run a GCS server of one bucket, which this process's clients use."""
    with GcsServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("gs").clear_instance_cache()
        yield server


@pytest.fixture(params=["gs", "s3", "memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Yield the URL of a run on each kind of storage."""
    monkeypatch.setenv(contract.ENV_HOME, str(tmp_path / "here"))
    number = random.randrange(10**9)
    if request.param == "file":
        return str(tmp_path / "run")
    if request.param == "memory":
        return f"memory://run-{number}"
    if request.param == "gs":
        request.getfixturevalue("gcs")
        return f"gs://bucket/run-{number}"
    for name, value in request.getfixturevalue("moto").items():
        monkeypatch.setenv(name, value)
    fsspec.config.conf.clear()
    fsspec.config.set_conf_env(fsspec.config.conf)
    fsspec.filesystem("s3").clear_instance_cache()
    fsspec.filesystem("s3").mkdir(f"bucket-{number}")
    return f"s3://bucket-{number}/run"


@pytest.fixture
def on(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Store]:
    """Return what makes this process be on a machine of some name, with a disk of its own; returns the run there."""

    def be(host: str) -> Store:
        monkeypatch.setattr(socket, "gethostname", lambda: host)
        monkeypatch.setattr(lease, "_kernel", lambda: f"of {host}")
        monkeypatch.setenv(contract.ENV_HOME, str(tmp_path / host))
        return Store(url)

    return be


@pytest.mark.slow
def test_a_runner_elsewhere_is_seen_and_not_doubled(on: Callable[[str], Store]) -> None:
    """On each kind of storage another machine sees who has the run and how fresh that is, and does not get it."""
    store = on("ada")
    assert lease.newest(store) is None
    assert lease.claim(store) == 0
    assert lease.claim(store) == 1, "the lock is what tells on one machine"
    there = on("bob")
    found = lease.elsewhere(there)
    assert found is not None
    assert (found.host, found.number) == ("ada", 1)
    assert 0 <= (found.sign_s or 0.0) < 60
    with pytest.raises(ConfigError, match=r"is running on ada \(last sign .* ago\): .*resume --take-over"):
        lease.claim(there)
    held = lease.Lease(on("ada"), 1)
    held.start()
    held.look()
    assert held.lost == ""
    assert lease.claim(on("bob"), take_over=True) == 2
    held.look()
    assert "runner on bob" in held.lost
    held.close()
    assert lease.newest(on("bob")).over is False, "who has lost a run says nothing about it any more"  # type: ignore[union-attr]
    lease.release(there, 2)
    assert lease.elsewhere(on("ada")) is None
    assert lease.claim(on("ada")) == 3


def test_containers_of_one_machine_see_each_other_s_lock(on: Callable[[str], Store]) -> None:
    """Where only the name differs the lock is seen, and tells: a new container goes on at once after a killed one."""
    store = on("ada")
    lease.claim(store)
    again = lease.newest(store)
    assert again is not None
    assert again.here
    with pytest.MonkeyPatch.context() as renamed:
        renamed.setattr(socket, "gethostname", lambda: "another container")
        found = lease.newest(store)
        assert found is not None
        assert (found.host, found.here, lease.claim(store)) == ("ada", True, 1)


@pytest.mark.parametrize("url", ["file"], indirect=True)
def test_machines_of_one_name(on: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shared disk a machine that was switched on again is the same one, and another of that name is not."""
    store = on("localhost")
    lease.claim(store)
    monkeypatch.setattr(lease, "_kernel", lambda: "of today")
    found = lease.newest(store)
    assert found is not None
    assert found.here
    monkeypatch.setattr(lease, "_machine", lambda: "another")
    assert lease.elsewhere(store) is not None


def test_a_look_that_gets_no_answer_says_so(on: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is about to write to the run's URL can tell that nobody has taken over from not knowing."""
    held = lease.Lease(store := on("ada"), lease.claim(store))
    assert held.look()

    def silent(store: Store) -> None:
        raise StorageError("no answer")

    monkeypatch.setattr(lease, "newest", silent)
    assert not held.look()
    assert held.lost == ""


@pytest.mark.slow
def test_who_is_silent_for_long_is_dead(on: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """On each kind of storage a runner that was silent for long loses the run, and one that gives signs does not."""
    held = lease.Lease(on("ada"), lease.claim(on("ada")))
    monkeypatch.setattr(lease, "STALE_S", 10.0)
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    held.start()
    time.sleep(11.0)
    there = on("bob")
    with pytest.raises(ConfigError, match=r"is running on (ada|bob) "):  # its thread is here, and says bob as well now
        lease.claim(there)
    held._closing.set()
    time.sleep(12.0)
    assert lease.claim(there) == 1


@pytest.mark.parametrize("url", ["gs", "s3", "memory"], indirect=True)
def test_of_many_takers_one_gets_the_run(on: Callable[[str], Store]) -> None:
    """Of eight that take over at once exactly one does; a later one is refused."""
    lease.claim(on("ada"))
    there = on("bob")
    homes = [there.path.parent.parent / f"home-{number}" for number in range(8)]
    stores = []
    for home in homes:
        os.environ[contract.ENV_HOME] = str(home)
        stores.append(Store(there.url))

    def take(store: Store) -> int | None:
        try:
            return lease.claim(store, take_over=True)
        except ConfigError:
            return None

    with ThreadPoolExecutor(8) as pool:
        won = [number for number in pool.map(take, stores) if number is not None]
    # Who looks after the first is through takes over from that one.
    assert sorted(won) == list(range(1, len(won) + 1))
    newest = lease.newest(stores[0])
    assert newest is not None
    assert newest.number == len(won)


@pytest.mark.parametrize("url", ["gs"], indirect=True)
@pytest.mark.parametrize("ahead_s", [-10_000.0, 0.0, 10_000.0])
def test_only_the_bucket_tells_the_time(ahead_s: float, on: Callable[[str], Store], gcs: GcsServer) -> None:
    """A bucket hours ahead or behind of this machine: a sign of a minute is fresh, one of eleven is not."""
    gcs.storage.ahead_s = ahead_s
    store = on("ada")
    lease.claim(store)
    name = f"{store.url.removeprefix('gs://bucket/')}/leases/0"
    gcs.age(name, 60.0)
    found = lease.newest(on("bob"))
    assert found is not None
    assert found.elsewhere
    assert 58 < (found.sign_s or 0.0) < 70
    gcs.age(name, 600.0)
    assert lease.elsewhere(on("bob")) is None
    assert gcs.names(prefix=f"{name.rpartition('/')[0]}/clock") == [], "a probe was left"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b'{"host": 3}', b'{"host": "ada"', b"[" * 100_000])
def test_a_damaged_lease_is_somebody_elses(content: bytes, tmp_path: Path) -> None:
    """Whatever lies there in place of a lease is one of a machine that is not known, and a later one takes over."""
    store = Store(tmp_path)
    store.write("leases/0", content)
    with pytest.raises(ConfigError, match="is running on a machine that is not known"):
        lease.claim(store)
    assert lease.claim(store, take_over=True) == 1


@pytest.mark.parametrize("url", ["gs", "memory"], indirect=True)
def test_status_between_two_attempts_elsewhere(on: Callable[[str], Store]) -> None:
    """A run whose runner waits on another machine is requeued there; one that has ended is ended, whoever had it."""
    store = on("ada")
    specs.create(store, JobSpec(command=("python", "train.py"), cwd="/", root="/", run=store.url), "local")
    mirror.publish(store)
    lease.claim(store)
    for event in ({"event": "submitted"}, {"event": "decision", "reason": "killed"}):
        store.write(contract.EVENTS, _events(store) + json.dumps({"t": time.time()} | event).encode() + b"\n")
    mirror.claim(store)
    outcome = b'{"outcome": "killed", "exit_code": 137}'
    assert store.remote is not None
    store.remote.write("attempts/0/outcome.json", outcome)
    mirror.upload_described(store)
    there = on("bob")
    mirror.refresh(there)
    status = run_status.status(there)
    assert (status.state, status.runner, status.host, status.reason) == ("requeued", "alive", "ada", "killed")
    assert status.place.startswith(" on ada (last sign ")
    store.write(
        contract.EVENTS, _events(store) + b'{"t": 3, "event": "ended", "state": "done", "reason": "finished"}\n'
    )
    mirror.upload_described(store)
    mirror.refresh(there)
    status = run_status.status(there)
    assert (status.state, status.runner, status.host, status.sign_s) == ("done", "ended", "", None)


def _events(store: Store) -> bytes:
    return store.read(contract.EVENTS) if store.exists(contract.EVENTS) else b""


def test_a_ledger_that_was_gone_on_from_elsewhere_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that are only in a home stay while the URL's ledger is their beginning, and give way once it has others."""
    monkeypatch.setenv(contract.ENV_HOME, str(tmp_path))
    store = Store(f"memory://ledgers-{random.randrange(10**9)}")
    assert store.remote is not None
    store.remote.write(contract.EVENTS, b"one\n")
    store.write(contract.EVENTS, b"one\ntwo of ours, longer than any other\n")
    mirror.refresh(store)
    assert store.read(contract.EVENTS).startswith(b"one\ntwo of ours")
    store.remote.write(contract.EVENTS, b"one\nresumed there\n")
    mirror.refresh(store)
    assert store.read(contract.EVENTS) == b"one\nresumed there\n"


SCRIPT = """
import fcntl, os, sys, time
from pathlib import Path
import numpy as np, jobkit
only, out = open(sys.argv[1] + ".only", "w"), Path(sys.argv[1])
try:
    fcntl.flock(only, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    Path(sys.argv[1] + ".overlap").write_text(os.environ["JOBKIT_ATTEMPT"])
with jobkit.Run(save_every="20 steps") as run:
    state = run.resume(n=0, h=np.zeros(100))
    for step in run.steps(int(sys.argv[2])):
        state.n += 1
        state.h = state.h * 1.5 + step
        time.sleep(0.01 if step < 60 or out.exists() else 1.0)
print(state.n, state.h.sum())
"""


INIT = """
import os, socket, sys, time
socket.sethostname(sys.argv[1])
open(sys.argv[2], "w").close()
while True:
    try:
        os.waitpid(-1, 0)
    except ChildProcessError:
        time.sleep(0.02)
"""


class Machines:
    """Machines with names, processes and disks of their own, and one bucket.

    Args:
        url: A run in it.
        path: Where the disks lie.
    """

    def __init__(self, url: str, path: Path) -> None:
        self.url, self.path = url, path
        self.go = path / "go"
        self.taken_over = False
        (path / "train.py").write_text(SCRIPT)
        self._inits: dict[str, subprocess.Popen[bytes]] = {}

    def _init(self, host: str) -> str:
        """Switch a machine on unless it is; return the pid, here, of the first of its processes."""
        if host not in self._inits:
            up = self.path / f"{host}.up"
            words = ["unshare", "-upf", "--mount-proc", "--kill-child", sys.executable, "-c", INIT, host, str(up)]
            self._inits[host] = subprocess.Popen(words)
            until(up.exists, f"{host} is up")
        pid = self._inits[host].pid
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]

    def jobkit(self, host: str, *arguments: str, code: int = 0) -> str:
        """Run the command line on a machine to its end; return what it printed."""
        self.taken_over |= "--take-over" in arguments
        words = ["nsenter", "-t", self._init(host), "-u", "-p", "-m", f"--wd={self.path}"]
        environ = os.environ | {contract.ENV_HOME: str(self.path / host)}
        done = subprocess.run(
            [*words, sys.executable, "-m", "launch", *arguments],
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr if code else done.stdout

    def submit(self, host: str, steps: int) -> None:
        """Submit the program."""
        self.jobkit(host, "submit", "--run", self.url, "--", sys.executable, "train.py", str(self.go), str(steps))

    def status(self, host: str) -> dict[str, Any]:
        """Return the run's status as a machine sees it."""
        told: dict[str, Any] = json.loads(self.jobkit(host, "status", self.url, "--json"))
        return told

    def pull_the_plug(self, host: str) -> None:
        """Have all processes of a machine gone at once."""
        init = self._inits.pop(host)
        init.kill()  # and with it, by the kernel, the namespace's first process and all others
        init.wait()

    def close(self) -> None:
        """Switch all off."""
        for host in list(self._inits):
            self.pull_the_plug(host)


@pytest.fixture
def machines(url: str, tmp_path: Path) -> Iterator[Machines]:
    """Yield them, where this user may have namespaces; nothing of them is left afterwards."""
    if subprocess.run(["unshare", "-upf", "--mount-proc", "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("needs to be root, with unshare and nsenter of util-linux")
    made = Machines(url, tmp_path)
    try:
        yield made
        # Who takes over does not wait for the other one, which hears of it within a minute.
        overlap = Path(f"{made.go}.overlap").exists() and not made.taken_over
        assert not overlap, "two programs of one run lived at the same time"
    finally:
        made.close()


@pytest.mark.slow
@pytest.mark.parametrize("url", ["gs", "s3"], indirect=True)
def test_a_run_elsewhere_is_refused_and_taken_over(machines: Machines) -> None:
    """A run that trains on one machine is told of on another, is not started twice, and is handed over when asked."""
    machines.submit("ada", 400)
    until(lambda: (machines.status("ada")["committed_step"] or 0) >= 40, "it trains", seconds=120)
    seen = until(lambda: (told := machines.status("bob"))["attempts"] and told, "bob sees the attempt", seconds=60)
    assert (seen["state"], seen["runner"]) == ("running", "alive")
    assert 0 <= seen["sign_s"] < 120
    assert seen["host"] == "ada"
    assert "running on ada (last sign " in machines.jobkit("bob", "status", machines.url)
    assert "on ada (last sign " in machines.jobkit("bob", "ls", machines.url)
    for words in (["resume", machines.url], ["resume", machines.url, "--on", "local"]):
        assert "(last sign " in machines.jobkit("bob", *words, code=2)
    told = machines.jobkit("bob", "submit", "--run", machines.url, "--", sys.executable, "-V", code=2)
    assert "already holds another job" in told
    assert "running on ada (last sign " in told
    assert machines.status("ada")["attempts"] == 1
    machines.jobkit("bob", "resume", "--take-over", machines.url)
    machines.go.touch()
    told = until(lambda: (told := machines.status("bob"))["state"] == "done" and told, "bob ends it", seconds=180)
    assert (told["attempts"], told["committed_step"]) == (2, 400)
    told = until(lambda: (told := machines.status("ada"))["state"] == "done" and told, "ada hears of it", seconds=30)
    assert told["attempts"] == 2
    assert remote_steps.steps(Remote(machines.url))[-1] == 400
    ledger = Remote(machines.url).read(contract.EVENTS).decode().splitlines()
    assert [json.loads(line)["event"] for line in ledger].count("ended") == 1


@pytest.mark.slow
@pytest.mark.parametrize("url", ["gs"], indirect=True)
def test_a_dead_machine_is_waited_for(machines: Machines, gcs: GcsServer) -> None:
    """A machine that lost its power keeps the run for ten minutes; after them a plain resume goes on elsewhere."""
    machines.submit("ada", 100)
    until(lambda: (machines.status("ada")["committed_step"] or 0) >= 40, "it trains", seconds=120)
    until(lambda: remote_steps.steps(Remote(machines.url))[-1:] >= [40], "a step is in the bucket", seconds=60)
    machines.pull_the_plug("ada")
    assert machines.status("bob")["runner"] == "alive"
    machines.jobkit("bob", "resume", machines.url, code=2)
    gcs.age(f"{machines.url.removeprefix('gs://bucket/')}/leases/0", 601)
    told = machines.status("bob")
    assert (told["state"], told["runner"], told["host"]) == ("failed", "gone", "")
    machines.go.touch()
    machines.jobkit("bob", "resume", "--wait", machines.url)
    assert machines.status("bob")["committed_step"] == 100


@pytest.mark.slow
@pytest.mark.parametrize("url", ["gs"], indirect=True)
def test_cancel_waits_for_the_machine_that_runs_it(machines: Machines) -> None:
    """A cancel from another machine is served where the run trains; its end is written there, once."""
    machines.submit("ada", 100_000)
    until(lambda: (machines.status("ada")["committed_step"] or 0) >= 20, "it trains", seconds=120)
    machines.jobkit("bob", "cancel", machines.url)
    assert [machines.status(host)["state"] for host in ("bob", "ada")] == ["cancelled", "cancelled"]
    told = machines.status("bob")
    assert told["endings"][0]["outcome"] == "preempted"
    machines.go.touch()
    machines.jobkit("bob", "resume", machines.url)  # at once: the runner has said that it is through
    assert machines.status("bob")["state"] in ("requeued", "running")


@pytest.mark.slow
@pytest.mark.parametrize("url", ["gs", "s3"], indirect=True)
def test_a_deleted_run_is_submitted_anew(machines: Machines) -> None:
    """After a run's objects were deleted its URL takes another job, from the node that has the old home too."""
    machines.go.touch()
    machines.submit("ada", 50)
    until(lambda: machines.status("ada")["state"] == "done", "it is done", seconds=120)
    remote = Remote(machines.url)
    assert "already holds" in machines.jobkit(
        "ada", "submit", "--run", machines.url, "--", sys.executable, "-V", code=2
    )
    remote.remove(remote.find())
    machines.submit("ada", 30)
    told = until(lambda: (told := machines.status("ada"))["state"] == "done" and told, "it is done again", seconds=120)
    assert (told["attempts"], told["committed_step"]) == (1, 30)
    assert remote_steps.steps(remote)[-1] == 30
    (home,) = (machines.path / "ada").glob("*-*")
    (aside,) = home.glob(".old-*")
    assert "50" in (aside / "run.json").read_text()


def test_a_resume_that_is_refused_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it fails after it has taken the run, neither lock nor lease is left behind: another machine may have it."""
    (tmp_path / "p").mkdir()
    project = Project(tmp_path / "p")
    store = project.submit("exit:1", "exit:0")
    until_over(store)

    def refused(*_: Any) -> None:
        raise ConfigError("cancelled on another machine this very moment")

    with monkeypatch.context() as patched:
        patched.setattr(submission, "take_back_cancel", refused)
        with pytest.raises(ConfigError, match="this very moment"):
            registry.resume(store.url)
    assert not lock.held(store)
    held = json.loads(store.read(f"{contract.LEASES}/{max(map(int, store.names(contract.LEASES)))}"))
    assert held["over"], held
    assert registry.resume(store.url) is State.RUNNING
    assert until_over(store).state is State.DONE
