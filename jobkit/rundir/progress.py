"""A progress bar for transfers, where a person is looking: standard error is a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def transfer(doing: str, total_bytes: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show how far a transfer is.

    Args:
        doing: What is said beside the bar.
        total_bytes: Size of the whole.
        shown: False where nobody is to be bothered.

    Yields:
        A function to call with the bytes of each piece that has arrived, from any thread.
    """
    if not shown or not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(doing, total=total_bytes)
        yield lambda nbytes: progress.advance(task, nbytes)
