"""Telling others what becomes of a run: webhooks and commands, on preempted, stalled, failed, done and the like, and
on what is wrong while it runs (troubles.py).

A process of its own follows the run's ledger and sends; it is started before the runner collects orphans, so that
neither a slow webhook nor a hanging command is ever waited for, or ended, by what trains. Who is told is named by a
variable or a file (targets.py), which holds

    https://host/path     gets a POST of JSON; with JOBKIT_NOTIFY_SECRET in the environment it is signed:
                          X-Jobkit-Signature: sha256=<HMAC-SHA256 of the body, in hex>
    any other words       are a command, run without a shell, with the JSON on its standard input

What fails is tried again, for some minutes; what became of it is in the ledger (notified, notify_failed).
"""

import contextlib
import hashlib
import hmac
import itertools
import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tenacity

import jobkit
from jobkit import contract, decode, names
from jobkit.contract import Outcome
from jobkit.errors import ConfigError, JobkitError, say
from jobkit.patience import Patience
from jobkit.rundir.ledger import Event, Ledger
from jobkit.rundir.store import Store
from jobkit.supervise import processes
from launch.lifecycle import orphans, targets, troubles, webhook
from launch.lifecycle.webhook import Again

SECRET = "JOBKIT_NOTIFY_SECRET"
"""Variable with the key of the signature."""
_POLL_S = 0.2
_COMMAND_S = 60.0
_TRIES, _LONGEST_WAIT_S = 7, 60.0
_START_S = 20.0
_OUTAGE_S = 600.0
_FINISH_S = 10.0
"""A job that ends waits this long for what is still to be told."""


# The runner's end.


def start(store: Store, named: Sequence[str], cwd: str) -> int | None:
    """Start the process that tells the targets of a run; return its pid, None if there is nobody to tell.

    Must be called before this process becomes the one that gets orphans. A failure is printed and is no reason not to
    train.
    """
    if not named:
        return None
    stat = store.stat(contract.EVENTS)
    since = 0 if stat is None else stat.st_size
    given = json.dumps({"run": store.url, "since": since, "runner": os.getpid(), "targets": list(named), "cwd": cwd})
    # No mark of a run: whoever looks for what is left of one must not find it.
    environ = contract.handed_on(os.environ)
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "launch.lifecycle.notify"],
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


def finish(pid: int | None) -> None:
    """Give what is still to be told a moment, since some schedulers end all processes of a job with its first."""
    deadline = time.monotonic() + _FINISH_S
    while pid is not None and processes.alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)


# The process that tells.


def follow(store: Store, named: Sequence[str], *, since: int, runner: int, cwd: str) -> None:
    """Tell the targets of everything that happens to a run until it has ended or its runner is gone.

    Args:
        store: The run.
        named: Who is told.
        since: Byte of the ledger to begin with.
        runner: Pid of the runner.
        cwd: Where commands run.
    """
    ledger = store.insist(lambda: Ledger(store.file(contract.EVENTS)))
    # One thread each: they are told in order, and one that does not answer delays no other.
    senders = {target: ThreadPoolExecutor(1) for target in named}
    over = False
    problems = _Troubles(store)
    while not over:
        over = not processes.alive(runner)  # looked at first: what it wrote before it went is still told
        events, since = _news(store.file(contract.EVENTS), since)
        over = over or any(event["event"] == "ended" for event in events)
        for message in [*filter(None, (message_of(store, event) for event in events)), *problems.news()]:
            for target, sender in senders.items():
                sender.submit(_notify, target, message, ledger, cwd)
        if not over:
            time.sleep(_POLL_S)
    for sender in senders.values():
        sender.shutdown(wait=True)


class _Troubles:
    """Reads what is wrong in an attempt that runs, each once; what was there before is old.

    Args:
        store: The run.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._since: dict[Path, int] = {}
        self._known: set[tuple[Any, ...]] = set()
        self.news()

    def news(self) -> list[dict[str, Any]]:
        """Return what is to be told."""
        messages = []
        try:
            newest = self._store.numbers(contract.ATTEMPTS)[-1:]
        except JobkitError:  # a shared disk that does not answer just now
            return []
        for attempt, writer in itertools.product(newest, ("supervisor", "0")):
            path = self._store.file(contract.events_file(attempt, writer))
            events, self._since[path] = _news(path, self._since.get(path, 0))
            self._known |= {_key(attempt, event) for event in events if event.get("event") in troubles.KINDS}
            here = troubles.here(self._store, attempt) if writer == "0" else {}
            if here and _key(attempt, here) not in self._known:  # its disk may be the one that fails
                self._known.add(_key(attempt, here))
                events.append(here)
            for event in events:
                if (trouble := troubles.of(event)) is not None and event.get("count", 1) == 1:  # once is enough
                    at = {"step": event.get("step"), "committed_step": self._committed()}
                    messages.append(_message(self._store, trouble.kind, attempt, {"reason": trouble.text}, at))
        return messages

    def _committed(self) -> int | None:
        with contextlib.suppress(JobkitError):  # it may be what does not answer
            return committed if (committed := orphans.committed_step(self._store)) >= 0 else None
        return None


def _key(attempt: int, event: Event) -> tuple[Any, ...]:
    return attempt, str(event.get("event")), str(event.get("step"))


def _news(path: Path, since: int) -> tuple[list[Event], int]:
    """Return the events written since, and the byte up to which they were read: whole lines only."""
    try:
        with open(path, "rb", opener=names.opener) as file:
            file.seek(since)
            content = file.read()
    except OSError:
        return [], since
    content = content[: content.rfind(b"\n") + 1]
    events = [event for line in content.splitlines() if (event := decode.event(line)) is not None]
    return events, since + len(content)


def message_of(store: Store, event: Event) -> dict[str, Any] | None:
    """Return what is to be told of an event of the launching side, None if it is nobody's business.

    An attempt that ended is told once what comes next is decided, unless it was done: then the run's end says so.
    """
    if event.get("event") not in ("decision", "ended"):
        return None
    attempt = event.get("attempt", max(store.numbers(contract.ATTEMPTS), default=None))
    outcome = (orphans.read_outcome(store, attempt) or {}) if attempt is not None else {}
    final = event["event"] == "ended"
    name = str(event.get("state") if final else outcome.get("outcome", ""))
    if not final and name in ("", Outcome.DONE):
        return None
    return _message(store, name, attempt, event if final else outcome, outcome) | {
        "final": final,
        "next": None if final else event.get("action"),
    }


def _message(
    store: Store, name: str, attempt: int | None, why: Mapping[str, Any], at: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what is told of anything.

    Args:
        store: The run.
        name: What happened, in a word.
        attempt: To which attempt.
        why: Has the `reason`.
        at: Has `step` and `committed_step`.
    """
    return {
        "id": uuid.uuid4().hex,
        "at": time.time(),
        "event": name,
        "final": False,
        "run": store.url,
        "attempt": attempt,
        "step": at.get("step"),
        "committed_step": at.get("committed_step"),
        "reason": str(why.get("reason", "")),
        "next": None,
    }


def _notify(target: str, message: Mapping[str, Any], ledger: Ledger, cwd: str) -> None:
    known = target.startswith(("env:", "file:"))  # what a run.json of somebody's own has may be the secret itself
    fields = {"told": message["event"], "target": target if known else "neither env: nor file:"}
    sending = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(_TRIES),
        wait=tenacity.wait_exponential(0.5, _LONGEST_WAIT_S) + tenacity.wait_random(0, 0.5),
        retry=tenacity.retry_if_exception_type(Again),
        reraise=True,
    )
    try:
        sending(_send, target, json.dumps(message).encode(), cwd)
        ledger.append("notified", **fields, tries=sending.statistics["attempt_number"])
    except Exception as error:
        # What is not ours may have anything in its words.
        reason = str(error) if isinstance(error, Again | JobkitError) else type(error).__name__
        ledger.append("notify_failed", **fields, tries=sending.statistics["attempt_number"], reason=reason[:300])


def _send(target: str, body: bytes, cwd: str) -> None:
    content = targets.read(target, os.environ)
    if targets.is_address(content):
        webhook.post(content, body, _headers(body))
    else:
        _run(targets.words(content), body, cwd)


def _headers(body: bytes) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "User-Agent": f"jobkit/{jobkit.__version__}"}
    if secret := os.environ.get(SECRET):
        headers["X-Jobkit-Signature"] = "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    return headers


def _run(words: Sequence[str], body: bytes, cwd: str) -> None:
    try:
        done = subprocess.run(words, input=body, cwd=cwd or None, capture_output=True, timeout=_COMMAND_S, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"the command took longer than {_COMMAND_S:g} s") from None
    except OSError as error:
        raise ConfigError(f"it cannot be started: {error.strerror}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        how = f"it ended with {contract.describe_exit(done.returncode)}"
        if done.returncode < 0:
            raise ConfigError(how)  # somebody did not want it to go on
        raise Again(f"{how}: {_without(words[1:], said[-1])}" if said else how)


def _without(words: Sequence[str], text: str) -> str:
    """Hide what is of a command in what it printed: any part of it may be a token."""
    for part in sorted({*re.findall(r"\w{3,}", " ".join(words))}, key=len, reverse=True):
        text = text.replace(part, "***")
    return text


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
    follow(Store(given["run"]).patient(Patience(deadline_s=_OUTAGE_S)), given["targets"], **run)


if __name__ == "__main__":
    main()
