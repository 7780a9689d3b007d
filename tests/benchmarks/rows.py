"""What every benchmark is: its arguments, and the rows that say what is claimed and whether it holds."""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One claim.

    Args:
        name: What was measured.
        peer: Of what the figures are multiples; or their unit.
        now: The figures, one of each round.
        must: What their median must not exceed.
        before: The same without what is claimed to be better, in the same rounds; empty where there is no such thing.
    """

    name: str
    peer: str
    now: Sequence[float]
    must: float
    before: Sequence[float] = ()

    @property
    def holds(self) -> bool:
        """Whether the claim does."""
        return statistics.median(self.now) <= self.must


def show(rows: Iterable[Row]) -> int:
    """Print the rows, one a line; return 1 if one of them does not hold, the exit code of a benchmark."""
    table = Table("claim", "before", "now", "must", "of", "", title="medians (quartiles)")
    holds = True
    for row in rows:
        before = median(row.before) if row.before else ""
        table.add_row(row.name, before, median(row.now), f"{row.must:g}", row.peer, "" if row.holds else "MISSED")
        holds &= row.holds
    if table.row_count:
        Console(width=160).print(table)
    return int(not holds)


def median(values: Sequence[float]) -> str:
    """Write figures as their median with their quartiles."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def ratios(mine: Iterable[float], theirs: Iterable[float]) -> list[float]:
    """Return figures as multiples of others', round by round."""
    return [one / other for one, other in zip(mine, theirs, strict=True)]


def parser(text: str | None, **numbers: int) -> argparse.ArgumentParser:
    """Return what reads a benchmark's arguments.

    Args:
        text: The module's docstring, which `--help` prints.
        numbers: Options that are numbers, with their values by default.
    """
    reading = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    reading.add_argument("--quick", action="store_true", help="fewer rounds, and without what takes minutes")
    reading.add_argument("--pictures", type=Path, default=Path("build"), metavar="DIRECTORY", help="default: build")
    for name, number in numbers.items():
        reading.add_argument(f"--{name}", type=int, default=number, help=f"default: {number}")
    return reading


def main(reading: argparse.ArgumentParser, claims: Callable[[argparse.Namespace], list[Row]]) -> None:
    """Run one benchmark as a program, and exit."""
    sys.exit(show(claims(reading.parse_args())))
