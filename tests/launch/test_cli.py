"""The command line: what it prints, its exit codes, and that a mistake writes nothing."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import jobkit
from jobkit.rundir.store import Store
from launch.backends import registry
from launch.cli import options
from launch.lifecycle import run_status
from tests.harness import jobs
from tests.harness.jobs import Project, until, until_over, until_stepping


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    yield from jobs.project(tmp_path)


MISTAKES = [
    (["submit"], "no command to run"),
    (["submit", "--"], "no command to run"),
    (["submit", "--", "pyhton", "job.py"], "the command 'pyhton' does not exist on PATH; check its spelling"),
    (["submit", "--", "job.py"], "for a script write: python job.py"),
    (["submit", "--", "./nothing.sh"], "the command './nothing.sh' does not exist"),
    (["submit", "--", "./job.py"], "is not executable: chmod +x it"),
    (["submit", "--", "python", "-u", "nothing.py"], "the script 'nothing.py' does not exist in"),
    (["submit", "--on", "gcp", "--", "true"], "a VM does not see a directory on this machine"),
    (["submit", "--on", "slurm", "--sbatch", "array=0-9", "--", "true"], "--array cannot be passed on to sbatch"),
    (["submit", "--run", "https://host/run", "--", "true"], "https://host/run cannot be written to"),
    (["checkpoints", "nowhere"], "holds no checkpoints"),
    (["submit", "-p", "low", "--", "true"], "--partition is for --on slurm; this is --on local"),
    (["submit", "--on", "moon", "--", "true"], "--on 'moon' is not a backend; available: local"),
    (["submit", "--grace", "soon", "--", "true"], "'soon' is not a duration"),
    (["submit", "--max-failures", "-1", "--", "true"], "max-failures is -1; give 0 or more"),
    (["submit", "--max-failures", "x", "--", "true"], "Invalid value for '--max-failures'"),
    (["submit", "--gpus", "3", "--", "true"], "--gpus is for --on gcp or aws; this is --on local"),
    (["submit", "--name", "a/b", "--", "true"], "the name 'a/b' is not usable"),
    (["submit", "--profile", "x", "--", "true"], "no profile 'x'; known are: bad"),
    (["submit", "--profile", "bad", "--", "true"], "has an unknown option 'colour'; valid are name, run, on, grace"),
    (["submit", "--run", "", "--", "true"], "--run is empty"),
    (["submit", "true", "--wait"], "--wait stands behind the command, which would get it: write it before true; if"),
    (["submit", "--run", "r", "true", "a", "--name=b"], "write -- before the command: jobkit submit -- true ..."),
    (["drill", "true", "--steps", "4"], "--steps stands behind the command"),
    (
        ["submit", "--", "true", "--lr={lr}"],
        "'--lr={lr}' in the command is for a sweep, and there is none: add --sweep",
    ),
    (["submit", "--", "true", "{seed}"], "add --sweep seed=VALUES"),
    (["submit", "--run", "nosuch://b/r", "--", "true"], "is not a URL that fsspec knows"),
    (["submit", "--run", "job.py", "--", "true"], "is a file; give another --run"),
    (["submit", "--run", "job.py/r", "--", "true"], "is not writable"),
    (["submit", "--run", "/proc/r", "--", "true"], "/proc"),
    (["submit", "--run", "full", "--", "true"], "is not empty and is not a run (it holds thesis.tex)"),
    (["status", "nothing"], "is not a run: it has no run.json; 'jobkit ls' lists the runs here"),
    (["logs", "nothing"], "is not a run"),
    (["cancel", "nothing"], "is not a run"),
    (["resume", "nothing"], "is not a run"),
    (["save", "nothing"], "is not a run"),
    (["stop", "nothing"], "is not a run"),
    (["save", "nothing", "--timeout", "0"], "--timeout 0: give a duration above zero, or --no-wait"),
    (["submit", "--stall", "0", "--", "true"], "--stall 0: give at least 1s, or off"),
    (["submit", "--stall", "soon", "--", "true"], "'soon' is not a duration"),
    (["ls", "nothing"], "is not a directory"),
    (["status"], "Missing argument 'RUN'"),
    (["statsu"], "No such command 'statsu'"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_mistakes(project: Project, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake is exit code 2 and one line on stderr with what to do; nothing is written."""
    (project.path / "full").mkdir()
    (project.path / "full" / "thesis.tex").write_text("")
    (project.path / "jobkit.toml").write_text("[profile.bad]\ncolour = 1\n")
    before = sorted(project.path.parent.rglob("*"))
    monkeypatch.chdir(project.path)
    done = jobs.command_line(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("jobkit: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(project.path.parent.rglob("*")) == before


VALUES = {
    "time": "1:00:00", "env": "A=b", "secret": "A=b", "label": "a=b", "gpus": "L4:1", "boot-disk-size": "200GB",
    "memory": "4GiB", "max-time": "1h", "nodes": "2", "mount": "/data",
}  # fmt: skip
"""A value of each option for which the word `1` is none."""
TABLES = ("sbatch", "env", "secret", "label")


def placing() -> dict[str, set[str]]:
    """Return the options that say where a run runs and on what, and the backends that the help of each is for."""
    command = options.placement_options(click.command("none")(lambda: None))
    prefix = re.compile(r"(?:^|\. )((?:(?:local|SLURM|gcp|aws)(?:, )?)+): ")
    names = {}
    for option in command.params:
        assert isinstance(option, click.Option)
        assert option.help is not None
        backends = {name.lower() for found in prefix.findall(option.help) for name in found.split(", ")}
        names[max(option.opts, key=len).removeprefix("--")] = backends or set(registry.NAMES)
    return names


def toml(option: str) -> str:
    """Return a value of an option as a profile has it."""
    numbers = ("nodes", "ntasks-per-node", "cpus-per-task", "max-restarts", "cpus", "price-per-hour", "max-cost")
    by_option = (
        dict.fromkeys(TABLES, '{A = "b"}') | dict.fromkeys(numbers, "1") | {"mount": '["/data"]', "spot": "true"}
    )
    return by_option.get(option, f'"{VALUES.get(option, "1")}"')


@pytest.mark.parametrize("name", registry.NAMES)
def test_an_option_of_another_backend(project: Project, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each option is refused, with the backends that know it, on every backend that its help does not name.

    The same from a profile.
    """
    monkeypatch.chdir(project.path)
    refused = {"command line": set(), "profile": set()}
    foreign = {option for option, backends in placing().items() if name not in backends}
    for option in placing():
        value = [] if option == "spot" else [VALUES.get(option, "1")]
        given = jobs.command_line("submit", "--on", name, f"--{option}", *value, "--dry-run", "--", "no such program")
        (project.path / "jobkit.toml").write_text(f"[profile.p]\n{option} = {toml(option)}\n")
        table = jobs.command_line("submit", "--on", name, "--profile", "p", "--dry-run", "--", "no such program")
        for way, done in (("command line", given), ("profile", table)):
            assert done.returncode == 2, (option, way)
            if found := re.search(r"--(\S+) is for --on (.*); this is --on (\w+)", done.stderr):
                assert (found[1], found[3]) == (option, name)
                assert set(found[2].split(" or ")) == placing()[option], done.stderr
                refused[way].add(option)
    assert refused == {"command line": foreign, "profile": foreign}


def test_failed_write_leaves_nothing(project: Project) -> None:
    """A submit that cannot write all it must removes what it made, parents too, and says why in one line."""
    (project.path / "weights").write_bytes(os.urandom(200_000))
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
    call = "from launch.cli.main import main; sys.argv = ['jobkit', *sys.argv[1:]]; main()"
    done = subprocess.run(
        [sys.executable, "-c", limited + call, "submit", "--run", "../deep/er/r", "--", "python", "job.py", "exit:0"],
        cwd=project.path, env=os.environ | {"PYTHONPATH": str(jobs.ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"jobkit: cannot write the snapshot into .*: File too large\n", done.stderr)
    assert not (project.path.parent / "deep").exists()


@pytest.mark.parametrize(("plan", "code"), [("commit:2,exit:0", 0), ("exit:1", 1)])
def test_wait(project: Project, plan: str, code: int) -> None:
    """--wait follows the run and exits as it ended."""
    done = project.cli("submit", "--run", "../runs/r", "--wait", "--", "python", "job.py", plan)
    assert (done.returncode, done.stderr) == (code, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"submitted {project.runs / 'r'}"
    if code == 0:
        assert lines[-1].startswith("done after 1 attempt, committed step 2")
    else:
        assert lines[-3].startswith("failed after 1 attempt: ")
        assert lines[-2].startswith("  attempt 0: exit code 1")
        assert lines[-1] == f"  its log: jobkit logs --attempt 0 {project.runs / 'r'}"


def test_wait_for_a_cancelled_run(project: Project) -> None:
    """--wait exits 3 when somebody cancels the run."""
    with project.start("submit", "--run", "../runs/r", "--wait", "--", "python", "job.py", "hold") as process:
        store = Store(project.runs / "r")
        until(lambda: store.exists("run.json"), "run.json is written")
        until_stepping(store)
        cancelled = project.cli("cancel", "../runs/r")
        out, _ = process.communicate(timeout=30)
    assert (cancelled.returncode, cancelled.stdout) == (0, "../runs/r is cancelled\n")
    assert process.returncode == 3
    assert "cancelled after 1 attempt" in out


def test_interrupt_only_detaches(project: Project) -> None:
    """Ctrl-C on --wait says that the run goes on, and it does."""
    with project.start("submit", "--run", "../runs/r", "--wait", "--", "python", "job.py", "hold") as process:
        store = Store(project.runs / "r")
        until(lambda: store.exists("run.json"), "run.json is written")
        until_stepping(store)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == f"detached; the run goes on. To stop it: jobkit cancel {store.url}"
    assert run_status.status(store).state == "running"
    registry.cancel(store.url)


def test_live_view_on_a_terminal(project: Project) -> None:
    """On a terminal --wait draws the state, the committed step and how attempts ended."""
    reader, writer = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", "submit", "--run", "../runs/r", "--wait", "--",
         "python", "job.py", "commit:7,exit:75", "sleep:1,exit:0"],
        cwd=project.path, env=os.environ | {"PYTHONPATH": str(jobs.ROOT), "TERM": "xterm", "COLUMNS": "100"},
        stdout=writer, stderr=writer, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(writer)
    shown = b""
    try:
        while chunk := os.read(reader, 1 << 16):
            shown += chunk
    except OSError:
        pass  # the terminal's end: EIO
    assert process.wait(timeout=30) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"committed step +7", text)
    assert "attempt 0: preempted" in text
    assert "done after 2 attempts" in text


def test_json_everywhere(project: Project) -> None:
    """Every command that lists prints one JSON document; what JSON cannot say is null."""
    done = project.cli("submit", "--json", "--wait", "--run", "../runs/r", "--", "python", "job.py", "commit:2,exit:0")
    assert json.loads(done.stdout)["state"] == "done"
    events = project.runs / "r" / "attempts" / "0" / "events-0.jsonl"
    events.write_text('{"t": 1, "event": "metrics", "step": 2, "values": {"loss": NaN, "acc": 0.5}}\n{"torn')
    status = json.loads(project.cli("status", "../runs/r", "--json").stdout, parse_constant=pytest.fail)
    assert status["metrics"] == {"loss": None, "acc": 0.5}
    assert (status["state"], status["attempt"], status["committed_step"]) == ("done", 0, 2)
    (row,) = json.loads(project.cli("ls", "../runs", "--json").stdout)
    assert row == status
    assert json.loads(project.cli("resume", "../runs/r", "--json").stdout)["state"] == "done"
    dry = json.loads(project.cli("submit", "--dry-run", "--json", "--", "python", "job.py").stdout)
    assert dry["command"] == ["python", "job.py"]
    assert re.fullmatch("[0-9a-f]{16}", dry["code"])
    assert not (project.path / "runs").exists()


def test_a_dry_run_refuses_what_the_submit_would(project: Project) -> None:
    """The directory of another run is taken for a dry run too, and stays as it was."""
    store = project.submit("commit:1,exit:0")
    until_over(store)
    before = sorted(path.name for path in store.path.iterdir())
    words = ("--run", store.url, "--", "python", "job.py", "exit:0")
    dry, real = project.cli("submit", "--dry-run", *words), project.cli("submit", *words)
    assert (dry.returncode, dry.stderr) == (real.returncode, real.stderr)
    assert (dry.returncode, "already holds another job" in dry.stderr) == (2, True)
    assert sorted(path.name for path in store.path.iterdir()) == before


def test_help_on_a_narrow_terminal(project: Project) -> None:
    """At 80 columns every command is said in a whole sentence."""
    lines = project.cli("--help", COLUMNS="80").stdout.partition("Commands:")[2].partition("\n\n")[0].splitlines()
    assert len(lines) > 10
    assert all(line.endswith((".", "`.")) and not line.endswith("..") for line in lines[1:]), lines


def test_ls_and_status_for_people(project: Project) -> None:
    """Ls has one line per run, also beside a damaged one, and status says why."""
    until_over(project.submit("exit:1", run="bad"))
    until_over(project.submit("commit:3,exit:0", run="group/good"))
    (project.runs / "broken").mkdir()
    (project.runs / "broken" / "run.json").write_text("{")
    done = project.cli("ls", "../runs")
    rows = {line.split()[0]: line.split()[1:2] + line.split()[4:7] for line in done.stdout.splitlines()}
    assert rows["RUN"] == ["STATE", "STEP", "COMMITTED", "REASON"]
    assert rows["../runs/bad"] == ["failed", "local", "-", "-"]
    assert rows["../runs/group/good"] == ["done", "local", "3", "3"]
    assert "broken/run.json is damaged" in done.stderr
    text = project.cli("status", "../runs/bad").stdout
    assert re.search(r"reason +failed \(exit code 1\) before committing anything", text)


def test_logs(project: Project) -> None:
    """Every attempt's log is shown under its number; -f follows until the run is over."""
    store = project.submit("commit:1,exit:75", "hold", "exit:0")
    with project.start("logs", "-f", store.url) as process:
        until_stepping(store, attempt=1)
        os.kill(jobs.program_pid(store, 1), signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
    expected = "".join(
        f"==> attempt {number} <==\nattempt {number}: {plan}\n"
        for number, plan in enumerate(["commit:1,exit:75", "hold", "exit:0"])
    )
    assert out == expected
    assert project.cli("logs", store.url).stdout == expected
    assert project.cli("logs", "--attempt", "1", store.url).stdout == "attempt 1: hold\n"
    missing = project.cli("logs", "--attempt", "9", store.url)
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "has no attempt 9; it has 0, 1, 2" in missing.stderr


def test_profile(project: Project) -> None:
    """A profile's options count, and the command line wins over them."""
    (project.path / "jobkit.toml").write_text("[profile.p]\ngrace = '2m'\nmax-failures = 3\nsnapshot = false\n")
    arguments = ("submit", "--dry-run", "--json", "--profile", "p", "--max-failures", "5", "--", "python", "job.py")
    plan = json.loads(project.cli(*arguments).stdout)
    assert (plan["grace_s"], plan["max_failures"], plan["snapshot"]) == (120.0, 5, False)


def test_no_snapshot(project: Project) -> None:
    """--no-snapshot runs in the working directory itself."""
    (project.path / "word.txt").write_text("here")
    done = project.cli(
        "submit", "--no-snapshot", "--run", "../runs/r", "--wait", "--", "python", "job.py", "read:word.txt,exit:0"
    )
    assert done.returncode == 0, done
    assert not (project.runs / "r" / "code").exists()
    assert "here" in project.cli("logs", "../runs/r").stdout


def test_python_api(project: Project) -> None:
    """The Python side says the same as the command line."""
    import launch

    status = launch.submit(project.spec("commit:1,hold", "exit:0"), on=launch.Local())
    assert status.state in ("queued", "running")
    until_stepping(Store(status.run))
    assert launch.cancel(status.run).state == "cancelled"
    assert launch.resume(status.run, wait=True).state == "done"
    assert launch.status(status.run).committed_step is not None


@pytest.mark.parametrize(
    "code", ["import launch", "import launch.cli.main", "import jobkit, launch.backends.local, launch.report.follow"]
)
def test_light_imports(code: str) -> None:
    """Neither the package nor the command line loads jax, numpy or rich."""
    check = f"import sys; {code}; print([m for m in ('jax', 'numpy', 'rich', 'orbax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], cwd=jobs.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_has_examples(project: Project) -> None:
    """Every command explains itself with an example that parses, and --version says which this is."""
    top = project.cli("--help").stdout
    for command in ("submit", "status", "logs", "save", "stop", "cancel", "resume", "ls", "demo", "drill"):
        assert re.search(rf"^  {command} ", top, re.MULTILINE)
        assert f"jobkit {command}" in project.cli(command, "--help").stdout
    assert jobkit.__version__ in project.cli("--version").stdout


def test_status_tells_of_damaged_checkpoints(project: Project) -> None:
    """A checkpoint that was found damaged and set aside is told by `status`, for a person and as JSON."""
    project.cli("submit", "--wait", "--run", "../runs/r", "--", "python", "job.py", "commit:2,exit:0")
    events = project.runs / "r" / "attempts" / "0" / "events-0.jsonl"
    with events.open("a") as file:
        file.write('{"t": 2, "event": "set_aside", "step": 1, "reason": "state.json differs from its checksum"}\n')
    assert "set aside       step 1: state.json differs from its checksum" in project.cli("status", "../runs/r").stdout
    told = json.loads(project.cli("status", "../runs/r", "--json").stdout)["set_aside"]
    assert told == [{"attempt": 0, "t": 2, "step": 1, "reason": "state.json differs from its checksum"}]
