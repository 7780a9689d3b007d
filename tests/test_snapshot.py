"""The snapshot: what belongs to it, that it is deterministic, that it is what runs."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from jobkit.errors import ConfigError
from jobkit.storage import Store
from launch import snapshot


def git(directory: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(directory), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A git work tree with committed, changed, new, deleted, ignored, linked and executable files."""
    top = tmp_path / "work"
    (top / "src" / "pkg").mkdir(parents=True)
    (top / "data").mkdir()
    (top / "sub").mkdir()
    files = {
        ".gitignore": "data/\n*.log\n__pycache__/\n", "train.py": "old", "gone.py": "x", "src/pkg/a.py": "a",
        "sub/run.sh": "#!/bin/sh", "data/big.bin": "data", "noise.log": "n", "sub/inner.log": "n", "a b\n.py": "odd",
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
    return snapshot.unpack(store, snapshot.take(tree, store), root=tree.root, links=tree.links)


def test_git_tree_as_it_is_now(work: Path, tmp_path: Path) -> None:
    """Changed and new files are in it, deleted and ignored ones are not, modes and links are kept."""
    copy = unpacked(work, Store(tmp_path / "run"), cwd=work / "sub")
    assert (copy / "train.py").read_text() == "new"
    assert (copy / "fresh.py").read_text() == "untracked"
    assert (copy / "a b\n.py").read_text() == "odd"
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
        snapshot.unpack(store, code, root=tree.root, links=())
    assert not store.exists(f"code/{code}")
    assert not list(store.file("code").glob(".*"))


def test_python_path_prefers_the_copy(work: Path, tmp_path: Path) -> None:
    """Import directories inside the work tree become the copy's; those elsewhere stay, in order, after it."""
    store = Store(tmp_path / "run")
    copy = unpacked(work, store)
    imports = snapshot.imports_below(work, [str(work / "sub"), str(tmp_path), str(work / "src")])
    assert imports == ("sub", "src")
    old = os.pathsep.join([str(work / "sub"), "/opt/lib", str(work / "data")])
    path = snapshot.python_path(copy, work, imports, old).split(os.pathsep)
    assert path == [str(copy), str(copy / "src"), str(copy / "sub"), "/opt/lib", str(work / "data")]
