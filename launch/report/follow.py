"""Following a run until it is over: a live view on a terminal, a line per change elsewhere; and its log."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from jobkit import contract, names
from jobkit.contract import State
from jobkit.errors import JobkitError
from jobkit.patience import Patience
from jobkit.printable import printable
from jobkit.rundir import mirror
from jobkit.rundir.store import Store, explain
from jobkit.units import counted, show_duration
from launch.backends import by_hand, registry
from launch.lifecycle import run_status, submission
from launch.lifecycle.run_status import Status
from launch.printing import dash, unguarded
from launch.spec import jobspec as specs

if TYPE_CHECKING:
    from rich.console import RenderableType

EXIT_CODES = {State.DONE: 0, State.FAILED: 1, State.CANCELLED: 3}
_POLL_S = 0.25
_POLL_JOB_S = 2.0
"""A scheduler, or a bucket, is asked less often than a directory."""
_REFRESH_S = 2.0
"""A run on an object store that lives on another machine is looked at this often."""
_MAX_RESUMES = 5
"""How often a runner that vanished is replaced while somebody watches."""


def follow(store: Store, *, out: TextIO | None = None, quiet: bool = False) -> int:
    """Follow a run until it is over, replacing its runner if that is killed.

    Args:
        store: The run.
        out: Where lines go; standard output by default.
        quiet: Print nothing.

    Returns:
        0 done, 1 failed, 3 cancelled.
    """
    out = out or sys.stdout
    store = store.patient(Patience())  # the run goes on meanwhile, so that this does
    with _view(out, quiet=quiet) as show:
        for status in _statuses(store, sys.stderr if quiet else sys.stdout if out.isatty() else out):
            show(status)
    if not quiet:
        print(_ending_line(status), file=out, flush=True)
    return EXIT_CODES.get(status.state, 1)


@contextlib.contextmanager
def _view(out: TextIO, *, quiet: bool) -> Iterator[Callable[[Status], None]]:
    """Yield what shows a status: in place on a terminal, as a line per change elsewhere, nowhere if quiet."""
    if quiet:
        yield lambda status: None
    elif out.isatty():
        from rich.live import Live

        from launch.console import Console

        with Live(console=Console(file=out), refresh_per_second=8, redirect_stderr=False) as live:
            yield lambda status: live.update(_card(status))
    else:
        printed = ""

        def show(status: Status) -> None:
            nonlocal printed
            line = _change_line(status)
            if line != printed and not status.state.over:
                print(line + _moving(status), file=out, flush=True)
                printed = line

        yield show


def _statuses(store: Store, out: TextIO) -> Iterator[Status]:
    """Yield the run's status again and again, the last time when it is over."""
    resumes = 0
    look = _looker(store)
    while True:
        look()
        status = registry.status(store)
        if status.runner == "gone" and status.job is None and status.state is State.FAILED and resumes < _MAX_RESUMES:
            resumes += 1
            print(f"jobkit: the local runner is gone; starting another ({resumes} of {_MAX_RESUMES})", file=out)
            try:
                registry.resume(store.url, clear_cancel=False)
            except JobkitError as error:
                print(f"jobkit: {error}", file=out)
            continue
        yield status
        if status.state.over:
            return
        time.sleep(_POLL_S if status.job is None and not status.host else _POLL_JOB_S)


def _looker(store: Store, also: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """Return what brings the run's home up to date, now and then; a store that does not answer just now is no end."""
    next_s = time.monotonic() + _REFRESH_S

    def look() -> None:
        nonlocal next_s
        if time.monotonic() >= next_s:
            with contextlib.suppress(JobkitError):
                submission.refresh(store)
                also()
            next_s = time.monotonic() + _REFRESH_S

    return look


def _change_line(status: Status) -> str:
    """Say what changes seldom; the step and the loss change all the time and are no reason for a line."""
    runs = status.state is State.RUNNING
    notices = [notice for notice in status.notices if notice["attempt"] == status.attempt]
    words = [
        f"{status.state} on {status.host}" if status.host else str(status.state),
        f"attempt {status.attempt}" if status.attempt is not None else "",
        status.phase.replace("_", " ") if status.phase and runs else "",
        f"committed step {status.committed_step}" if status.committed_step is not None else "",
        f"notice {notices[-1].get('source', '')}".rstrip() if notices and runs else "",
        status.reason if status.reason != "starting" else "",
        "uploads fail" if status.storage else "",
        *(trouble.short for trouble in status.troubles),
    ]
    return ", ".join(filter(None, words))


def _moving(status: Status) -> str:
    """Say what changes all the time, for a line that is printed for another reason."""
    step = (
        f"; at step {status.step}{_of_total(status)}"
        if status.step is not None and status.state is State.RUNNING
        else ""
    )
    loss = status.metrics.get("loss")
    step += f", loss {loss:.6g}" if step and loss is not None else ""
    return "; ".join([step, *(trouble.text for trouble in status.troubles)])


def _ending_line(status: Status) -> str:
    after = f" after {counted(status.attempts, 'attempt')}" if status.attempts else ""
    step = f", committed step {status.committed_step}" if status.committed_step is not None else ""
    step += _of_total(status) if step and status.state is State.DONE else ""
    reason = f": {status.reason}" if status.reason else ""
    why = ""
    if status.state is State.FAILED and status.endings:
        last = status.endings[-1]
        why = f"\n  attempt {last.attempt}: {last.reason}\n  its log: jobkit logs --attempt {last.attempt} {status.run}"
    return f"{status.state}{after}{step}{reason}{why}"


def _card(status: Status) -> "RenderableType":
    """Lay a status out for a terminal; of a sweep, a table of its points too."""
    from rich.console import Group
    from rich.text import Text

    from launch.report.terminal import in_pairs, points_table

    style = _STYLES.get(str(status.state), "")
    card = in_pairs((name, Text(value, style=style if name == "state" else "")) for name, value in rows(status))
    return Group(card, Text(), points_table(point_table(status), _STYLES)) if status.points else card


_STYLES = {"running": "green", "done": "bold green", "failed": "bold red", "cancelled": "yellow", "requeued": "cyan"}


def rows(status: Status) -> Iterator[tuple[str, str]]:
    """Yield a status as pairs of words for a person."""
    yield "run", status.run
    yield "state", f"{status.state}{status.place}"
    yield "backend", _where(status)
    if status.reason:
        yield "reason", status.reason
    if status.attempt is not None:
        phase = f", {status.phase.replace('_', ' ')}" if status.phase else ""
        yield "attempt", f"{status.attempt}{phase}"
    if status.step is not None:
        yield "step", f"{status.step}{_of_total(status)}"
    if status.elapsed_s is not None:
        yield "elapsed", show_duration(status.elapsed_s)
    if not status.points:
        yield "committed step", "none" if status.committed_step is None else str(status.committed_step)
    if status.metrics:
        yield (
            "metrics",
            "  ".join(
                _metrics(dict(sorted(status.metrics.items(), key=lambda item: (item[0] != "loss", item[0]))), " ")
            ),
        )
    if (seconds := run_status.age(status.updated)) is not None:
        yield "updated", f"{show_duration(seconds)} ago"
    if status.storage:
        yield "storage", status.storage
    for trouble in status.troubles:
        yield "trouble", trouble.text
    for event in status.set_aside[-3:]:
        yield "set aside", f"step {event.get('step')}: {event.get('reason', '')}"
    for notice in status.notices[-3:]:
        yield "notice", f"attempt {notice['attempt']}: {notice.get('source', '')}"
    for ending in status.endings[-5:]:
        step = f" at step {ending.step}" if ending.step is not None else ""
        yield "ended", f"attempt {ending.attempt}: {ending.outcome}{step}: {ending.reason}"


def _where(status: Status) -> str:
    """Say what runs it, and where."""
    if status.backend == by_hand.NAME:
        return "none: it was started by hand and not submitted" + (f", on {status.node}" if status.node else "")
    job = f"job {status.job}" if status.job else ""
    words = [
        status.backend,
        job,
        status.partition and f"partition {status.partition}",
        status.node and f"on {status.node}",
    ]
    return ", ".join(filter(None, words))


def _of_total(status: Status) -> str:
    """Write of how many steps, and how long the rest will take: ' of 2,000 (5 %), about 3 min left'."""
    if status.total_steps is None or status.step is None:
        return ""
    if status.state is State.DONE and status.step < status.total_steps:
        return f" of {status.total_steps}, stopped early"
    share = 100 * status.step // max(1, status.total_steps)
    left = f", about {show_duration(status.left_s)} left" if status.left_s is not None and not status.state.over else ""
    return f" of {status.total_steps} ({share} %){left}"


def _metrics(metrics: Mapping[str, float | None], between: str) -> list[str]:
    return [f"{name}{between}{'nan' if value is None else f'{value:.6g}'}" for name, value in metrics.items()]


def step_of(status: Status) -> str:
    """Write the completed steps, and of how many where that is known: '120/2000'."""
    return dash(status.step) + (f"/{status.total_steps}" if status.total_steps is not None else "")


def point_table(status: Status) -> list[tuple[str, ...]]:
    """Lay the points of a sweep out in rows, under a head."""
    names = list(status.points[0].values)
    lines: list[tuple[str, ...]] = [("POINT", *names, "STATE", "ATTEMPT", "STEP", "COMMITTED", "METRICS", "REASON")]
    for number, point in enumerate(status.points):
        counts = (dash(point.attempt), step_of(point), dash(point.committed_step))
        values = (point.values[name] for name in names)
        metrics = " ".join(_metrics(point.metrics, "=")) or "-"
        lines.append((str(number), *values, str(point.state), *counts, metrics, point.reason))
    return lines


def copy_logs(
    store: Store, out: TextIO, *, attempt: int | None = None, tail: int | None = None, following: bool = False
) -> None:
    """Write the log of every attempt, each under a line that names it.

    Args:
        store: The run.
        out: Where it goes.
        attempt: Only this one.
        tail: Only so many of the last lines, of each point of a sweep.
        following: Go on until the run is over.
    """
    store = store.patient(Patience()) if following else store
    members = specs.points(store, specs.read(store))
    offsets: dict[tuple[str, int], int] = {}

    def fetch() -> None:
        for one in members:
            mirror.fetch_logs(one, attempt)

    fetch()
    for one in members if tail is not None else ():
        offsets |= _last_lines(one, attempt, tail or 0) | {("", -1): 0}  # none was written last
    look = _looker(store, fetch)
    while True:
        look()
        # Before the copying: what is written until the run is over must still be copied.
        status = registry.status(store) if following else None
        over = status is None or status.state.over
        if following and over:
            with contextlib.suppress(JobkitError):
                fetch()
        for point, one in enumerate(members):
            for number in one.numbers(contract.ATTEMPTS):
                if attempt is None or number == attempt:
                    name = f"attempt {number}" if attempt is None or len(members) > 1 else ""
                    _copy_log(one, number, offsets, out, f"point {point}, {name}" if len(members) > 1 else name)
        out.flush()
        if over:
            return
        time.sleep(_POLL_JOB_S if status is not None and status.host else _POLL_S)


def _last_lines(store: Store, attempt: int | None, count: int) -> dict[tuple[str, int], int]:
    """Return from where on each log of a run is to be copied for the last lines of all, by its attempt."""
    offsets = {}
    for number in reversed(store.numbers(contract.ATTEMPTS)):
        if attempt in (None, number):
            offset, lines = _tail_of(store.file(contract.log_file(number)), count)
            offsets[store.url, number], count = offset, count - lines
    return offsets


def _tail_of(path: Path, count: int) -> tuple[int, int]:
    """Return where the last lines of a file begin, at most `count`, and how many they are; it is read from its end."""
    lines, text = 0, b""
    with contextlib.suppress(FileNotFoundError), open(path, "rb", opener=names.opener) as log:
        begin = end = log.seek(0, os.SEEK_END)
        while begin and text.count(b"\n", 0, -1) < count:
            begin = log.seek(max(0, begin - _BLOCK_BYTES))
            text = log.read(end - begin)
        last = text.splitlines(keepends=True)[-count:] if count else []
        return end - sum(map(len, last)), len(last)
    return 0, lines


_BLOCK_BYTES = 1 << 16


def _copy_log(store: Store, attempt: int, offsets: dict[tuple[str, int], int], out: TextIO, name: str) -> None:
    key = (store.url, attempt)
    newest = next(reversed(offsets), None)
    offset = offsets.get(key, 0)
    content = store.insist(lambda: _rest(store.file(contract.log_file(attempt)), offset))
    if not content and key in offsets:
        return
    if name and key != newest:
        print(f"==> {name} <==", file=out)
    offsets.pop(key, None)  # the newest is the last one written
    offsets[key] = offset + len(content)
    unguarded(out).write(printable(content.decode(errors="replace"), bars=True))


def _rest(path: Path, offset: int) -> bytes:
    try:
        with open(path, "rb", opener=names.opener) as log:
            log.seek(offset)
            return log.read()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise explain(error, f"cannot read {path}") from None


def print_service_log(store: Store, out: TextIO) -> None:
    """Write what a batch service's own log has of a run's job."""
    for line in registry.of(store).service_log(store):
        print(line, file=out)
