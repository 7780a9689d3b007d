"""`jobkit drill`: certify that a user's own program survives what will happen to it.

An uninterrupted reference run first; then the scenarios, each a fresh run that is interrupted at a moment chosen from
what the reference showed, and compared with it bit for bit. A run that differs is diagnosed.
"""

import contextlib
import dataclasses
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import msgspec

from jobkit import contract
from jobkit.contract import Outcome
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir import commits
from jobkit.rundir.store import Store
from jobkit.units import show_duration
from launch.backends.local import Local
from launch.backends.slurm import scontrol
from launch.drill import comparing, diagnosis, observe, own_files, scenarios
from launch.drill import reference as references
from launch.drill.comparing import Comparer
from launch.drill.progress import Lines
from launch.drill.reference import PROBED, Reference
from launch.drill.runs import Runs
from launch.drill.scenarios import Scenario
from launch.drill.suspects import Diagnosis
from launch.drill.verdict import DrillResult, Trial, Untried, judge, judge_files
from launch.lifecycle import verbs
from launch.spec.jobspec import JobSpec

NOT_ASKED = "not asked for"
_QUEUE_S = 600.0
"""How long a job of a drill may wait for its turn."""
_TRIES = 3
"""A program that was over before it could be hit is run again, slower."""
_PROBED = ("kill", "damage", "kill-commit", "kill-save", "notice", "requeue", "notice-save")
"""Scenarios that restart a run in its middle, one of which is probed: the first that is asked for. After a kill steps
are repeated, which can then be compared.
"""
_ACCELERATORS = ("/dev/nvidia0", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")


@dataclass
class Options:
    """What was asked for.

    Args:
        spec: The user's program, how its runs are submitted, and below which directory they lie.
        backend: Where they run.
        steps: How many steps to drill; None for as many as a few seconds hold, 0 for all of the program's.
        at: The step at which to interrupt it in mid-run; None for the middle.
        jobs: Scenarios at the same time.
        timeout_s: How long the reference may take.
        keep: Keep the runs even if all went well.
    """

    spec: JobSpec
    backend: verbs.Backend = field(default_factory=Local)
    steps: int | None = None
    at: int | None = None
    jobs: int = 1
    timeout_s: float = 1800.0
    keep: bool = False


def chosen(only: Sequence[str], quick: bool, backend: verbs.Backend) -> list[Scenario]:
    """Return the scenarios that are asked for.

    Raises:
        ConfigError: If there is none of a name.
    """
    there = _all(backend)
    known = {scenario.name: scenario for scenario in there}
    for name in only:
        if name not in known:
            raise ConfigError(f"there is no scenario {name!r}; known are {', '.join(known)}")
    return [one for one in there if (one.name in only if only else one.quick or not quick)]


def _all(backend: verbs.Backend) -> tuple[Scenario, ...]:
    return scenarios.ALL if backend.processes_here else scenarios.ON_SLURM


def default_jobs() -> int:
    """Say how many scenarios to run at once: an accelerator serves one program at a time."""
    if any(os.path.exists(path) for path in _ACCELERATORS):
        return 1
    return min(4, len(os.sched_getaffinity(0)))


def free_place(place: Path, what: str) -> None:
    """Check that runs may lie in a directory.

    Raises:
        ConfigError: If there is anything in it.
    """
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"{place} is not an empty directory; give the {what} a new --run")


def drill(options: Options, wanted: Sequence[Scenario], telling: Lines) -> DrillResult:
    """Run the reference and the scenarios.

    Raises:
        ConfigError: If the program cannot be drilled: it does not run, does not end, or has no steps.
    """
    begun, place = time.monotonic(), Path(options.spec.run)
    if find_spec("jax") is None:
        raise ConfigError("a drill trains here, and there is no jax: pip install -e '.[train]' in jobkit's checkout")
    free_place(place, "drill")
    try:
        with (
            comparing.comparer() as comparer,
            contextlib.closing(Runs(_mounted(options.spec), options.backend, telling, shared_cache(place))) as runs,
        ):
            result = _certify(options, wanted, runs, comparer)
    except BaseException:
        with contextlib.suppress(OSError):
            place.rmdir()  # where nothing was begun
        if isinstance(sys.exception(), KeyboardInterrupt) and not options.keep:
            shutil.rmtree(place, ignore_errors=True)
        raise
    result.seconds = time.monotonic() - begun
    if result.passed and not options.keep:
        shutil.rmtree(place, ignore_errors=True)
    return result


def shared_cache(place: Path) -> dict[str, str]:
    """Return what every program of a drill has in its environment.

    They share what the reference compiles, which lies in its run: beside the runs each snapshot would copy it.
    """
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(place / references.NAME / contract.CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return {name: value for name, value in cache.items() if name not in os.environ}


def _mounted(spec: JobSpec) -> JobSpec:
    """Let the attempts in containers see what all of them share, the compilations."""
    if spec.container is None:
        return spec
    os.makedirs(spec.run, exist_ok=True)
    mounts = (*spec.container.mounts, spec.run)
    return msgspec.structs.replace(spec, container=msgspec.structs.replace(spec.container, mounts=mounts))


def _certify(options: Options, wanted: Sequence[Scenario], runs: Runs, comparer: Comparer) -> DrillResult:
    runs.telling.say(f"reference: {' '.join(options.spec.command)}")
    reference = references.take(runs, steps=options.steps, at=options.at, timeout_s=options.timeout_s)
    lacking = {one.name: one.lacking(reference) for one in _all(options.backend)}
    tried = [one for one in wanted if not lacking[one.name]]
    estimate = reference.scenario_s * sum(1 + 0.3 * len(one.ends) for one in tried) / options.jobs
    runs.telling.say(
        f"reference: {reference.steps} steps, {show_duration(reference.step_s)} each, first step after "
        f"{show_duration(reference.start_s)}; {len(tried)} scenarios, about {show_duration(estimate)}"
    )
    usual = _Usual(runs, comparer, reference)
    one = _Drill(runs, comparer, reference, usual, options.jobs, tried)
    trials = one.trials()
    cause = one.diagnose(trials)
    missed = {trial.name: trial.missed for trial in trials}
    untried = [(each, missed.get(each.name, lacking[each.name] or NOT_ASKED)) for each in _all(options.backend)]
    return DrillResult(
        options.spec.command,
        options.spec.run,
        reference,
        trials,
        cause,
        seconds=0.0,
        warnings=one.warnings(trials, cause),
        aside=tuple(sorted(usual.metrics or ())),
        files_aside=tuple(sorted(usual.files.names)) if usual.files is not None else (),
        untried=[Untried(each.name, each.text, why) for each, why in untried if why],
    )


class _Usual:
    """What differs between runs that nobody interrupts: no run can be held to that.

    Args:
        runs: Where the program is run.
        comparer: Compares two runs.
        reference: The run that the others are compared with.
    """

    def __init__(self, runs: Runs, comparer: Comparer, reference: Reference) -> None:
        self._runs, self._comparer, self._reference = runs, comparer, reference
        self._mutex = threading.Lock()
        self._second: Store | None = None
        """Another run that nobody interrupts, once somebody had to know of one."""
        self.metrics: frozenset[str] | None = None
        """Metrics that differ; None as long as nobody had to know."""
        self.files: own_files.Difference | None = None
        """How their files differ; None as long as nobody had to know."""

    def varying_metrics(self) -> frozenset[str]:
        """Return the metrics that differ; another undisturbed run tells which."""
        with self._mutex:
            if self.metrics is None:
                self.metrics = frozenset()
                with contextlib.suppress(JobkitError):  # it did not come to its end: nothing is let pass
                    comparison = self._comparer.compare(self._reference.run, self._another().url)
                    self.metrics = comparing.varying(comparison)
            return self.metrics

    def other_files(self, store: Store) -> own_files.Difference:
        """Return how the files that a run leaves differ from an undisturbed run's, more than those differ themselves.

        Raises:
            JobkitError: If another undisturbed run does not come to its end.
        """
        left = own_files.read(store)
        with self._mutex:
            usual = own_files.read(Store(self._reference.run))
            difference = own_files.differ(usual, left)
            if difference.names and self.files is None:
                self.files = own_files.differ(usual, own_files.read(self._another()))
            return difference.without(self.files or own_files.Difference())

    def _another(self) -> Store:
        """Return another run that nobody interrupts, once it is over."""
        if self._second is None:
            self._runs.telling.say("another undisturbed run tells what differs anyway: metrics, files")
            wanted = {"undisturbed": self._reference.environ()}
            (ended,) = self._runs.finish(wanted, limit_s=_limit_s(self._runs, self._reference))
            (self._second,) = observe.must_end(ended)
        return self._second


def _limit_s(runs: Runs, reference: Reference) -> float:
    """Say how long a run may take that is to tell something."""
    return 120 + 12 * reference.scenario_s + (0 if runs.here else 2 * _QUEUE_S)


class _Drill:
    """The scenarios of one drill, and why a run differs.

    Args:
        runs: Where the program is run.
        comparer: Compares two runs.
        reference: The run that is not interrupted.
        usual: What differs anyway.
        jobs: Scenarios at the same time.
        wanted: The scenarios.
    """

    def __init__(
        self, runs: Runs, comparer: Comparer, reference: Reference, usual: _Usual, jobs: int, wanted: list[Scenario]
    ) -> None:
        self._runs, self._comparer, self._reference, self._usual = runs, comparer, reference, usual
        self._jobs, self._wanted = jobs, wanted
        names = {one.name for one in wanted}
        self._probed = next((name for name in _PROBED if name in names), "")
        """The scenario whose run is probed."""
        self._probed_besides: Store | None = None

    def trials(self) -> list[Trial]:
        """Run the scenarios, several at a time; return how they went, in order."""
        with ThreadPoolExecutor(self._jobs) as pool:
            going = [pool.submit(self._trial, one) for one in self._wanted]
            try:
                for future in as_completed(going):
                    self._runs.telling.say(f"  {future.result().in_short}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._runs.close()
                raise
        return [future.result() for future in going]

    def _trial(self, scenario: Scenario) -> Trial:
        reference = self._reference
        for number in range(1, _TRIES + 1):
            name = scenario.name if number == 1 else f"{scenario.name}-{number}"
            trial = self._try(scenario, name, reference)
            if not trial.missed or trial.broken or self._runs.aborted:
                break
            slower_s = 3 * reference.pace_s + reference.start_s / reference.steps
            reference = dataclasses.replace(reference, pace_s=slower_s, tail_s=0.0)
        return trial

    def _try(self, scenario: Scenario, name: str, reference: Reference) -> Trial:
        begun, trial = time.monotonic(), Trial(scenario.name, scenario.text)
        limit_s = 60 + 4 * self._jobs * reference.scenario_s * (1 + len(scenario.ends))
        if not self._runs.here:
            limit_s += _QUEUE_S + len(scenario.ends) * (_QUEUE_S + scontrol.hold_s())
        probe = PROBED if scenario.name == self._probed else ()
        asked = reference.environ(paced=True, probe=probe, fault=scenario.fault(reference))
        run = self._runs.start(name, asked, limit_s=limit_s)
        scenario.play(run, reference)
        trial.run, trial.done, trial.missed, trial.broken = run.store.url, run.done, run.missed, run.wrong
        judge(trial, scenario, run.store, reference)
        run.end()
        if trial.endings and trial.endings[-1].outcome == Outcome.DONE:  # else its end is what is wrong
            self._compare(trial, run.store)
        trial.seconds = time.monotonic() - begun
        return trial

    def _compare(self, trial: Trial, store: Store) -> None:
        """Hold against a run its state, its metrics and the files that it leaves."""
        try:
            trial.comparison = self._comparer.compare(self._reference.run, trial.run)
        except JobkitError as error:
            trial.broken.append(str(error))
            return
        only_metrics = not trial.comparison["equal"] and trial.comparison["leaf"] is None
        trial.identical = comparing.same(trial.comparison, self._usual.varying_metrics() if only_metrics else ())
        if not trial.identical and max(commits.steps(store), default=-1) == self._reference.steps:
            trial.broken.append(f"it ended with other bits: {comparing.first_difference(trial.comparison)}")
        try:
            judge_files(trial, self._usual.other_files(store))
        except (JobkitError, OSError) as error:
            trial.warnings = (f"the files that it leaves were not compared: {error}",)

    # Why.

    def diagnose(self, trials: Sequence[Trial]) -> Diagnosis | None:
        """Find out why a run differs, if one does; that this fails costs no verdict."""
        differing = next((trial for trial in trials if trial.identical is False or trial.donated), None)
        files = next((trial.files for trial in trials if trial.files), None)
        try:
            if differing is not None:
                self._runs.telling.say(f"{differing.name} went another way than the reference; looking for the reason")
                return diagnosis.diagnose(differing.run, self._reference, self._comparer.compare, self._finish)
            if files is not None:
                return diagnosis.of_files(files, self._probed_run(trials), Store(self._reference.run))
        except Exception as error:
            reason = str(error) if isinstance(error, JobkitError) else f"{type(error).__name__}: {error}"
            return diagnosis.failed(reason)
        return None

    def warnings(self, trials: Sequence[Trial], cause: Diagnosis | None) -> tuple[str, ...]:
        """Return what the scenarios warn of, and what the probe has seen."""
        lines = [line for trial in trials for line in trial.warnings]
        try:
            seen = diagnosis.warnings(self._probed_run(trials), Store(self._reference.run))
            lines += [line for line in seen if not (cause and cause.names(line))]
        except Exception as error:
            lines.append(f"what the restart does not bring back is not known: {error}")
        return tuple(dict.fromkeys(lines))

    def _probed_run(self, trials: Sequence[Trial]) -> Store:
        """Return a run that was interrupted and probed: a scenario's, or, if none was fit for it, one more."""
        run = next((trial.run for trial in trials if trial.name == self._probed), "")
        if run:
            return Store(run)
        if self._probed_besides is None:
            asked = self._reference.environ(probe=PROBED, fault=diagnosis.notice(self._reference))
            (self._probed_besides,) = self._finish({"probed": asked})
        return self._probed_besides

    def _finish(self, wanted: Mapping[str, Mapping[str, str]]) -> list[Store]:
        return self._runs.finish(wanted, limit_s=_limit_s(self._runs, self._reference))
