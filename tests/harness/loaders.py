"""Libraries that people bring along, for programs that the tests run; beside the environment, not in it.

`python -m tests.harness.loaders STAMP` provides them below .venv/loaders, as `make test-all` does; it needs no root.
They come from the package index, each without what it depends on and the environment has. PyPI's torch for Linux brings
2.5 GB of CUDA, so PyTorch is Debian's, unpacked. It was built against an older numpy, so that what a program takes from
it are Python's numbers, no arrays.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness import debian

ROOT = Path(__file__).parent.parent.parent
PLACE = ROOT / ".venv" / "loaders"
HOW = "make .venv/.loaders"
PACKAGES = {
    "tensorflow": (
        "tensorflow-cpu==2.21.0", "astunparse==1.6.3", "flatbuffers==25.12.19", "gast==0.7.0", "google-pasta==0.2.0",
        "termcolor==3.3.0",
    ),
    "torch": ("torchdata==0.11.0",),
    "datasets": (
        "datasets==5.2.0", "dill==0.4.1", "filelock==4.3.1", "httpcore2==2.16.2", "httpx2==2.16.2",
        "huggingface-hub==2.4.0", "multiprocess==0.70.19", "pandas==3.1.1", "pyarrow==26.0.1", "tqdm==4.70.1",
        "truststore==0.10.5", "xxhash==4.1.0",
    ),
    "haiku": ("dm-haiku==0.0.17", "jmp==0.0.4", "tabulate==0.10.0"),
}  # fmt: skip
"""What the package index has of each library, by the name under which that is imported."""
LEFT_OUT = r"python3-(?!torch$)|libtorch-test|(gdal|mariadb|mysql|proj|unixodbc)-|lib(input|wacom)-"
"""What Debian's PyTorch depends on and does without: numpy above all, of which there is one."""


def environment(name: str) -> dict[str, str]:
    """Return the variables with which a program finds a library.

    Args:
        name: One of `PACKAGES`.

    Raises:
        OSError: If it was not provided.
    """
    root = PLACE / name
    if not root.exists():
        raise OSError(f"{name} is missing: {HOW}, on an amd64 with Debian's or Ubuntu's packages for its Python")
    packages = {"PYTHONPATH": str(_packages(name, root)), "TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"}
    if name != "torch":
        return packages
    libraries = [root / "usr/lib"]
    for directory in (root / "usr/lib", root / "lib"):
        libraries += [found / below for found in directory.glob("*-linux-gnu") for below in ("", "blas", "lapack")]
    return packages | {"LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries))}


def needed(name: str) -> dict[str, str]:
    """Return the variables with which a program finds a library and jobkit; without it skip the test, on CI fail.

    Args:
        name: One of `PACKAGES`; others need nothing.
    """
    if name not in PACKAGES:
        return {}
    try:
        found = environment(name)
    except OSError as error:
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing(str(error))
    return {**found, "PYTHONPATH": os.pathsep.join([str(ROOT), found["PYTHONPATH"]])}


def _packages(name: str, root: Path) -> Path:
    return root / ("usr/lib/python3/dist-packages" if name == "torch" else "site-packages")


def _provide(name: str) -> None:
    """Provide a library, unless it is there and can be imported.

    Raises:
        OSError: If it cannot be had, or cannot be imported here.
    """
    root = PLACE / name
    if not root.exists():
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=PLACE) as made:
            new = Path(made) / "root"
            if name == "torch":
                _torch(new)
            _install(name, _packages(name, new))
            new.rename(root)
    command = [sys.executable, "-W", "ignore", "-c", f"import {name}"]
    done = subprocess.run(command, env=os.environ | environment(name), capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(root)
        raise OSError(f"{name} cannot be imported: {(done.stderr.strip().splitlines() or ['?'])[-1]}")


def _install(name: str, into: Path) -> None:
    uv = Path(sys.executable).with_name("uv")
    command = [uv, "pip", "install", "-q", "-p", sys.executable, "--no-deps", "--target", into, *PACKAGES[name]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{name} cannot be had: {done.stderr.strip()}")


def _torch(new: Path) -> None:
    debian.check()
    packages = new.with_name("packages")
    debian.download_afresh(packages, ["python3-torch"], LEFT_OUT)
    debian.extract(packages, new)


def main(stamp: str | None = None) -> int:
    """Provide all and say so in one line; where one cannot be had, only CI fails.

    Args:
        stamp: A file that is made where all are there.
    """
    PLACE.mkdir(parents=True, exist_ok=True)
    try:
        with ThreadPoolExecutor() as together:
            list(together.map(_provide, PACKAGES))
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"programs with libraries that people bring along are not all tried: {error}", file=sys.stderr)
        return int(bool(os.environ.get("CI")))
    print(f"{', '.join(PACKAGES)} for the programs of the tests, in {PLACE}")
    if stamp is not None:
        Path(stamp).touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
