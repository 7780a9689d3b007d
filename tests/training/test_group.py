"""Several real processes, one run: who gets the notice, in which phase, on which step they all stop."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import jobkit
from jobkit import contract, group
from jobkit.rundir import commits
from jobkit.rundir.ledger import attempt_events, read_events
from jobkit.rundir.store import Store
from tests.harness import training

STEPS = 30


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Train without interruption in 2 and in 4 processes; return the digests of the ends."""
    found = {}
    for count in (2, 4):
        url = tmp_path_factory.mktemp("undisturbed") / "run"
        assert training.join_many(training.start_many(url, count, steps=STEPS)) == [0] * count, logs(url)
        found[count] = training.digest(url)
    return found


def logs(url: Path) -> str:
    """Return what every process printed."""
    return "\n".join(path.read_text() for path in sorted(url.parent.glob(f"{url.name}-*.log")))


class Signals:
    """A hook that sends signals to its own process at a given point.

    Args:
        at: Index of a process -> (point, step, name of the signal).
        slow: Seconds that each process sleeps per step, times its index: they drift apart as far as they can.
    """

    def __init__(self, at: dict[int, tuple[str, int, str]], slow: float = 0.0, save_at: int = -1) -> None:
        self._at, self._slow, self._save_at = at, slow, save_at

    def __call__(self, point: str, run: Any) -> None:
        """Pass a point."""
        import jax

        index = jax.process_index()
        if self._slow and point == "step":
            time.sleep(self._slow * index)
        if point == "step" and run.step == self._save_at:
            run.save()
        if index in self._at:
            when, step, name = self._at[index]
            if point == when and run.step == step:
                os.kill(os.getpid(), getattr(signal, name))


def both(point: str, step: int) -> dict[int, tuple[str, int, str]]:
    """Return a notice of another kind for each of two processes."""
    return {0: (point, step, "SIGUSR1"), 1: (point, step, "SIGTERM")}


CASES: dict[str, tuple[int, Signals, int]] = {
    "one of two, in a step": (2, Signals({1: ("step", 12, "SIGTERM")}), 12),
    "the first of two, in a step": (2, Signals({0: ("step", 12, "SIGTERM")}), 12),
    "both, with different notices": (2, Signals(both("step", 12)), 12),
    "both, at different steps": (2, Signals({0: ("step", 12, "SIGUSR2"), 1: ("step", 13, "SIGTERM")}), 12),
    "one, while they drift apart": (2, Signals({1: ("step", 12, "SIGTERM")}, slow=0.05), 12),
    "one, before it resumes": (2, Signals({1: ("opened", 0, "SIGTERM")}), 0),
    "one, after it resumed": (2, Signals({0: ("resumed", 0, "SIGTERM")}), 0),
    "one, in the first step": (2, Signals({1: ("step", 0, "SIGTERM")}), 0),
    "one, with a save in flight": (2, Signals({1: ("step", 10, "SIGTERM")}), 10),
    "one, with a save asked for": (2, Signals({0: ("step", 14, "SIGTERM")}, save_at=14), 14),
    "one of four": (4, Signals({2: ("step", 12, "SIGTERM")}), 12),
    "some of four": (4, Signals({1: ("step", 12, "SIGTERM"), 3: ("step", 12, "SIGINT")}, slow=0.02), 12),
    "all of four": (4, Signals(dict.fromkeys(range(4), ("step", 12, "SIGTERM"))), 12),
}
"""How many processes, who gets which notice when, and the step that was then in progress."""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_all_stop_at_one_step(case: str, tmp_path: Path, undisturbed: dict[int, str]) -> None:
    """Whoever gets the notice, in any phase: all stop at one step, committed, exit 75, and go on bit for bit."""
    count, hook, at = CASES[case]
    url = tmp_path / "run"
    assert training.join_many(training.start_many(url, count, steps=STEPS, hook=hook, pause_s=0.03)) == [75] * count, (
        logs(url)
    )
    store = Store(url)
    stopped = [event["step"] for event in read_events(store) if event["event"] == "stopped"]
    assert len(stopped) == count
    assert len(set(stopped)) == 1, stopped
    assert stopped[0] == max(commits.steps(store)), "a step was lost"
    assert at <= stopped[0] <= at + 15, "they went on for many steps after the notice"
    assert training.join_many(training.start_many(url, count, steps=STEPS)) == [0] * count, logs(url)
    assert training.digest(url) == undisturbed[count]


@pytest.mark.slow
def test_a_notice_in_the_last_step(tmp_path: Path, undisturbed: dict[int, str]) -> None:
    """A notice in the last step changes nothing: the run is done, in every process."""
    url = tmp_path / "run"
    hook = Signals({1: ("step", STEPS - 1, "SIGTERM")})
    assert training.join_many(training.start_many(url, 2, steps=STEPS, hook=hook)) == [0, 0], logs(url)
    assert training.digest(url) == undisturbed[2]


@pytest.mark.slow
def test_a_notice_while_one_compiles(tmp_path: Path, undisturbed: dict[int, str]) -> None:
    """A process that is busy in its first step answers all the same; nobody waits for it longer than it takes."""
    url = tmp_path / "run"
    started = training.start_many(url, 2, steps=STEPS, pause_s=0.5)
    store = Store(url)
    deadline = time.monotonic() + 60
    while len([event for event in attempt_events(store, 0) if event["event"] == "fresh"]) < 2:  # both listen
        assert time.monotonic() < deadline, logs(url)
        time.sleep(0.01)
    os.kill(started[1].pid or 0, signal.SIGTERM)
    assert training.join_many(started) == [75, 75], logs(url)
    assert training.join_many(training.start_many(url, 2, steps=STEPS)) == [0, 0], logs(url)
    assert training.digest(url) == undisturbed[2]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 3])
def test_a_process_dies(victim: int, tmp_path: Path, undisturbed: dict[int, str]) -> None:
    """When one of four is killed the others end soon, and the run goes on from its newest commit."""
    url = tmp_path / "run"
    started = training.start_many(url, 4, steps=STEPS, pause_s=0.1)
    store = Store(url)
    deadline = time.monotonic() + 60
    while max(commits.steps(store), default=0) < 10:
        assert time.monotonic() < deadline, logs(url)
        time.sleep(0.02)
    os.kill(started[victim].pid or 0, signal.SIGKILL)
    codes = training.join_many(started, 60)
    assert codes[victim] == -signal.SIGKILL
    assert None not in codes, "the others hang"
    assert 0 not in codes
    assert training.join_many(training.start_many(url, 4, steps=STEPS)) == [0] * 4, logs(url)
    assert training.digest(url) == undisturbed[4]


@pytest.mark.slow
def test_a_process_dies_while_they_agree(tmp_path: Path) -> None:
    """A notice, and one of them is stopped dead before it can answer: the others give up, and say what stands."""
    url = tmp_path / "run"
    started = training.start_many(url, 2, steps=10_000, pause_s=0.1)
    store = Store(url)
    deadline = time.monotonic() + 60
    while max(commits.steps(store), default=0) < 10:
        assert time.monotonic() < deadline, logs(url)
        time.sleep(0.02)
    os.kill(started[1].pid or 0, signal.SIGSTOP)
    os.kill(started[0].pid or 0, signal.SIGTERM)
    begun = time.monotonic()
    started[0].join(60)
    os.kill(started[1].pid or 0, signal.SIGKILL)
    assert started[0].exitcode not in (None, 0), "it hangs"
    assert time.monotonic() - begun < 60
    training.join_many(started)


THERE = {"1 x 8": (1, 8), "2 x 2": (2, 2), "8 x 1": (8, 1), "1 x 1": (1, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("there", THERE)
def test_other_topologies(there: str, tmp_path: Path) -> None:
    """What 4 processes with 2 devices each saved has the same values on any other number of them."""
    url = tmp_path / "run"
    assert training.join_many(training.start_many(url, 4, devices=2, steps=10, own_data=False)) == [0] * 4, logs(url)
    before = training.digest(url, arrays_only=True)
    count, devices = THERE[there]
    again = training.start_many(url, count, devices=devices, steps=10, own_data=False, hook=_dump)
    assert training.join_many(again) == [0] * count, logs(url)
    assert training.digest(url, arrays_only=True) == before
    told = json.loads((url.parent / "values.json").read_text())
    assert told == training.values(url, 10)
    more = training.start_many(url, count, devices=devices, steps=12, own_data=False)
    assert training.join_many(more) == [0] * count, logs(url)
    assert commits.steps(Store(url))[-1] == 12


def _dump(point: str, run: Any) -> None:
    """Write what was restored, as process 0 sees it."""
    import jax
    from jax.experimental import multihost_utils

    if point == "resumed":
        whole = multihost_utils.process_allgather(run.state.params, tiled=True)
        if jax.process_index() == 0:
            values = {name: whole[name].tolist() for name in sorted(whole)}
            Path(run.url).with_name("values.json").write_text(json.dumps(values))


MB = 1 << 20


def _shards(url: str, told: str) -> None:
    """Save, or restore, 32 MB in each of three shardings; write down what this process has read from storage."""
    import jobkit

    jobkit.initialize()
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()).reshape(-1, 2), ("host", "chip"))
    layouts = {"whole": PartitionSpec(), "rows": PartitionSpec(("host", "chip")), "partly": PartitionSpec("chip")}
    begin = {
        name: jax.jit(
            lambda number=number: jax.random.normal(jax.random.key(number), (32, MB // 4), jnp.float32),
            out_shardings=NamedSharding(mesh, layout),
        )()
        for number, (name, layout) in enumerate(layouts.items())
    }

    def read_bytes() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    with jobkit.Run(url, save_every=None) as run:
        before = read_bytes()
        arrays = begin if told == "save" else jax.tree.map(jnp.zeros_like, begin)
        values = run.resume(arrays=arrays, steps=0, optimizer=None)
        read = read_bytes() - before
        same = all(
            np.array_equal(mine.data, right.data)
            for name, array in begin.items()
            for mine, right in zip(values.arrays[name].addressable_shards, array.addressable_shards, strict=True)
        )
        Path(f"{url}-{told}-{jax.process_index()}.json").write_text(json.dumps({"read": read, "same": same}))
        for _ in run.steps(run.step + 1):
            values.arrays = dict(values.arrays)
            values.steps += 1


@pytest.mark.slow
def test_shards_are_written_once_and_read_where_they_belong(tmp_path: Path) -> None:
    """Replicas are on storage once in all; a process reads its own parts (process 0 checks all, too), bit for bit."""
    url = tmp_path / "run"
    assert training.join_many(training.start_many(url, 4, devices=2, function=_shards, told="save")) == [0] * 4, logs(
        url
    )
    store = Store(url)
    files = commits.read(store, commits.steps(store)[-1]).files
    sizes = [record.size for record in files.values()]
    assert 96 * MB <= sum(sizes) < 97 * MB
    shares = [sum(record.size for name, record in files.items() if f"ocdbt.process_{i}/" in name) for i in range(4)]
    assert max(shares) < 26 * MB, f"replicas are not written by all in equal shares: {shares}"
    again = training.start_many(url, 4, devices=2, function=_shards, told="restore")
    assert training.join_many(again) == [0] * 4, logs(url)
    told = [json.loads(Path(f"{url}-restore-{index}.json").read_text()) for index in range(4)]
    assert all(each["same"] for each in told)
    assert [each["read"] // MB for each in told[1:]] == [72] * 3, told


@pytest.mark.slow
def test_what_each_process_had_cannot_be_split(tmp_path: Path) -> None:
    """State that was another one in each process is refused on another number of them, with the remedy."""
    url = tmp_path / "run"
    assert training.join_many(training.start_many(url, 2, steps=10)) == [0, 0], logs(url)
    assert training.join_many(training.start_many(url, 4, steps=20)) == [78] * 4, logs(url)
    assert "part 'data' of step 10" in logs(url)
    assert "resume with 2 processes" in logs(url)


@pytest.mark.slow
def test_save_is_asked_of_all(tmp_path: Path) -> None:
    """Asked for by every process a save is made, with process 0's metrics; asked for by one alone it is an error."""
    url = tmp_path / "run"
    assert training.join_many(training.start_many(url, 2, steps=8, hook=_ask, save_every=None)) == [0, 0], logs(url)
    saved = {event["step"]: event for event in read_events(Store(url)) if event["event"] == "saved"}
    assert saved[4]["metrics"] == {"from": 0.0}


def _ask(point: str, run: Any) -> None:
    """Ask for a save in step 3, with a metric that differs between processes."""
    import jax

    if point == "step" and run.step == 3:
        run.save(**{"from": jax.process_index()})


@pytest.mark.slow
def test_timed_saves_are_agreed(tmp_path: Path, undisturbed: dict[int, str]) -> None:
    """Saves by the clock are made at the same steps in all processes, however their clocks run."""
    url = tmp_path / "run"
    slow = Signals({}, slow=0.02)
    assert training.join_many(
        training.start_many(url, 4, steps=STEPS, pause_s=0.05, save_every="0.3s", hook=slow)
    ) == [0] * 4, logs(url)  # fmt: skip
    steps = [
        [event["step"] for event in attempt_events(Store(url), 0) if event["event"] == "saved" and event["writer"] == i]
        for i in "0123"
    ]
    assert len(steps[0]) > 3
    assert steps == [steps[0]] * 4
    assert training.digest(url) == undisturbed[4]


def test_the_key_value_store_is_where_we_look(tmp_path: Path) -> None:
    """JAX has no public name for its coordination service's client: here is what we use of it."""
    code, printed = training.attempt(tmp_path / "run", function=_talk)
    assert code == 0, printed


def _talk(url: str) -> None:
    import jax

    from jobkit.supervise.processes import free_port

    jax.distributed.initialize(f"127.0.0.1:{free_port()}", 1, 0)
    one = group.Group("test", index=0, count=2)
    assert one.put("a", {"x": 1})
    assert not one.put("a", 2)
    assert one.get("a") == {"x": 1}
    try:
        one.get("b", 0.1)
    except TimeoutError:
        return
    raise AssertionError("heard what nobody said")


def test_computing_before_the_processes_met(tmp_path: Path) -> None:
    """A program that computes first is told to call jobkit.initialize() first; nothing is written."""
    url = tmp_path / "run"
    assert training.join_many(training.start_many(url, 2, function=_too_early)) == [78, 78]
    assert "call jobkit.initialize() first" in logs(url)
    assert not (url / contract.CHECKPOINTS).exists()


def _too_early(url: str) -> None:
    import jax.numpy as jnp

    import jobkit

    jnp.zeros(1).block_until_ready()
    with jobkit.Run(url):
        pass


def _notifier(url: str, when: str) -> None:
    import jax

    from jobkit.supervise.processes import free_port

    def turn_on() -> None:
        jax.config.update("jax_enable_preemption_service", True)  # type: ignore[no-untyped-call]
        jax.distributed.initialize(f"127.0.0.1:{free_port()}", 1, 0)

    if when == "before":
        turn_on()
    with jobkit.Run(url, save_every=None) as run:
        if when == "opened":
            turn_on()
        values = run.resume(total=0, optimizer=None)
        for step in run.steps(2000):
            values.total += 1
            time.sleep(0.01)
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("when", ["before", "opened"])
def test_jaxs_own_notifier_takes_nothing(when: str, tmp_path: Path) -> None:
    """Where a program turns JAX's notifier on, before or inside a run, that is said, and SIGTERM is served as ever."""
    code, printed = training.attempt(tmp_path / "run", function=_notifier, when=when)
    assert code == 75, printed
    assert "JAX's own preemption notifier was on" in printed
    assert "SIGTERM: stopped after step 6" in printed


def _epochs(point: str, run: Any) -> None:
    """Send a notice in the last step of the first of several loops."""
    import jax

    if (point, run.step, jax.process_index()) == ("step", 9, 1):
        os.kill(os.getpid(), signal.SIGTERM)


def _in_epochs(url: str) -> None:
    import jobkit

    jobkit.initialize()
    with jobkit.Run(url, save_every=None) as run:
        values = run.resume(total=0, optimizer=None)
        for epoch in range(1, 100):
            for _ in run.steps(10 * epoch):
                values.total += 1
                time.sleep(0.02)
                _epochs("step", run)


@pytest.mark.slow
def test_a_notice_in_the_last_step_of_a_loop_that_another_follows(tmp_path: Path) -> None:
    """Loop after loop, by epochs: a notice that was agreed for the end of one stops the run before or in the next."""
    url = tmp_path / "run"
    assert training.join_many(training.start_many(url, 2, function=_in_epochs)) == [75, 75], logs(url)
    (stopped,) = {event["step"] for event in read_events(Store(url)) if event["event"] == "stopped"}
    assert 10 <= stopped <= 13


def test_a_disk_that_does_not_answer_names_no_lost_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hiccup of the shared disk is not the death of a process, nor of the thread that looks."""

    def stale(path: Path) -> list[str]:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "listdir", stale)
    assert group.lost_process(Store(tmp_path), 0) == ""
