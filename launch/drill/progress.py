"""How a drill shows what its runs are doing: a row for each that moves, below lines for what has happened."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import Progress, TaskID, TextColumn
from rich.text import Text

from launch.console import Console
from launch.lifecycle.run_status import Status


class Lines:
    """Tells a line per event: for pipes, and for --json on standard error.

    Args:
        console: Where.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        """Tell a line."""
        self.console.print(Text(text), soft_wrap=True)

    def moved(self, name: str, status: Status) -> None:
        """Take note of what a run is doing; among lines there is no place for it."""


class Rows(Lines):
    """Shows what every run is doing, below the lines, on a terminal.

    Args:
        console: Where.
        progress: What draws the rows.
        steps: How many steps a run has, where that is known.
    """

    def __init__(self, console: Console, progress: Progress, steps: int | None = None) -> None:
        super().__init__(console)
        self._progress, self.steps = progress, steps
        self._rows: dict[str, TaskID] = {}

    def moved(self, name: str, status: Status) -> None:
        """Show what a run is doing; one that is over has no row."""
        if status.state.over:
            if name in self._rows:
                self._progress.remove_task(self._rows.pop(name))
            return
        step = f"step {status.step}" if status.step is not None else status.phase or "starting"
        self.show(name, status.step, f"attempt {status.attempt or 0}, {step}")

    def show(self, name: str, step: int | None, detail: str) -> None:
        """Show a row, a new one where there is none of that name."""
        if name not in self._rows:
            self._rows[name] = self._progress.add_task(name, total=self.steps, detail="")
        self._progress.update(self._rows[name], completed=step or 0, detail=detail)


@contextmanager
def telling(as_json: bool) -> Iterator[Lines]:
    """Give what shows a drill's progress."""
    console = Console(stderr=as_json, highlight=False)
    if not console.is_terminal:
        yield Lines(console)
        return
    columns = TextColumn("  {task.description} ", style="cyan"), TextColumn("{task.fields[detail]}", style="dim")
    with Progress(*columns, console=console, refresh_per_second=5, transient=True) as progress:
        yield Rows(console, progress)
