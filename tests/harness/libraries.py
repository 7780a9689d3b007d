"""The sets of libraries that tests run on, besides constraints.txt: the lowest that pyproject allows, and the newest.

`python -m tests.harness.libraries NAME STAMP`, as `make test-NAME` does, makes .venv/NAME from constraints-NAME.txt
with the Python of that set: one that runs on this machine, else Debian's, unpacked beside it. It needs no root.
"""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from jobkit import versions
from tests.harness import debian, slurm_packages

ROOT = Path(__file__).parent.parent.parent
VENV = ROOT / ".venv"
SETS = {"lowest": "3.11", "newest": "3.13"}
"""Which Python each set is installed on."""
SUITES = {"3.11": "bookworm", "3.13": "trixie"}
"""Which Debian has which Python."""
PACKAGES = ["python{}", "libstdc++6"]
LEFT_OUT = "perl-base|base-passwd|debconf|media-types|tzdata|netbase|ca-certificates|gcc-"
"""What Debian's Python depends on and does without."""


def python(wanted: str) -> Path:
    """Return a Python of a version that runs; Debian's is unpacked where there is none.

    Args:
        wanted: As "3.13".

    Raises:
        OSError: If there is none to be had.
    """
    found = (Path(directory) / f"python{wanted}" for directory in [VENV / "bin", *os.get_exec_path()])
    if (runs := next((path for path in found if _runs(path)), None)) is not None:
        return runs
    root = VENV / f"python-{wanted}"
    program = root / "usr/bin" / f"python{wanted}"
    if not _runs(program):
        packages = [name.format(wanted) for name in PACKAGES]
        try:
            debian.unpack_suite(SUITES[wanted], packages, LEFT_OUT, root, lambda new: [new / program.relative_to(root)])
        except OSError as error:
            raise OSError(f"no python{wanted} runs here, which can be installed; {error}") from None
    if not _runs(program):
        raise OSError(f"the python{wanted} of Debian's {SUITES[wanted]} does not run here: install python{wanted}")
    return program


def _runs(program: Path) -> bool:
    """Tell whether a Python starts; one that is on PATH may be a shim for a version that is not chosen."""
    return os.access(program, os.X_OK) and not subprocess.run([program, "-c", ""], capture_output=True).returncode


def install(name: str) -> Path:
    """Make the virtual environment of a set, with the project and all its extras; return it.

    Raises:
        OSError: If its Python cannot be had.
        subprocess.CalledProcessError: If a package cannot be had; uv has said which.
    """
    uv, target, base = Path(sys.executable).with_name("uv"), VENV / name, python(SETS[name])
    subprocess.run([uv, "venv", "-q", "--clear", "--no-python-downloads", "-p", base, target], check=True)
    at = ["-p", target / "bin/python", "-c", f"constraints-{name}.txt"]
    subprocess.run([uv, "pip", "install", "-q", *at, "-e", ".[all]"], cwd=ROOT, check=True)
    return target


def in_use() -> str:
    """Name the versions that tests run on here, in one line."""
    packages = [*versions.TRAINING, "fsspec", "gcsfs", "s3fs"]
    named = [f"Python {platform.python_version()}", *(f"{package} {version(package)}" for package in packages)]
    slurm = slurm_packages.find()
    return ", ".join([*named, slurm.version() if slurm else "no SLURM"])


def main(name: str, stamp: str) -> int:
    """Make a set and say so in one line.

    Args:
        name: One of `SETS`.
        stamp: A file that is made where it is there.
    """
    try:
        target = install(name)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"the {name} set of libraries cannot be installed: {error}", file=sys.stderr)
        return 1
    print(f"the {name} set of libraries for the tests in {target}")
    Path(stamp).touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
