"""What becomes of a save when a container is stopped, by how the container was started: measured, as a table.

`python -m tests.harness.container_table` measures it and writes it into docker/README.md; a test measures it again.
"""

import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.harness import engine
from tests.harness.engine import ROOT, Container, Engine
from tests.harness.jobs import until

README = ROOT / "docker" / "README.md"
_BLOCK = "--block-signal=TERM,INT,USR1,USR2,HUP"
_SUPERVISE = ("python3", "-m", "jobkit.supervise", "--")
SAVE_S, ENOUGH_S, SHORT_S = 3, 15, 1

PROGRAM = """
import os, pathlib, signal, sys, time
beat = None
if "JOBKIT_SUPERVISOR" in os.environ:
    from jobkit.supervise.heartbeat import Heartbeat, Phase
    beat = Heartbeat(pathlib.Path(os.environ["JOBKIT_SUPERVISOR"]))
print("importing", flush=True)
while os.environ.get("MOMENT") == "importing":
    time.sleep(0.05)
noticed = []
signal.signal(signal.SIGTERM, lambda *_: noticed.append(1))
if beat:
    beat.enter(Phase.LISTENING)
print("training", flush=True)
while not noticed:
    time.sleep(0.02)
print("saving", flush=True)
if beat:
    beat.enter(Phase.STOPPING)
until = time.monotonic() + SAVE_S
while time.monotonic() < until:
    time.sleep(0.02)
print("saved", flush=True)
if beat:
    beat.enter(Phase.STOPPED)
sys.exit(75)
""".replace("SAVE_S", str(SAVE_S))
"""A training in small: it takes a while to import, saves when it is told to stop, and exits 75."""

_SLOW = "import sys, time; print('starting', flush=True); time.sleep(3)"
"""As sitecustomize: a Python that takes long to start, as from a cold disk."""


@dataclass(frozen=True)
class Form:
    """A way to start a training in a container.

    Args:
        shown: How it stands in a Dockerfile or at a command line.
        command: What the container runs.
        init: Whether `docker run --init` is given.
    """

    shown: str
    command: tuple[str, ...]
    init: bool = False


FORMS = [
    Form("this image: `env --block-signal` and the supervisor", ("env", _BLOCK, *_SUPERVISE, "python3", "train.py")),
    Form('`["python3", "-m", "jobkit.supervise", "--", ...]`', (*_SUPERVISE, "python3", "train.py")),
    Form("supervisor, around a script without `exec`", (*_SUPERVISE, "sh", "script.sh")),
    Form("supervisor, around `python3 train.py \\| tee`", (*_SUPERVISE, "sh", "-c", "python3 train.py | tee /tmp/log")),
    Form('`["python3", "train.py"]`', ("python3", "train.py")),
    Form('`["python3", "train.py"]`, `--init`', ("python3", "train.py"), init=True),
    Form("`python3 train.py` (shell form)", ("sh", "-c", "python3 train.py")),
    Form("script without `exec`", ("sh", "script.sh")),
    Form("script without `exec`, `--init`", ("sh", "script.sh"), init=True),
    Form("script with `exec python3 train.py`", ("sh", "exec.sh")),
    Form("`python3 train.py \\| tee log`", ("sh", "-c", "python3 train.py | tee /tmp/log")),
]
MOMENTS = {
    "starting": "Python starts",
    "importing": "imports",
    "training": "training",
    "saving": "again, while it saves",
    "short": f"training, `-t {SHORT_S}`",
}


@contextlib.contextmanager
def files() -> Iterator[Path]:
    """Provide the directory that is /app in every container."""
    with tempfile.TemporaryDirectory(prefix="jobkit-table-") as made:
        app = Path(made)
        (app / "slow").mkdir()
        texts = {
            "train.py": PROGRAM,
            "script.sh": "python3 train.py\necho after\n",
            "exec.sh": "exec python3 train.py\n",
        }
        for name, text in (texts | {"slow/sitecustomize.py": _SLOW}).items():
            (app / name).write_text(text)
        for path in (app, *app.rglob("*")):
            path.chmod(0o755)
        yield app


def try_out(docker: Engine, form: Form, moment: str, app: Path) -> str:
    """Stop a container at a moment; return what became of it."""
    options = ["--entrypoint=", "--read-only", "--tmpfs=/tmp", f"--volume={app}:/app:ro", "--env=JOBKIT_RUN=/tmp/run"]
    options += [f"--env=MOMENT={moment}", *(["--init"] if form.init else [])]
    options += ["--env=PYTHONPATH=/app/slow"] if moment == "starting" else []
    with docker.container(docker.image(), *form.command, options=options) as container:
        _until_said(container, "training" if moment in ("saving", "short") else moment)
        if moment == "saving":
            container.kill()
            with contextlib.suppress(AssertionError):  # nobody may have heard it
                until(lambda: "saving" in container.logs() or not container.state()["Running"], "", seconds=3)
        container.stop(SHORT_S if moment == "short" else ENOUGH_S)
        code, saved = container.state()["ExitCode"], "saved" in container.logs().split()
    if moment in ("starting", "importing"):
        return "waits out `-t`, 137" if code == 137 else f"ends at once, {code}"
    return f"saved, {code}" if saved else f"**lost**, {code}"


def _until_said(container: Container, word: str) -> None:
    until(lambda: word in container.logs().split(), f"{word} is printed", seconds=60)


def measure(docker: Engine) -> str:
    """Return the table."""
    with files() as app, ThreadPoolExecutor(10) as pool:
        cells = {
            (form, moment): pool.submit(try_out, docker, form, moment, app) for form in FORMS for moment in MOMENTS
        }
        rows = [[form.shown, *(cells[form, moment].result() for moment in MOMENTS)] for form in FORMS]
    lines = [["the container runs", *MOMENTS.values()], ["---"] * (1 + len(MOMENTS)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_TABLE = re.compile(r"(?<=<!-- python -m tests.harness.container_table -->\n).*?(?=\n<!-- end -->)", re.DOTALL)


def written() -> str:
    """Return the table as it stands in docker/README.md."""
    found = _TABLE.search(README.read_text())
    assert found is not None, f"{README} has lost its table"
    return found[0]


def main() -> None:
    """Measure the table and write it down."""
    docker = engine.find()
    if docker is None:
        sys.exit(f"no docker daemon answers; {engine.HOW}")
    table = measure(docker)
    README.write_text(_TABLE.sub(lambda _: table, README.read_text()))
    print(table)


if __name__ == "__main__":
    main()
