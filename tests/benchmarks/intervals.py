"""What is lost between preemptions: a fixed interval, Young/Daly with the true rate, and `save_every="auto"`.

A simulation, driven by the class that runs use (interval.py). Time up is spent on useful steps, on waiting for
saves and notices, and on steps that a loss takes back; queue and restart are the same for all and left out. One step
is as short as you like. A save holds training up for b seconds and is durable d seconds after it began.

The traces are generated, from fixed seeds; none of them is a recording. Where a published figure stands behind a
number, it is named beside it. Run: python -m tests.benchmarks.intervals
"""

import argparse
import functools
import math
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobkit.checkpoint.interval import BEHIND, CAP, Cost, Interval, Past, interval_s
from tests.benchmarks.rows import Row, main, parser

HOUR = 3600.0
DAY = 24 * HOUR
SEEDS = 8
PARSER = parser(__doc__)
FIXED_S = 600.0


@dataclass(frozen=True)
class Trace:
    """Lives of attempts: how long each trains before it is ended, and whether that was announced.

    Args:
        name: For the table.
        grace_s: How long before the end it is announced; a save that takes longer does not fit.
        lives: Returns the lives for one seed, some weeks of them.
    """

    name: str
    grace_s: float
    lives: Callable[[random.Random], Iterator[tuple[float, bool]]]


def poisson(mean_s: float, noticed: float, total_s: float) -> Callable[[random.Random], Iterator[tuple[float, bool]]]:
    """Return lives that end at a constant rate, a share of them with notice."""

    def lives(chance: random.Random) -> Iterator[tuple[float, bool]]:
        left = total_s
        while left > 0:
            life = chance.expovariate(1 / mean_s)
            left -= life
            yield life, chance.random() < noticed

    return lives


def by_rate(
    rate: Callable[[float, random.Random], tuple[float, float]], total_s: float
) -> Callable[[random.Random], Iterator[tuple[float, bool]]]:
    """Return lives that end at a rate of the hour: `rate` gives the mean per second, and the share with notice."""

    def lives(chance: random.Random) -> Iterator[tuple[float, bool]]:
        now, begun, slice_s = 0.0, 0.0, 60.0
        while now < total_s:
            per_s, noticed = rate(now, chance)
            now += slice_s
            if chance.random() < -math.expm1(-per_s * slice_s):
                yield now - begun, chance.random() < noticed
                begun = now

    return lives


def spot(total_s: float) -> Callable[[random.Random], Iterator[tuple[float, bool]]]:
    """Return a spot market: days of quiet, and storms of one to three hours in which a machine lives for minutes.

    That reclaims come in bulk is what Bamboo (Thorpe et al., NSDI 2023) reports of spot GPUs; how long quiet and storms
    last is assumed here. The notice is GCE's 30 s, and comes in four of five (assumed).
    """

    def lives(chance: random.Random) -> Iterator[tuple[float, bool]]:
        left = total_s
        while left > 0:
            quiet = chance.expovariate(1 / (14 * HOUR))
            yield quiet, chance.random() < 0.8
            left -= quiet
            storm = chance.uniform(1 * HOUR, 3 * HOUR)
            left -= storm
            while storm > 0:
                life = chance.expovariate(1 / (12 * 60))
                storm -= life
                yield life, chance.random() < 0.8

    return lives


def shared_cluster(now: float, chance: random.Random) -> tuple[float, float]:
    """Give the rate of a low-priority SLURM job on 16 nodes, by the hour of the week.

    Preempted each hour and a half on working days, in 19 of 20 with a grace period that is kept (assumed); nodes fail
    at 6.5 per thousand node-days without notice (Kokolis et al. 2024, 'Revisiting reliability in large-scale machine
    learning research clusters', RSC-1).
    """
    hour, day = now / HOUR % 24, int(now / DAY) % 7
    preempted = 1 / (1.5 * HOUR) if day < 5 and 9 <= hour < 19 else 1 / (20 * HOUR)
    failed = 16 * 6.5 / 1000 / DAY
    return preempted + failed, 0.95 * preempted / (preempted + failed)


MONTH = 30 * DAY
TRACES = [
    Trace("Poisson 2 h, no notice", 0.0, poisson(2 * HOUR, 0.0, 7 * DAY)),
    Trace("Poisson 2 h, 9 of 10 noticed", 600.0, poisson(2 * HOUR, 0.9, 7 * DAY)),
    Trace("Poisson 3 days, no notice", 0.0, poisson(3 * DAY, 0.0, 2 * MONTH)),
    Trace("spot with storms, 30 s notice", 30.0, spot(MONTH)),
    Trace("SLURM by day and night", 300.0, by_rate(shared_cluster, MONTH)),
]
COSTS = {"100 MB": Cost(0.03, 0.3), "10 GB": Cost(1.0, 12.0), "100 GB": Cost(6.0, 180.0)}


@dataclass
class Spent:
    """Where the time of one run went, in seconds."""

    useful: float = 0.0
    saving: float = 0.0
    lost: float = 0.0

    @property
    def badput(self) -> float:
        """Share of the time that was not useful."""
        return (self.saving + self.lost) / (self.useful + self.saving + self.lost)


def simulate(trace: Trace, seed: int, cost: Cost, policy: "Policy") -> Spent:
    """Run attempts one after the other; `policy` opens an attempt and yields the interval before each next save."""
    spent, losses = Spent(), 0
    for life, noticed in trace.lives(random.Random(seed)):
        intervals = policy(spent, losses)
        now, durable_at = 0.0, 0.0  # `durable_at`: up to where this life's work is safe
        saving = 0.0
        while True:
            begin = now + next(intervals)
            if begin >= life:
                break
            if begin + cost.durable_s <= life:
                durable_at = begin
            saving += cost.blocking_s + BEHIND * (cost.durable_s - cost.blocking_s)
            now = begin
        if noticed and cost.durable_s <= trace.grace_s:
            spent.saving += min(cost.durable_s, life)
            durable_at = life
        else:
            losses += 1
        spent.saving += min(saving, durable_at)
        spent.lost += life - durable_at
        spent.useful += max(durable_at - saving, 0.0)
    return spent


Policy = Callable[[Spent, int], Iterator[float]]
"""Given what earlier attempts spent and how many losses there were."""


def fixed(interval: float) -> Policy:
    """Return the policy of one interval for all."""

    def policy(spent: Spent, losses: int) -> Iterator[float]:
        while True:
            yield interval

    return policy


def auto(cost: Cost) -> Policy:
    """Return the policy of `save_every="auto"`, which knows what earlier attempts' ledgers tell and nothing else."""

    def policy(spent: Spent, losses: int) -> Iterator[float]:
        opened = Interval(0.0)
        opened.past = Past(spent.useful + spent.saving + spent.lost, losses, (cost,) if spent.useful else ())
        opened.saved(0, cost)
        now = 0.0
        while True:
            interval = opened.seconds(now)
            yield interval
            now += interval

    return policy


@functools.cache
def true_mean_s(trace: Trace, fits: bool) -> float:
    """Return the mean time between losses that no save preceded, over many seeds."""
    total, losses = 0.0, 0
    for seed in range(200, 220):
        for life, noticed in trace.lives(random.Random(seed)):
            total, losses = total + life, losses + (not (noticed and fits))
    return total / max(losses, 1)


def measure(trace: Trace, cost: Cost) -> dict[str, float]:
    """Return the badput of every policy on one trace, as the mean over the seeds."""
    known = interval_s(cost, true_mean_s(trace, cost.durable_s <= trace.grace_s), cap=1.0)
    policies = {"fixed 10 min": fixed(FIXED_S), "Young/Daly, true M": fixed(known), "auto": auto(cost)}
    return {
        name: statistics.fmean(simulate(trace, seed, cost, policy).badput for seed in range(SEEDS))
        for name, policy in policies.items()
    }


def claims(given: argparse.Namespace) -> list[Row]:
    """Print the table, and draw the picture."""
    table = Table(
        "trace",
        "save (blocked, durable)",
        "M in hours",
        "fixed 10 min",
        "Young/Daly, true M",
        "auto",
        title=f"badput in %, simulated, {SEEDS} seeds; auto waits for saves at most {CAP:.0%} of the time",
    )
    taken: list[tuple[str, dict[str, float]]] = []
    for trace in TRACES:
        for size, cost in COSTS.items():
            badput = measure(trace, cost)
            taken.append((f"{trace.name}\n{size}", badput))
            shown = [f"{badput[name] * 100:.2f}" for name in badput]
            saves = f"{size} ({cost.blocking_s:g} s, {cost.durable_s:g} s)"
            mean_s = true_mean_s(trace, cost.durable_s <= trace.grace_s)
            table.add_row(trace.name, saves, f"{mean_s / HOUR:.1f}", *shown)
    Console(width=120).print(table)
    draw(taken, given.pictures / "intervals.png")
    # A thousandth of the time is nothing, whatever a quarter of it is.
    worst = [(badput["auto"] - 0.001) / badput["Young/Daly, true M"] for _, badput in taken]
    return [Row("badput of save_every='auto', the worst trace", "Young/Daly with the true rate", [max(worst)], 1.25)]


def draw(taken: list[tuple[str, dict[str, float]]], path: Path) -> None:
    """Draw the badput of every policy."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 0.55 * len(taken) + 1.2), layout="constrained")
    names = list(taken[0][1])
    for index, (name, colour) in enumerate(zip(names, ("#b8b8b8", "#7aa6c2", "#d1495b"), strict=True)):
        places = [place + (index - 1) * 0.27 for place in range(len(taken))]
        axes.barh(places, [found[name] * 100 for _, found in taken], height=0.25, label=name, color=colour)
    axes.set_yticks(range(len(taken)), [name for name, _ in taken], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("badput, % of the time up (logarithmic)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(path)


if __name__ == "__main__":
    main(PARSER, claims)
