"""`jobkit demo`: one real training twice, once undisturbed and once preempted and killed, and the bits compared.

The second one runs through the same local backend as any other job; what interrupts it are real signals to real
processes, at steps drawn from a seed. jax is only in the trainings' own processes.
"""

import json
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from jobkit import contract
from jobkit.contract import Outcome, State
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir import ledger
from jobkit.rundir.ledger import Event
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store, is_remote, local_path
from jobkit.supervise.heartbeat import Phase
from jobkit.units import show_duration
from launch.backends.local import Local
from launch.console import Console
from launch.drill import observe
from launch.lifecycle import run_status, verbs
from launch.lifecycle.history import read_history
from launch.report.html import write_html
from launch.spec.jobspec import JobSpec

STEPS, LEAST_STEPS = 500, 60
_LOOK_S = 0.25
"""How often the picture is drawn anew."""


@dataclass
class Interruption:
    """One planned interruption, and what came of it.

    Args:
        kind: 'preemption' (SIGTERM) or 'kill' (SIGKILL).
        target: 'supervisor', as a scheduler would, or 'trainer'.
        planned_step: Completed steps at which it is due.
        fired_step: Completed steps when the signal was sent; None until then.
        attempt: The attempt it hit.
        reached_step: Completed steps when that attempt ended.
        resumed_step: Where the next attempt went on.
        commit_s: Seconds from the notice to the commit; None for a kill.
        restart_s: Seconds from the end of the attempt to the end of the next one's first step.
    """

    kind: str
    target: str
    planned_step: int
    fired_step: int | None = None
    attempt: int | None = None
    outcome: str | None = None
    reached_step: int | None = None
    resumed_step: int | None = None
    commit_s: float | None = None
    restart_s: float | None = None

    @property
    def name(self) -> str:
        """What a person reads: 'SIGTERM to the supervisor'."""
        return f"{self.signum.name} to the {self.target}"

    @property
    def signum(self) -> signal.Signals:
        """What is sent."""
        return signal.SIGKILL if self.kind == "kill" else signal.SIGTERM

    @property
    def lost_steps(self) -> int | None:
        """Completed steps that had to be done again."""
        if self.reached_step is None or self.resumed_step is None:
            return None
        return self.reached_step - self.resumed_step

    @property
    def as_promised(self) -> bool:
        """Whether it hit a training, ended its attempt as such a signal must, and cost a preemption no step."""
        wanted = Outcome.PREEMPTED if self.kind == "preemption" else Outcome.KILLED
        if self.fired_step is None or self.outcome != wanted or self.lost_steps is None:
            return False
        return self.kind == "kill" or self.lost_steps == 0


@dataclass
class Result:
    """What a demo found; the card and `--json` show it.

    Args:
        identical: Whether final state and every logged value are the same to the last bit.
        comparison: What `python -m jobkit.compare` said.
        plot: The picture.
        report: The page of both runs.
    """

    run: str
    seed: int
    steps: int
    attempts: int
    interruptions: list[Interruption]
    identical: bool
    comparison: dict[str, Any]
    undisturbed_s: float
    disturbed_s: float
    plot: str
    report: str

    @property
    def survived(self) -> bool:
        """Whether every interruption happened and went as promised and the bits are the same."""
        return self.identical and all(interruption.as_promised for interruption in self.interruptions)


def draw(seed: int, steps: int = STEPS) -> list[Interruption]:
    """Draw two preemptions and one kill, in order of their steps.

    One lies in each third of the run, so that every one hits an attempt of its own; each of the preempted processes,
    supervisor and trainer, is hit once.
    """
    dice = random.Random(seed)
    plans = [("preemption", "supervisor"), ("preemption", "trainer"), ("kill", "trainer")]
    dice.shuffle(plans)
    third = steps // 3
    return [
        Interruption(kind, target, third * index + dice.randint(third // 5, third - third // 5))
        for index, (kind, target) in enumerate(plans)
    ]


def main(run: str | None = None, seed: int | None = None, *, steps: int = STEPS, json: bool = False) -> int:
    """Run the demo and print its card.

    Args:
        run: Directory for the two runs and the picture, a new one below runs/ by default; or the URL of a bucket for
            the runs, and then the picture lies below runs/.
        seed: Decides when and what is interrupted; drawn and printed by default.
        steps: How long each training is; fewer than 60 leave no room for three interruptions.
        json: Print one JSON object instead of a card; progress goes to standard error.

    Returns:
        0 if every interruption happened and went as promised and the bits are the same, else 1.

    Raises:
        ConfigError: If the directory is taken, or what the demo needs is not installed.
    """
    if steps < LEAST_STEPS:
        raise ConfigError(f"{steps} steps are too few to be interrupted three times; give {LEAST_STEPS} or more")
    _check_installed()
    place = local_path(run) if run and not is_remote(run) else _fresh_place()
    base = run.rstrip("/") if run and is_remote(run) else str(place)
    _check_free(base, place)
    urls = {name: f"{base}/{name}" for name in ("undisturbed", "disturbed")}
    seed = random.SystemRandom().randrange(1000) if seed is None else seed
    console = Console(stderr=json)
    plan = draw(seed, steps)
    console.print(
        f"[bold]jobkit demo[/bold]  run {escape(base if is_remote(base) else _short(place))}  seed {seed}",
        highlight=False,
        soft_wrap=True,
    )
    planned = ", ".join(f"{interruption.name} at step {interruption.planned_step}" for interruption in plan)
    console.print(f"planned: {planned}", highlight=False, soft_wrap=True)
    with _screen(console, steps) as screen:
        undisturbed = _train("undisturbed", urls["undisturbed"], place, [], screen)
        disturbed = _train("disturbed", urls["disturbed"], place, plan, screen)
        screen.say("comparing the two runs bit for bit")
        with observe.comparer() as comparer:
            comparison = comparer.compare(*urls.values())
    stores = {name: Store(url) for name, url in urls.items()}
    _settle(stores["disturbed"], plan)
    result = Result(
        run=base,
        seed=seed,
        steps=steps,
        attempts=len(stores["disturbed"].numbers(contract.ATTEMPTS)),
        interruptions=plan,
        identical=bool(comparison.get("equal")),
        comparison=comparison,
        undisturbed_s=undisturbed,
        disturbed_s=disturbed,
        plot=str(draw_losses(place, stores, plan)),
        report=str(_write_report(place, stores)),
    )
    if json:
        _print_json(result)
    else:
        console.print(_card(result))
        for name, path in (("loss curves", result.plot), ("report", result.report)):
            console.print(f"{name}: {_short(Path(path))}", highlight=False, soft_wrap=True)
    return 0 if result.survived else 1


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("jax", "flax", "optax", "orbax", "grain", "matplotlib") if find_spec(name) is None]
    if missing:
        remedy = "pip install -e '.[train,report]' in jobkit's checkout"
        raise ConfigError(f"the demo needs {', '.join(missing)}: {remedy}")


def _check_free(base: str, place: Path) -> None:
    if is_remote(base):
        if Remote(base, deadline_s=20).find():
            raise ConfigError(f"{base} is not empty; give the demo a new --run")
    elif place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"{place} is not an empty directory; give the demo a new --run")


def _fresh_place() -> Path:
    stem = Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    place, count = stem, 2
    while place.exists():
        place, count = stem.with_name(f"{stem.name}-{count}"), count + 1
    return place.absolute()


def _short(path: Path) -> str:
    """Write a path relative to here where it lies below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


# One training, watched.


def _train(name: str, url: str, place: Path, plan: Sequence[Interruption], screen: "_Screen") -> float:
    """Run the training to its end, interrupting it as planned; return the seconds it took.

    Args:
        name: What the bar is called.
        url: The run.
        place: A directory to start it in.
        plan: The interruptions.
        screen: Where it is shown.

    Raises:
        JobkitError: If it does not get to its end; nothing of it runs any more then.
    """
    begun = time.monotonic()
    # On the CPU whatever the machine has: an accelerator's kernels need flags of their own to repeat their bits.
    trainer = (sys.executable, "-m", "jobkit.examples.text", "--steps", str(screen.steps))
    place.mkdir(parents=True, exist_ok=True)
    spec = JobSpec(command=("env", "JAX_PLATFORMS=cpu", *trainer), run=url, cwd=str(place), snapshot=False)
    task, waiting, over = screen.add(name), list(plan), False
    store = verbs.submit(Local(), spec)
    watched = _Watched(store, task, screen)
    try:
        next_look = 0.0
        while not over:
            if waiting and _fire(store, waiting[0], screen.say):
                waiting.pop(0)
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + _LOOK_S
                over = watched.look()
            time.sleep(observe.AIM_S if waiting else _LOOK_S / 2)
    finally:
        if not over:  # Ctrl-C, or an error of ours: leave nothing running
            verbs.cancel(Local(), store)
    if watched.status.state is not State.DONE:
        log = store.file(contract.log_file(watched.status.attempt or 0))
        raise JobkitError(f"the {name} training did not finish: {watched.status.reason}; see {log}")
    return time.monotonic() - begun


def _fire(store: Store, interruption: Interruption, say: Callable[[str], None]) -> bool:
    """Send the signal if its step is reached; tell whether it was sent."""
    attempt = observe.newest_attempt(store)
    link = observe.living(store, attempt) if attempt is not None else None
    if attempt is None or link is None:
        return False
    beat = observe.beat_of(link)
    if beat.phase != Phase.STEPPING or beat.step < interruption.planned_step:
        return False
    pid = beat.pid if interruption.target == "trainer" else link["pid"]
    if not observe.send(pid, interruption.signum):
        return False
    interruption.fired_step, interruption.attempt = beat.step, attempt
    say(f"step {beat.step}: {interruption.name} of attempt {attempt}")
    return True


class _Screen:
    """Two bars and the events above them; plain lines where there is no terminal."""

    def __init__(self, console: Console, progress: Progress, steps: int) -> None:
        self._console, self._progress, self.steps = console, progress, steps
        self._plain_at = 0.0

    def add(self, name: str) -> TaskID:
        """Begin a bar."""
        return self._progress.add_task(name, total=self.steps, detail="starting")

    def say(self, text: str) -> None:
        """Print an event."""
        self._console.print(f"  {text}", highlight=False, soft_wrap=True)

    def update(self, task: TaskID, step: int, detail: str) -> None:
        """Move a bar."""
        self._progress.update(task, completed=step, detail=detail)
        if not self._console.is_terminal and time.monotonic() - self._plain_at >= 5:
            self._plain_at = time.monotonic()
            self.say(f"{self._progress.tasks[task].description}: step {step}/{self.steps}, {detail}")


@contextmanager
def _screen(console: Console, steps: int = STEPS) -> Iterator[_Screen]:
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=30),
        TextColumn("step {task.completed:>3.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield _Screen(console, progress, steps)


@dataclass
class _Watched:
    """What has been told about a run so far."""

    store: Store
    task: TaskID
    screen: _Screen
    status: run_status.Status = field(init=False)
    _told: int = 0

    def look(self) -> bool:
        """Read the status, show it, tell of attempts that ended or resumed; return whether the run is over."""
        self.status = status = run_status.status(self.store)
        for event in self._news():
            self.screen.say(event)
        detail = [status.phase.replace("_", " ") if status.phase else str(status.state)]
        if status.attempt:
            detail.append(f"attempt {status.attempt}")
        loss = status.metrics.get("loss")
        if loss is not None:
            detail.append(f"loss {loss:.3f}")
        if status.committed_step is not None:
            detail.append(f"committed {status.committed_step}")
        self.screen.update(self.task, status.step or 0, ", ".join(detail))
        return status.state.over and status.runner != "alive"

    def _news(self) -> Iterator[str]:
        attempts = self.store.numbers(contract.ATTEMPTS)
        count = 0
        for attempt in attempts:
            for event in ledger.attempt_events(self.store, attempt):
                text = _told(event)
                if text:
                    count += 1
                    if count > self._told:
                        self._told = count
                        yield text


def _told(event: Event) -> str:
    if event["event"] == "stopped":
        return f"step {event['step']}: committed {event['notice_to_commit_s']:.2f} s after the notice"
    if event["event"] == "restored":
        return f"step {event['step']}: attempt {event['attempt']} goes on from here"
    return ""


# What came of it.


def _settle(store: Store, plan: Sequence[Interruption]) -> None:
    """Fill in, from the ledger, how each interruption went."""
    for interruption in plan:
        if interruption.attempt is None:
            continue
        ending = observe.ending_of(store, interruption.attempt)
        interruption.outcome, interruption.reached_step = ending.outcome, ending.reached_step
        interruption.commit_s, interruption.restart_s = ending.commit_s, ending.restart_s
        interruption.resumed_step = ending.resumed_step


def _card(result: Result) -> Panel:
    """Draw the card."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("interruption")
    for name in ("at step", "steps lost", "to commit", "restart"):
        table.add_column(name, justify="right")
    table.add_column("as promised")
    for each in result.interruptions:
        table.add_row(
            f"{each.signum.name}, {each.target}",
            _number(each.fired_step),
            _number(each.lost_steps),
            "-" if each.commit_s is None else f"{each.commit_s:.2f} s",
            "-" if each.restart_s is None else f"{each.restart_s:.1f} s",
            "yes" if each.as_promised else f"[red]no[/red] ({each.outcome or 'not sent'})",
        )
    grid = Table.grid(padding=(1, 0, 0, 0))
    times = f"{show_duration(result.undisturbed_s)} undisturbed, {show_duration(result.disturbed_s)} disturbed"
    grid.add_row(f"{result.steps} steps in {result.attempts} attempts; {times}")
    grid.add_row(table)
    grid.add_row(_verdict(result))
    return Panel(grid, title=f"jobkit demo, seed {result.seed}", title_align="left", expand=False, padding=(1, 2))


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _verdict(result: Result) -> str:
    answer = "[bold green]yes[/bold green]" if result.identical else "[bold red]no[/bold red]"
    lines = [f"final state and every loss bit-identical: {answer}"]
    compared = result.comparison
    lines.append(
        f"[dim]{compared['leaves']} leaves of step {compared['step']} and {compared['values']} logged values compared, "
        f"{compared['repeated']} of them logged again after the kill[/dim]"
    )
    first = compared.get("difference")
    if first:
        lines.append(f"first difference at step {first['step']}, {first['name']}: {first['a']} / {first['b']}")
    return "\n".join(lines)


def _print_json(result: Result) -> None:
    document = asdict(result) | {"survived": result.survived}
    for entry, each in zip(document["interruptions"], result.interruptions, strict=True):
        entry |= {"lost_steps": each.lost_steps, "as_promised": each.as_promised}
    print(json.dumps(document, indent=2))


# The pictures.


def _write_report(place: Path, runs: Mapping[str, Store]) -> Path:
    """Write the page of both runs, the interrupted one first."""
    both = [runs["disturbed"], runs["undisturbed"]]
    histories = [read_history(store, state=State.DONE, reason="finished") for store in both]
    return write_html(place / contract.REPORT / "report.html", histories)


_INK, _BLUE, _ORANGE, _RED, _GREEN = "#1f2933", "#3b6fb6", "#e07b1a", "#c0392b", "#2e8b57"


def draw_losses(place: Path, runs: Mapping[str, Store], plan: Sequence[Interruption]) -> Path:
    """Draw both loss curves, the interruptions and the commits into report/loss.png.

    Args:
        place: The demo's directory.
        runs: 'undisturbed' and 'disturbed'.
        plan: The interruptions, as they went.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    stores = [runs["undisturbed"], runs["disturbed"]]
    left, right = (ledger.read_metrics(store).values for store in stores)
    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "text.color": _INK}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(10, 5.2), layout="constrained")
        _curve(axes, left.get("loss", {}), color=_BLUE, alpha=0.35, linewidth=3.5, label="loss, undisturbed")
        _curve(axes, right.get("loss", {}), color=_INK, linewidth=0.8, label="loss, disturbed")
        _points(axes, left, facecolors="none", edgecolors=_BLUE, linewidths=1.6, s=75, label="val_loss, undisturbed")
        _points(axes, right, color=_INK, s=12, zorder=4, label="val_loss, disturbed")
        axes.set(xlabel="step", ylabel="loss (nats per character)", xlim=(0, max(left.get("loss", {0: 0.0})) + 5))
        _mark_interruptions(axes, plan)
        _mark_commits(axes, stores[1])
        figure.legend(frameon=False, loc="outside lower center", ncols=5, fontsize=9)
        axes.set_title("One training, undisturbed and interrupted", loc="left", fontsize=12, fontweight="bold", pad=12)
        path = place / contract.REPORT / "loss.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def _curve(axes: Any, values: dict[int, float], **style: Any) -> None:
    steps = sorted(values)
    axes.plot(steps, [values[step] for step in steps], **style)


def _points(axes: Any, values: dict[str, dict[int, float]], **style: Any) -> None:
    line = values.get("val_loss", {})
    axes.scatter(list(line), list(line.values()), **({"zorder": 3} | style))


def _mark_interruptions(axes: Any, plan: Sequence[Interruption]) -> None:
    """Draw a line per interruption, and shade the steps that were done again."""
    for index, each in enumerate(plan):
        if each.fired_step is None:
            continue
        color = _RED if each.kind == "kill" else _ORANGE
        at = each.reached_step or each.fired_step
        axes.axvline(at, color=color, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
        lost = each.lost_steps or 0
        if lost and each.resumed_step is not None:
            axes.axvspan(each.resumed_step, at, color=color, alpha=0.15, linewidth=0, zorder=0)
        label = f"{each.signum.name}, {each.target}\n{lost} steps lost"
        late = at > 0.8 * axes.get_xlim()[1]
        axes.annotate(
            label, (at, 0.99 - 0.1 * (index % 2)), xycoords=("data", "axes fraction"), xytext=(-5 if late else 5, 0),
            textcoords="offset points", ha="right" if late else "left", va="top", color=color, fontsize=9,
        )  # fmt: skip


def _mark_commits(axes: Any, store: Store) -> None:
    """Draw a tick at the bottom for each committed save of the disturbed run."""
    events = [event for attempt in store.numbers(contract.ATTEMPTS) for event in ledger.attempt_events(store, attempt)]
    steps = sorted({event["step"] for event in events if event["event"] == "saved"})
    if steps:
        axes.plot(
            steps, [0.012] * len(steps), "|", color=_GREEN, markersize=9, markeredgewidth=1.4,
            transform=axes.get_xaxis_transform(), label=f"commits, disturbed ({len(steps)})", clip_on=False,
        )  # fmt: skip
