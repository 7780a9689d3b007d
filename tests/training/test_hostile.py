"""Runs that anybody may have written: whatever stands in them, readers say a sentence, and touch nothing else."""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobkit import contract, decode
from jobkit.errors import JobkitError
from jobkit.rundir import commits, ledger, retention
from jobkit.rundir.commits import Commit
from jobkit.rundir.control import Control
from jobkit.rundir.files import checksum
from jobkit.rundir.store import Store
from jobkit.supervise import stall
from jobkit.tracking import trackers
from launch.cli import main
from launch.lifecycle import lease, lock, orphans, run_status
from launch.lifecycle.history import read_history
from launch.spec import jobspec as specs
from launch.spec import sweep
from tests.harness import ledgers

FEW, MANY = 6, 200
"""Cases of each kind: in any test run, and in the slow ones."""
DEEP = 100_000
VALUES: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, -(2**70), 10**400, 1e308, float("inf"), float("nan"), -0.5, "", "nan", "\ud800",
    "a\0b", "\x1b]0;x\x07", "../../x", "/etc/passwd", "x" * 5000, [], ["a", 1], {}, {"a": {"b": []}}, [[[[[[1]]]]]],
    {"loss": 10**400}, {"loss": []}, {"\ud800": 1}, {1: 2}, "running", "stepping", "9" * 5000,
]  # fmt: skip
RAW = [
    b"", b"\0" * 100, b"\xff\xfe", b"[" * DEEP, b'{"a":' * DEEP, b'{"t":1,"event":' + b"[" * DEEP,
    b"[" * 900 + b"]" * 900, b'{"event":"ended","t":1,"x":' + b"[" * 900 + b"]" * 900 + b"}", b"null", b"[]", b"7",
    b'"text"', b'{"t":' + b"9" * 5000 + b"}", b'{"t":1e999,"event":"ended"}', b'{"t":NaN,"event":"ended"}',
    b'{"t":1,"event":["ended"]}', b'{"t":1,"event":{}}', b'{"t":true,"event":"ended"}', b'{"t":"1","event":"ended"}',
    b'{"t":1,"event":"ended","reason":"\\ud800"}', b'{"t":1,"event":"ended","reason":"\xed\xa0\x80"}',
    b'{"t":1,"event":"' + b"x" * 1_000_000 + b'"}', b"{" + b'"a":1,' * 1000 + b'"a":1}', b"\xef\xbb\xbf{}",
]  # fmt: skip


def changed(chance: random.Random, base: dict[str, Any]) -> bytes:
    """Return a JSON object with values that it never has."""
    told = dict(base)
    known = [*base, *decode._KINDS]
    for _ in range(chance.randint(1, 4)):
        name = chance.choice(known)
        if isinstance(told.get(name), dict) and chance.random() < 0.5:
            inner = dict(told[name])
            inner[chance.choice([*inner, "x"])] = chance.choice(VALUES)
            told[name] = inner
        elif chance.random() < 0.15:
            told.pop(name, None)
        else:
            told[name] = chance.choice(VALUES)
    return json.dumps(told).encode()


def hostile(chance: random.Random, content: bytes) -> bytes:
    """Return something else than a file's content: changed, cut, or nothing like it."""
    lines = content.split(b"\n")
    kind = chance.random()
    if kind < 0.2:
        return chance.choice(RAW)
    if kind < 0.3:
        return content[: chance.randrange(len(content) + 1)]
    if kind < 0.4 and content:
        flipped = bytearray(content)
        for _ in range(5):
            flipped[chance.randrange(len(flipped))] = chance.randrange(256)
        return bytes(flipped)
    objects = [place for place, line in enumerate(lines) if line.startswith(b"{") and line.endswith(b"}")]
    if not objects:
        try:
            return changed(chance, json.loads(content))
        except ValueError:
            return chance.choice(RAW)
    for _ in range(chance.randint(1, 4)):  # a ledger: some lines
        place = chance.choice(objects)
        strange = chance.choice(RAW) if chance.random() < 0.3 else changed(chance, json.loads(lines[place]))
        lines.insert(place, strange) if chance.random() < 0.5 else lines.__setitem__(place, strange)
        objects = [index for index in objects if lines[index].startswith(b"{") and _is_object(lines[index])]
        if not objects:
            break
    return b"\n".join(lines)


def _is_object(line: bytes) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.loads(line), dict)
    return False


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run with every kind of file that a run has."""
    run = ledgers.interrupted(tmp_path_factory.mktemp("whole") / "bad")
    store = run.store
    for step in (60, 100):
        stage = commits.new_stage(store, step, 2)
        (stage / "default").mkdir(parents=True)
        (stage / "default" / "a").write_bytes(b"abc")
        commit = Commit(step=step, attempt=2, at=1e9, reason="asked", files={}, metrics={"loss": 1.0})
        table = {
            "version": 1,
            "parts": {"params": {"kind": "value", "leaves": {"w": {"is": "scalar", "type": "int", "value": 1}}}},
        }
        commits.publish(store, stage, state=table, commit=commit)
        commits.score(store, step, {"val": 0.5}, attempt=99)
    told = {"exit_code": 0, "process": 0, "processes": 2, "node": "n", "reason": "r", "step": 3, "ended": 9.0}
    run.store.write("attempts/2/process-0.json", json.dumps(told))
    run.store.write("attempts/2/process-1.json", json.dumps(told | {"process": 1, "exit_code": 76}))
    run.store.write("attempts/2/supervisor.json", json.dumps({"pid": 1, "started": 1.0, "heartbeat": "/dev/shm/x"}))
    run.store.write("attempts/2/events-1.jsonl", run.store.read("attempts/2/events-0.jsonl"))
    run.store.write("attempts/2/log-0.txt", b"step 1\nstep 2\n")
    run.store.write("strategy.json", json.dumps({"keep": 3, "keep_best": ["loss", "min"], "save_every": 60.0}))
    run.store.write("lock", json.dumps({"pid": 1, "host": "h", "since": 1.0}))
    run.store.write("save.json", json.dumps({"by": "ada@n", "at": 1.0, "id": "x"}))
    lease_ = {"host": "h", "kernel": "k", "pid": 1, "home": "x", "token": "t", "over": False}
    run.store.write("leases/0", json.dumps(lease_))
    run.store.write("trackers.json", json.dumps({"wandb": {"id": "abc"}}))
    return run.path


FILES = [
    "run.json", "events.jsonl", "attempts/0/outcome.json", "attempts/2/events-0.jsonl", "attempts/2/events-1.jsonl",
    "attempts/2/events-supervisor.jsonl", "attempts/2/process-0.json", "attempts/2/supervisor.json",
    "attempts/2/log-0.txt", "strategy.json", "cancel.json", "save.json", "lock", "leases/0", "trackers.json",
    "checkpoints/100/commit.json", "checkpoints/100/state.json", "scores/*.json",
]  # fmt: skip


def jobkit(*words: str) -> tuple[int, str]:
    """Run the command line in this process; return its exit code and what it said. A traceback is an error here."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # strict, as a terminal's
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["jobkit", *words])
        with pytest.raises(SystemExit) as left:
            main.main()
        out.flush()
    return int(left.value.code or 0), out.buffer.getvalue().decode()  # type: ignore[attr-defined]


COMMANDS: list[list[str]] = [
    ["status"], ["status", "--json"], ["explain"], ["explain", "--json"], ["report"], ["report", "--json"], ["logs"],
    ["checkpoints"], ["checkpoints", "--json"], ["report", "--html", "page.html"],
]  # fmt: skip
READERS: list[Callable[[Store], object]] = [
    run_status.status,
    read_history,
    ledger.read_metrics,
    ledger.read_events,
    retention.keep_of,
    commits.metrics,
    lambda store: [commits.problems(store, step) for step in commits.steps(store)],
    lambda store: Control(store).new(contract.SAVE),
    lambda store: trackers.logged_before(store, 3, 1000),
    lambda store: trackers.ending_of(store, 2),
    lambda store: stall.learn(store, 3, "supervisor"),
    lambda store: [orphans.of_all_processes(store, attempt) for attempt in store.numbers(contract.ATTEMPTS)],
    lambda store: [orphans.last_step(store, attempt) for attempt in store.numbers(contract.ATTEMPTS)],
    orphans.committed_step,
    lock.holder,
    lock.runner_alive,
    lease.newest,
    lambda store: specs.points(store, specs.read(store)),
]


def look(directory: Path, chance: random.Random) -> None:
    """Look at the run 'bad' in every way, and a few by the command line; beside it 'good' has to be listed."""
    run = directory / "bad"
    for reader in READERS:
        with contextlib.suppress(JobkitError):
            reader(Store(run))
    code, told = jobkit("ls", str(directory))
    assert code == 0, told
    assert "good" in told
    for command in chance.sample(COMMANDS, 2):
        code, told = jobkit(command[0], str(run), *command[1:])
        assert code in (0, 1, 2), told
        if code == 0 and "--json" in command:
            json.loads(told[told.index("\n{" if not told.startswith(("{", "[")) else told[0]) :])
        assert code != 2 or told.startswith("jobkit: "), told


def prepared(whole: Path, tmp_path: Path) -> Path:
    """Copy the run, and a good one beside it, and something of the user's that nobody may touch."""
    (tmp_path / "runs").mkdir()
    shutil.copytree(whole, tmp_path / "runs" / "bad")
    ledgers.smooth(tmp_path / "runs" / "good")
    (tmp_path / "mine").write_text("mine")
    return tmp_path / "runs"


def seen(top: Path, but: Path) -> dict[str, str]:
    """Return what is outside of a directory: every path and what is in it."""
    found = {}
    for directory, _, files in os.walk(top):
        if not Path(directory).is_relative_to(but):
            for name in files:
                path = Path(directory, name)
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
            found[directory] = ""
    return found


def cases(name: str, many: int) -> list[random.Random]:
    """Return the chances of the cases of a kind; the same ones each time."""
    return [random.Random(f"{name} {case}") for case in range(many)]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("many", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_any_file_of_a_run_may_hold_anything(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, many: int
) -> None:
    """Whatever stands in a file of a run: a sentence or none, never a traceback, and `ls` lists the other runs."""
    runs = prepared(whole, tmp_path)
    monkeypatch.chdir(runs)
    run = runs / "bad"
    path = next(iter(sorted(run.glob(name))), run / name)
    content = path.read_bytes() if path.exists() else b'{"by": "ada@n", "at": 1.0, "word": "stopped", "id": "x"}'
    before = seen(tmp_path, runs)
    begun = time.process_time()
    for chance in cases(name, many):
        strange = hostile(chance, content)
        if name.endswith("commit.json") and chance.random() < 0.7:
            with contextlib.suppress(ValueError, RecursionError, TypeError):
                told = json.loads(strange) | {"seal": commits._UNSEALED}
                strange = commits._sealed(json.dumps(told, indent=1).encode())
        path.write_bytes(strange)
        look(runs, chance)
    path.write_bytes(content)
    assert seen(tmp_path, runs) == before
    assert time.process_time() - begun < 10 * many, "some content takes very long to read"


@pytest.mark.parametrize("kind", ["pipe", "directory", "link", "dangling", "unreadable"])
def test_any_file_of_a_run_may_be_no_file(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A pipe, a directory, a link in a file's place: a sentence, nobody waits, and `ls` lists the other runs."""
    runs = prepared(whole, tmp_path)
    monkeypatch.chdir(runs)
    before = seen(tmp_path, runs)
    for name in FILES:
        path = next(iter(sorted((runs / "bad").glob(name))), runs / "bad" / name)
        aside = path.with_name("aside")
        if path.exists():
            path.rename(aside)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        elif kind == "unreadable":
            path.touch(mode=0)
        else:
            path.symlink_to(tmp_path / ("mine" if kind == "link" else "nowhere"))
        look(runs, random.Random(name))
        path.rmdir() if kind == "directory" else path.unlink()
        if aside.exists():
            aside.rename(path)
    assert seen(tmp_path, runs) == before


ODD = [
    "a\nb",
    "a\\b",
    "\x1b[2J",
    "ü",
    "07",
    "9" * 19,
    "٣",
    "-1",
    "1e3",
    "a" * 255,
    " ",
    "events-0.jsonl",
    ".tmp",
    "é\udcff",
]


@pytest.mark.parametrize("place", ["", "attempts", "attempts/2", "checkpoints", "checkpoints/100", "scores", "code"])
@pytest.mark.parametrize("many", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_any_name_may_stand_in_a_run(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, many: int
) -> None:
    """Files and directories of any name, wherever in a run: a sentence or none, and the other runs are listed."""
    runs = prepared(whole, tmp_path)
    monkeypatch.chdir(runs)
    before = seen(tmp_path, runs)
    for chance in cases(place, many):
        stem = chance.choice([*ODD, chr(chance.randrange(1, 1280)) * chance.randint(1, 9)])
        name = chance.choice([stem, f"events-{stem}.jsonl", f"process-{stem}.json", f"{stem}-1.json", f"{stem}.tar.gz"])
        path = runs / "bad" / place / name.replace("/", "")
        if len(os.fsencode(path.name)) > 255 or path.exists():
            continue
        path.parent.mkdir(exist_ok=True)
        if chance.random() < 0.5:
            path.mkdir()
        else:
            path.write_bytes(chance.choice(RAW))
        look(runs, chance)
        path.rmdir() if path.is_dir() else path.unlink()
    assert seen(tmp_path, runs) == before


# The state that a step holds.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save one step of a real run with parts of every kind of leaf."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jobkit.run.run import Run

    url = tmp_path_factory.mktemp("trained") / "bad"
    with Run(url) as run:
        run.resume(params=PARTS(jnp, np, jax), data=Batches(), optimizer=None)
        for _ in run.steps(1):
            run.state.params = jax.tree.map(lambda leaf: leaf, run.state.params) | {"more": [jnp.ones(2)]}
    return url


def PARTS(jnp: Any, np: Any, jax: Any) -> dict[str, Any]:  # noqa: N802
    """Return a value with leaves of every kind."""
    return {
        "w": jnp.ones((2, 3)), "n": np.zeros(4), "key": jax.random.key(0), "step": 1, "lr": 0.5, "name": "x", "c": 1j,
        "empty": jnp.zeros((0, 2)), "more": None,
    }  # fmt: skip


class Batches:
    """An iterator that takes any state: what it makes of one is its own business."""

    def get_state(self) -> Any:
        """Return a state of every container."""
        return {"at": 1, ("a", 2): [b"x", {"deep": (1.5, None)}]}

    def set_state(self, told: Any) -> None:
        """Take any state."""


def sealed(step: Path, name: str, content: bytes) -> None:
    """Replace a file of a committed step as somebody would who knows how: with a commit.json that fits."""
    (step / name).write_bytes(content)
    told = json.loads((step / "commit.json").read_bytes())
    size, crc = checksum(step / name)
    told["files"][name] = {"size": size, "crc32c": crc}
    (step / "commit.json").write_bytes(
        commits._sealed(json.dumps(told | {"seal": commits._UNSEALED}, indent=1).encode())
    )


LEAF: list[Any] = [
    *VALUES, "jax", "numpy", "numpy_scalar", "key", "scalar", "object", "O", "float32", "int8", "V9", "fry", [2, 3],
    [0, 2**49, 2**49], [-1], [2.0], [10**30], {"at": -1, "shape": [1], "dtype": "int8"}, {"at": 2**40, "shape": [9**9],
    "dtype": "float64"}, {"root": "="}, {"root": "*"}, {"root": {"dict": [["w", "*"]]}}, {"root": {"list": "x"}},
    {"root": {"given": 1, "holds": 2}}, {"tuple": [0, 99]}, {"dict": [[[[1]], 0]]}, {"0": 1, "1": 2},
]  # fmt: skip


def places(told: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """List every place in a JSON document as (container, key)."""
    for key in list(told) if isinstance(told, dict) else range(len(told)):
        found.append((told, key))
        if isinstance(told[key], dict | list):
            places(told[key], found)
    return found


@pytest.mark.parametrize("many", [20, pytest.param(MANY, marks=pytest.mark.slow)])
def test_any_state_may_stand_in_a_step(trained: Path, tmp_path: Path, many: int) -> None:
    """A step whose table says anything, under a seal that fits: an error of ours, or what it says is restored."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jobkit.checkpoint.restore import export_params
    from jobkit.checkpoint.weights.parts_alone import load

    run = tmp_path / "bad"
    shutil.copytree(trained, run)
    step = run / contract.step_dir(1)
    content = (step / "state.json").read_bytes()
    restored = 0
    for case, chance in enumerate(cases("state", many)):
        told = json.loads(content)
        for _ in range(chance.randint(1, 3)):
            where, key = chance.choice(places(told, []))
            if isinstance(where, dict) and chance.random() < 0.2:
                where.pop(key, None)
            else:
                where[key] = chance.choice(LEAF)
        sealed(step, "state.json", chance.choice(RAW) if chance.random() < 0.1 else json.dumps(told).encode())
        with contextlib.suppress(JobkitError):
            load(run, params=PARTS(jnp, np, jax), data=Batches())
            restored += 1
        with contextlib.suppress(JobkitError):
            export_params(run, tmp_path / f"out-{case}")
    sealed(step, "state.json", content)
    load(run, params=PARTS(jnp, np, jax), data=Batches())
    assert restored < many


@pytest.mark.parametrize("text", ["", "7", "0-3,7", "9-1", "1-", "x", "0-" + "9" * 30, "٣", "1,,2", "-5", "3 - 4"])
def test_points_of_an_array_are_those_that_we_wrote(text: str) -> None:
    """What a ledger says of an array names a few points, whatever it says."""
    assert sweep.expand(text) == {"7": {7}, "0-3,7": {0, 1, 2, 3, 7}, "1,,2": {1, 2}}.get(text, set())


@pytest.mark.parametrize("job", ["--uid=0", "1; true", "a\nb", "", "-1", None, 7, "12_3", "arn:aws:batch:x:1:job/a-b"])
def test_a_job_of_the_ledger_is_a_name(tmp_path: Path, job: object) -> None:
    """What a scheduler's command is given as a job's name is one, never an option."""
    run = ledgers.Written(tmp_path)
    run.launcher(1, "job", id=job, backend="slurm")
    assert run_status.jobs(run.store, "slurm") == (
        [str(job)] if job in (7, "12_3", "arn:aws:batch:x:1:job/a-b") else []
    )
