"""The longest silence of a program around a preemption, where SLURM holds requeued jobs back for its default of 120 s.

    jobkit    a training in JAX, as its users write it
    plain     the same training in a plain batch script with --no-requeue that submits its own successor, saved with
              Orbax's CheckpointManager when JAX tells of the preemption
    submitit  a checkpointable step loop without JAX, which submitit requeues: SLURM is told to send it the signal that
              it waits for

One cluster, jobkit and plain in turn; submitit waits on a cluster of its own meanwhile. JOBKIT_SLURM names the SLURM.

Run: python -m tests.benchmarks.silence [--quick] [--rounds N] [--json FILE] [--case NAME ...]
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.rows import Row, main, parser
from tests.harness import slurm_packages
from tests.harness.slurm import Cluster, SlurmError

ROOT = Path(__file__).parent.parent.parent
HOLD_S, MUST_S = 120, 2.5
LIFE_S = 5.0
"""So long a program steps before it is preempted: what it begins in the background has begun by then."""
NEVER_S = HOLD_S + 60.0
"""After so long a program is not expected to run again."""

_BEATS = """\
import os, sys, time
def beat(step):
    with open(f"{sys.argv[1]}/{sys.argv[2]}-{os.environ['SLURM_PROCID']}", "a") as file:
        file.write(f"{time.time()} {os.environ['SLURM_JOB_ID']}:{os.getpid()} {step}\\n")
    time.sleep(0.05)
"""
_ARRAY = """\
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
where = NamedSharding(jax.make_mesh((jax.device_count(),), ("data",)), PartitionSpec("data"))
weights = jax.make_array_from_callback((1024,), where, lambda index: np.ones(1024, np.float32)[index])
update = jax.jit(lambda weights: weights * 0.999)
"""
_JOBKIT = f"""\
{_BEATS}
import jobkit
jobkit.initialize()
{_ARRAY}
with jobkit.Run(save_every=None) as run:
    run.resume(weights=weights, optimizer=None)
    for step in run.steps(1_000_000):
        run.state.weights = update(run.state.weights)
        beat(step)
"""
_PLAIN = f"""\
{_BEATS}
import jax
jax.config.update("jax_enable_preemption_service", True)
jax.distributed.initialize()
{_ARRAY}
import orbax.checkpoint as ocp
manager = ocp.CheckpointManager(f"{{sys.argv[1]}}.saved.{{sys.argv[2]}}")
step = manager.latest_step()
if step is not None:
    weights = manager.restore(step, args=ocp.args.StandardRestore({{"weights": weights}}))["weights"]
step = step or 0
while True:
    weights = update(weights)
    step += 1
    beat(step)
    if manager.reached_preemption(step):
        manager.save(step, args=ocp.args.StandardSave({{"weights": weights}}), force=True)
        manager.wait_until_finished()
        sys.exit(75)
"""
_SCRIPT = """\
#!/bin/bash
job=$SLURM_JOB_ID
[ -z "$SLURM_ARRAY_TASK_ID" ] || job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
export POINT=${{POINT:-${{SLURM_ARRAY_TASK_ID:-0}}}}
trap : TERM
srun {python} {home}/plain.py {beats} $POINT || {{
  unset ${{!SLURM_ARRAY_@}}
  [ -e {beats}.end ] || sbatch --dependency=afterany:$job {options} {home}/plain.sh
}}
"""
_SUBMITIT = f"""\
import json, sys
import submitit
class Loop:
    def __call__(self, *words):
        sys.argv[1:] = words
        exec({_BEATS!r}, globals())
        while True:
            beat(0)
    def checkpoint(self, *words):
        return submitit.helpers.DelayedSubmission(self, *words)
executor = submitit.SlurmExecutor(folder=sys.argv[1] + "-submitit")
executor.update_parameters(time=60, stderr_to_stdout=True, **json.loads(sys.argv[3]))
for point in range(int(sys.argv[2])):
    executor.submit(Loop(), sys.argv[1], str(point))
"""


@dataclass(frozen=True)
class Case:
    """One kind of run, and how it is preempted.

    Args:
        partition: Where it runs, which says how it is preempted.
        nodes: How many nodes it has, and `per_node` processes on each.
        per_node: Processes on a node.
        points: How many points a sweep has; 0 for a run of its own.
        times: How often it is preempted.
    """

    partition: str = "requeue5"
    nodes: int = 1
    per_node: int = 1
    points: int = 0
    times: int = 1

    @property
    def processes(self) -> int:
        """How many programs beat."""
        return self.nodes * self.per_node * max(1, self.points)


CASES = {
    "1 task": Case(),
    "2x2 tasks": Case(nodes=2, per_node=2),
    "sweep of 3": Case(points=3),
    "GraceTime 0": Case("requeue0"),
    "CANCEL": Case("cancel5"),
    "six in a row": Case(times=6),
}


class Beats:
    """What the programs of a run wrote down, each at every step."""

    def __init__(self, directory: Path, processes: int) -> None:
        directory.mkdir()
        self.directory, self._processes = directory, processes

    def read(self) -> list[list[tuple[float, str, int]]]:
        """Return of each process when it beat, which life of it, and at which step."""
        lines = [path.read_text().splitlines() for path in sorted(self.directory.iterdir())]
        words = [[line.split() for line in one] for one in lines]
        return [[(float(one[0]), one[1], int(one[2])) for one in beats if len(one) == 3] for beats in words]

    def running(self, since: float) -> bool:
        """Whether each process has made some steps in a life that began after a moment."""
        begun: list[dict[str, list[float]]] = []
        for beats in self.read():
            lives: dict[str, list[float]] = {}
            for moment, life, _ in beats:
                lives.setdefault(life, []).append(moment)
            begun.append(lives)
        new = [any(moments[0] > since and len(moments) > 10 for moments in lives.values()) for lives in begun]
        return len(new) == self._processes and all(new)

    def silence(self, since: float) -> float:
        """Return the longest time between two steps of one process after a moment, in seconds."""
        moments = [[moment for moment, *_ in beats] for beats in self.read()]
        return max(later - earlier for one in moments for earlier, later in pairwise(one) if later > since)

    def back_at(self, since: float) -> int:
        """Return the lowest step at which a process went on after a moment."""
        first = [{life: step for moment, life, step in reversed(beats) if moment > since} for beats in self.read()]
        begun = [{life for moment, life, _ in beats if moment <= since} for beats in self.read()]
        return min(step for one, old in zip(first, begun, strict=True) for life, step in one.items() if life not in old)


class Bench:
    """A cluster, and a user's directory on it."""

    def __init__(self, cluster: Cluster, home: Path) -> None:
        self.cluster, self._home = cluster, home
        self._environ = os.environ | cluster.environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        for name, text in {"train": _JOBKIT, "plain": _PLAIN, "submit": _SUBMITIT}.items():
            (home / f"{name}.py").write_text(text)

    def beats(self, name: str, case: Case) -> Beats:
        """Make the place where the programs of a run beat."""
        return Beats(self._home / name, case.processes)

    def _run(self, *words: str) -> None:
        done = subprocess.run(
            [sys.executable, *words], cwd=self._home, env=self._environ, capture_output=True, text=True
        )
        if done.returncode:
            raise SlurmError(done.stderr)

    def jobkit(self, case: Case, beats: Beats) -> Callable[[], object]:
        """Submit a run of jobkit's; return what ends it."""
        url = f"{beats.directory}-run"
        options = ["-p", case.partition, "--run", url, "-N", str(case.nodes), "--ntasks-per-node", str(case.per_node)]
        options += ["--sweep", f"x=1..{case.points}"] if case.points else []
        command = ["python", "train.py", str(beats.directory), "{x}" if case.points else "0"]
        self._run("-m", "launch", "submit", "--on", "slurm", *options, "--", *command)
        return lambda: self._run("-m", "launch", "cancel", url)

    def plain(self, case: Case, beats: Beats) -> Callable[[], object]:
        """Submit the plain script; return what ends it."""
        options = f"-p {case.partition} -N {case.nodes} --ntasks-per-node={case.per_node} --no-requeue -o /dev/null"
        places = {"python": sys.executable, "home": self._home, "beats": beats.directory, "options": options}
        (self._home / "plain.sh").write_text(_SCRIPT.format(**places))
        array = [f"--array=1-{case.points}"] if case.points else []
        self.cluster.run("sbatch", *options.split(), *array, self._home / "plain.sh", **self._environ)
        return beats.directory.with_suffix(".end").touch

    def submitit(self, case: Case, beats: Beats) -> Callable[[], object]:
        """Submit submitit's loop; return what ends it."""
        given = {"partition": case.partition, "nodes": case.nodes, "ntasks_per_node": case.per_node}
        self._run("submit.py", str(beats.directory), str(max(1, case.points)), json.dumps(given))
        return self.cluster.tidy

    def preempt(self, beats: Beats) -> float:
        """Take the nodes of all that runs for a second; return the longest silence until all run again."""

        def running() -> list[str]:
            return self.cluster.run("squeue", "--noheader", "--states=RUNNING", "--format=%N").split()

        nodes = self.cluster.wait(running, "a job of it runs", NEVER_S)
        names = sorted(set(self.cluster.run("scontrol", "show", "hostnames", ",".join(nodes)).split()))
        since = time.time()
        self.cluster.preempt(names, seconds=1)
        try:
            self.cluster.wait(lambda: beats.running(since), "all run again", NEVER_S)
        except AssertionError:
            return math.inf
        if beats.back_at(since) == 1:
            raise SlurmError(f"{beats.directory.name} began anew: it has not saved, or not restored")
        return beats.silence(since)

    def measure(self, name: str, contestant: str, case: Case) -> list[float]:
        """Return the longest silence of a run around each of its preemptions; infinite where it never runs again."""
        beats = self.beats(name, case)
        end = getattr(self, contestant)(case, beats)
        self.cluster.wait(lambda: beats.running(0.0), f"{name} runs", 120)
        found = []
        for _ in range(case.times):
            time.sleep(LIFE_S)
            found.append(self.preempt(beats))
        end()
        self.cluster.tidy()
        return found


def _theirs(home: Path, cases: dict[str, Case]) -> dict[str, list[float]]:
    """Measure submitit's runs one after the other, each on its own cluster, all at once; no run is preempted twice."""

    def one(case: Case) -> list[float]:
        with (
            tempfile.TemporaryDirectory(dir=home) as made,
            Cluster(cred_expire_s=HOLD_S, extra_conf="SlurmctldParameters=preempt_send_user_signal") as cluster,
            suppress(AssertionError),
        ):
            return Bench(cluster, Path(made)).measure("submitit", "submitit", case)
        return [math.inf]

    single = {name: case for name, case in cases.items() if case.times == 1}
    with ThreadPoolExecutor(len(single) or 1) as pool:
        return dict(zip(single, pool.map(one, single.values()), strict=True))


def measure(rounds: int, cases: dict[str, Case]) -> tuple[str, dict[str, dict[str, list[float]]]]:
    """Return SLURM's version, and by case and contestant the silences in seconds."""
    found: dict[str, dict[str, list[float]]] = {name: {"jobkit": [], "plain": []} for name in cases}
    with (
        tempfile.TemporaryDirectory() as made,
        Cluster(cred_expire_s=HOLD_S) as cluster,
        ThreadPoolExecutor(1) as pool,
    ):
        home = Path(made)
        theirs = pool.submit(_theirs, home, cases)
        bench = Bench(cluster, home)
        for number in range(rounds):
            for name, case in cases.items():
                for contestant in ("jobkit", "plain"):
                    if case.times == 1 or number == 0:
                        where = f"{contestant}-{number}-{list(cases).index(name)}"
                        found[name][contestant] += bench.measure(where, contestant, case)
        for name, figures in theirs.result().items():
            found[name]["submitit"] = figures
        return cluster.run("scontrol", "--version").split()[-1], found


def _shown(figures: list[float]) -> str:
    if not figures:
        return ""
    longest = f" (longest {max(figures):.1f})" if len(figures) > 1 else ""
    return "never" if math.isinf(max(figures)) else f"{statistics.median(figures):.1f}{longest}"


PARSER = parser(__doc__, rounds=3)
PARSER.add_argument("--json", type=Path)
PARSER.add_argument("--case", action="append", choices=CASES)


def claims(given: argparse.Namespace) -> list[Row]:
    """Measure them and print a table."""
    console = Console()
    if slurm_packages.find() is None:
        console.print(f"left out: {slurm_packages.HOW}")
        return []
    chosen = {name: CASES[name] for name in given.case or CASES}
    version, found = measure(1 if given.quick else given.rounds, chosen)
    title = f"SLURM {version}, a requeue held back {HOLD_S} s: longest silence, median s"
    table = Table("preempted", "jobkit", "plain", "submitit", title=title)
    for name, row in found.items():
        table.add_row(name, *(_shown(row.get(contestant, [])) for contestant in ("jobkit", "plain", "submitit")))
    console.print(table)
    if given.json:
        given.json.write_text(json.dumps({"slurm": version, "hold_s": HOLD_S, "silence_s": found}, indent=1) + "\n")
    over = {name: statistics.median(row["jobkit"]) - statistics.median(row["plain"]) for name, row in found.items()}
    return [Row(f"silence, preempted {name}", "s beyond plain", [beyond], MUST_S) for name, beyond in over.items()]


if __name__ == "__main__":
    main(PARSER, claims)
