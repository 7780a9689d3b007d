"""Names from outside: whoever may write to a bucket or a shared directory reaches nothing but the run there."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import google_crc32c
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobkit import contract, names
from jobkit.errors import ConfigError, JobkitError, StorageError
from jobkit.rundir import commits, mirror, remote_steps
from jobkit.rundir.commits import Commit, FileRecord
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.store import Store, home_of
from launch.cli import main
from launch.lifecycle import lock, orphans, run_status
from launch.spec import jobspec as specs
from launch.spec import snapshot, unpacking
from launch.spec.jobspec import JobSpec
from tests.fakes.gcs_server import GcsServer
from tests.training import test_hostile

ODD = [
    "/x",
    "../x",
    "a/../../x",
    "a//x",
    "",
    ".",
    "..",
    "a/.",
    "./a",
    "a/",
    "a\0b",
    "a\nb",
    "a\\b",
    "\ud800",
    "a" * 256,
]
"""Names that are not one's inside a run."""


def test_the_door() -> None:
    """A name is relative, of plain parts, and such that a file can have it; one number has one spelling."""
    assert not any(map(names.inside, ODD))
    assert not any(map(names.inside, ("a" * 256, None, 1, b"a", "a/" * 2050 + "a")))
    assert all(map(names.inside, ("a", "checkpoints/7/default/d/1f", ".tmp", "...", "ü b", "a" * 255)))
    assert [names.number(text) for text in ("0", "17", "07", "٣", "-1", "9" * 5000, "")] == [0, 17, *[None] * 5]


@given(st.text(st.characters(), max_size=12) | st.lists(st.sampled_from(["", ".", "..", "a"])).map("/".join))
def test_nothing_a_store_is_asked_for_lies_outside_it(name: str) -> None:
    """Whatever the name, a store's path of it is below the store, or the name is refused in words."""
    store = Store("/scratch/run")
    if name and not names.inside(name):
        with pytest.raises(ConfigError, match="no name inside"):
            store.file(name)
    else:
        assert os.path.normpath(store.file(name)) == f"/scratch/run/{name}".rstrip("/")


def test_strange_names_are_told_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What lies in a run under a name that nobody gives is left out, and said once, without its control characters."""
    store = Store(tmp_path)
    for name in ("0", "1", "a\x1b[2Jb"):
        (tmp_path / "attempts" / name).mkdir(parents=True)
    for _ in range(3):
        assert store.names("attempts") == ["0", "1"]
    told = capsys.readouterr().err
    assert told.count("left alone") == 1
    assert "\\x1b[2J" in told
    assert "\x1b" not in told


# A bucket that others may write to.


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[GcsServer]:
    """Run a GCS server of one bucket, for a node with a home of its own."""
    monkeypatch.setenv(contract.ENV_HOME, str(tmp_path / "homes"))
    with GcsServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        fsspec.config.conf.clear()
        fsspec.config.set_conf_env(fsspec.config.conf)
        fsspec.filesystem("gs").clear_instance_cache()
        yield server


def run_json(**fields: Any) -> bytes:
    """Return a run.json; the fields are of its specification."""
    told = json.loads(specs.encode(JobSpec(command=("true",), name="one"), "local"))
    told["spec"] |= fields
    return json.dumps(told).encode()


def commit_json(files: dict[str, bytes], step: int = 100) -> bytes:
    """Return a sealed commit.json that lists files, whatever they are called."""
    records = {name: FileRecord(len(data), f"{google_crc32c.value(data):08x}") for name, data in files.items()}
    commit = Commit(step=step, attempt=0, at=0.0, reason="end", files=records)
    return commits._sealed(commits._written(commit))


def jobkit(*words: str) -> tuple[int, str]:
    """Run the command line in this process; return its exit code and what it said, a traceback is an error here."""
    out = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        patch.setattr(sys, "argv", ["jobkit", *words])
        with pytest.raises(SystemExit) as left:
            main.main()
    return int(left.value.code or 0), out.getvalue()


def outside(tmp_path: Path) -> tuple[Path, Callable[[], None]]:
    """Return a file that nobody may touch, and a check that it and all around it is as it was."""
    home = tmp_path / "victim"
    home.mkdir()
    victim = home / "authorized_keys"
    victim.write_text("mine")

    def check() -> None:
        assert [path.name for path in home.iterdir()] == ["authorized_keys"]
        assert victim.read_text() == "mine"

    return victim, check


def test_looking_at_a_bucket_writes_nothing_outside_the_homes(gcs: GcsServer, tmp_path: Path) -> None:
    """Objects whose names climb out of the run, or are absolute, reach no file of who calls `status` or `ls`."""
    victim, check = outside(tmp_path)
    url = f"gs://bucket/run-{random.randrange(10**9)}"
    run = url.removeprefix("gs://bucket/")
    gcs.write(f"{run}/run.json", run_json())
    for name in (str(victim), str(victim.parent / "new"), "../../pwn", "attempts/0/../../../../pwn", "scores//pwn"):
        gcs.write(f"{run}/{name}", b"theirs, and longer than yours")
    for command in (["status", url], ["ls", "gs://bucket/"], ["logs", url]):
        code, told = jobkit(*command)
        assert code == 0, told
    check()
    assert not list(tmp_path.rglob("pwn"))


@pytest.mark.parametrize("how", ["load", "verify"])
def test_a_commit_that_lists_a_file_of_yours_reaches_it_not(gcs: GcsServer, tmp_path: Path, how: str) -> None:
    """A commit.json whose files are absolute or climb is damage: nothing is downloaded to, or removed from, there."""
    victim, check = outside(tmp_path)
    url = f"gs://bucket/run-{random.randrange(10**9)}"
    run = url.removeprefix("gs://bucket/")
    gcs.write(f"{run}/run.json", run_json())
    files = {str(victim): b"theirs", "../../../x": b"x", "state.json": b"{}"}
    gcs.write(f"{run}/checkpoints/100/commit.json", commit_json(files))
    for name, data in files.items():
        gcs.write(f"{run}/checkpoints/100/{name}", data)
    if how == "load":
        from jobkit.checkpoint.weights.parts_alone import load  # brings jax in

        with pytest.raises(JobkitError, match="no file of its step"):
            load(url, model=0)
    else:
        code, told = jobkit("checkpoints", url, "verify", "--all")
        assert code == 1
        assert "no file of its step" in told
    check()


@pytest.mark.parametrize("seal", ["../../../x", "/etc/x", "ABCDEF01", ""])
def test_a_seal_is_the_checksum_and_nothing_else(seal: str) -> None:
    """The file of a step's later metrics is called by its seal: one that is no checksum is damage."""
    told = json.loads(commit_json({})) | {"seal": seal}
    content = json.dumps(told, separators=(",", ":")).encode()
    with pytest.raises(StorageError, match="crc32c"):
        commits.parse(content, 100, where="here")


def test_no_object_outside_a_url_is_asked_for(gcs: GcsServer) -> None:
    """What is read, written, or removed below a URL is below it, whoever gave the name."""
    gcs.write("other/secret", b"theirs")
    remote = Store("gs://bucket/run").remote
    assert remote is not None
    for call in (remote.read, lambda name: remote.write(name, b"x"), lambda name: remote.remove([name])):
        with pytest.raises(ConfigError, match="no name inside"):
            call("../other/secret")
    assert gcs.names() == ["other/secret"]


def test_folders_that_a_console_made_are_nobodys(gcs: GcsServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Empty objects whose name ends in a slash, as web consoles make them, are passed over without a word."""
    url = f"gs://bucket/run-{random.randrange(10**9)}"
    run = url.removeprefix("gs://bucket/")
    for name in ("", "attempts/", "checkpoints/", "attempts/0/claim.json"):
        gcs.write(f"{run}/{name}", b"" if name.endswith("/") or not name else b"x")
    remote = Store(url).remote
    assert remote is not None
    assert list(remote.find()) == ["attempts/0/claim.json"]
    assert remote.numbers(contract.ATTEMPTS) == [0]
    assert remote_steps.steps(remote) == []
    assert capsys.readouterr().err == ""


# A directory that others may write to.


def plant(store: Store, name: str, target: Path) -> None:
    """Put a symbolic link into a run."""
    store.path.mkdir(parents=True, exist_ok=True)
    link = store.path / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)


OPENS: dict[str, Callable[[Store], object]] = {
    contract.LOCK: lambda store: lock.acquire(store),
    contract.EVENTS: lambda store: Ledger(store.file(contract.EVENTS)).append("submitted"),
    contract.RUN_JSON: lambda store: store.write(contract.RUN_JSON, b"{}"),
    f"{contract.ATTEMPTS}/0": lambda store: store.write(f"{contract.attempt_dir(0)}/outcome.json", b"{}"),
    contract.ATTEMPTS: lambda store: store.claim(contract.ATTEMPTS),
    contract.CANCEL: lambda store: store.remove(contract.CANCEL),
    f"{contract.CHECKPOINTS}/5": lambda store: commits.remove(store, 5),
    contract.STAGE: lambda store: commits.new_stage(store, 1, 0),
    contract.CHECKPOINTS: lambda store: commits.set_aside(store, 5, ["damaged"]),
    contract.TRASH: lambda store: commits.sweep(store, attempt=1),
    contract.CODE: lambda store: unpacking.unpack(store, "0" * 16, root=store.path, links=()),
    f"{contract.CODE}/{'0' * 16}": lambda store: unpacking.unpack(store, "0" * 16, root=store.path, links=()),
    contract.SCORES: lambda store: store.create(f"{contract.SCORES}/1.json", b"{}"),
}
"""What opens, makes, replaces or removes something in a run, by the name of a link that would lead it elsewhere."""


@pytest.mark.parametrize("name", OPENS)
@pytest.mark.parametrize("dangling", [False, True], ids=["there", "dangling"])
def test_no_link_in_a_run_is_followed(tmp_path: Path, name: str, *, dangling: bool) -> None:
    """A planted link is refused with what to do about it, and what it leads to is neither made nor changed."""
    victim, check = outside(tmp_path)
    store = Store(tmp_path / "run")
    is_file = "." in name.rpartition("/")[2].lstrip(".") or name == contract.LOCK
    plant(store, name, victim.parent / "new" if dangling else victim if is_file else victim.parent)
    with pytest.raises(ConfigError, match="symbolic link: jobkit follows none"):
        OPENS[name](store)
    assert (store.path / name).is_symlink()
    check()


def test_the_path_to_a_run_may_be_a_link(tmp_path: Path) -> None:
    """A run directory that is a link, or lies behind one, as on scratch disks, is a run like any other."""
    (tmp_path / "scratch" / "run").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    (tmp_path / "mine").symlink_to(tmp_path / "scratch" / "run")
    for url in (tmp_path / "runs" / "run", tmp_path / "mine"):
        store = Store(url)
        store.write("a/b", b"x")
        assert store.read("a/b") == b"x"
        assert store.claim(contract.ATTEMPTS) >= 0
        Ledger(store.file(contract.EVENTS)).append("submitted")
        held = lock.acquire(store)
        assert held is not None
        held.close()


def test_a_file_of_a_step_that_is_a_link_is_damage(tmp_path: Path) -> None:
    """The bytes of a committed step are its own: a link in it is not read through, and the step does not check out."""
    victim, _ = outside(tmp_path)
    store = Store(tmp_path / "run")
    step = store.path / contract.step_dir(100)
    (step / "default").mkdir(parents=True)
    (step / "commit.json").write_bytes(commit_json({"default/a": b"mine"}))
    (step / "default" / "a").symlink_to(victim)
    assert commits.problems(store, 100) == ["default/a is a symbolic link"]


def test_a_pipe_in_a_run_holds_nobody_up(tmp_path: Path) -> None:
    """A named pipe where a file should be is an error at once: nobody waits for who writes to it."""
    store = Store(tmp_path)
    os.mkfifo(tmp_path / "x")
    with pytest.raises(ConfigError, match="a pipe"):
        store.read("x")
    with pytest.raises(ConfigError, match="a pipe"):
        Ledger(tmp_path / "x")


def test_a_supervisors_directory_is_one_of_this_run(tmp_path: Path) -> None:
    """Where an attempt's heartbeat lies is read in the run: a directory that is no supervisor's of it stays."""
    store = Store(tmp_path / "run")
    thesis = tmp_path / "jobkit-thesis"
    thesis.mkdir()
    (thesis / "chapter").write_text("mine")
    (tmp_path / "jobkit-link").symlink_to(thesis)
    for place in (thesis, tmp_path / "jobkit-link", "jobkit-\0", 7, ["jobkit-x"]):
        store.write(f"{contract.attempt_dir(0)}/supervisor.json", json.dumps({"heartbeat": place}, default=str))
        assert orphans.heartbeat_directory(store, 0) is None
    orphans.write_outcome(store, 0, program_code=None, reason="killed")
    assert (thesis / "chapter").read_text() == "mine"


# run.json and the archive.


@pytest.mark.parametrize(
    "fields",
    [
        {"code": "../../x"},
        {"code": "/etc"},
        {"code": "0" * 16, "root": "/w", "cwd": "/w/../x"},
        {"root": "/w", "cwd": "/w", "links": ["/you/.ssh"]},
        {"root": "/w", "cwd": "/w", "links": ["ok", "a/../../b"]},
        {"root": "/w", "cwd": "/w", "imports": [".", "../x"]},
        {"sweep": {name: [str(i) for i in range(1000)] for name in "abcdefgh"}},
    ],
)
def test_a_run_json_that_leads_outside_is_no_run(tmp_path: Path, fields: dict[str, Any]) -> None:
    """A digest, a link, an import directory or a working directory outside is refused when run.json is read."""
    (tmp_path / "run.json").write_bytes(run_json(**fields))
    with pytest.raises(JobkitError, match="is damaged"):
        specs.read(Store(tmp_path))


def test_a_point_takes_the_code_of_the_sweep_that_it_lies_in(tmp_path: Path) -> None:
    """Whatever a point's run.json says, its snapshot is that of the directory above it."""
    elsewhere = JobSpec(command=("true",), sweep_url=str(tmp_path / "theirs"))
    assert specs.code_store(Store(tmp_path / "sweep/points/3"), elsewhere).path == tmp_path / "sweep"
    assert specs.code_store(Store(tmp_path / "run"), elsewhere).path == tmp_path / "run"


def archive(store: Store, *members: tuple[str, bytes, str]) -> str:
    """Write an archive of (name, type, content or target) into a run; return its digest."""
    tarred = io.BytesIO()
    with tarfile.open(fileobj=tarred, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind, content in members:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.linkname = kind, 0o755, content
            data = content.encode() if kind == tarfile.REGTYPE else b""
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    code = hashlib.sha256(tarred.getvalue()).hexdigest()[:16]
    store.write(snapshot.archive_name(code), gzip.compress(tarred.getvalue()))
    return code


@pytest.mark.parametrize("kind", ["absolute", "climbing", "through", "hard", "device", "pipe", "odd"])
def test_an_archive_writes_nothing_outside(tmp_path: Path, kind: str) -> None:
    """Members that climb, go through a link, or are no files are refused before anything is unpacked."""
    victim, check = outside(tmp_path)
    members: dict[str, list[tuple[str, bytes, str]]] = {
        "absolute": [(str(victim), tarfile.REGTYPE, "theirs")],
        "climbing": [("a/../../../../victim/new", tarfile.REGTYPE, "theirs")],
        "through": [("a", tarfile.SYMTYPE, str(victim.parent)), ("a/new", tarfile.REGTYPE, "theirs")],
        "hard": [("a", tarfile.LNKTYPE, str(victim))],
        "device": [("a", tarfile.CHRTYPE, "")],
        "pipe": [("a", tarfile.FIFOTYPE, "")],
        "odd": [("a\nb", tarfile.REGTYPE, "x")],
    }
    store = Store(tmp_path / "run")
    code = archive(store, *members[kind])
    with pytest.raises(ConfigError, match="somebody changed it"):
        unpacking.unpack(store, code, root=tmp_path, links=())
    check()
    assert os.listdir(store.path / "code") == [f"{code}.tar.gz"]


def test_an_archive_that_is_made_to_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an archive may unpack to is bounded."""
    monkeypatch.setattr(unpacking, "_LARGEST_BYTES", 1 << 20)
    store = Store(tmp_path / "run")
    code = archive(store, ("a", tarfile.REGTYPE, "0" * (1 << 21)))
    with pytest.raises(ConfigError, match="damaged"):
        unpacking.unpack(store, code, root=tmp_path, links=())


def test_links_of_a_snapshot_stay_legal_and_lead_nobody_on(tmp_path: Path) -> None:
    """A link to data in the code is there as ever; what run.json wants linked behind it is not made there."""
    victim, check = outside(tmp_path)
    store, root = Store(tmp_path / "run"), tmp_path / "work"
    (root / "data").mkdir(parents=True)
    (root / "a" / "b").mkdir(parents=True)
    code = archive(store, ("a", tarfile.SYMTYPE, str(victim.parent)), ("train.py", tarfile.REGTYPE, "pass"))
    top = unpacking.unpack(store, code, root=root, links=("data",))
    assert (top / "a").resolve() == victim.parent
    assert (top / "data").resolve() == root / "data"
    code = archive(store, ("a", tarfile.SYMTYPE, str(victim.parent)), ("other.py", tarfile.REGTYPE, "pass"))
    with pytest.raises(ConfigError, match="symbolic link"):
        unpacking.unpack(store, code, root=root, links=("a/b",))
    check()


def test_code_with_names_that_none_may_have_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of the working tree whose name holds a newline or half a character is no part of the snapshot, loudly."""
    (tmp_path / "train.py").touch()
    (tmp_path / "a\nb.py").touch()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.py")).touch()
    assert snapshot.find(tmp_path, tmp_path / "run").files == ("train.py",)
    assert "holds 2" in capsys.readouterr().err


def test_fields_of_a_specification_are_all_there(tmp_path: Path) -> None:
    """A run.json as submit writes it passes the door."""
    spec = JobSpec(command=("true",), cwd="/w/a", root="/w", code="0" * 16, links=("data", "a/b c"), imports=(".", "s"))
    (tmp_path / "run.json").write_bytes(specs.encode(spec, "local"))
    assert specs.read(Store(tmp_path)) == spec
    assert msgspec.json.decode((tmp_path / "run.json").read_bytes())["backend"] == "local"


# What a run may be called, and where its home may lie.


@pytest.mark.parametrize(
    ("run", "told"),
    [
        ("runs/a\nb", "holds '\\n'"),
        ("runs/a\x1b[2Jb", "holds '\\x1b'"),
        ("runs/a\\b", "holds '\\\\'"),
        ("gs://bucket/a\nb", "holds '\\n'"),
        ("gs://bucket/a\\b", "holds '\\\\'"),
        ("gs://bucket/../b", "part that is empty"),
        ("gs://bucket//b", "part that is empty"),
        ("gs://bucket/" + "a/" * 500, "at most 800"),
        ("file:///tmp/a%0Ab", "holds '\\n'"),
        ("runs/" + "a" * 255, "a part of 255 bytes"),
        ("runs/" + "ü" * 128, "a part of 256 bytes"),
        ("runs/" + "a/" * 2000, "at most 3000"),
        (os.fsdecode(b"runs/\xff"), "UTF-8"),
        (os.fsdecode(b"gs://bucket/\xff"), "UTF-8"),
    ],
)
def test_a_run_that_something_would_stumble_over_is_refused_at_submit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, told: str
) -> None:
    """Control characters, backslashes, bytes that are no text, long names: refused in a sentence, and nothing made."""
    monkeypatch.chdir(tmp_path)
    code, said = jobkit("submit", "--run", run, "--", "true")
    assert (code, len(said.strip().splitlines())) == (2, 1)
    assert told in said
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("many", [10, pytest.param(test_hostile.MANY, marks=pytest.mark.slow)])
def test_any_run_and_name_is_taken_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int) -> None:
    """Any text as --run or --name is taken, or refused in a sentence; nothing is raised, nor made in a dry run."""
    monkeypatch.chdir(tmp_path)
    for chance in test_hostile.cases("places", many):
        letters = [
            *map(chr, range(1, 256)),
            "\ud800",
            "\udcff",
            "\u202e",
            "٣",
            "/",
            "/",
            "..",
            "://",
            "gs:",
            "~",
            "%0A",
        ]
        text = "".join(chance.choices(letters, k=chance.choice([1, 2, 5, 50, 300])))
        words = ["--run", f"runs/{text}"] if chance.random() < 0.6 else [chance.choice(["--run", "--name"]), text]
        code, said = jobkit("submit", "--dry-run", "--no-snapshot", *words, "--", "true")
        assert code in (0, 2), said
        assert code == 0 or said.startswith("jobkit: "), said
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a\nb", "a\x1bb", "a" * 255, "a/b", os.fsdecode(b"\xff")])
def test_a_name_that_something_would_stumble_over_is_refused_at_submit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A run's own name is short and plain."""
    monkeypatch.chdir(tmp_path)
    code, said = jobkit("submit", "--name", name, "--", "true")
    assert (code, len(said.strip().splitlines())) == (2, 1)
    assert "is not usable" in said or "may be in it" in said
    assert os.listdir(tmp_path) == []


def test_every_command_refuses_a_run_that_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are no UTF-8 as a run's path, for any command: a sentence, exit 2; and `ls` passes over such ones."""
    monkeypatch.chdir(tmp_path)
    run = os.fsdecode(b"r\xff")
    for words in (["status"], ["logs"], ["explain"], ["report"], ["cancel"], ["resume"], ["checkpoints"]):
        code, said = jobkit(*words, run)
        assert (code, len(said.strip().splitlines())) == (2, 1), said
    for name in (run, "fine"):
        Store(tmp_path / name if name == "fine" else tmp_path / "x").write(contract.RUN_JSON, run_json())
    os.rename(tmp_path / "x", tmp_path / run)
    code, said = jobkit("ls", ".")
    assert code == 0
    assert "fine" in said


def test_a_program_of_its_own_keeps_off_backslashes(tmp_path: Path) -> None:
    """A Run that nobody submitted refuses the path at which it would find all its checkpoints damaged."""
    from jobkit.run.run import Run  # brings jax in

    with pytest.raises(ConfigError, match="holds"):
        Run(f"{tmp_path}/a\\b")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("what", ["link", "file", "writable", "home link", "home writable"])
def test_a_home_that_somebody_else_may_have_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The directory for runs on object stores is this user's own, no link, and nobody else's to write: or refused."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv(contract.ENV_HOME, raising=False)
    root = tmp_path / f"jobkit-{os.getuid()}"
    home = home_of("gs://bucket/run") if what.startswith("home") else None
    place = home or root
    if home is not None:
        home.rmdir()
    if what.endswith("link"):
        (tmp_path / "theirs").mkdir()
        place.symlink_to(tmp_path / "theirs")
    elif what == "file":
        place.touch()
    else:
        place.mkdir()
        place.chmod(0o777)
    with pytest.raises(ConfigError, match="yours alone"):
        home_of("gs://bucket/run")
    assert not list((tmp_path / "theirs").glob("*"))


def test_a_home_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Homes have mode 0700, those that an older jobkit made wider too; with JOBKIT_HOME the path may be a link."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv(contract.ENV_HOME, raising=False)
    root = tmp_path / f"jobkit-{os.getuid()}"
    root.mkdir(mode=0o755)
    home = home_of("gs://bucket/run")
    home.chmod(0o755)
    assert home_of("gs://bucket/run") == home
    assert [path.stat().st_mode & 0o777 for path in (root, home)] == [0o700, 0o700]
    (tmp_path / "scratch").symlink_to(root)
    monkeypatch.setenv(contract.ENV_HOME, str(tmp_path / "scratch"))
    assert home_of("gs://bucket/run").resolve() == home.resolve()


# A bucket that anybody may write to, a few hundred times.


def climbing(chance: random.Random, victim: Path) -> str:
    """Return the name of an object below a run, which may lead anywhere as a path."""
    pieces = ["..", "..", "", ".", "0", "events-0.jsonl", "checkpoints", "100", "commit.json", "scores", "x"]
    if chance.random() < 0.3:
        return f"{chance.choice(['', 'attempts/0/', 'scores/', '/'])}{victim.parent}/{chance.choice('ab')}"
    start = chance.choice(["", "attempts/0", "checkpoints/100", "scores", "attempts/0/events-", "code", "a", "a/b"])
    way = [*chance.choices(pieces, k=chance.randint(1, 4)), *[".."] * chance.randint(0, 6)]
    name = "/".join([start, *way, victim.name])
    return chance.choice([name, name.lstrip("/"), name.replace("x", chance.choice(ODD[:9])), str(victim)])


def attack(gcs: GcsServer, tmp_path: Path, many: int) -> list[str]:
    """Put objects of any name into a bucket, look at the run there; return what changed outside the home."""
    victim = tmp_path / "yours" / "authorized_keys"
    victim.parent.mkdir()
    victim.write_text("mine")
    homes = tmp_path / "homes"
    before = test_hostile.seen(tmp_path, homes)
    for case, chance in enumerate(test_hostile.cases("bucket", many)):
        run = f"run-{os.getpid()}-{case}"
        gcs.write(f"{run}/run.json", run_json())
        listed = {climbing(chance, victim): b"theirs, and longer than yours was" for _ in range(4)}
        records = {name: FileRecord(len(data), f"{google_crc32c.value(data):08x}") for name, data in listed.items()}
        strange = Commit(step=100, attempt=0, at=0.0, reason="end", files=records if chance.random() < 0.7 else {})
        gcs.write(f"{run}/checkpoints/100/commit.json", commits._sealed(commits._written(strange)))
        for name, data in listed.items():
            for place in ("", "checkpoints/100/"):
                with contextlib.suppress(UnicodeEncodeError):
                    gcs.write(f"{run}/{place}{name.encode().decode()}", data)
        for look_at in (
            lambda store: mirror.refresh(store),
            lambda store: mirror.fetch_ledgers(store, 9),
            lambda store: remote_steps.fetch(store, 100, attempt=0),
            lambda store: remote_steps.problems(store, 100),
            lambda store: remote_steps.fetch_newest(store, Ledger(store.file("events.jsonl")), attempt=0),
            run_status.status,
        ):
            with contextlib.suppress(JobkitError):
                look_at(Store(f"gs://bucket/{run}", deadline_s=1.0))
        if test_hostile.seen(tmp_path, homes) != before:
            break
    after = test_hostile.seen(tmp_path, homes)
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


@pytest.mark.parametrize("many", [10, pytest.param(test_hostile.MANY, marks=pytest.mark.slow)])
def test_any_object_may_stand_in_a_bucket(gcs: GcsServer, tmp_path: Path, many: int) -> None:
    """Objects and commits of any name: nothing outside the home is made, changed or removed by who looks."""
    assert attack(gcs, tmp_path, many) == []


def test_without_the_door_the_bucket_reaches_everything(
    gcs: GcsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same attack does get out once names are no longer looked at: it is the door that holds it."""
    monkeypatch.setattr(names, "inside", lambda name: True)
    monkeypatch.setattr(names, "below", lambda root, name: root / name)
    with contextlib.suppress(Exception):
        assert attack(gcs, tmp_path, 10) != []
        return
    pytest.fail("nothing got out")
