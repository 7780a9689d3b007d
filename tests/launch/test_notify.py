"""Notifications: real runs, a real HTTP server, real commands; nothing of it is ever in the training's way."""

import gzip
import hashlib
import hmac
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobkit.errors import ConfigError
from jobkit.rundir.store import Store
from launch.lifecycle import notify, run_status, targets
from tests.harness import ledgers
from tests.harness.jobs import Project, events, supervisor_pid, until, until_over, until_stepping
from tests.harness.jobs import project as make_project


class Server(ThreadingHTTPServer):
    """A webhook that writes down what it is told and answers as it is told to."""

    def __init__(self) -> None:
        self.told: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[int] = []
        super().__init__(("127.0.0.1", 0), Hook)

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_port}/hook"

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What it was told."""
        return [json.loads(body) for _, body in self.told]


class Hook(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_POST(self) -> None:
        """Write it down; answer with the next answer, 200 when there is none."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.told.append((dict(self.headers), body))
        self.send_response(self.server.answers.pop(0) if self.server.answers else 200)
        self.send_header("Location", self.server.url)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    """Run a webhook."""
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """Make a project."""
    yield from make_project(tmp_path)


def test_preempted_and_done(project: Project, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Webhooks of a file and a variable, and a command, hear of a preemption and the end, signed, in order, once.

    Nothing in the run directory has any word of them.
    """
    monkeypatch.setenv(notify.SECRET, "hush")
    monkeypatch.setenv("HOOK", f"{server.url}?token=quiet")
    (project.path / "hook").write_text(f"{server.url}/silent\n")
    monkeypatch.setenv("TELL", f"sh -c 'cat >> {project.path}/told; echo >> {project.path}/told; : hidden'")
    store = project.submit("commit:5,hold", "commit:9,exit:0", notify=("file:hook", "env:HOOK", "env:TELL"))
    until_stepping(store)
    os.kill(supervisor_pid(store), signal.SIGTERM)
    until_over(store)
    until(lambda: len(events(store, "notified")) == 6, "all are told")
    heard = [json.loads(line) for line in (project.path / "told").read_text().splitlines()]
    assert [(one["event"], one["final"], one["attempt"]) for one in heard] == [
        ("preempted", False, 0),
        ("done", True, 1),
    ]
    assert heard[0]["reason"] == "stopped on SIGTERM"
    assert heard[0]["step"] == heard[0]["committed_step"] > 5
    assert heard[0]["next"] == "restart"
    assert sorted(one["id"] for one in server.messages) == sorted([one["id"] for one in heard] * 2)
    for headers, body in server.told:
        signature = hmac.new(b"hush", body, hashlib.sha256).hexdigest()
        assert headers["X-Jobkit-Signature"] == f"sha256={signature}"
    (archive,) = store.file("code").glob("*.tar.gz")
    # Not through links: what leads to a file beside the run is no copy of it.
    files = [path for path in store.path.rglob("*") if path.is_file() and not path.is_symlink()]
    written = b"".join([*(path.read_bytes() for path in files), gzip.decompress(archive.read_bytes())])
    assert not [word for word in (b"hush", b"quiet", b"silent", b"hidden") if word in written]


@pytest.mark.slow
def test_nothing_is_waited_for(project: Project, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that hangs delays no attempt and no other target, and is not ended with an attempt."""
    pids = project.path / "pids"
    monkeypatch.setenv("HANG", f"sh -c 'echo $$ >> {pids}; exec sleep 300'")
    monkeypatch.setenv("HOOK", server.url)
    store = project.submit("commit:1,exit:1", "commit:3,exit:0", notify=("env:HANG", "env:HOOK"))
    until_over(store, seconds=60)
    until(lambda: len(server.messages) == 2, "all is told", seconds=40)
    assert [(one["event"], one["final"], one["next"]) for one in server.messages] == [
        ("failed", False, "restart"),
        ("done", True, None),
    ]
    for number in range(2):  # one after the other, and each is alive
        until(lambda number=number: pids.exists() and len(pids.read_text().split()) > number, "it hangs", seconds=40)
        os.kill(int(pids.read_text().split()[number]), signal.SIGKILL)
    until(lambda: len(ledger(store)) == 4, "their ends are written")
    hung = [one for one in ledger(store) if one["target"] == "env:HANG"]
    assert [(one["event"], one["told"], one["tries"], one["reason"]) for one in hung] == [
        ("notify_failed", "failed", 1, "it ended with SIGKILL"),
        ("notify_failed", "done", 1, "it ended with SIGKILL"),
    ]


def tell(run: ledgers.Written, *targets: str, written: int = 1) -> None:
    """Have targets told of the end of a run whose runner is gone."""
    notify.follow(run.store, targets, since=0, runner=2**22 - 1, cwd="")
    assert len(ledger(run.store)) == written


def ledger(store: Store) -> list[dict[str, Any]]:
    """Return what is written of the notifications."""
    names = ("notified", "notify_failed")
    return [event for event in run_status.events(store) if event["event"] in names]


@pytest.mark.slow
def test_tried_again(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer of 500 or 429 is tried again until it is well; a 404 or a redirect is final; both are in the ledger."""
    monkeypatch.setenv("HOOK", server.url)
    run = ledgers.smooth(tmp_path / "r")
    server.answers = [500, 429]
    tell(run, "env:HOOK")
    assert [(one["event"], one["tries"]) for one in ledger(run.store)] == [("notified", 3)]
    for answer, count in ((404, 2), (302, 3)):
        server.answers = [answer]
        tell(run, "env:HOOK", written=count)
        last = ledger(run.store)[-1]
        assert (last["event"], last["tries"], last["reason"]) == ("notify_failed", 1, f"it answered {answer}")
    assert len({message["id"] for message in server.messages[:3]}) == 1  # tried again is not told twice


def test_what_cannot_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No server, variable, file or program there, or a command that fails: said in the ledger, without a secret."""
    monkeypatch.setattr(notify, "_TRIES", 2)
    told = {
        "http://127.0.0.1:9/token-one": "no answer: ConnectionRefusedError",
        "http://me:token-one@127.0.0.1:9/": "it is no address of a webhook: write https://host/path, without a user "
        "in it",
        "http://169.254.169.254/token-one": "its host leads to 169.254.169.254: link-local addresses, and those of a "
        "cloud's metadata service, are no webhooks; give the address of one",
        "no-such-command token-one": "it cannot be started: No such file or directory",
        "sh -c 'echo \"no, $1\" >&2; exit 3' - token-one": "it ended with exit code 3: no, ***-***",
    }
    names = [f"env:VARIABLE_{number}" for number in range(len(told))]
    for name, content in zip(names, told, strict=True):
        monkeypatch.setenv(name.removeprefix("env:"), content)
    lost = {
        "env:NOWHERE": "the variable NOWHERE holds neither an address nor a command where the run's jobs are started",
        f"file:{tmp_path}/x": f"the file {tmp_path}/x cannot be read (No such file or directory)",
    }
    run = ledgers.smooth(tmp_path / "r")
    tell(run, *names, *lost, written=len(told) + 2)
    found = {one["target"]: one["reason"] for one in ledger(run.store)}
    assert found == dict(zip(names, told.values(), strict=True)) | lost


def test_troubles_while_it_runs(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """That no step is made is told once for each silence, whatever attempt it is in, and nothing of before."""
    monkeypatch.setenv("HOOK", server.url)
    run = ledgers.Written(tmp_path / "r")
    silence = {"step": 40, "waited_s": 60.5, "usual_s": 0.02, "budget_s": 3600.0}
    run.supervisor(0, 100, "silent", **silence)
    follower = threading.Thread(
        target=notify.follow, args=(run.store, ["env:HOOK"]), kwargs={"since": 0, "runner": os.getpid(), "cwd": ""}
    )
    follower.start()
    run.outcome(0, outcome="killed", reason="killed by SIGKILL")
    run.launcher(101, "decision", attempt=0, action="restart")
    until(lambda: len(server.messages) == 1, "it follows")
    now = time.time()
    run.supervisor(1, now, "silent", **silence)
    until(lambda: len(server.messages) == 2, "the first silence is told")
    run.supervisor(1, now, "heard_again", after_s=70.0)
    run.supervisor(1, now, "silent", **silence | {"step": 50})
    until(lambda: len(server.messages) == 3, "the second is told")
    run.launcher(now, "ended", state="cancelled")
    follower.join()
    assert [(one["event"], one["final"], one["attempt"], one["step"]) for one in server.messages] == [
        ("killed", False, 0, None),
        ("silent", False, 1, 40),
        ("silent", False, 1, 50),
        ("cancelled", True, 1, None),
    ]
    assert server.messages[1]["reason"].startswith("no step for 6")
    assert server.messages[1]["reason"].endswith(" s (usually 0.02 s); restarted after 1 h: --stall")


@pytest.mark.parametrize(
    ("target", "content", "told"),
    [
        ("https://host/token", "", "may be a secret, and run.json would show it: write env:NAME"),
        ("curl -H token", "", "may be a secret, and run.json would show it: write env:NAME"),
        ("", "", "may be a secret, and run.json would show it"),
        ("env:", "", "names no variable"),
        ("env:a b", "", "names no variable"),
        ("env:HOOK", " ", "--notify env:HOOK: the variable HOOK holds neither"),
        ("env:HOOK", "https:///token", "--notify env:HOOK: it is no address"),
        ("env:HOOK", "https://user:token@host/x", "it is no address"),
        ("env:HOOK", "host/token", "neither an address .* nor a command"),
        ("env:HOOK", "echo 'token", "neither an address .* nor a command"),
        ("env:HOOK", "http://169.254.169.254/token", "leads to 169.254.169.254"),
        ("env:NO_SUCH_HOOK", "", "NO_SUCH_HOOK is not set where the run will be"),
        ("file:", "", "names no file"),
        ("file:nosuchfile", "", "nosuchfile cannot be read"),
        ("file:hook", "./tell.sh token", "neither an address .* nor a command"),
    ],
)
def test_mistakes(tmp_path: Path, target: str, content: str, told: str) -> None:
    """A target that cannot work or would show a secret is refused before anything is written, without the secret."""
    (tmp_path / "hook").write_text(content)
    with pytest.raises(ConfigError, match=told) as refused:
        targets.check([target], cwd=tmp_path, environ={"HOOK": content})
    assert "token" not in str(refused.value)


def test_what_works(tmp_path: Path) -> None:
    """Addresses, of this machine too, and commands are taken from variables and files, whose paths become absolute."""
    for content in ("https://host/x?token=1", "http://127.0.0.1:8000/", "sh -c 'it is over'\n"):
        (tmp_path / "hook").write_text(content)
        found = targets.check(["env:HOOK", "file:hook"], cwd=tmp_path, environ={"HOOK": content})
        assert found == ("env:HOOK", f"file:{tmp_path}/hook")


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("file:hook", "no file of this machine is there"),
        ("env:PLAIN", "run.json would show what is in --env PLAIN"),
        ("env:OTHER", "OTHER is not set where the run will be"),
        ("https://host/token", "run.json would show it"),
    ],
)
def test_in_a_cloud_it_is_one_of_its_secrets(target: str, told: str) -> None:
    """There a target comes from the secret manager: a file is not there, and run.json has the values of --env."""
    with pytest.raises(ConfigError, match=told):
        targets.check_elsewhere([target], plain={"PLAIN"}, secrets={"HOOK"})
    targets.check_elsewhere(["env:HOOK"], plain={"PLAIN"}, secrets={"HOOK"})


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_nobody_who_could_be_told(project: Project, dry: tuple[str, ...]) -> None:
    """Words instead of a name, or a variable that is not set, are refused by the submit and by its dry run."""
    (project.path / "jobkit.toml").write_text('[profile.loud]\nnotify = ["https://host/x"]\n')
    for options, told in [
        (("--notify", "https://host/x"), "run.json would show it: write env:NAME"),
        (("--profile", "loud"), "run.json would show it: write env:NAME"),
        (("--notify", "env:NO_SUCH_HOOK"), "NO_SUCH_HOOK is not set where the run will be"),
    ]:
        done = project.cli("submit", *dry, "--run", "new", *options, "--", "python", "job.py")
        assert (done.returncode, told in done.stderr) == (2, True), done.stderr
    assert not (project.path / "new").exists()


def test_from_a_profile(project: Project) -> None:
    """A profile's targets come after those of the command line."""
    (project.path / "jobkit.toml").write_text('[profile.loud]\nnotify = ["env:HOOK"]\n')
    done = project.cli(
        "submit", "--profile", "loud", "--notify", "env:ECHO", "--dry-run", "--json", "--", "python", "job.py",
        HOOK="sh x", ECHO="echo",
    )  # fmt: skip
    assert json.loads(done.stdout)["notify"] == ["env:ECHO", "env:HOOK"]
