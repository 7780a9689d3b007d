"""tf.data and PyTorch's DataLoader for the scripts that a drill is tried on; beside the environment, not in it.

`python -m tests.harness.loaders STAMP` provides both below .venv/loaders, as `make test-all` does; it needs no root.
TensorFlow comes from the package index without what it depends on: what it needs here the environment has. PyPI's
torch for Linux brings 2.5 GB of CUDA, so PyTorch is Debian's, unpacked. It was built against an older numpy, so that
what a script takes from it are Python's numbers, no arrays.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.harness import debian

ROOT = Path(__file__).parent.parent.parent
PLACE = ROOT / ".venv" / "loaders"
NAMES = ("tensorflow", "torch")
HOW = "make .venv/.loaders"
TENSORFLOW = ["tensorflow-cpu==2.21.0", "astunparse==1.6.3", "flatbuffers==25.12.19", "gast==0.7.0"]
TENSORFLOW += ["google-pasta==0.2.0", "termcolor==3.3.0"]
LEFT_OUT = r"python3-(?!torch$)|libtorch-test|(gdal|mariadb|mysql|proj|unixodbc)-|lib(input|wacom)-"
"""What Debian's PyTorch depends on and does without: numpy above all, of which there is one."""


def environment(name: str) -> dict[str, str]:
    """Return the variables with which a program finds a library.

    Args:
        name: One of `NAMES`.

    Raises:
        OSError: If it was not provided.
    """
    root = PLACE / name
    if not root.exists():
        raise OSError(f"{name} is missing: {HOW}, on an amd64 with Debian's or Ubuntu's packages for its Python")
    if name == "tensorflow":
        return {"PYTHONPATH": str(root / "site-packages"), "TF_CPP_MIN_LOG_LEVEL": "3"}
    libraries = [root / "usr/lib"]
    for directory in (root / "usr/lib", root / "lib"):
        libraries += [found / below for found in directory.glob("*-linux-gnu") for below in ("", "blas", "lapack")]
    return {
        "PYTHONPATH": str(root / "usr/lib/python3/dist-packages"),
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
    }


def _provide(name: str) -> None:
    """Provide a library, unless it is there and can be imported.

    Raises:
        OSError: If it cannot be had, or cannot be imported here.
    """
    root = PLACE / name
    if not root.exists():
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=PLACE) as made:
            new = Path(made) / "root"
            (_tensorflow if name == "tensorflow" else _torch)(new)
            new.rename(root)
    command = [sys.executable, "-W", "ignore", "-c", f"import {name}"]
    done = subprocess.run(command, env=os.environ | environment(name), capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(root)
        raise OSError(f"{name} cannot be imported: {(done.stderr.strip().splitlines() or ['?'])[-1]}")


def _tensorflow(new: Path) -> None:
    uv = Path(sys.executable).with_name("uv")
    command = [uv, "pip", "install", "-q", "-p", sys.executable, "--no-deps", "--target", new / "site-packages"]
    done = subprocess.run([*command, *TENSORFLOW], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"tensorflow cannot be had: {done.stderr.strip()}")


def _torch(new: Path) -> None:
    debian.check()
    packages = new.with_name("packages")
    debian.download_afresh(packages, ["python3-torch"], LEFT_OUT)
    debian.extract(packages, new)


def main(stamp: str | None = None) -> int:
    """Provide both and say so in one line; where one cannot be had, only CI fails.

    Args:
        stamp: A file that is made where both are there.
    """
    PLACE.mkdir(parents=True, exist_ok=True)
    try:
        with ThreadPoolExecutor() as both:
            list(both.map(_provide, NAMES))
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"scripts with tf.data and PyTorch's DataLoader are not all drilled: {error}", file=sys.stderr)
        return int(bool(os.environ.get("CI")))
    print(f"{' and '.join(NAMES)} for scripts that are drilled, in {PLACE}")
    if stamp is not None:
        Path(stamp).touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
