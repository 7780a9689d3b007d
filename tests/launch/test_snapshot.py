"""The snapshot: what belongs to it, that it is deterministic, that it is what runs."""

import os
import stat
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jobkit
from jobkit.errors import ConfigError
from jobkit.rundir.store import Store
from launch.lifecycle import submission
from launch.spec import snapshot, unpacking
from tests.harness.jobs import Project, until_over
from tests.harness.jobs import project as make_project


def git(directory: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(directory), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """Make a project."""
    yield from make_project(tmp_path)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A git work tree with committed, changed, new, deleted, ignored, linked and executable files."""
    top = tmp_path / "work"
    (top / "src" / "pkg").mkdir(parents=True)
    (top / "data").mkdir()
    (top / "sub").mkdir()
    files = {
        ".gitignore": "data/\n*.log\n__pycache__/\n", "train.py": "old", "gone.py": "x", "src/pkg/a.py": "a",
        "sub/run.sh": "#!/bin/sh", "data/big.bin": "data", "noise.log": "n", "sub/inner.log": "n", "a b ü.py": "odd",
    }  # fmt: skip
    for name, text in files.items():
        (top / name).write_text(text)
    (top / "sub" / "run.sh").chmod(0o755)
    (top / "link.py").symlink_to("train.py")
    (top / "outside").symlink_to("../elsewhere")
    git(top, "init", "-q")
    git(top, "add", "-A")
    git(top, "commit", "-qm", "x")
    (top / "train.py").write_text("new")
    (top / "gone.py").unlink()
    (top / "fresh.py").write_text("untracked")
    return top


def unpacked(top: Path, store: Store, cwd: Path | None = None) -> Path:
    tree = snapshot.find(cwd or top, store.path)
    return unpacking.unpack(store, snapshot.take(tree, store), root=tree.root, links=tree.links)


def test_git_tree_as_it_is_now(work: Path, tmp_path: Path) -> None:
    """Changed and new files are in it, deleted and ignored ones are not, modes and links are kept."""
    copy = unpacked(work, Store(tmp_path / "run"), cwd=work / "sub")
    assert (copy / "train.py").read_text() == "new"
    assert (copy / "fresh.py").read_text() == "untracked"
    assert (copy / "a b ü.py").read_text() == "odd"
    assert not (copy / "gone.py").exists()
    assert os.access(copy / "sub" / "run.sh", os.X_OK)
    assert not os.access(copy / "train.py", os.X_OK)
    assert os.readlink(copy / "link.py") == "train.py"
    assert os.readlink(copy / "outside") == str(tmp_path / "elsewhere")


def test_ignored_paths_are_linked(work: Path, tmp_path: Path) -> None:
    """Data that git ignores is reached under its relative path; caches are not linked."""
    (work / "src" / "__pycache__").mkdir()
    (work / "src" / "__pycache__" / "a.pyc").write_text("")
    store = Store(tmp_path / "run")
    copy = unpacked(work, store)
    assert os.readlink(copy / "data") == str(work / "data")
    assert (copy / "data" / "big.bin").read_text() == "data"
    assert (copy / "sub" / "inner.log").read_text() == "n"
    assert not (copy / "src" / "__pycache__").exists()
    (archive,) = store.file("code").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        assert "data/big.bin" not in tar.getnames()


def test_digest_depends_on_content_alone(work: Path, tmp_path: Path) -> None:
    """The same files give the same bytes whenever and wherever; one changed letter gives others."""
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    code = snapshot.take(snapshot.find(work, one.path), one)
    os.utime(work / "train.py", (1, 1))
    tree = snapshot.find(work, two.path)
    assert snapshot.take(tree, two) == code == snapshot.digest(tree)
    assert one.read(f"code/{code}.tar.gz") == two.read(f"code/{code}.tar.gz")
    (work / "train.py").write_text("newer")
    assert snapshot.digest(snapshot.find(work, one.path)) != code


def test_runs_inside_the_tree_are_no_code(work: Path) -> None:
    """Neither this run's directory nor another's is archived; the other's can still be read from."""
    for name in ("mine", "other"):
        (work / "runs" / name / "code").mkdir(parents=True)
        (work / "runs" / name / "lock").write_text("")
        (work / "runs" / name / "big").write_text("checkpoint")
    tree = snapshot.find(work, work / "runs" / "mine")
    assert not [name for name in tree.files if name.startswith("runs/")]
    assert "runs/other" in tree.links
    assert "runs/mine" not in tree.links


def test_what_no_git_ignores_is_linked_all_the_same(work: Path, tmp_path: Path) -> None:
    """A virtual environment, and the run directory of a program that was started by hand, are linked, never copied."""
    for name in ("env/pyvenv.cfg", "env/bin/python", "byhand/strategy.json", "byhand/attempts/0/log.txt"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(name)
    tree = snapshot.find(work, tmp_path / "run")
    assert not [name for name in tree.files if name.startswith(("env/", "byhand/"))]
    assert {"env", "byhand"} <= set(tree.links)


def test_submodules_and_nested_work_trees(work: Path, tmp_path: Path) -> None:
    """Files of a work tree inside the work tree are part of the snapshot, its ignored ones are not."""
    inner = work / "vendor" / "lib"
    inner.mkdir(parents=True)
    (inner / "lib.py").write_text("lib")
    (inner / "skip.tmp").write_text("")
    (inner / ".gitignore").write_text("*.tmp")
    git(inner, "init", "-q")
    tree = snapshot.find(work, tmp_path / "run")
    assert "vendor/lib/lib.py" in tree.files
    assert "vendor/lib/skip.tmp" in tree.links


def test_without_git(tmp_path: Path) -> None:
    """Elsewhere all files below the directory count, but environments and caches do not."""
    top = tmp_path / "plain"
    for name in ("a.py", "pkg/b.py", ".venv/bin/python", "pkg/__pycache__/b.pyc", "c.pyc", "node_modules/x.js"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(name)
    os.mkfifo(top / "pipe")
    tree = snapshot.find(top, tmp_path / "run")
    assert tree.files == ("a.py", "pkg/b.py")
    assert tree.links == (".venv", "node_modules")


def test_too_large(work: Path, tmp_path: Path) -> None:
    """A tree over the limit is refused with the largest files and both remedies."""
    (work / "weights.npz").write_bytes(bytes(5000))
    with pytest.raises(ConfigError, match=r"largest files are weights.npz \(5.0 kB\).*gitignore.*--no-snapshot"):
        snapshot.find(work, tmp_path / "run", limit_bytes=4000)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_archive_is_refused(work: Path, tmp_path: Path, damage: str) -> None:
    """An archive that is not what was submitted never runs."""
    store = Store(tmp_path / "run")
    tree = snapshot.find(work, store.path)
    code = snapshot.take(tree, store)
    path = store.file(f"code/{code}.tar.gz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(bytes(content) if damage == "flip" else content[:-20])
    with pytest.raises(ConfigError, match=r"is (damaged|missing)"):
        unpacking.unpack(store, code, root=tree.root, links=())
    assert not store.exists(f"code/{code}")
    assert not list(store.file("code").glob(".*"))


def test_python_path_prefers_the_copy(work: Path, tmp_path: Path) -> None:
    """Import directories inside the work tree become the copy's; those elsewhere stay, in order, after it."""
    store = Store(tmp_path / "run")
    copy = unpacked(work, store)
    imports = snapshot.imports_below(work, [str(work / "sub"), str(tmp_path), str(work / "src")])
    assert imports == ("sub", "src")
    old = os.pathsep.join([str(work / "sub"), "/opt/lib", str(work / "data")])
    path = unpacking.python_path(copy, work, imports, old).split(os.pathsep)
    assert path == [str(copy), str(copy / "src"), str(copy / "sub"), "/opt/lib", str(work / "data")]


def reaches(top: Path, name: str, bits: int) -> bool:
    """Tell whether a class of users, by its bit of execution, gets through a tree to a file and may read it."""
    above = [top.joinpath(*name.split("/")[:depth]) for depth in range(1, len(name.split("/")))]
    return all(path.stat().st_mode & bits for path in above) and bool((top / name).stat().st_mode & bits << 2)


MODES = st.integers(0, 0o777).map(lambda mode: mode | 0o600)


@settings(max_examples=40, deadline=None)
@given(files=st.lists(MODES, min_size=3, max_size=3), directories=st.lists(MODES, min_size=2, max_size=2))
def test_modes_never_widen(files: list[int], directories: list[int]) -> None:
    """Who cannot read a file can read no copy of it, in an open run directory neither; its owner's x bit is kept."""
    names = ["a.py", "sub/b.py", "sub/deep/c.py"]
    with tempfile.TemporaryDirectory() as place:
        top, store = Path(place, "tree"), Store(Path(place, "run"))
        (top / "sub" / "deep").mkdir(parents=True)
        store.make(shared=True)
        for name, mode in zip(names, files, strict=True):
            (top / name).write_text(name)
            (top / name).chmod(mode)
        for name, mode in zip(["sub/deep", "sub"], directories, strict=True):
            (top / name).chmod(mode | 0o700)
        code = snapshot.take(tree := snapshot.find(top, store.path), store)
        archive = store.file(snapshot.archive_name(code))
        assert stat.S_IMODE(archive.stat().st_mode) & 0o077 == 0
        with tarfile.open(archive) as tar:
            packed = {entry.name: entry.mode for entry in tar}
        copy = unpacking.unpack(store, code, root=tree.root, links=tree.links)
        for name in names:
            original, copied = (top / name).stat().st_mode, (copy / name).stat().st_mode
            assert original & 0o700 == copied & 0o700 == packed[name] & 0o700
            assert copied & 0o022 == 0
            for bits in (0o001, 0o010):
                assert reaches(top, name, bits) or not (reaches(copy, name, bits) or packed[name] & bits << 2)


def test_a_new_run_is_its_owners_alone(project: Project) -> None:
    """Nobody else reaches the code, run.json, logs and ledgers of a new run; --shared, or its own mode, opens it."""
    (project.path / "notes").write_text("mine")
    (project.path / "notes").chmod(0o600)
    (own := project.runs / "own").mkdir(parents=True)
    own.chmod(0o750)
    (team := project.runs / "team").mkdir()
    team.chmod(0o2775)
    wanted = {"new": 0o700, "shared": 0o755, "own": 0o750, "team/new": 0o2750}
    umask = os.umask(0o022)
    try:
        stores = [project.submit("commit:1,exit:0", run=run, shared=run == "shared") for run in wanted]
    finally:
        os.umask(umask)
    for store, mode in zip(stores, wanted.values(), strict=True):
        until_over(store)
        assert stat.S_IMODE(store.path.stat().st_mode) == mode
        (copy,) = (path for path in store.file("code").iterdir() if path.is_dir())
        assert stat.S_IMODE(copy.stat().st_mode) == mode & 0o755
        assert stat.S_IMODE((copy / "notes").stat().st_mode) == 0o600


def test_a_run_that_nobody_submitted_is_its_owners_too(tmp_path: Path) -> None:
    """The directory that the first attempt makes is closed to others as well."""
    store = Store(tmp_path / "byhand" / "r")
    assert store.claim("attempts") == 0
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o700


def test_below_a_default_acl_whom_it_names_gets_in(tmp_path: Path) -> None:
    """Who is named by the default ACL of the directory above is not masked out of a new run."""
    entries = [(0x01, 7, -1), (0x02, 7, 65534), (0x04, 5, -1), (0x10, 7, -1), (0x20, 0, -1)]  # linux/posix_acl_xattr.h
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", acl)
    except OSError:
        pytest.skip("no ACLs on this file system")
    store = Store(tmp_path / "team" / "r")
    store.make()
    assert os.getxattr(store.path, "system.posix_acl_access") == acl  # the mask is rwx still


SECRETS = (".env", ".env.local", "certs/Server.PEM", "certs/tls.key", "credentials-gcp.json", "id_ed25519", "id_rsa")


@pytest.mark.parametrize("repository", [True, False])
def test_what_looks_like_a_secret_is_linked(work: Path, tmp_path: Path, repository: bool) -> None:
    """Untracked files with names of secrets are in no archive, can be read under their own names, and are named."""
    (work / "public.pem").write_text("tracked")
    git(work, "add", "public.pem")
    if not repository:
        (work / ".git").rename(tmp_path / "git")
        (work / "public.pem").unlink()
    for name in SECRETS:
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text("hush")
    store = Store(tmp_path / "run")
    tree = snapshot.find(work, store.path)
    code = snapshot.take(tree, store)
    copy = unpacking.unpack(store, code, root=tree.root, links=tree.links)
    with tarfile.open(store.file(snapshot.archive_name(code))) as tar:
        assert not {*SECRETS} & {*tar.getnames()}
        assert ("public.pem" in tar.getnames()) == repository
    assert all(os.readlink(copy / name) == str(work / name) for name in SECRETS)
    assert tree.secrets == SECRETS
    for sent, told in ((False, "linked, not copied into"), (True, "neither copied nor sent to the bucket")):
        (line,) = snapshot.remarks(tree, sent=sent)
        assert told in line
        assert line.startswith(".env, .env.local, certs/Server.PEM, certs/tls.key, credentials-gcp.json and 2 more: ")


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_submit_says_what_it_takes(project: Project, dry: tuple[str, ...]) -> None:
    """It names what looks like a secret, and how much it takes and how to leave things out where no git bounds it."""

    def told() -> list[str]:
        run = f"--run={project.runs}/{len(os.listdir(project.path))}"
        return project.cli("submit", *dry, run, "--", "python", "job.py", "exit:0").stderr.splitlines()

    assert told() == []
    (project.path / ".env").write_text("hush")
    for number in range(100):
        (project.path / f"{number}.txt").write_text("")
    secret, size = told()
    assert secret == "jobkit: .env: linked, not copied into the snapshot, since it looks like a secret"
    assert size.startswith("jobkit: the snapshot takes all 101 files (")
    assert all(word in size for word in (str(project.path), "the largest files are job.py", ".gitignore", "git init"))
    git(project.path, "init", "-q")
    assert told() == [secret]


def test_the_same_is_said_once(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """A process that submits the same code again and again, as a drill does, says it once."""
    submission._say_once.cache_clear()
    (project.path / ".env").write_text("hush")
    for run in ("a", "b"):
        until_over(project.submit("exit:0", run=run))
    assert capsys.readouterr().err.count("it looks like a secret") == 1


def test_a_large_directory_is_told_of(tmp_path: Path) -> None:
    """More than 50 MB in few files are worth a word as well."""
    (tmp_path / "data.bin").touch()
    for size, told in ((50_000_000, False), (50_000_001, True)):
        os.truncate(tmp_path / "data.bin", size)
        lines = list(snapshot.remarks(snapshot.find(tmp_path, tmp_path / "run"), sent=False))
        assert [("takes all 1 files" in line and "data.bin (50.0 MB)" in line) for line in lines] == [True] * told


@pytest.mark.parametrize("repository", [True, False])
def test_what_our_own_tools_wrote_is_no_code(tmp_path: Path, repository: bool) -> None:
    """Reports, SLURM's output and all of runs/ are no code; what only looks like them is."""
    top, run = tmp_path / "work", tmp_path / "work" / "runs" / "drill-1" / "reference"
    tool = '<head><meta charset="utf-8"><meta name="generator" content="jobkit">'
    files = {
        "train.py": "", "report.html": tool, "card.html": tool, "site/index.html": "<head>",
        "loss.png": "PNG Software\0jobkit", "logo.png": "PNG", "slurm-12.out": "", "slurm-12_3.out": "",
        "my.out": "", "runs/drill-1/cache/x": "x", "exp/a.py": "",
        "runs/other/code/1.tar.gz": "", "runs/other/lock": "", "pkg/runs/table.py": "",
    }  # fmt: skip
    for name, text in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    if repository:
        git(top, "init", "-q")
    code = ("exp/a.py", "logo.png", "my.out", "pkg/runs/table.py", "site/index.html", "train.py")
    assert snapshot.find(top, run).files == code
    assert snapshot.find(top, tmp_path / "elsewhere").files == code
    assert snapshot.find(top, run).links == ("runs/other",)
    if repository:
        (top / "runs" / "mine.py").write_text("")
        git(top, "add", "runs/mine.py")
        assert "runs/mine.py" in snapshot.find(top, run).files


@pytest.mark.parametrize("repository", [True, False])
def test_checkpoints_are_no_code(tmp_path: Path, repository: bool) -> None:
    """What an export, `jobkit.save` and plain Orbax wrote is linked, so that it is found; what git tracks is code."""
    top, tree = tmp_path / "work", {"w": np.ones(3)}
    (top / "pkg").mkdir(parents=True)
    (top / "train.py").write_text("")
    with jobkit.Run(tmp_path / "run", trackers=()) as run:
        state = run.resume(params=tree, optimizer=None)
        for _ in run.steps(1):
            state.params = {"w": state.params["w"] + 1}
    jobkit.export_params(tmp_path / "run", top / "exported")
    jobkit.save(top / "pkg" / "saved", params=tree)
    with ocp.CheckpointManager(top / "manager") as manager:
        manager.save(7, args=ocp.args.StandardSave(tree))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(top / "tracked", tree)
    if repository:
        git(top, "init", "-q")
        git(top, "add", "tracked", "train.py")
    found = snapshot.find(top, tmp_path / "elsewhere")
    apart = ("exported", "manager/7", "pkg/saved")
    assert found.links == (apart if repository else (*apart, "tracked"))
    assert {name.partition("/")[0] for name in found.files} == {"train.py"} | ({"tracked"} if repository else set())


@pytest.mark.slow
def test_a_report_changes_no_code(project: Project) -> None:
    """Page and picture of a report beside the code are not told of as changes."""
    store = project.submit("exit:0")
    until_over(store)
    for option in ("--html", "--png"):
        assert project.cli("report", store.url, option, f"loss{option.replace('--', '.')}").returncode == 0
    assert len(snapshot.find(project.path, store.path).files) == 1
