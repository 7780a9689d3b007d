"""The supervisor as PID 1 of real containers, and the image: every moment of a stop, memory, orphans, any uid."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import container_table
from tests.harness.container_table import ENOUGH_S
from tests.harness.engine import Container, Engine
from tests.harness.jobs import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

READ_ONLY = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges")


@pytest.fixture(scope="module")
def app() -> Iterator[Path]:
    """Provide the programs of the table: train.py and scripts around it."""
    with container_table.files() as made:
        yield made


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Provide a directory that any user may write to."""
    tmp_path.chmod(0o777)
    for above in tmp_path.parents[:2]:  # pytest keeps others out
        above.chmod(0o755)
    return tmp_path


def options(app: Path, runs: Path, *more: str) -> list[str]:
    """Return what a container of these tests is started with; its run is `runs`/run."""
    return [f"--volume={app}:/app:ro", f"--volume={runs}:/runs", "--env=JOBKIT_RUN=/runs/run", *READ_ONLY, *more]


def outcome(runs: Path, attempt: int = 0) -> dict[str, Any]:
    """Return how an attempt ended."""
    return dict(json.loads((runs / f"run/attempts/{attempt}/outcome.json").read_text()))


def until_said(container: Container, word: str) -> None:
    """Wait until the program has printed a word."""
    until(lambda: word in container.logs().split(), f"{word} is printed: {container.logs()}", seconds=60)


def test_the_table_is_what_happens(docker: Engine) -> None:
    """docker/README.md says what becomes of a save, by entry point, moment and timeout: all of it measured again."""
    assert container_table.measure(docker) == container_table.written()


def test_any_user_anywhere(docker: Engine, app: Path, runs: Path) -> None:
    """A uid that nobody knows, no home, nothing writable but /tmp and the run, no network: saved inside the grace."""
    more = ["--user=12345:54321", "--env=HOME=/nowhere", "--env=JOBKIT_GRACE_S=13"]
    with docker.container(
        docker.image(), "python3", "train.py", options=options(app, runs, *more, f"--stop-timeout={ENOUGH_S}")
    ) as container:
        until_said(container, "training")
        assert container.stop(ENOUGH_S) < ENOUGH_S
        assert container.state()["ExitCode"] == 75
    told = outcome(runs)
    assert (told["outcome"], told["notice"]["source"]) == ("preempted", "SIGTERM")
    events = (runs / "run/attempts/0/events-supervisor.jsonl").read_text().splitlines()
    (notice,) = [event for event in map(json.loads, events) if event["event"] == "notice"]
    assert notice["deadline_s"] == 13
    assert (runs / "run").stat().st_uid == 12345


def test_a_stop_after_the_end_changes_nothing(docker: Engine, app: Path, runs: Path) -> None:
    """SIGTERM while the supervisor clears up after a program that is done: the container still exits 0."""
    command = ["sh", "-c", "trap '' TERM; sleep 300 & echo done"]  # a leftover that has to be killed
    with docker.container(docker.image(), *command, options=options(app, runs)) as container:
        until_said(container, "done")
        container.kill()
        container.kill()
        assert container.wait() == 0
    assert outcome(runs)["outcome"] == "done"


def test_the_kernel_killed_it_for_memory(docker: Engine, app: Path, runs: Path) -> None:
    """A program beyond the container's memory: exit 137 as of any SIGKILL, and the outcome says which one it was."""
    eat = ["python3", "-c", "import time; x = bytearray(512 << 20); x[::4096] = b'1' * (len(x) // 4096)"]
    more = ["--memory=128m", "--memory-swap=128m"]
    with docker.container(docker.image(), *eat, options=options(app, runs, *more)) as container:
        assert container.wait() == 137
        assert container.state()["OOMKilled"]
    assert outcome(runs)["reason"] == "killed by SIGKILL: out of memory (limit 134.2 MB)"


def test_a_kill_is_not_taken_for_memory(docker: Engine, app: Path, runs: Path) -> None:
    """A program that is killed by somebody: the same exit code, and no word of memory."""
    with docker.container(
        docker.image(), "sh", "-c", "kill -9 $$", options=options(app, runs, "--memory=128m")
    ) as container:
        assert container.wait() == 137
    assert outcome(runs)["reason"] == "killed by SIGKILL"


def test_orphans_are_reaped(docker: Engine, app: Path, runs: Path) -> None:
    """What is orphaned inside the container does not stay as zombies: PID 1 takes its exit codes."""
    orphans = "for n in 1 2 3 4 5 6 7 8; do sh -c 'sleep 0.1 & sleep 0.05 &'; done; echo made; exec python3 train.py"
    count = "cat /proc/[0-9]*/stat | cut -d' ' -f3 | sort | uniq -c"
    with docker.container(docker.image(), "sh", "-c", orphans, options=options(app, runs)) as container:
        until_said(container, "training")
        until(lambda: "Z" not in container.execute("sh", "-c", count), "no zombie is left")
        container.kill(signal.SIGUSR1)  # not for this program, which is sent what it knows
        assert container.wait() in (75, 138)


def test_any_program_may_be_pid_1s_child(docker: Engine, app: Path, runs: Path) -> None:
    """An attempt that was stopped goes on in another container with the next number, on the same directory."""
    for attempt in range(2):
        with docker.container(docker.image(), "python3", "train.py", options=options(app, runs)) as container:
            until_said(container, "training")
            container.stop(ENOUGH_S)
            assert container.state()["ExitCode"] == 75
        assert outcome(runs, attempt)["attempt"] == attempt


def test_the_image_runs_the_demo(docker: Engine) -> None:
    """Trained, preempted and killed in a container: a user nobody knows, read-only, no network; not a bit differs."""
    image = docker.image("train,gcs,report")
    more = [*READ_ONLY, "--user=12345:54321", "--entrypoint=jobkit"]
    with docker.container(
        image, "demo", "--run", "/tmp/demo", "--steps", "100", "--seed", "7", "--json", options=more
    ) as container:
        assert container.wait(500) == 0, container.logs()
        told = json.loads(docker.docker("logs", container.name).stdout)
    assert told["survived"]
    assert told["identical"]
    assert told["attempts"] == 4


def test_the_image_is_as_promised(docker: Engine) -> None:
    """Its user is not root, its modules are compiled, and its entry point is the one in the table."""
    told = json.loads(docker.docker("inspect", "-f", "{{json .Config}}", docker.image()).stdout)
    assert told["User"] == "65532:65532"
    assert tuple(told["Entrypoint"]) == container_table.FORMS[0].command[:-2]
    compiled = "import jobkit.supervise.supervisor as s, pathlib; print(pathlib.Path(s.__cached__).exists())"
    with docker.container(docker.image(), "-c", compiled, options=[*READ_ONLY, "--entrypoint=python3"]) as container:
        assert container.wait() == 0
        assert container.logs().strip() == "True"
