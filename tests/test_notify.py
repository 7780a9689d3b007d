"""Notifications: real runs, a real HTTP server, real commands; nothing of it is ever in the training's way."""

import hashlib
import hmac
import json
import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobkit.errors import ConfigError
from jobkit.storage import Store
from launch import notify, report
from tests import ledgers
from tests.jobs import Project, events, supervisor_pid, until, until_over, until_stepping
from tests.jobs import project as make_project


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
    """A webhook, one by a variable, and a command hear of a preemption and of the end, signed, in order, once."""
    monkeypatch.setenv(notify.SECRET, "hush")
    monkeypatch.setenv("HOOK", f"{server.url}?token=quiet")
    command = f"sh -c 'cat >> {project.path}/told; echo >> {project.path}/told'"
    store = project.submit("commit:5,hold", "commit:9,exit:0", notify=(server.url, "env:HOOK", command))
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
    written = "".join(path.read_text(errors="replace") for path in store.path.rglob("*") if path.is_file())
    assert "hush" not in written
    assert "quiet" not in written


def test_nothing_is_waited_for(project: Project, server: Server) -> None:
    """A command that hangs delays no attempt and no other target, and is not ended with an attempt."""
    pids = project.path / "pids"
    hang = f"sh -c 'echo $$ >> {pids}; exec sleep 300'"
    store = project.submit("commit:1,exit:1", "commit:3,exit:0", notify=(hang, server.url))
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
    hung = [one for one in ledger(store) if one["target"] == "sh"]
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
    return [event for event in report.events(store) if event["event"] in names]


def test_tried_again(tmp_path: Path, server: Server) -> None:
    """An answer of 500 or 429 is tried again until it is well; a 404 or a redirect is final; both are in the ledger."""
    run = ledgers.smooth(tmp_path / "r")
    server.answers = [500, 429]
    tell(run, server.url)
    assert [(one["event"], one["tries"]) for one in ledger(run.store)] == [("notified", 3)]
    for answer, count in ((404, 2), (302, 3)):
        server.answers = [answer]
        tell(run, server.url, written=count)
        last = ledger(run.store)[-1]
        assert (last["event"], last["tries"], last["reason"]) == ("notify_failed", 1, f"it answered {answer}")
    assert len({message["id"] for message in server.messages[:3]}) == 1  # tried again is not told twice


def test_what_cannot_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is not there, a variable without an address, a command that does not exist: said in the ledger."""
    monkeypatch.setattr(notify, "_TRIES", 2)
    run = ledgers.smooth(tmp_path / "r")
    tell(run, "http://127.0.0.1:9/secret", "env:NOWHERE", "no-such-command x", "sh -c 'echo no >&2; exit 3'", written=4)
    assert {one["target"]: one["reason"] for one in ledger(run.store)} == {
        "http://127.0.0.1": "no answer: ConnectionRefusedError",
        "env:NOWHERE": "the variable NOWHERE holds no http address where the run's jobs are started",
        "no-such-command": "it cannot be started: No such file or directory",
        "sh": "it ended with exit code 3: no",
    }


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("https://user:secret@host/x", "holds what may be a secret"),
        ("https://host/x?token=secret", "holds what may be a secret"),
        ("https:///x", "names no host"),
        ("env:", "names no variable"),
        ("env:a b", "names no variable"),
        ("", "is no command"),
        ("echo 'x", "is no command"),
    ],
)
def test_mistakes(target: str, told: str) -> None:
    """A target that cannot work or would show a secret is refused before anything is written, without the secret."""
    with pytest.raises(ConfigError, match=told) as refused:
        notify.check([target])
    assert "secret@" not in str(refused.value)
    assert "token" not in str(refused.value)
    notify.check(["https://host/x", "http://127.0.0.1:8000/", "env:HOOK", "mail -s 'it is over' me"])


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_nobody_who_could_be_told(project: Project, dry: tuple[str, ...]) -> None:
    """A program that is not there, or a variable that is not set, is refused by the submit and by its dry run."""
    for target, told in [
        ("nosuchprogram --now", "there is no program 'nosuchprogram'"),
        ("./tell.sh", "there is no program './tell.sh'"),
        ("env:NO_SUCH_HOOK", "NO_SUCH_HOOK is not set where the run will be"),
    ]:
        done = project.cli("submit", *dry, "--run", "new", "--notify", target, "--", "python", "job.py")
        assert (done.returncode, told in done.stderr) == (2, True), done.stderr
    assert not (project.path / "new").exists()


def test_from_a_profile(project: Project) -> None:
    """A profile's targets come after those of the command line."""
    (project.path / "jobkit.toml").write_text('[profile.loud]\nnotify = ["env:HOOK"]\n')
    done = project.cli(
        "submit", "--profile", "loud", "--notify", "echo", "--dry-run", "--json", "--", "python", "job.py", HOOK="x"
    )
    assert json.loads(done.stdout)["notify"] == ["echo", "env:HOOK"]
