"""`jobkit demo`: one real training twice, once undisturbed and once preempted and killed, and the bits compared.

Both are runs of a drill on an example: what interrupts the second one are real signals to real processes, at steps
drawn from a seed. jax is only in the trainings' own processes.
"""

import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from jobkit import contract
from jobkit.contract import Outcome, State
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir import ledger
from jobkit.rundir.ledger import Event
from jobkit.rundir.remote import Remote
from jobkit.rundir.store import Store, is_remote, local_path
from jobkit.units import show_duration
from launch.backends import registry
from launch.backends.local import Local
from launch.console import Console
from launch.drill import observe
from launch.drill.card import number
from launch.drill.comparing import Comparison, comparer
from launch.drill.drill import free_place
from launch.drill.observe import Ending
from launch.drill.progress import Rows
from launch.drill.runs import Runs, Watched
from launch.lifecycle import run_status
from launch.lifecycle.history import History, read_history
from launch.lifecycle.run_status import Status
from launch.report.goodput import measure
from launch.report.html import Verdict, write_html
from launch.report.loss_curve import curve_of
from launch.report.png import draw_curve, write_figure
from launch.spec.jobspec import JobSpec, fresh_place

STEPS, LEAST_STEPS = 500, 60
_NONE = Ending(None, None)
"""Of an interruption that hit nobody."""


@dataclass
class Interruption:
    """One planned interruption, and what came of it.

    Args:
        kind: 'preemption' (SIGTERM) or 'kill' (SIGKILL).
        target: 'supervisor', as a scheduler would, or 'trainer'.
        planned_step: Completed steps at which it is due.
        fired_step: Completed steps when the signal was sent; None until then.
        ending: How the attempt that it hit has ended.
    """

    kind: str
    target: str
    planned_step: int
    fired_step: int | None = None
    ending: Ending = _NONE

    @property
    def name(self) -> str:
        """What a person reads: 'SIGTERM to the supervisor'."""
        return f"{self.signum.name} to the {self.target}"

    @property
    def signum(self) -> signal.Signals:
        """What is sent."""
        return signal.SIGKILL if self.kind == "kill" else signal.SIGTERM

    @property
    def as_promised(self) -> bool:
        """Whether it hit a training, ended its attempt as such a signal must, and cost a preemption no step."""
        outcome, lost_steps = self.ending.outcome, self.ending.lost_steps
        if self.kind == "kill":
            return outcome == Outcome.KILLED and lost_steps is not None
        return outcome == Outcome.PREEMPTED and self.ending.reached_step == self.ending.resumed_step is not None

    def document(self) -> dict[str, Any]:
        """Return it for JSON."""
        document = asdict(self)
        ending: dict[str, Any] = document.pop("ending")
        del ending["reason"]
        return document | ending | {"lost_steps": self.ending.lost_steps, "as_promised": self.as_promised}


_QUESTION = "final state and every loss bit-identical"


@dataclass
class DemoResult:
    """What a demo found; the card and `--json` show it.

    Args:
        comparison: What `python -m jobkit.compare` said.
        plot: The picture.
        report: The page of both runs.
    """

    run: str
    seed: int
    steps: int
    attempts: int
    interruptions: list[Interruption]
    comparison: Comparison
    undisturbed_s: float
    disturbed_s: float
    plot: str
    report: str

    @property
    def identical(self) -> bool:
        """Whether final state and every logged value are the same to the last bit."""
        return bool(self.comparison["equal"])

    @property
    def survived(self) -> bool:
        """Whether every interruption happened and went as promised and the bits are the same."""
        return self.identical and all(interruption.as_promised for interruption in self.interruptions)

    def document(self) -> dict[str, Any]:
        """Return it for JSON."""
        more = {"identical": self.identical, "survived": self.survived}
        return asdict(self) | more | {"interruptions": [each.document() for each in self.interruptions]}


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


def main(run: str | None = None, seed: int | None = None, *, steps: int = STEPS, as_json: bool = False) -> int:
    """Run the demo and print its card.

    Args:
        run: Directory for the two runs and the picture, a new one below runs/ by default; or the URL of a bucket for
            the runs, and then the picture lies below runs/.
        seed: Decides when and what is interrupted; drawn and printed by default.
        steps: How long each training is; fewer than 60 leave no room for three interruptions.
        as_json: Print one JSON object instead of a card; progress goes to standard error.

    Returns:
        0 if every interruption happened and went as promised and the bits are the same, else 1.

    Raises:
        ConfigError: If the directory is taken, or what the demo needs is not installed.
    """
    if steps < LEAST_STEPS:
        raise ConfigError(f"{steps} steps are too few to be interrupted three times; give {LEAST_STEPS} or more")
    missing = [name for name in ("jax", "flax", "optax", "orbax", "grain", "matplotlib") if find_spec(name) is None]
    if missing:
        remedy = "pip install -e '.[train,report]' in jobkit's checkout"
        raise ConfigError(f"the demo needs {', '.join(missing)}: {remedy}")
    remote = is_remote(run or "")
    place = local_path(run) if run and not remote else Path(fresh_place("demo")).absolute()
    base = run.rstrip("/") if run and remote else str(place)
    if remote and Remote(base, deadline_s=20).find():
        raise ConfigError(f"{base} is not empty; give the demo a new --run")
    free_place(place, "demo")
    seed = random.SystemRandom().randrange(1000) if seed is None else seed
    plan = draw(seed, steps)
    console = Console(stderr=as_json)
    tell = partial(console.print, highlight=False, soft_wrap=True)
    tell(f"[bold]jobkit demo[/bold]  run {escape(base if remote else _short(place))}  seed {seed}")
    tell(f"planned: {', '.join(f'{each.name} at step {each.planned_step}' for each in plan)}")
    result = _train_twice(base, place, seed, steps, plan, console)
    if as_json:
        print(run_status.to_json(result.document()))
    else:
        console.print(_card(result))
        for name, path in (("loss curves", result.plot), ("report", result.report)):
            tell(f"{name}: {_short(Path(path))}")
    return 0 if result.survived else 1


def _short(path: Path) -> str:
    """Write a path relative to here where it lies below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


# The two trainings.


def _train_twice(
    base: str, place: Path, seed: int, steps: int, plan: list[Interruption], console: Console
) -> DemoResult:
    """Train undisturbed, then interrupted as planned; compare, and draw both."""
    # On the CPU whatever the machine has: an accelerator's kernels need flags of their own to repeat their bits.
    command = ("env", "JAX_PLATFORMS=cpu", sys.executable, "-m", "jobkit.examples.text", "--steps", str(steps))
    place.mkdir(parents=True, exist_ok=True)
    spec = JobSpec(command=command, run=base, cwd=str(place), snapshot=False)
    stores, seconds = [], []
    with _bars(console, steps) as bars, closing(Runs(spec, Local(), bars)) as runs:
        for name, planned in (("undisturbed", []), ("disturbed", plan)):
            begun = time.monotonic()
            run = runs.start(name, {})
            try:
                run.play(partial(_interrupt, run, planned))
            except BaseException:  # Ctrl-C: it saves, and is cancelled as any run is
                with suppress(JobkitError):  # it is over by itself
                    registry.cancel(run.store.url)
                raise
            status = registry.status(run.store)
            if run.wrong or status.state is not State.DONE:
                log = run.store.file(contract.log_file(status.attempt or 0))
                reason = run.wrong[0] if run.wrong else status.reason
                raise JobkitError(f"the {name} training did not finish: {reason}; see {log}")
            stores.append(run.store)
            seconds.append(time.monotonic() - begun)
        bars.say("comparing the two runs bit for bit")
        with comparer() as comparing:
            comparison = comparing.compare(*(store.url for store in stores))
    for each in plan:
        if each.ending.attempt is not None:
            each.ending = observe.ending_of(stores[1], each.ending.attempt)
    undisturbed, disturbed = (read_history(store, state=State.DONE, reason="finished") for store in stores)
    return DemoResult(
        run=base,
        seed=seed,
        steps=steps,
        attempts=len(stores[1].numbers(contract.ATTEMPTS)),
        interruptions=plan,
        comparison=comparison,
        undisturbed_s=seconds[0],
        disturbed_s=seconds[1],
        plot=str(draw_losses(place / contract.REPORT / "loss.png", undisturbed, disturbed)),
        report=str(
            write_html(place / contract.REPORT / "report.html", [disturbed, undisturbed], _page_verdict(comparison))
        ),
    )


def _page_verdict(comparison: Comparison) -> Verdict:
    """Say on the page what the demo found, and name it after that."""
    equal = bool(comparison["equal"])
    answer = "yes" if equal else "no"
    return Verdict(f"jobkit demo, bit-identical: {answer}", f"{_QUESTION}: {answer}", equal)


def _interrupt(run: Watched, plan: Sequence[Interruption]) -> None:
    """Send each signal once its step is reached."""
    for each in plan:
        run.until(partial(_fire, run, each), f"it was at step {each.planned_step}")


def _fire(run: Watched, interruption: Interruption) -> bool:
    """Send the signal if its step is reached; tell whether it was sent."""
    one = run.at_step(interruption.planned_step)
    if one is None:
        return False
    pid = one.beat.pid if interruption.target == "trainer" else one.supervisor
    if not observe.send(pid, interruption.signum):
        return False
    interruption.fired_step, interruption.ending = one.beat.step, Ending(one.attempt, None)
    run.runs.telling.say(f"step {one.beat.step}: {interruption.name} of attempt {one.attempt}")
    return True


class _Bars(Rows):
    """A bar for each training, and the events above them; plain lines where there is no terminal."""

    def __init__(self, console: Console, progress: Progress, steps: int) -> None:
        super().__init__(console, progress, steps)
        self._printed: dict[str, int] = {}
        """How many events of each run have been printed."""
        self._plain_at = 0.0

    def say(self, text: str) -> None:
        """Print an event."""
        super().say(f"  {text}")

    def moved(self, name: str, status: Status) -> None:
        """Move a run's bar, and tell of attempts that ended or resumed."""
        news = [text for event in ledger.read_events(Store(status.run)) if (text := _news(event))]
        for text in news[self._printed.get(name, 0) :]:
            self.say(text)
        self._printed[name] = len(news)
        detail = [status.phase.replace("_", " ") if status.phase else str(status.state)]
        loss = status.metrics.get("loss")
        detail += [f"attempt {status.attempt}"] if status.attempt else []
        detail += [f"loss {loss:.3f}"] if loss is not None else []
        detail += [f"committed {status.committed_step}"] if status.committed_step is not None else []
        self.show(name, status.step, ", ".join(detail))

    def show(self, name: str, step: int | None, detail: str) -> None:
        """Move a bar."""
        super().show(name, step, detail)
        if not self.console.is_terminal and time.monotonic() - self._plain_at >= 5:
            self._plain_at = time.monotonic()
            self.say(f"{name}: step {step or 0}/{self.steps}, {detail}")


def _news(event: Event) -> str:
    if event["event"] == "stopped":
        return f"step {event['step']}: committed {event['notice_to_commit_s']:.2f} s after the notice"
    if event["event"] == "restored":
        return f"step {event['step']}: attempt {event['attempt']} goes on from here"
    return ""


@contextmanager
def _bars(console: Console, steps: int = STEPS) -> Iterator[_Bars]:
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=30),
        TextColumn("step {task.completed:>3.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield _Bars(console, progress, steps)


# What came of it.


def _card(result: DemoResult) -> Panel:
    """Draw the card."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("interruption")
    for name in ("at step", "steps lost", "to commit", "restart"):
        table.add_column(name, justify="right")
    table.add_column("as promised")
    for each in result.interruptions:
        ending = each.ending
        table.add_row(
            f"{each.signum.name}, {each.target}",
            number(each.fired_step),
            number(ending.lost_steps),
            number(ending.commit_s, ".2f", " s"),
            number(ending.restart_s, ".1f", " s"),
            "yes" if each.as_promised else f"[red]no[/red] ({ending.outcome or 'not sent'})",
        )
    grid = Table.grid(padding=(1, 0, 0, 0))
    times = f"{show_duration(result.undisturbed_s)} undisturbed, {show_duration(result.disturbed_s)} disturbed"
    grid.add_row(f"{result.steps} steps in {result.attempts} attempts; {times}")
    grid.add_row(table)
    grid.add_row("\n".join(_verdict(result)))
    return Panel(grid, title=f"jobkit demo, seed {result.seed}", title_align="left", expand=False, padding=(1, 2))


def _verdict(result: DemoResult) -> Iterator[str]:
    answer = "[bold green]yes[/bold green]" if result.identical else "[bold red]no[/bold red]"
    yield f"{_QUESTION}: {answer}"
    compared = result.comparison
    yield (
        f"[dim]{compared['leaves']} leaves of step {compared['step']} and {compared['values']} logged values compared, "
        f"{compared['repeated']} of them logged again after the kill[/dim]"
    )
    if first := compared.get("difference"):
        yield f"first difference at step {first['step']}, {first['name']}: {first['a']} / {first['b']}"


# The picture.

_BLUE, _GREEN = "#3b6fb6", "#2e8b57"


def draw_losses(path: Path, undisturbed: History, disturbed: History) -> Path:
    """Draw the loss of the interrupted training over that of the undisturbed one, and its commits, into a PNG.

    Raises:
        ConfigError: If it cannot be written there.
    """
    steps = sorted({event["step"] for life in disturbed.lives for event in life.program if event["event"] == "saved"})

    def picture(plt: Any) -> Any:
        figure, axes = plt.subplots(figsize=(10, 5.2), layout="constrained")
        under, over = (curve_of(history, measure(history)) for history in (undisturbed, disturbed))
        if under is not None and over is not None:
            style: dict[str, Any] = {"color": _BLUE, "alpha": 0.35}
            axes.plot(*zip(*under.line, strict=True), linewidth=4, label="undisturbed", **style)
            for step, value in under.dots:
                axes.plot(step, value, "o", markersize=10, **style)
            draw_curve(axes, over)
        axes.plot(
            steps, [0.012] * len(steps), "|", color=_GREEN, markersize=9, markeredgewidth=1.4,
            transform=axes.get_xaxis_transform(), label=f"commits, disturbed ({len(steps)})", clip_on=False,
        )  # fmt: skip
        axes.set_title("One training, undisturbed and interrupted: loss in nats per character", pad=20)
        figure.legend(frameon=False, loc="outside lower center", ncols=4, fontsize=9)
        return figure

    return write_figure(path, picture)
