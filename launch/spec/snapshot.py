"""The code of a run, as it was when it was submitted: one deterministic archive, unpacked once, run by every attempt.

What git ignores (data, environments) is no part of the archive; it is linked into the unpacked tree, so that relative
paths keep working. So is what looks like a secret, or is a checkpoint, and is in no repository. A copy is never
readable for anybody who cannot read the original.
"""

import dataclasses
import fnmatch
import gzip
import hashlib
import io
import os
import re
import secrets
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from jobkit import contract, names
from jobkit.errors import ConfigError
from jobkit.rundir.files import sync_directory
from jobkit.rundir.store import Store, explain
from jobkit.units import show_size

LIMIT_BYTES = 200_000_000
SKIPPED = {".git", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".tox", ".nox"}
"""Directories that are neither archived nor linked: caches, and git's own."""
_LINKED = {".venv", "venv", "node_modules"}
"""Directories that are linked where no git says what to ignore."""
_SECRETS = (
    ".env", ".env.*", "*.pem", "*.key", "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "credentials*.json",
)  # fmt: skip
"""Names of files that are linked unless git tracks them, whatever their case."""
_MANY, _MUCH_BYTES = 100, 50_000_000
"""What is taken without a word where no repository says what belongs to the code."""
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Tree:
    """What belongs to a snapshot, found but not yet read.

    Args:
        root: Top of the tree.
        files: Files and symbolic links, relative to root, sorted.
        links: What is linked instead of copied, relative to root, sorted.
        secrets: Those of the links that were left out because they look like secrets.
        bounded: Whether a git repository says what belongs to it.
        sizes: Size in bytes of each file.
    """

    root: Path
    files: tuple[str, ...]
    links: tuple[str, ...]
    secrets: tuple[str, ...] = ()
    bounded: bool = True
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)


def find(cwd: Path, run: Path, *, limit_bytes: int = LIMIT_BYTES, secret: Iterable[Path] = ()) -> Tree:
    """Find what belongs to the snapshot of a working directory: of its git work tree, or of all below it.

    Args:
        cwd: Where the user is.
        run: The run directory; never part of a snapshot.
        limit_bytes: Largest size of all files together.
        secret: Files that are never copied, tracked or not.

    Raises:
        ConfigError: If the files are too large together.
    """
    cwd, run = cwd.resolve(), run.resolve()
    top = _git_top(cwd)
    tracked, untracked, ignored = _git_files(top) if top else ([], *_all_files(cwd))
    root = top or cwd
    private, known = {path.resolve() for path in secret}, set(tracked)
    code = {str(above) for name in tracked for above in PurePosixPath(name).parents}
    kept: set[str] = set()
    others, runs = set(ignored), {run: True} | _holding(root, run, tracked)
    secrets = {name for name in untracked if _looks_secret(name)}
    secrets |= {name for name in [*tracked, *untracked] if private and (root / name).resolve() in private}
    for name in [*tracked, *untracked]:
        linked = _apart_above(root, name, runs, code) or (name if name in secrets else None)
        if linked is None and _is_output(root / name, tracked=name in known):
            continue
        if linked is not None and root / linked in run.parents:  # a link there would lead around in a circle
            continue
        (kept if linked is None else others).add(linked or name)
    files = names.sift(sorted(kept), where=str(root))
    links = tuple(_topmost(name for name in names.sift(sorted(others), where=str(root)) if _linkable(root, name, run)))
    sizes = {name: size for name in files if (size := _size(root / name)) is not None}
    tree = Tree(root, tuple(files), links, tuple(sorted(secrets.intersection(links))), top is not None, sizes)
    if sum(sizes.values()) > limit_bytes:
        raise ConfigError(
            f"the code below {root} is {show_size(sum(sizes.values()))}, and a snapshot may have "
            f"{show_size(limit_bytes)}; {_largest(tree)}: name them in .gitignore (they are linked then), or submit "
            "with --no-snapshot"
        )
    return tree


def remarks(tree: Tree, *, sent: bool) -> Iterator[str]:
    """Say what a person should know of a snapshot before it is taken: what it leaves out, and how much it takes.

    Args:
        tree: What was found.
        sent: Whether the archive goes to an object store.
    """
    if tree.secrets:
        more = f" and {len(tree.secrets) - _SHOWN} more" if len(tree.secrets) > _SHOWN else ""
        shown = ", ".join(tree.secrets[:_SHOWN]) + more
        what = "linked, neither copied nor sent to the bucket" if sent else "linked, not copied into the snapshot"
        looks = "they look like secrets" if len(tree.secrets) > 1 else "it looks like a secret"
        yield f"{shown}: {what}, since {looks}"
    size = sum(tree.sizes.values())
    if not tree.bounded and (len(tree.files) > _MANY or size > _MUCH_BYTES):
        yield (
            f"the snapshot takes all {len(tree.files):,} files ({show_size(size)}) below {tree.root}, since no git "
            f"repository says what is code; {_largest(tree)}. To leave files out: 'git init' there and name them in "
            ".gitignore (they are linked then), submit from the directory of the code alone, or --no-snapshot"
        )


def _size(path: Path) -> int | None:
    """Return a file's size in bytes, None if it is gone since it was listed."""
    try:
        return path.lstat().st_size
    except OSError:
        return None


def _looks_secret(name: str) -> bool:
    last = name.rpartition("/")[2].lower()
    return any(fnmatch.fnmatchcase(last, pattern) for pattern in _SECRETS)


def _largest(tree: Tree) -> str:
    largest = sorted(tree.sizes, key=lambda name: -tree.sizes[name])[:3]
    return "the largest files are " + ", ".join(f"{name} ({show_size(tree.sizes[name])})" for name in largest)


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, check=False)
    except OSError:
        return None
    return os.fsdecode(done.stdout) if done.returncode == 0 else None


def _git_top(cwd: Path) -> Path | None:
    top = _git(cwd, "rev-parse", "--show-toplevel")
    return Path(top.removesuffix("\n")) if top and top.strip() else None


def _git_files(top: Path) -> tuple[list[str], list[str], list[str]]:
    """List (tracked, untracked, ignored) of a work tree, submodules and nested work trees included."""
    listed = [
        [name.rstrip("/") for name in (_git(top, "ls-files", "-z", *which) or "").split("\0") if name]
        for which in (
            ("--cached",),
            ("--others", "--exclude-standard"),
            ("--others", "--ignored", "--exclude-standard", "--directory"),
        )
    ]
    groups: tuple[list[str], list[str], list[str]] = [], [], listed[2]
    for files, entries in zip(groups[:2], listed[:2], strict=True):
        for name in entries:
            path = top / name
            if path.is_dir() and not path.is_symlink():
                inner = _git_files(path) if (path / ".git").exists() else ([], [], [])
                for into, below in zip(groups, inner, strict=True):
                    into += [f"{name}/{each}" for each in below]
            elif _archivable(path):
                files.append(name)
    return groups


def _all_files(top: Path) -> tuple[list[str], list[str]]:
    files, links = [], []
    for directory, subdirectories, entries in os.walk(top):
        relative = os.path.relpath(directory, top)
        prefix = "" if relative == "." else f"{relative}/"
        for name in list(subdirectories):
            path = Path(directory, name)
            if name in _LINKED or _stands_apart(path):
                links.append(prefix + name)
            if name in SKIPPED or name in _LINKED or _stands_apart(path):
                subdirectories.remove(name)
            elif path.is_symlink():
                files.append(prefix + name)
        files += [prefix + name for name in entries if not name.endswith(".pyc") and _archivable(Path(directory, name))]
    return files, links


def _archivable(path: Path) -> bool:
    """Tell a file or symbolic link from what is gone or is a socket, a device, a pipe."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISLNK(mode)


_MADE_BY_US = (b'<meta name="generator" content="jobkit">', b"Software\0jobkit")
"""How a page and a picture begin that a report or a drill wrote."""
_OF_SLURM = re.compile(r"slurm-\d+(_\d+)?\.(out|err)")


def _is_output(path: Path, *, tracked: bool) -> bool:
    """Tell what a run's own tools wrote from code: a report, a card, what SLURM has a job print into."""
    if path.suffix not in (".html", ".png", ".out", ".err") or path.is_symlink():
        return False
    if _OF_SLURM.fullmatch(path.name):
        return not tracked
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError:
        return False
    return any(mark in head for mark in _MADE_BY_US)


def _holding(root: Path, run: Path, tracked: Iterable[str]) -> dict[Path, bool]:
    """Return which of the directories called `runs`, where runs go by default, hold nothing but runs.

    What lies there and is no run, the caches of a drill say, is no code either.
    """
    code = {root / above for name in tracked for above in PurePosixPath(name).parents if above.name == _RUNS}
    holding: dict[Path, bool] = {}
    for path in {root / _RUNS, *run.parents}:
        if path.name == _RUNS and path != root and path.is_relative_to(root) and path not in code:
            below = (one for one in _directories(path) for one in (one, *_directories(one)))
            if run.is_relative_to(path) or any(_is_run(one) for one in below):
                holding |= dict.fromkeys(_directories(path), True)
    return holding


_RUNS = "runs"


def _directories(path: Path) -> list[Path]:
    try:
        return [path / entry.name for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _stands_apart(path: Path, *, tracked: bool = False) -> bool:
    """Tell whether a directory is linked, never copied: a run, a virtual environment, or a checkpoint of no repository.

    Args:
        path: The directory.
        tracked: Whether it has files that git tracks.
    """
    return _is_run(path) or (path / "pyvenv.cfg").is_file() or (not tracked and _is_checkpoint(path))


def _is_checkpoint(path: Path) -> bool:
    """Tell whether a directory is what Orbax wrote, as an export of ours is, or what `jobkit.save` did."""
    saved = (path / contract.CHECKPOINTS).glob(f"*/{contract.COMMIT}")
    return (path / "_CHECKPOINT_METADATA").is_file() or any(saved)


def _is_run(path: Path) -> bool:
    """Tell whether a directory is that of a run, submitted or begun by hand."""
    made = (path / contract.RUN_JSON).is_file() or (path / contract.CODE).is_dir()
    submitted = made and (path / contract.LOCK).is_file()
    by_hand = (path / contract.STRATEGY).is_file() and (path / contract.ATTEMPTS).is_dir()
    return submitted or by_hand


def _apart_above(root: Path, name: str, runs: dict[Path, bool], code: set[str]) -> str | None:
    """Return the directory apart that a file lies in, relative to root, None if it is in none.

    Args:
        root: The tree.
        name: The file.
        runs: A memory of which directories stand apart.
        code: Directories with files that git tracks.
    """
    parts = name.split("/")
    for depth in range(1, len(parts)):
        above = "/".join(parts[:depth])
        path = root / above
        if path not in runs:
            runs[path] = _stands_apart(path, tracked=above in code)
        if runs[path]:
            return above
    return None


def _linkable(root: Path, name: str, run: Path) -> bool:
    parts = name.split("/")
    if SKIPPED.intersection(parts) or name.endswith((".pyc", ".egg-info")):
        return False
    path = root / name
    return path != run and run not in path.parents


def _topmost(names: Iterable[str]) -> Iterator[str]:
    """Drop every name below another one of them; they come sorted."""
    seen: set[str] = set()
    for name in names:
        parts = name.split("/")
        if not any("/".join(parts[:depth]) in seen for depth in range(1, len(parts))):
            seen.add(name)
            yield name


class _Hashing:
    """A writer that hashes what passes."""

    def __init__(self, file: BinaryIO | gzip.GzipFile) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self._file.write(content)


def digest(tree: Tree) -> str:
    """Return the digest that the archive of a tree has, without writing it."""
    with open(os.devnull, "wb") as nowhere:
        return _write_tar(tree, nowhere)


def archive_name(code: str) -> str:
    """Return the archive's name inside a run directory."""
    return f"{contract.CODE}/{code}.tar.gz"


def take(tree: Tree, store: Store) -> str:
    """Write the archive into a run directory and return its digest: sha256 of the tar stream, 16 hexadecimal digits.

    Durability: the archive is on storage on return, whole or not at all.
    """
    temporary = store.file(contract.CODE) / f".{secrets.token_hex(6)}.tmp"
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        # Its owner's alone, wherever it lies: files are in it that nobody else may read.
        with open(temporary, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=6) as zipped:
                code = _write_tar(tree, zipped)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, store.file(archive_name(code)))
        sync_directory(temporary.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise explain(error, f"cannot write the snapshot into {store.file(contract.CODE)}") from None
    return code


def _write_tar(tree: Tree, file: BinaryIO | gzip.GzipFile) -> str:
    hashing = _Hashing(file)
    with tarfile.open(fileobj=hashing, mode="w|", format=tarfile.GNU_FORMAT) as tar:  # type: ignore[call-overload]
        for entry, content in entries(tree):
            tar.addfile(entry, io.BytesIO(content))
    return hashing.sha256.hexdigest()[:16]


def entries(tree: Tree) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Yield what the archive of a tree has, in its order: each file or link, and its content.

    Raises:
        ConfigError: If a file cannot be read.
    """
    for name in tree.files:
        try:
            yield _entry(tree.root, name)
        except FileNotFoundError:
            continue  # removed since it was listed
        except OSError as error:
            raise ConfigError(
                f"cannot read {tree.root / name} for the snapshot: {error.strerror}; make it readable, name it "
                "in .gitignore, or submit with --no-snapshot"
            ) from None


def _entry(root: Path, name: str) -> tuple[tarfile.TarInfo, bytes]:
    path = root / name
    entry = tarfile.TarInfo(name)
    status = path.lstat()
    entry.mtime = 0
    if stat.S_ISLNK(status.st_mode):
        entry.type, entry.mode = tarfile.SYMTYPE, 0o777
        entry.linkname = _kept_target(root, name, os.readlink(path))
        return entry, b""
    content = path.read_bytes()
    entry.mode = _kept_mode(root, name, status.st_mode)
    entry.size = len(content)  # not the status's: the file may change while it is read
    return entry, content


def _kept_mode(root: Path, name: str, mode: int) -> int:
    """Return a copy's mode: nobody gets more than the original gives, and no one else may write.

    The copy's group may be another than the original's, so that a group gets what everybody gets. A directory that is
    closed closes what is below it.
    """
    everybody = mode & 0o005
    above = [root / directory for directory in Path(name).parents[:-1]] if everybody else []
    if not all(directory.stat().st_mode & 0o011 == 0o011 for directory in above):
        everybody = 0
    return (mode & 0o700) | (everybody << 3 & mode) | everybody


def _kept_target(root: Path, name: str, target: str) -> str:
    """Return a symbolic link's target; one that leaves the tree becomes absolute, so that it still points there."""
    inside = os.path.normpath(os.path.join(os.path.dirname(name), target))
    if not os.path.isabs(target) and inside.split(os.sep)[0] == os.pardir:
        return os.path.normpath(root / inside)
    return target


def imports_below(root: Path, entries: Iterable[str]) -> tuple[str, ...]:
    """Return which of Python's import directories lie inside a tree, relative to it.

    Args:
        root: The tree.
        entries: PYTHONPATH's and sys.path's; those of the environment itself (sys.prefix) do not count.
    """
    prefixes = [Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]
    directories: list[str] = []
    for entry in entries:
        path = Path(entry or os.curdir).resolve()
        if any(path.is_relative_to(prefix) for prefix in prefixes if prefix != root and prefix.is_relative_to(root)):
            continue
        if path.is_relative_to(root) and path.is_dir() and "site-packages" not in path.parts:
            relative = path.relative_to(root).as_posix()
            if relative not in directories:
                directories.append(relative)
    return tuple(directories)
