"""The snapshot of a run, unpacked once and run by every attempt, so that it wins over the tree that it was taken of."""

import gzip
import hashlib
import io
import os
import secrets
import shutil
import stat
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from jobkit import contract, names
from jobkit.errors import ConfigError
from jobkit.rundir.files import sync_directory, sync_tree
from jobkit.rundir.store import Store, explain
from launch.spec import snapshot

_LARGEST_BYTES = 4 * snapshot.LIMIT_BYTES
"""Of an archive when it is read: its files, and a head and some padding for each."""


def unpack(store: Store, code: str, *, root: Path, links: Iterable[str]) -> Path:
    """Unpack an archive beside itself, once, and return the directory.

    Args:
        store: The run.
        code: The archive's digest.
        root: The tree that it was taken of: links point there.
        links: Paths that are linked into the unpacked tree.

    Raises:
        ConfigError: If the archive is missing or damaged.
    """
    target = store.file(f"{contract.CODE}/{code}")
    if store.exists(f"{contract.CODE}/{code}"):
        return target
    content = verified(store, code)
    temporary = target.with_name(f".{code}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.mkdir(mode=0o700)  # files get their own modes only after they are written
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            # Python before 3.11.4 has no filters, and "data" refuses the links that lead to a user's own files.
            tar.extraction_filter = getattr(tarfile, "tar_filter", None)
            tar.extractall(temporary, members=_members(tar))
        sync_tree(temporary)
        for name in links:
            _link(root, temporary, name)
        temporary.chmod(stat.S_IMODE(store.path.stat().st_mode) & 0o755)
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():
                raise
        sync_directory(target.parent)
    except OSError as error:
        raise explain(error, f"cannot unpack the snapshot into {target}") from None
    except tarfile.TarError as error:
        raise ConfigError(
            f"the snapshot {store.file(snapshot.archive_name(code))} is damaged: {error}; {_AGAIN}"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _members(tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """Return the members of an archive, the links last, so that nothing is written through one.

    Raises:
        ConfigError: If one is neither file nor link, or its name is not one inside.
    """
    members = tar.getmembers()
    known = {member.name for member in members}
    for member in members:
        above = member.name.split("/")[:-1]
        below_another = any("/".join(above[: depth + 1]) in known for depth in range(len(above)))
        if not (member.isreg() or member.issym()) or not names.inside(member.name) or below_another:
            raise ConfigError(f"the snapshot has a member {member.name!a}, as none of ours has: somebody changed it")
    return sorted(members, key=tarfile.TarInfo.issym)


_AGAIN = "submit again, to a new run directory"


def verified(store: Store, code: str) -> bytes:
    """Return the tar stream of an archive.

    Raises:
        ConfigError: If the archive is missing or damaged.
    """
    path = store.file(snapshot.archive_name(code))
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(store.read(snapshot.archive_name(code)))) as zipped:
            content = zipped.read(_LARGEST_BYTES)
    except FileNotFoundError:
        raise ConfigError(f"the snapshot {path} is missing; {_AGAIN}") from None
    except (gzip.BadGzipFile, EOFError, ValueError, zlib.error):
        content = b""
    actual = hashlib.sha256(content).hexdigest()[:16]
    if actual != code:
        raise ConfigError(f"the snapshot {path} is damaged: its digest is {actual}; {_AGAIN}")
    return content


def _link(root: Path, top: Path, name: str) -> None:
    original, link = root / name, top / name
    try:
        os.lstat(original)
    except (FileNotFoundError, NotADirectoryError):  # anything else is no answer
        return
    if os.path.lexists(link):
        return
    try:
        names.below(top, os.path.dirname(name)).mkdir(parents=True, exist_ok=True)
        link.symlink_to(original)
    except (FileExistsError, NotADirectoryError):
        pass  # a file of the snapshot stands where a directory was meanwhile


def python_path(top: Path, root: Path, imports: Iterable[str], old: str) -> str:
    """Return the PYTHONPATH under which the unpacked tree wins over the working tree.

    Args:
        top: The unpacked tree.
        root: The working tree.
        imports: Import directories, relative to both.
        old: The PYTHONPATH so far, with absolute entries.
    """
    wanted = [top, *([top / "src"] if (top / "src").is_dir() else []), *(top / name for name in imports)]
    rest = [entry for entry in old.split(os.pathsep) if entry and not _within(entry, root, top)]
    return os.pathsep.join(dict.fromkeys([*(os.path.normpath(path) for path in wanted), *rest]))


def _within(entry: str, root: Path, top: Path) -> bool:
    """Tell whether an entry of PYTHONPATH has its copy in the unpacked tree."""
    path = Path(entry).resolve()
    if not path.is_relative_to(root):
        return False
    copy = top / path.relative_to(root)
    return copy.is_dir() and copy.resolve().is_relative_to(top.resolve())
