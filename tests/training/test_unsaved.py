"""What is trained and not saved: told wherever one looks at a run, and ended where no later save can go better."""

import contextlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobkit import contract
from jobkit.checkpoint.first_step_check import _is_key, _is_source
from jobkit.errors import ConfigError
from jobkit.rundir import commits
from jobkit.rundir.ledger import Ledger, attempt_events, newest_event
from jobkit.rundir.store import Store
from jobkit.supervise.heartbeat import Heartbeat, Link, read_unsaved
from jobkit.supervise.unsaved import STATE, STORAGE, UNCHANGED, Unsaved
from launch.backends import registry
from launch.drill import reference
from launch.lifecycle import notify, run_status
from tests.harness import jobs, ledgers, training
from tests.harness.jobs import Project, until, until_over


def events(url: Path, name: str, attempt: int = 0) -> list[dict[str, Any]]:
    """Return the events of one kind of an attempt."""
    return [event for event in attempt_events(Store(url), attempt) if event["event"] == name]


# A state that is the same at every save.


def _trains(
    url: str, *, how: str, steps: int = 40, save_every: Any = "10 steps", stop: int = -1, kill: int = -1
) -> None:
    """Train in one of the ways below, getting a SIGTERM or a SIGKILL in a step."""
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    import jobkit

    rows = np.random.default_rng(0)
    params, tx = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}, optax.sgd(1e-2, momentum=0.9)
    mine: Any = {"params": params, "opt": tx.init(params)}
    model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    frozen = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    parts: dict[str, Any] = {
        "copy": {"train": mine, "optimizer": None},
        "copy, optimizer": {"params": params, "optimizer": mine["opt"]},
        "copy, keys": {"train": mine, "optimizer": None, "key": jax.random.key(0), "old": jax.random.PRNGKey(0)},
        "trains": {"train": mine, "optimizer": None},
        "late": {"train": mine, "optimizer": None},
        "buffer": {"train": mine, "optimizer": None, "buffer": np.zeros((64, 3), np.float32)},
        "warm-up": {"params": params, "optimizer": mine["opt"], "buffer": np.zeros((64, 3), np.float32)},
        "counter": {"seen": 0, "best": math.inf, "history": [], "optimizer": None},
        "frozen": {"frozen": frozen, "seen": 0, "best": math.inf, "history": [], "optimizer": None},
        "copy, epoch": {"train": mine, "optimizer": None, "epoch": jnp.int32(0)},
        "statistics": {"model": model, "frozen": frozen, "optimizer": None},
        "rate 0": {"train": {"params": params, "opt": optax.adam(0.0).init(params)}, "optimizer": None},
        "evaluates": {"optimizer": None, "rng": np.random.PCG64(0), "key": jax.random.key(0)},
        "object": {"trainer": Trainer(), "optimizer": None},
    }[how]

    def update(train: Any, batch: Any) -> Any:
        gradients = jax.grad(lambda params: ((batch @ params["w"] + params["b"]) ** 2).mean())(train["params"])
        updates, opt = tx.update(gradients, train["opt"], train["params"])
        return {"params": optax.apply_updates(train["params"], updates), "opt": opt}

    with jobkit.Run(url, save_every=save_every, trackers=()) as run:
        state = run.resume(data=rows, **parts)
        for step in run.steps(steps):
            batch = rows.normal(size=(8, 4)).astype(np.float32)
            if how in ("copy", "copy, optimizer", "copy, keys"):
                mine = update(mine, batch)
            elif how == "trains" or (how == "late" and step >= 25):
                state.train = update(state.train, batch)
            elif how == "rate 0":
                opt = optax.adam(0.0).update(jax.tree.map(jnp.ones_like, params), state.train["opt"])[1]
                state.train = {"params": params, "opt": opt}
            if how == "evaluates":
                state.key = jax.random.split(state.key)[0]
            elif how == "copy, keys":
                state.key, state.old = jax.random.split(state.key)[0], jax.random.split(state.old)[0]
            elif how in ("buffer", "warm-up"):
                state.buffer[step % 64] = batch[0, :3]
            elif how in ("counter", "frozen"):
                state.seen, state.best = state.seen + 1, float(batch.min())
                state.history = [*state.history, f"{state.best}"]
            elif how == "copy, epoch":
                mine, state.epoch = update(mine, batch), state.epoch + 1
            elif how == "statistics":
                model(batch[:, :3])
            elif how == "object":
                parts["trainer"].weight += 1.0
            run._session.checkpoints.wait()  # a save is not begun while one is under way
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            if step == kill:
                os.kill(os.getpid(), signal.SIGKILL)


class Trainer:
    """A program's own object that trains and knows its state."""

    def __init__(self) -> None:
        self.weight = np.zeros(3)

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        return {"weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it."""
        self.weight = state["weight"]


@pytest.mark.parametrize("how", ["copy, optimizer", "copy, keys"])
def test_a_copy_is_trained(tmp_path: Path, how: str) -> None:
    """A run that saves the same again and again warns at the first save and ends with 78 at the second."""
    code, printed = training.attempt(tmp_path / "r", function=_trains, how=how)
    assert code == contract.Exit.CONFIG, printed
    assert [(event["step"], event["count"]) for event in events(tmp_path / "r", "unchanged")] == [(10, 1), (20, 2)]
    assert "warning: step 10 holds the same as step 0 in all " in printed
    assert "step 20 holds the same as step 10 in all " in printed
    assert "run.state.NAME = ..." in printed
    assert ("warning: the first step changed nothing in params, optimizer:" in printed) is ("optimizer" in how)
    assert "nothing new was saved at two intervals in a row, so the run ends, committed step 20: step 20" in printed
    assert "Traceback" not in printed


SOUND = ("trains", "buffer", "counter", "statistics", "rate 0", "evaluates", "object")


@pytest.mark.slow
def test_no_false_alarm(tmp_path: Path) -> None:
    """A buffer, a counter, running statistics, an optimizer at rate 0, an evaluation: they end well, unwarned."""
    code, printed = training.attempt(tmp_path / "r", function=_trains_soundly, timeout_s=300)
    assert code == 0, printed
    assert "warning" not in printed
    for how in SOUND:
        assert len(events(tmp_path / f"r-{how}", "saved")) == 3
        assert events(tmp_path / f"r-{how}", "unchanged") == []


def _trains_soundly(url: str) -> None:
    for how in SOUND:
        _trains(f"{url}-{how}", how=how, steps=20)


@pytest.mark.parametrize("how", ["frozen", "copy, epoch"])
def test_numbers_alone_are_no_training(tmp_path: Path, how: str) -> None:
    """Where a counter changes and no array does the run is warned once, goes on, and is looked at ever more seldom."""
    code, printed = training.attempt(tmp_path / "r", function=_trains, how=how, steps=60, save_every="5 steps")
    assert code == 0, printed
    assert printed.count("warning: no array differs between steps 0 and 5, though numbers do (of ") == 1
    assert printed.count("no array differs") == 1
    told = events(tmp_path / "r", "unchanged")
    assert [event["step"] for event in told] == [5, 10, 15, 20, 40]
    assert {event["kind"] for event in told} == {"numbers"}
    assert "run.state.NAME = ..." in told[-1]["reason"]
    assert "leave them out of resume()" in told[-1]["reason"]


def test_a_warm_up_is_warned_of_once(tmp_path: Path) -> None:
    """A training that fills a buffer first is warned that its first step changed nothing else, and not stopped."""
    code, printed = training.attempt(tmp_path / "r", function=_trains, how="warm-up")
    assert code == 0, printed
    assert printed.count("warning") == 1
    assert "the first step changed nothing in params, optimizer:" in printed


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "save_every"), [(0, "10 steps"), (1, None), (40, None)])
def test_a_single_save_is_a_warning(tmp_path: Path, steps: int, save_every: Any) -> None:
    """A program with one save after its start, or without a step, is at most warned."""
    named = {"steps": steps, "save_every": save_every}
    code, printed = training.attempt(tmp_path / "r", function=_trains, how="copy", **named)
    assert code == 0, printed
    assert printed.count("warning: step") == (steps > 0)


@pytest.mark.slow
def test_a_first_change_ends_the_looking(tmp_path: Path) -> None:
    """Nothing is compared any more once something has changed, and what was said before is taken back."""
    code, printed = training.attempt(tmp_path / "r", function=_trains, how="late", save_every="20 steps", steps=80)
    assert code == 0, printed
    assert [event["step"] for event in events(tmp_path / "r", "unchanged")] == [20]


@pytest.mark.slow
def test_a_notice_is_no_interval(tmp_path: Path) -> None:
    """A save on notice neither warns nor ends the run, and what an interval said before counts in the next attempt."""
    url = tmp_path / "r"
    code, printed = training.attempt(url, function=_trains, how="copy", stop=4)
    assert (code, events(url, "unchanged")) == (contract.Exit.PREEMPTED, []), printed
    code, printed = training.attempt(url, function=_trains, how="copy", kill=11)
    assert (code, [event["step"] for event in events(url, "unchanged", 1)]) == (-signal.SIGKILL, [10]), printed
    code, printed = training.attempt(url, function=_trains, how="copy")
    assert (code, [event["step"] for event in events(url, "unchanged", 2)]) == (contract.Exit.CONFIG, [20]), printed


def test_what_goes_on_by_itself() -> None:
    """Iterators, loaders and generators count as no training; an object with a state alone does."""

    class Loader:
        def state_dict(self) -> None: ...
        def __iter__(self) -> Iterator[int]:
            return iter([1])

    sources = [iter([1]), np.random.default_rng(0), np.random.default_rng(0).bit_generator, random.Random(0), Loader()]
    assert all(map(_is_source, sources))
    assert not any(map(_is_source, [Trainer(), {"w": 1}, [1.0], np.zeros(3), 3, jax.numpy.zeros(2)]))
    assert _is_key("", {"is": "jax", "shape": [5, 2], "dtype": "uint32"})
    assert _is_key("drop/count", {"is": "jax", "shape": [], "dtype": "uint32", "role": "RngCount"})
    assert _is_key("drop/rngs/count", {"is": "jax", "shape": [], "dtype": "uint32"})
    assert not _is_key("key/kernel", {"is": "jax", "shape": [2], "dtype": "float32"})
    assert not _is_key("count", {"is": "jax", "shape": [], "dtype": "uint32"})


@pytest.mark.parametrize(
    ("changed", "told"), [(False, "cannot be drilled, since nothing that it trains is saved: it"), (True, "")]
)
def test_a_drill_refuses_what_saves_nothing_new(tmp_path: Path, changed: bool, told: str) -> None:
    """A reference whose last saved state holds nothing new is refused, one that changed late is not."""
    run = ledgers.Written(tmp_path / "r")
    run.store.write("checkpoints/40/commit.json", "{}")
    run.program(0, 1, "opened")
    run.program(0, 2, "unchanged", step=20, kind="unchanged", count=1, reason="it holds the same")
    if changed:
        run.program(0, 3, "changed", step=40)
    with pytest.raises(ConfigError, match=told) if told else contextlib.nullcontext():
        reference.read(run.store)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("trains_a_copy", "step 40 holds the same as step 0 in all 1 leaves of w"),
        ("trains_a_copy_counting", "no array differs between steps "),
    ],
)
def test_a_drill_of_a_program_that_trains_a_copy(tmp_path: Path, name: str, told: str) -> None:
    """`jobkit drill` does not certify a program whose training is never saved: exit 2 before any scenario."""
    script = jobs.ROOT / f"tests/drill_scripts/{name}.py"
    command = [sys.executable, "-m", "launch", "drill", "--quick", "--", "python", str(script)]
    environ = os.environ | {"PYTHONPATH": str(jobs.ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"nothing that it trains is saved: {told}" in done.stderr


@pytest.mark.slow
def test_of_several_processes(tmp_path: Path) -> None:
    """Several processes that train a copy end together with 78, though each sees a part of the state only."""
    codes = training.join_many(training.start_many(tmp_path / "r", 2, function=_trains_together, copy=True))
    assert contract.Exit.CONFIG in codes
    assert 0 not in codes
    assert None not in codes
    assert [event["count"] for event in events(tmp_path / "r", "unchanged")] == [1, 2]
    codes = training.join_many(training.start_many(tmp_path / "s", 2, function=_trains_together, copy=False))
    assert codes == [0, 0]
    assert events(tmp_path / "s", "unchanged") == []


def _trains_together(url: str, *, copy: bool) -> None:
    """Train in several processes; what changes, if it is no copy, is an array of process 1's own."""
    import jobkit

    jobkit.initialize()
    with jobkit.Run(url, save_every="10 steps", trackers=()) as run:
        state = run.resume(own={"w": np.zeros(3)}, optimizer=None)
        for _ in run.steps(40):
            if not copy and jax.process_index() == 1:
                state.own["w"] += 1.0
            run._session.checkpoints.wait()


# A state, or a storage, that cannot be saved.


def _goes_bad(url: str | None = None, *, bad: tuple[int, int] = (15, 10**9), steps: int = 100, kill: int = -1) -> None:
    """Train with an object whose state cannot be saved between two steps."""
    import jobkit

    class Bad:
        step = 0

        def state_dict(self) -> dict[str, Any]:
            return {"it": object() if bad[0] <= self.step < bad[1] else 1}

        def load_state_dict(self, state: Any) -> None: ...

    it = Bad()
    with jobkit.Run(url, save_every="10 steps", trackers=()) as run:
        state = run.resume(it=it, n=0, optimizer=None)
        for step in run.steps(steps):
            state.n += 1
            it.step = step + 1
            run._session.checkpoints.wait()
            if step == kill:
                os.kill(os.getpid(), signal.SIGKILL)


def test_state_ends_the_run_at_the_second_interval(tmp_path: Path) -> None:
    """Where the state cannot be saved, the run goes on for one interval and ends with 78 at the next."""
    code, printed = training.attempt(tmp_path / "r", function=_goes_bad)
    assert code == contract.Exit.CONFIG, printed
    failed = events(tmp_path / "r", "save_failed")
    assert [(event["step"], event["kind"], event["count"]) for event in failed] == [(20, "state", 1), (30, "state", 2)]
    assert "training goes on, the newest committed step is 10" in printed
    assert "so the run ends, committed step 10: an object's state holds" in printed.splitlines()[-1]
    assert "which jobkit cannot save: its state_dict()" in printed.splitlines()[-1]
    assert "Traceback" not in printed


def test_state_that_recovers(tmp_path: Path) -> None:
    """An interval that can be saved again begins the count anew: training ends well."""
    code, printed = training.attempt(tmp_path / "r", function=_goes_bad, bad=(15, 25), steps=40)
    assert code == 0, printed
    assert [event["count"] for event in events(tmp_path / "r", "save_failed")] == [1]
    assert commits.steps(Store(tmp_path / "r"))[-1] == 40


def test_state_is_counted_over_attempts(tmp_path: Path) -> None:
    """A run that is killed once an interval ends at its second failed one, too."""
    url = tmp_path / "r"
    assert training.attempt(url, function=_goes_bad, kill=22)[0] == -signal.SIGKILL
    code, printed = training.attempt(url, function=_goes_bad)
    assert code == contract.Exit.CONFIG, printed
    assert [event["step"] for event in events(url, "save_failed", 1)] == [20]


TRAIN = '''\
"""train.py: counts, and saves every ten steps."""
import sys, time
import jobkit

class Bad:
    step = 0
    def state_dict(self):
        return {"it": object() if "bad" in sys.argv and self.step > 15 else 1}
    def load_state_dict(self, state):
        pass

it = Bad()
with jobkit.Run(save_every="10 steps", trackers=()) as run:
    state = run.resume(n=0, it=it)
    for step in run.steps(int(sys.argv[1])):
        state.n, it.step = state.n + 1, step + 1
        time.sleep(0.02 if step < 25 else 0.2)
'''


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    for made in jobs.project(tmp_path):
        (made.path / "train.py").write_text(TRAIN)
        yield made


def submit(project: Project, *words: str) -> tuple[Store, "subprocess.Popen[str]"]:
    """Submit train.py and wait for its end, in a process; a command writes down what is told of the run."""
    (project.path / "tell").write_text(f"sh -c 'cat >> {project.path}/told; echo >> {project.path}/told'\n")
    run = str(project.runs / "r")
    command = ("--notify", "file:tell", "--run", run, "--", "python", "train.py", *words)
    return Store(run), project.start("submit", "--wait", *command)


def told(project: Project) -> list[dict[str, Any]]:
    """Return what the command was told."""
    path = project.path / "told"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wrong(store: Store, kind: str) -> str:
    """Return what a status says is wrong of a kind, '' if nothing."""
    return next((one.text for one in run_status.status(store).troubles if one.kind == kind), "")


@pytest.mark.slow
def test_storage_that_fails_is_told(project: Project) -> None:
    """While the storage fails training goes on; status, ls, --wait, explain and --notify say so, until it is over."""
    store, waiting = submit(project, "100000")
    until(lambda: commits.steps(store)[-1:] > [0], "a step is committed", seconds=60)
    _swap(store, block=True)
    text = until(lambda: wrong(store, "save_failed"), "status knows", seconds=30)
    status = run_status.status(store)
    newest = f"the newest committed step is {status.committed_step}"
    assert status.state == "running"
    assert re.match(rf"step \d+ is not saved.*; {newest}$", text)
    assert newest in json.loads(project.cli("status", store.url, "--json").stdout)["troubles"][0]["text"]
    assert newest in project.cli("status", store.url).stdout
    assert newest in project.cli("ls", str(project.runs)).stdout
    assert re.search("attempt 0 failed:.* is not saved, and nothing after it", project.cli("explain", store.url).stdout)
    until(lambda: [one["event"] for one in told(project)] == ["save_failed"], "somebody is told")
    assert newest in told(project)[0]["reason"]
    _swap(store, block=False)
    until(lambda: not run_status.status(store).troubles, "it is over")
    registry.cancel(store.url)
    assert "is not saved" in waiting.communicate(timeout=60)[0]
    assert newest in (project.runs / "r/attempts/0/log-0.txt").read_text()


def _swap(store: Store, *, block: bool) -> None:
    """Put a file where saves are written, between two saves, or take it away."""
    stage, aside = store.file(contract.STAGE), store.file("checkpoints/.stage-before")
    if not block:
        stage.unlink()
        return
    while not aside.exists():
        if not any(stage.iterdir()):
            stage.rename(aside)
    stage.touch()


@pytest.mark.slow
def test_state_that_fails_is_told(project: Project) -> None:
    """Where the state cannot be saved the same is said, and the run ends at the next interval with the reason."""
    store, waiting = submit(project, "100000", "bad")
    until(lambda: store.exists("attempts/0"), "it runs", seconds=60)
    text = until(lambda: wrong(store, "save_failed"), "status knows", seconds=60)
    assert text.startswith("step 20 is not saved: an object's state holds")
    assert text.endswith("; the newest committed step is 10")
    until(lambda: [one["event"] for one in told(project)] == ["save_failed"], "somebody is told")
    assert "not saved" in waiting.communicate(timeout=60)[0]
    last = until_over(store)
    assert (last.state, last.endings[-1].outcome, last.troubles) == ("failed", "config", [])
    assert "so the run ends, committed step 10: an object's state holds" in last.endings[-1].reason
    until(lambda: [one["event"] for one in told(project)][-2:] == ["config", "failed"], "the end is told")


# What is read, and from where.


def test_what_an_earlier_attempt_left_is_read_with_care(tmp_path: Path) -> None:
    """Of an earlier attempt one failed interval beyond the step it goes on from counts, and no nonsense."""
    store, ledger = Store(tmp_path), Ledger(tmp_path / "l")
    for event, counted in [
        ({"step": 30, "kind": STATE, "count": 1}, True),
        ({"step": 20, "kind": STATE, "count": 1}, False),
        ({"step": 30, "kind": STATE, "count": 2}, False),
        ({"step": "x", "kind": STATE, "count": 1}, False),
        ({"kind": [STATE], "count": {}}, False),
    ]:
        store.write(contract.events_file(0, 0), _line({"t": 1.0, "event": "save_failed"} | event))
        for attempt in (1, 3):  # attempts that did not reach an interval make no difference
            lost = Unsaved(ledger, Heartbeat(None))
            lost.go_on(store, attempt, 20)
            assert (lost.failed(40, STATE, "it", committed_step=20) is not None) is counted


def test_the_disk_that_fails_holds_the_ledger(tmp_path: Path) -> None:
    """The supervisor's directory says what is not saved where the ledger cannot, until a step is, once to a person."""
    store = Store(tmp_path / "run")
    store.write("attempts/0/claim", "")
    ledger = Ledger(store.file(contract.events_file(0, 0)))
    ledger.close()  # what is appended is dropped, as on a full disk
    with _linked(store) as link:
        lost, notified = Unsaved(ledger, Heartbeat(link.directory)), notify._Troubles(store)
        assert lost.failed(20, STORAGE, "the disk is full", committed_step=10) is None
        assert _told(store) == ["step 20 is not saved: the disk is full; the newest committed step is 10"]
        assert [[one["event"] for one in notified.news()] for _ in range(2)] == [["save_failed"], []]
        lost.failed(30, STORAGE, "the disk is full", committed_step=10)
        assert _told(store)[0].startswith("step 30 is not saved (2 intervals in a row): the disk")
        assert notified.news() == []
        lost.saved()
        assert _told(store) == []
        assert read_unsaved(link.directory) is None
        lost.failed(40, STORAGE, "it cannot be tidied up", committed_step=40)
        assert _told(store) == []
        lost.failed(40, UNCHANGED, "step 40 holds the same", committed_step=40)
        assert _told(store) == ["nothing new is saved: step 40 holds the same"]
        lost.changed(50)
        assert _told(store) == []


@contextlib.contextmanager
def _linked(store: Store) -> Iterator[Link]:
    """Make what a supervisor shares with its program."""
    link = Link(store.path, 0)
    store.write("attempts/0/supervisor.json", json.dumps({"heartbeat": str(link.directory)}))
    try:
        yield link
    finally:
        link.close()


def _told(store: Store) -> list[str]:
    return [one.text for one in run_status._troubles(store, 0)]


@given(st.lists(st.sampled_from(["failed", "saved", "unchanged", "metrics", "torn"]), max_size=30), st.integers(1, 300))
def test_the_newest_event_is_found(names: list[str], block: int) -> None:
    """Read backwards in blocks of any size, a ledger gives the last event of some kinds that is whole."""
    import tempfile

    from jobkit.rundir import ledger

    lines = [{"t": 1.0, "event": name, "step": step, "pad": "x" * (7 * step % 50)} for step, name in enumerate(names)]
    text = "".join('{"t":1.0,"event":"sav\n' if line["event"] == "torn" else _line(line) for line in lines)
    wanted = [line for line in lines if line["event"] in ("failed", "saved")]
    before, ledger._BLOCK_BYTES = ledger._BLOCK_BYTES, block
    try:
        with tempfile.TemporaryDirectory() as place:
            store = Store(place)
            store.write("e.jsonl", text)
            assert newest_event(store, "e.jsonl", ("failed", "saved")) == (wanted[-1] if wanted else {})
    finally:
        ledger._BLOCK_BYTES = before


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event, separators=(",", ":")) + "\n"


@pytest.mark.parametrize(
    "event",
    [
        {"event": "save_failed", "step": "20", "kind": "state", "count": 1},
        {"event": "save_failed", "reason": "of nothing"},
        {"event": "saved", "step": 20},
    ],
)
def test_what_is_not_understood_is_nothing(tmp_path: Path, event: dict[str, Any]) -> None:
    """A ledger of another version, or one with nonsense in it, says of nothing that it is not saved."""
    store = Store(tmp_path)
    store.write(contract.events_file(0, 0), _line({"t": 1.0} | event))
    assert _told(store) == []
