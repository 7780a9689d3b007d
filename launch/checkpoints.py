"""A run's checkpoints from outside: list, verify, remove, export."""

import os
import subprocess
import sys
import time
from collections.abc import Callable

import msgspec

from jobkit import contract
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir import commits, remote_steps, retention
from jobkit.rundir.ledger import Ledger, read_events
from jobkit.rundir.store import Store

_WHOLE = ("rehearsed", "restored", "verified")
"""Events that say a step was read back whole."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One committed step.

    Args:
        age_s: Seconds since its commit, by the clocks of its writer and of this machine.
        verified_at: When it was last read back whole (epoch, s), None if never.
        uploaded: Whether it is on the run's URL; None for a run on a file system.
        best: Whether it is the best by the metric of the run's `keep_best`.
        problem: What is wrong with it, as far as its commit.json tells.
    """

    step: int
    age_s: float | None = None
    bytes: int | None = None
    attempt: int | None = None
    reason: str = ""
    metrics: dict[str, float] = {}
    verified_at: float | None = None
    uploaded: bool | None = None
    best: bool = False
    problem: str = ""


def listed(store: Store) -> list[Row]:
    """List the committed steps of a run, oldest first; on an object store also those that are not in this home."""
    verified: dict[int, float] = {}
    damaged: dict[int, str] = {}
    for event in sorted(read_events(store), key=lambda event: float(event["t"])):
        if event["event"] in _WHOLE:
            verified[event["step"]] = event["t"]
            damaged.pop(event["step"], None)
        elif event["event"] == "damaged":
            damaged[event["step"]] = str(event.get("reason", ""))
    remote = remote_steps.steps(store.remote) if store.remote is not None else []
    rows = []
    for step in sorted({*commits.steps(store), *remote}):
        uploaded = step in remote if store.remote is not None else None
        problem = damaged.get(step, "")
        try:
            commit = _commit(store, step)
        except JobkitError as error:
            problem = str(error)
        if problem:
            rows.append(Row(step=step, uploaded=uploaded, problem=problem))
            continue
        row = Row(
            step=step,
            age_s=max(0.0, time.time() - commit.at),
            bytes=commit.nbytes,
            attempt=commit.attempt,
            reason=commit.reason,
            metrics=commit.metrics,
            verified_at=verified.get(step),
            uploaded=uploaded,
        )
        rows.append(row)
    best = retention.keep_of(store).best_of({row.step: row.metrics for row in rows if not row.problem})
    return [msgspec.structs.replace(row, best=row.step == best) for row in rows]


def _commit(store: Store, step: int) -> commits.Commit:
    if step in commits.steps(store):
        return commits.read(store, step)
    return commits.with_scores(store, remote_steps.read(store.bucket, step))


def verify(store: Store, steps: list[int], tell: Callable[[int, list[str]], None]) -> dict[int, list[str]]:
    """Read every byte of steps and compare it with what was committed.

    Args:
        store: The run; a step on an object store is read from there.
        steps: Committed steps.
        tell: Called after each with what is wrong with it.

    Returns:
        What is wrong, by step; empty lists for whole ones.
    """
    ledger = Ledger(store.file(contract.EVENTS))
    problems = {}
    for step in steps:
        remote = store.remote is not None and step in remote_steps.steps(store.remote)
        problems[step] = remote_steps.problems(store, step) if remote else commits.problems(store, step)
        if not problems[step]:
            ledger.append("verified", step=step)
        else:
            ledger.append("damaged", step=step, reason=problems[step][0])
        tell(step, problems[step])
    ledger.close()
    return problems


def chosen(store: Store, step: str | None, *, every: bool) -> list[int]:
    """Return the steps that a person means: a number, 'latest', or all.

    Raises:
        ConfigError: If there is none, or the text is no step.
    """
    known = [row.step for row in listed(store)]
    if not known:
        raise ConfigError(f"{store.url} has no committed checkpoint")
    if every:
        return known
    if step is None or step == "latest":
        return known[-1:]
    if not step.isdecimal() or int(step) not in known:
        raise ConfigError(f"{step!r} is not a committed step of {store.url}; it has {', '.join(map(str, known))}")
    return [int(step)]


def remove(store: Store, step: int) -> None:
    """Remove a committed step.

    Raises:
        ConfigError: If it is the newest: what a restart would continue from is never removed.
    """
    if step == chosen(store, "latest", every=False)[0]:
        raise ConfigError(f"step {step} is the newest of {store.url}, from which a restart goes on; it stays")
    commits.remove(store, step)
    if store.remote is not None:
        remote_steps.remove(store.remote, step)


def export(store: Store, out: str, step: str | None, *, as_json: bool = False) -> int:
    """Write the parameters of a step alone; in a process of its own, since this one does not load jax.

    Returns:
        Its exit code.
    """
    arguments = [sys.executable, "-m", "jobkit.export", store.url, os.path.abspath(out), step or "latest"]
    arguments += ["--json"] * as_json
    return subprocess.run(arguments, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False).returncode
