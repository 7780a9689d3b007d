"""Telling others what becomes of a run: webhooks and commands, on preempted, stalled, failed, done and the like.

A process of its own follows the run's ledger and sends; it is started before the runner collects orphans, so that
neither a slow webhook nor a hanging command is ever waited for, or ended, by what trains. A target is

    https://host/path     gets a POST of JSON; with JOBKIT_NOTIFY_SECRET in the environment it is signed:
                          X-Jobkit-Signature: sha256=<HMAC-SHA256 of the body, in hex>
    env:NAME              the same, for an address that is itself a secret: the variable NAME holds it
    any other words       are a command, run without a shell, with the JSON on its standard input

What fails is tried again, for some minutes; what became of it is in the ledger (notified, notify_failed). Secrets stay
in the environment: run.json has the name of the variable.
"""

import hashlib
import hmac
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tenacity

import jobkit
from jobkit import contract, processes
from jobkit.contract import Outcome
from jobkit.errors import ConfigError, say
from jobkit.ledger import Event, Ledger
from jobkit.storage import Store
from launch import leftovers

SECRET = "JOBKIT_NOTIFY_SECRET"
"""Variable with the key of the signature."""
_POLL_S = 0.2
_TIMEOUT_S, _COMMAND_S = 10.0, 60.0
_TRIES, _LONGEST_WAIT_S = 7, 60.0
_START_S = 20.0
_FINISH_S = 10.0
"""A job that ends waits this long for what is still to be told."""


class _Again(Exception):  # noqa: N818  (it is no error yet)
    """It may work the next time."""


def check(targets: Sequence[str], *, cwd: Path | None = None, variables: Container[str] | None = None) -> None:
    """Refuse targets that cannot work or that would put a secret into run.json.

    Args:
        targets: What `--notify` was given.
        cwd: Where commands will run, if that is on this machine; else nobody knows here which ones there are.
        variables: Names that the environment of the runner will have; None if that is not known.

    Raises:
        ConfigError: With the remedy.
    """
    for target in targets:
        kind, _, rest = target.partition(":")
        if kind in ("http", "https"):
            parts = urlsplit(target)
            if not parts.hostname:
                raise ConfigError(f"--notify {target!r} names no host; write https://host/path")
            if parts.username or parts.password or parts.query:
                raise ConfigError(
                    f"--notify {kind}://{parts.hostname}/... holds what may be a secret, and run.json would show it: "
                    "put the address into a variable and write --notify env:NAME"
                )
        elif kind == "env" and not rest.isidentifier():
            raise ConfigError(f"--notify {target!r} names no variable; write env:NAME")
        elif kind == "env":
            if variables is not None and rest not in variables:
                raise ConfigError(f"--notify {target}: {rest} is not set where the run will be; set it first")
        elif not (words := _words(target)):
            raise ConfigError(f"--notify {target!r} is no command; write the words as a shell would take them")
        elif cwd is not None and shutil.which(cwd / words[0] if os.sep in words[0] else words[0]) is None:
            raise ConfigError(f"--notify {target!r}: there is no program {words[0]!r}; check its spelling")


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:
        return []


# The runner's end.


def start(store: Store, targets: Sequence[str], cwd: str) -> int | None:
    """Start the process that tells the targets of a run; return its pid, None if there is nobody to tell.

    Must be called before this process becomes the one that gets orphans. A failure is printed and is no reason not to
    train.
    """
    if not targets:
        return None
    path = store.file(contract.EVENTS)
    since = path.stat().st_size if path.exists() else 0
    given = json.dumps({"run": store.url, "since": since, "runner": os.getpid(), "targets": list(targets), "cwd": cwd})
    # No mark of a run: whoever looks for what is left of one must not find it.
    environ = {name: value for name, value in os.environ.items() if name not in _MARKS}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "launch.notify"],
            input=given,
            env=environ,
            stdout=subprocess.PIPE,
            text=True,
            timeout=_START_S,
            start_new_session=True,
            check=True,
        )
        return int(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        say(f"nobody is notified of {store.url}: {error}")
        return None


_MARKS = (contract.ENV_RUN, contract.ENV_ATTEMPT, contract.ENV_SUPERVISOR, contract.ENV_RUNNER, contract.ENV_LOCK)


def finish(pid: int | None) -> None:
    """Give what is still to be told a moment, since some schedulers end all processes of a job with its first."""
    deadline = time.monotonic() + _FINISH_S
    while pid is not None and processes.alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)


# The process that tells.


def follow(store: Store, targets: Sequence[str], *, since: int, runner: int, cwd: str) -> None:
    """Tell the targets of everything that happens to a run until it has ended or its runner is gone.

    Args:
        store: The run.
        targets: Who is told.
        since: Byte of the ledger to begin with.
        runner: Pid of the runner.
        cwd: Where commands run.
    """
    ledger = Ledger(store.file(contract.EVENTS))
    # One thread each: they are told in order, and one that does not answer delays no other.
    senders = {target: ThreadPoolExecutor(1) for target in targets}
    over = False
    while not over:
        over = not processes.alive(runner)  # looked at first: what it wrote before it went is still told
        events, since = _news(store.file(contract.EVENTS), since)
        for event in events:
            over = over or event.get("event") == "ended"
            message = message_of(store, event)
            if message is not None:
                for target, sender in senders.items():
                    sender.submit(_tell, target, message, ledger, cwd)
        if not over:
            time.sleep(_POLL_S)
    for sender in senders.values():
        sender.shutdown(wait=True)


def _news(path: Path, since: int) -> tuple[list[Event], int]:
    """Return the events written since, and the byte up to which they were read: whole lines only."""
    try:
        with path.open("rb") as file:
            file.seek(since)
            content = file.read()
    except OSError:
        return [], since
    content = content[: content.rfind(b"\n") + 1]
    events = []
    for line in content.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events, since + len(content)


def message_of(store: Store, event: Event) -> dict[str, Any] | None:
    """Return what is to be told of an event of the launching side, None if it is nobody's business.

    An attempt that ended is told once what comes next is decided, unless it was done: then the run's end says so.
    """
    if event.get("event") not in ("decision", "ended"):
        return None
    attempt = event.get("attempt", max(store.numbers(contract.ATTEMPTS), default=None))
    outcome = (leftovers.read_outcome(store, attempt) or {}) if attempt is not None else {}
    final = event["event"] == "ended"
    name = str(event.get("state") if final else outcome.get("outcome", ""))
    if not final and name in ("", Outcome.DONE):
        return None
    return {
        "id": uuid.uuid4().hex,
        "at": time.time(),
        "event": name,
        "final": final,
        "run": store.url,
        "attempt": attempt,
        "step": outcome.get("step"),
        "committed_step": outcome.get("committed_step"),
        "reason": str((event if final else outcome).get("reason", "")),
        "next": None if final else event.get("action"),
    }


def _tell(target: str, message: Mapping[str, Any], ledger: Ledger, cwd: str) -> None:
    tries = 0
    told = {"told": message["event"], "target": _shown(target)}
    try:
        for attempt in tenacity.Retrying(
            stop=tenacity.stop_after_attempt(_TRIES),
            wait=tenacity.wait_exponential(0.5, _LONGEST_WAIT_S) + tenacity.wait_random(0, 0.5),
            retry=tenacity.retry_if_exception_type(_Again),
            reraise=True,
        ):
            with attempt:
                tries += 1
                _send(target, json.dumps(message).encode(), cwd)
        ledger.append("notified", **told, tries=tries)
    except Exception as error:
        ledger.append("notify_failed", **told, tries=tries, reason=f"{error}"[:300])


def _shown(target: str) -> str:
    """Name a target without anything that could be a secret."""
    kind = target.partition(":")[0]
    if kind in ("http", "https"):
        return f"{kind}://{urlsplit(target).hostname}"
    return target if kind == "env" else _words(target)[0]


def _send(target: str, body: bytes, cwd: str) -> None:
    kind, _, rest = target.partition(":")
    if kind == "env":
        url = os.environ.get(rest, "")
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"the variable {rest} holds no http address where the run's jobs are started")
        _post(url, body)
    elif kind in ("http", "https"):
        _post(target, body)
    else:
        _run(_words(target), body, cwd)


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: the body is meant for the address that was given."""

    def redirect_request(self, *_: Any) -> None:
        """Follow nothing."""


def _post(url: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json", "User-Agent": f"jobkit/{jobkit.__version__}"}
    if secret := os.environ.get(SECRET):
        headers["X-Jobkit-Signature"] = "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")
    try:
        with urllib.request.build_opener(_Stay).open(request, timeout=_TIMEOUT_S):
            return
    except urllib.error.HTTPError as error:
        text = f"it answered {error.code}"
        if error.code >= 500 or error.code in (408, 425, 429):
            raise _Again(text) from None
        raise ConfigError(text) from None
    except (OSError, ValueError) as error:  # the address is not in the words: it may be the secret
        raise _Again(f"no answer: {type(getattr(error, 'reason', error)).__name__}") from None


def _run(words: Sequence[str], body: bytes, cwd: str) -> None:
    try:
        done = subprocess.run(words, input=body, cwd=cwd or None, capture_output=True, timeout=_COMMAND_S, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"it took longer than {_COMMAND_S:g} s") from None
    except OSError as error:
        raise ConfigError(f"it cannot be started: {error.strerror}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        how = f"it ended with {contract.describe_exit(done.returncode)}"
        if done.returncode < 0:
            raise ConfigError(how)  # somebody did not want it to go on
        raise _Again(f"{how}: {said[-1]}" if said else how)


def main() -> None:
    """Leave the runner's family, say under which pid, and follow the run that standard input names."""
    given = json.load(sys.stdin)
    if (pid := os.fork()) != 0:
        print(pid, flush=True)
        os._exit(0)
    with open(os.devnull, "r+b") as nothing:
        for descriptor in (0, 1):
            os.dup2(nothing.fileno(), descriptor)
    run = {"since": given["since"], "runner": given["runner"], "cwd": given["cwd"]}
    follow(Store(given["run"]), given["targets"], **run)


if __name__ == "__main__":
    main()
