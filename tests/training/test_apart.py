"""Several processes that share nothing but a bucket: each saves its part, the URL has the step, all go on from it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobkit import contract
from jobkit.checkpoint.restore import fetch
from jobkit.contract import Exit
from jobkit.errors import StorageError
from jobkit.rundir import commits, remote_steps
from jobkit.rundir.apart import parts, sending
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.store import Store, home_of
from jobkit.rundir.uploader import Uploader
from jobkit.supervise import processes
from jobkit.supervise.together import gathering
from tests.harness import jobs, training
from tests.harness.jobs import children, until
from tests.training.test_gathering import Attempt, attempt, end  # noqa: F401

TRAIN = """
import os
from tests.harness import training
training.train_many(os.environ["JOBKIT_RUN"], steps={steps}, pause_s={pause_s})
"""


def program(steps: int, pause_s: float = 0.0) -> str:
    """Return a training program."""
    return TRAIN.format(steps=steps, pause_s=pause_s)


def train(run: Attempt, count: int, steps: int, *, number: int, nodes: str = "node") -> list[tuple[int, str]]:
    """Train in an attempt of so many processes; return how each supervisor ended, and what it printed."""
    started = [run.start(i, count, program(steps), number=number, node=f"{nodes}-{i}") for i in range(count)]
    return [end(process, 300) for process in started]


def digest(run: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the digest of the newest step of the URL, as somebody reads it who trained none of it."""
    with monkeypatch.context() as there:
        there.setenv(contract.ENV_HOME, str(tmp_path / "reader"))
        fetch(Store(run.url), "latest")
        return training.digest(run.url)


@pytest.mark.slow
def test_two_train_and_go_on(attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Two processes save to the URL from homes of their own, and go on from there, from homes that are empty too."""
    ends = train(attempt, 2, 10, number=0)
    assert [code for code, _ in ends] == [0, 0], ends
    assert remote_steps.steps(attempt.remote) == [0, 10]
    assert parts.name_of(10, 1) in attempt.remote.find(contract.step_dir(10))
    assert remote_steps.problems(Store(attempt.url), 10) == []
    assert jobs.events(Store(attempt.url), "saved")
    assert not jobs.events(Store(attempt.url), "rehearsed"), "nobody has all of a step"
    (home,) = (tmp_path / "node-1").iterdir()
    (home / contract.TRASH).write_text("")  # nothing can be removed there, which fails no save
    for number, steps, nodes in ((1, 30, "node"), (2, 40, "other")):
        assert attempt.claim() == number
        ends = train(attempt, 2, steps, number=number, nodes=nodes)
        assert [code for code, _ in ends] == [0, 0], ends
    assert (home / contract.step_dir(0)).is_dir()
    assert remote_steps.steps(attempt.remote) == [30, 40]
    whole = tmp_path / "whole"
    assert training.join_many(training.start_many(whole, 2, steps=40)) == [0, 0]
    assert digest(attempt, tmp_path, monkeypatch) == training.digest(whole)
    assert commits.steps(Store(attempt.url))[-1] == 30


@pytest.mark.slow
def test_a_part_that_never_comes(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Process 0's supervisor waits at the end for what others carry, a bounded time, and names who is missing."""
    monkeypatch.setattr(sending, "_OTHERS_S", 1.0)
    store = Store(attempt.url)
    stage = commits.new_stage(store, 1, 0)
    stage.mkdir()
    commit = commits.Commit(
        step=1, attempt=0, at=0.0, reason="interval", files={}, topology={"process_count": 2},
        parts={parts.name_of(1, 1): "00000000"},
    )  # fmt: skip
    assert commits.publish(store, stage, state={}, commit=commit)
    ledger = Ledger(store.file(contract.events_file(0, "supervisor")))
    begun = time.monotonic()
    with pytest.raises(StorageError, match=r"step 1 of .* waits for the part of process 1; the newest saves wait in"):
        Uploader(store, 0, ledger, process=(0, 2)).close(deadline_s=300)
    assert time.monotonic() - begun < 60
    assert parts.name_of(1, 0) in attempt.remote.find(contract.step_dir(1))
    assert remote_steps.steps(attempt.remote) == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Train without interruption in two processes on one disk; return the digest of the end."""
    whole = tmp_path_factory.mktemp("undisturbed") / "run"
    assert training.join_many(training.start_many(whole, 2, steps=20)) == [0, 0]
    return training.digest(whole)


KILLS = [
    "0 after_data:2",
    "0 before_rename:2",
    "1 before_rename:2",
    "1 after_rename:2",
    "1 before_part:2",
    "0 after_part:2",
]


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS)
def test_killed_and_gone_on(
    kill: str,
    attempt: Attempt,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: str,
) -> None:
    """SIGKILL of a program or a supervisor at a point of a save: no committed step is lost, the end is the same."""
    victim, point = kill.split()
    more = [{contract.ENV_FAULT: f"{point}@0"} if str(index) == victim else {} for index in range(2)]
    started = [attempt.start(index, 2, program(20, 0.1), node=f"node-{index}", **more[index]) for index in range(2)]
    codes = [end(process, 400)[0] for process in started]
    assert codes != [0, 0]
    there = remote_steps.steps(attempt.remote)
    assert all(remote_steps.problems(Store(attempt.url), step) == [] for step in there)
    assert attempt.claim() == 1
    ends = train(attempt, 2, 20, number=1)
    assert [code for code, _ in ends] == [0, 0], ends
    assert max(remote_steps.steps(attempt.remote)) == 20
    assert digest(attempt, tmp_path, monkeypatch) == undisturbed


SHARDS = """
import os, numpy as np, jobkit
jobkit.initialize()
import jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
mesh = Mesh(np.array(jax.devices()), ("data",))
layouts = dict(rows=PartitionSpec("data"), whole=PartitionSpec())
made = dict()
for number, (name, layout) in enumerate(layouts.items()):
    value = np.random.default_rng(number).normal(size=(64, 8192)).astype(np.float32)
    spread = NamedSharding(mesh, layout)
    made[name] = jax.make_array_from_callback(value.shape, spread, lambda at, value=value: value[at])
first = int(os.environ["JOBKIT_ATTEMPT"]) == 0
begin = made if first else jax.tree.map(jnp.zeros_like, made)
with jobkit.Run(os.environ["JOBKIT_RUN"], save_every=None) as run:
    state = run.resume(arrays=begin, seen=0)
    for name, array in made.items():
        for mine, right in zip(state.arrays[name].addressable_shards, array.addressable_shards, strict=True):
            assert np.array_equal(mine.data, right.data), name
    for _ in run.steps(run.step + 1):
        state.seen += 1
        state.arrays = dict(state.arrays)
"""
MB = 1 << 20


@pytest.mark.slow
def test_other_numbers_of_processes(attempt: Attempt, tmp_path: Path) -> None:  # noqa: F811
    """4 -> 2 -> 1 -> 4 processes on new nodes: the same values, and each reads little more than its shards hold."""
    server = attempt.server
    for number, count in enumerate((4, 2, 1, 4)):
        if number:
            assert attempt.claim() == number
        before = server.bytes_out
        started = [
            attempt.start(
                index, count, SHARDS, number=number, node=f"n{number}-{index}",
                XLA_FLAGS=f"--xla_force_host_platform_device_count={4 // count}",
            )
            for index in range(count)
        ]  # fmt: skip
        ends = [end(process, 400) for process in started]
        assert [code for code, _ in ends] == [0] * count, ends
        holds = 2 * MB + count * 2 * MB
        assert number == 0 or server.bytes_out - before < 1.1 * holds


BEST = """
import os, numpy as np, jobkit
jobkit.initialize()
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
def made(step):
    value = np.full((8, 4), step, np.float32)
    return jax.make_array_from_callback(value.shape, rows, lambda at: value[at])
with jobkit.Run(os.environ["JOBKIT_RUN"], save_every=None, keep=1, keep_best=("loss", "min")) as run:
    state = run.resume(array=made(0), seen=0)
    for step in run.steps(4):
        state.array, state.seen = made(step + 1), step + 1
        run.save(loss=abs(step + 1 - 2))
    for wanted, at in (("best", 2), ("latest", 4), (2, 2)):
        assert run.restore(wanted) == state.seen == at
        for shard in state.array.addressable_shards:
            assert np.array_equal(shard.data, np.full(shard.data.shape, at, np.float32))
    try:
        run.restore(99)
    except jobkit.ConfigError as error:
        print(error)
"""


@pytest.mark.slow
def test_the_best_step_comes_back(attempt: Attempt) -> None:  # noqa: F811
    """After the loop each process has its shards of the best step back, and of the newest, which is on its way up."""
    ends = [end(process, 300) for process in [attempt.start(index, 2, BEST) for index in range(2)]]
    assert [code for code, _ in ends] == [0, 0], ends
    assert all("step 99 of" in printed for _, printed in ends)


@pytest.mark.slow
def test_started_by_hand(attempt: Attempt, tmp_path: Path) -> None:  # noqa: F811
    """Processes whose parts nobody would carry to the URL are refused, with the remedy; nothing is written there."""
    before = attempt.remote.find()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program(10)],
            env={
                **os.environ,
                contract.ENV_RUN: attempt.url,
                contract.ENV_HOME: str(tmp_path / f"node-{index}"),
                **own,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, own in enumerate(training.processes(2))
    ]
    ends = [end(process, 120) for process in started]
    assert [code for code, _ in ends] == [Exit.CONFIG] * 2, ends
    assert all("start them with jobkit submit" in printed for _, printed in ends)
    assert attempt.remote.find() == before


IMPATIENT = "from jobkit.rundir.apart import fetching; fetching._UPLOADED_S = 4.0\n"


def held(run: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[Path]]:
    """Return the newest step that two homes have both parts of, and where each has its own."""
    places = []
    for index in range(2):
        with monkeypatch.context() as there:
            there.setenv(contract.ENV_HOME, str(tmp_path / f"node-{index}"))
            places.append(home_of(run.url, index) / contract.CHECKPOINTS)
    steps = [int(path.parent.name) for path in places[1].glob("*/part-1.json")]
    return max(step for step in steps if (places[0] / str(step) / contract.COMMIT).exists()), places


def both_die(run: Attempt, point: str) -> None:
    """Have both supervisors killed while they carry their part of step 10, which is not committed on the URL then."""
    fault = {contract.ENV_FAULT: f"{point}:2@0"}
    for process in [run.start(index, 2, program(20, 0.1), **fault) for index in range(2)]:
        end(process, 300)
    until(lambda: not _programs(run.url), "the programs, which save once more without them, have ended", seconds=60)
    assert remote_steps.steps(run.remote) == [0]


def _programs(url: str, index: int | None = None) -> list[int]:
    """Return the processes of a run on this machine, or those of one of its programs."""
    found = processes.with_environment(contract.ENV_RUN, url).items()
    return [pid for pid, environ in found if index is None or environ.get(contract.ENV_PROCESS) == str(index)]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_home_is_lost_whose_part_is_there(
    lost: int,
    attempt: Attempt,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: str,
) -> None:
    """A part on the URL is as good as one in a home: with the other's, which is nowhere else, the step is committed."""
    killed = {contract.ENV_FAULT: "before_part:2@0"}
    started = [
        attempt.start(index, 2, program(20, 0.1), node=f"node-{index}", **(killed if index != lost else {}))
        for index in range(2)
    ]
    assert end(started[1 - lost], 300)[0] == -signal.SIGKILL
    until(lambda: not _programs(attempt.url, 1 - lost), "its program, which saves once more, has ended", seconds=60)
    gathering.open_attempt(attempt.remote, 1 - lost)  # its machine comes back: nobody waits for its part
    end(started[lost], 300)
    assert remote_steps.steps(attempt.remote) == [0]
    newest = max(step for step in range(1, 21) if parts.name_of(step, lost) in attempt.remote.find("checkpoints"))
    assert newest >= 10
    assert attempt.claim() == 1
    ends = [end(process, 300) for process in (
        attempt.start(lost, 2, program(20), number=1, node="another"),
        attempt.start(1 - lost, 2, program(20), number=1, node=f"node-{1 - lost}"),
    )]  # fmt: skip
    assert [code for code, _ in ends] == [0, 0], ends
    assert f"attempt 1 resumes at step {newest} of" in "".join(printed for _, printed in ends)
    assert digest(attempt, tmp_path, monkeypatch) == undisturbed


@pytest.mark.slow
def test_a_slow_bucket_loses_no_step(
    attempt: Attempt,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: str,
) -> None:
    """What all homes have is waited for; what does not come stays there, and the next attempt goes on from it."""
    both_die(attempt, "before_part")
    step, places = held(attempt, tmp_path, monkeypatch)
    assert step >= 10
    assert attempt.claim() == 1
    attempt.server.faults.fail(503, count=None, match=r"^upload.*checkpoints/")
    started = [attempt.start(index, 2, IMPATIENT + program(20), number=1) for index in range(2)]
    until(lambda: all(children(process.pid) for process in started), "both programs have begun", seconds=60)
    until(lambda: not any(children(process.pid) for process in started), "both have ended", seconds=120)
    assert [(places[index] / str(step)).is_dir() for index in range(2)] == [True, True]
    assert attempt.server.faults.fired["fail"]
    attempt.server.faults.clear()
    ends = [end(process, 120) for process in started]
    assert [code for code, _ in ends] == [Exit.STORAGE] * 2, ends
    assert attempt.claim() == 2
    ends = train(attempt, 2, 20, number=2)
    assert [code for code, _ in ends] == [0, 0], ends
    assert f"attempt 2 resumes at step {step} of" in ends[0][1]
    assert digest(attempt, tmp_path, monkeypatch) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_damaged_part_is_not_waited_for(
    index: int,
    attempt: Attempt,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: str,
) -> None:
    """A part that was damaged before it was carried is set aside in its home, and all go on from the step before."""
    both_die(attempt, "before_part")
    step, places = held(attempt, tmp_path, monkeypatch)
    victim = max((path for path in (places[index] / str(step)).rglob("*") if path.is_file()), key=_size)
    victim.write_bytes(bytes([victim.read_bytes()[0] ^ 1]) + victim.read_bytes()[1:])
    assert attempt.claim() == 1
    ends = train(attempt, 2, 20, number=1)
    assert [code for code, _ in ends] == [0, 0], ends
    assert "is damaged" in ends[index][1]
    assert list((places[index] / ".set-aside").glob(f"{step}-*/{victim.relative_to(places[index] / str(step))}"))
    assert digest(attempt, tmp_path, monkeypatch) == undisturbed


def _size(path: Path) -> int:
    return path.stat().st_size
