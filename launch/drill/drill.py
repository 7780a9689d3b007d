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
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import msgspec

from jobkit import contract
from jobkit.contract import Outcome, State
from jobkit.drill.settings import Drill
from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir import commits, ledger
from jobkit.rundir.store import Store
from jobkit.units import show_duration
from launch.backends import registry
from launch.backends.local import Local
from launch.backends.slurm import scontrol
from launch.drill import asking, diagnosis, observe, own_files, scenarios
from launch.drill.diagnosis import Diagnosis
from launch.drill.observe import Comparer, LateError, MissedError
from launch.drill.scenarios import Scenario, Shown, Stage, describe
from launch.drill.verdict import Found, Result, Untried, judge, judge_files
from launch.lifecycle import lock, orphans, run_status, verbs
from launch.spec import jobspec as specs
from launch.spec.container import Container
from launch.spec.jobspec import JobSpec

ENOUGH_S, ENOUGH_STEPS = 3.0, 24
"""The reference is cut after so much training, unless its end is within as much: a drill repeats it a dozen times."""
_LEAST_STEPS = 6
NOT_ASKED = "not asked for"
_REFERENCE = "reference"
"""The name of the run that is not interrupted."""
_SHORTEST_S = 2.0
"""A run that trains for less is slowed down: it could not be hit from outside. On a busy machine it takes longer still,
by how long a start takes."""
_ASK_S = 2.0
_QUEUE_S = 600.0
"""How long a job of a drill may wait for its turn."""
_TRIES = 3
"""A program that was over before it could be hit is run again, slower."""
_ATTEMPTS = 2
"""A run that was to tell something is interrupted once; one that needs more attempts crashes."""
_PROBED = ("notice", "kill", "requeue", "kill-commit", "kill-save", "damage", "notice-save")
"""Scenarios that restart a run in its middle, one of which is probed: the first that is asked for."""
_ACCELERATORS = ("/dev/nvidia0", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")


@dataclass
class Options:
    """What was asked for.

    Args:
        command: The user's program.
        place: Where the runs lie.
        steps: How many steps to drill; None for as many as a few seconds hold, 0 for all of the program's.
        at: The step at which to interrupt it in mid-run; None for the middle.
        jobs: Scenarios at the same time.
        timeout_s: How long the reference may take.
        snapshot: Whether runs use a copy of the code.
        keep: Keep the runs even if all went well.
        backend: Where they run.
        sbatch: Options of sbatch, on SLURM.
        container: What the attempts are in; None for nothing.
    """

    command: tuple[str, ...]
    place: Path
    backend: verbs.Backend = field(default_factory=Local)
    sbatch: dict[str, str] = field(default_factory=dict)
    container: Container | None = None
    steps: int | None = None
    at: int | None = None
    jobs: int = 1
    timeout_s: float = 1800.0
    snapshot: bool = True
    keep: bool = False


class Telling:
    """Where a drill tells how it goes; the command line gives one that draws."""

    def say(self, text: str) -> None:
        """Tell a line."""

    def moved(self, name: str, detail: str) -> None:
        """Tell what a run is doing."""

    def ended(self, found: Found) -> None:
        """Tell how a scenario went."""


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


def _untried(backend: verbs.Backend, wanted: Sequence[Scenario], shown: Shown, found: Sequence[Found]) -> list[Untried]:
    """Return what was not tried: not asked for, without an occasion, or missed."""
    reasons = {one.name: one.lacking(shown) or NOT_ASKED for one in _all(backend)}
    reasons |= {one.name: "" for one in wanted if not one.lacking(shown)} | {each.name: each.missed for each in found}
    return [Untried(one.name, one.text, reasons[one.name]) for one in _all(backend) if reasons[one.name]]


def default_jobs() -> int:
    """Say how many scenarios to run at once: an accelerator serves one program at a time."""
    if any(os.path.exists(path) for path in _ACCELERATORS):
        return 1
    return max(1, min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))


def drill(options: Options, wanted: Sequence[Scenario], telling: Telling) -> Result:
    """Run the reference and the scenarios.

    Raises:
        ConfigError: If the program cannot be drilled: it does not run, does not end, or has no steps.
    """
    begun = time.monotonic()
    if find_spec("jax") is None:
        raise ConfigError("a drill trains here, and there is no jax: pip install -e '.[train]' in jobkit's checkout")
    _check_place(options.place)
    one = _Drill(options, telling)
    try:
        with observe.comparer() as comparer:
            shown = one.reference()
            asked, wanted = wanted, [each for each in wanted if not each.lacking(shown)]
            estimate = shown.scenario_s * sum(1 + 0.3 * len(each.ends) for each in wanted) / options.jobs
            telling.say(
                f"reference: {shown.steps} steps, {show_duration(shown.step_s)} each, first step after "
                f"{show_duration(shown.start_s)}; {len(wanted)} scenarios, about {show_duration(estimate)}"
            )
            results = one.scenarios(wanted, shown, comparer)
            cause = one.diagnose(results, shown, comparer)
            warnings = one.warnings(results, shown, cause)
    except BaseException:
        one.end_all()
        with contextlib.suppress(OSError):
            options.place.rmdir()  # where nothing was begun
        if isinstance(sys.exception(), KeyboardInterrupt) and not options.keep:
            shutil.rmtree(options.place, ignore_errors=True)
        raise
    one.end_all()
    aside = tuple(sorted(one.aside or ()))
    result = Result(options.command, str(options.place), shown, results, cause, time.monotonic() - begun, aside)
    result.files_aside, result.warnings = tuple(sorted(one.files_aside.names)), warnings
    result.untried = _untried(options.backend, asked, shown, results)
    if result.passed and not options.keep:
        shutil.rmtree(options.place, ignore_errors=True)
    return result


def _check_place(place: Path) -> None:
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"{place} is not an empty directory; give the drill a new --run")


class _Drill:
    """The runs of one drill."""

    def __init__(self, options: Options, telling: Telling) -> None:
        self._options, self._telling = options, telling
        self._stores: list[Store] = []
        self._mutex = threading.Lock()
        self._aborted = False
        self.aside: frozenset[str] | None = None
        """Metrics that differ between undisturbed runs; None as long as nobody had to know."""
        self._files_aside: own_files.Difference | None = None
        self._undisturbed: list[Store] = []
        """Runs that nobody interrupts, besides the reference; as many as somebody had to know of."""
        self._aside_mutex = threading.RLock()
        self._cut = False
        """Whether the reference was cut, so that what follows its loop is missing."""
        self._probed = ""
        """The scenario whose run is probed."""
        self._probed_besides: Store | None = None
        self._here = options.backend.processes_here
        self._looked: dict[str, tuple[float, run_status.Status]] = {}

    def _status(self, store: Store) -> run_status.Status:
        """Read what a run is doing; a scheduler is asked every few seconds only."""
        if self._here:
            return run_status.status(store)
        at, status = self._looked.get(store.url, (0.0, None))
        if status is None or time.monotonic() - at > _ASK_S:
            status = registry.status(store)
            self._looked[store.url] = (time.monotonic(), status)
        return status

    def _end(self, store: Store) -> None:
        """Leave nothing of a run running."""
        if self._here:
            observe.end_now(store)
        elif not registry.status(store).state.over:
            registry.cancel(store.url, wait=False)

    def _environ(self, **more: str) -> dict[str, str]:
        """Return what every program of the drill has in its environment.

        They share what the reference compiles, which lies in its run: beside the runs each snapshot would copy it.
        """
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(self._options.place / _REFERENCE / contract.CACHE),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        return {name: value for name, value in cache.items() if name not in os.environ} | more

    def _mounted(self, container: Container) -> Container:
        """Let the attempts of all runs see what they share, the compilations."""
        self._options.place.mkdir(parents=True, exist_ok=True)
        return msgspec.structs.replace(container, mounts=(*container.mounts, str(self._options.place)))

    def submit(self, name: str, environ: dict[str, str], *, max_failures: int = 10) -> tuple[Store, JobSpec]:
        """Start a run of the user's program."""
        options, variables = self._options, self._environ(**environ)
        spec = JobSpec(
            command=options.command,
            run=str(options.place / name),
            snapshot=options.snapshot,
            max_failures=max_failures,
            sbatch=options.sbatch,
            container=options.container and self._mounted(options.container),
        )
        if self._here:
            store = verbs.submit(Local(variables), spec)
        else:  # a job's environment is the cluster's to make
            words = ("env", *(f"{name}={value}" for name, value in variables.items()))
            spec = msgspec.structs.replace(spec, command=(*words, *options.command))
            store = verbs.submit(options.backend, spec)
        with self._mutex:
            self._stores.append(store)
        return store, specs.read(store)

    def end_all(self) -> None:
        """Leave nothing running."""
        self._aborted = True
        for store in self._stores:
            with contextlib.suppress(JobkitError, OSError):
                self._end(store)

    # The reference.

    def reference(self) -> Shown:
        """Run the program undisturbed and say what it showed.

        Raises:
            ConfigError: If it cannot be drilled.
        """
        wish, at = self._options.steps, self._options.at
        if at is not None and wish is None:
            wish = at + max(_LEAST_STEPS, at // 10)
        drill = Drill(until=wish or None, probe=diagnosis.FIRST)
        self._telling.say(f"reference: {' '.join(self._options.command)}")
        store, _ = self.submit(_REFERENCE, {contract.ENV_DRILL: drill.to_json()}, max_failures=0)
        cut = self._until_enough(store, may_cut=wish is None)
        status = self._status(store)
        if status.state is not State.DONE and not (cut and status.state is State.CANCELLED):
            raise ConfigError(self._why_not(store, status))
        cut &= bool(observe.first(store, 0, "stopped"))  # else its loop had ended before
        self._cut = cut
        shown = _shown(store, at)
        if cut:
            return dataclasses.replace(shown, until=shown.steps, loops=1, tail_s=0.0)
        return dataclasses.replace(shown, until=wish or None if shown.total is not None else None)

    def _until_enough(self, store: Store, *, may_cut: bool) -> bool:
        """Wait until the reference is over, or has trained enough to be cut; tell whether it was cut."""
        deadline = time.monotonic() + self._options.timeout_s
        seen: tuple[float, int] | None = None
        while not self._status(store).state.over:
            if time.monotonic() > deadline:
                self._end(store)
                raise ConfigError(
                    f"the program did not end within {show_duration(self._options.timeout_s)}: give it fewer steps, "
                    f"or the drill more time (--timeout); its log: {store.file(contract.log_file(0))}"
                )
            link = observe.living(store, 0)
            beat = observe.beat_of(link) if link is not None else None
            # A loop of one's own has no end of ours: it is drilled to its own. Only steps() writes `first_step`.
            if beat is not None and beat.step > 0:
                self._telling.moved("reference", f"step {beat.step}")
                seen = seen or ((time.monotonic(), beat.step) if observe.first(store, 0, "first_step") else None)
            trained_s = time.monotonic() - seen[0] if seen is not None else 0.0
            if may_cut and seen is not None and beat is not None and trained_s >= ENOUGH_S:
                left = max((event["total"] for event in _loops(store)), default=0) - beat.step
                within_reach = left * trained_s <= ENOUGH_S * (beat.step - seen[1])
                if beat.step >= ENOUGH_STEPS and not within_reach:
                    registry.cancel(store.url)
                    return True
            time.sleep(0.05)
        return False

    def _why_not(self, store: Store, status: run_status.Status) -> str:
        log = store.file(contract.log_file(0))
        last = status.endings[-1].reason if status.endings else status.reason
        return f"the program cannot be drilled: without any interruption it ended with {last}; its log: {log}"

    # The scenarios.

    def scenarios(self, wanted: Sequence[Scenario], shown: Shown, comparer: Comparer) -> list[Found]:
        """Run scenarios, several at a time; in the order in which they are given."""
        results: dict[str, Found] = {}
        self._probed = next((name for name in _PROBED if name in {one.name for one in wanted}), "")
        with ThreadPoolExecutor(self._options.jobs) as pool:
            waiting = {pool.submit(self._scenario, one, shown, comparer) for one in wanted}
            try:
                while waiting:
                    done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in done:
                        result = future.result()
                        results[result.name] = result
                        self._telling.ended(result)
            except BaseException:
                for future in waiting:
                    future.cancel()
                self.end_all()
                raise
        return [results[one.name] for one in wanted]

    def _scenario(self, scenario: Scenario, shown: Shown, comparer: Comparer) -> Found:
        for number in range(1, _TRIES + 1):
            name = scenario.name if number == 1 else f"{scenario.name}-{number}"
            result = self._try(scenario, name, shown, comparer)
            if not result.missed or result.broken or self._aborted:
                break
            shown = dataclasses.replace(shown, pace_s=3 * shown.pace_s + shown.start_s / shown.steps, tail_s=0.0)
        return result

    def _try(self, scenario: Scenario, name: str, shown: Shown, comparer: Comparer) -> Found:
        begun, result = time.monotonic(), Found(scenario.name, scenario.text)
        asked = scenario.environment(shown, diagnosis.FIRST if scenario.name == self._probed else ())
        environ = self._environ(**asked)
        store, spec = self.submit(name, asked)
        limit_s = 60 + 4 * self._options.jobs * shown.scenario_s * (1 + len(scenario.ends))
        if not self._here:
            limit_s += _QUEUE_S + len(scenario.ends) * (_QUEUE_S + scontrol.hold_s())
        stage = Stage(store, spec, shown, environ, begun + limit_s, lambda: self._over(store))
        if fault := scenario.fault(shown):
            stage.say(f"by itself: {describe(fault)}")
        try:
            scenario.act(stage)
        except MissedError as missed:
            result.missed = str(missed)
        except (LateError, JobkitError) as error:
            result.broken.append(str(error))
        self._until_over(stage, scenario.name)
        result.done, result.run = stage.done, store.url
        result.broken += stage.wrong
        judge(result, scenario, store, shown)
        if self._here and orphans.processes_of(store):
            result.broken.append("a process of the run is still alive")
        self._end(store)
        self._compare(result, shown, comparer)
        result.seconds = time.monotonic() - begun
        return result

    def _over(self, store: Store) -> bool:
        return self._aborted or not (lock.held(store) if self._here else not self._status(store).state.over)

    def _until_over(self, stage: Stage, name: str) -> None:
        store = stage.store

        def over() -> bool:
            status = self._status(store)
            step = f"step {status.step}" if status.step is not None else status.phase or "starting"
            self._telling.moved(name, f"attempt {status.attempt or 0}, {step}")
            return status.state.over and not (self._here and orphans.processes_of(store))

        while not over():
            if self._aborted:
                return
            if time.monotonic() > stage.deadline_s:
                stage.wrong.append("the run did not end in time")
                self._end(store)
                return
            time.sleep(0.1)

    def _compare(self, found: Found, shown: Shown, comparer: Comparer) -> None:
        if not found.endings or found.endings[-1].outcome != Outcome.DONE:
            return  # its end is missing: that is what is wrong
        try:
            found.comparison = comparer.compare(shown.run, found.run)
        except JobkitError as error:
            found.broken.append(str(error))
            return
        only_metrics = not found.comparison["equal"] and found.comparison["leaf"] is None
        found.identical = diagnosis.same(found.comparison, self._varying(shown, comparer) if only_metrics else ())
        if not found.identical and max(commits.steps(Store(found.run)), default=-1) == shown.steps:
            found.broken.append(f"it ended with other bits: {diagnosis.tell(found.comparison)}")
        self._compare_files(found, shown)

    def _compare_files(self, found: Found, shown: Shown) -> None:
        """Hold against a run the files that it leaves, except those that differ between undisturbed runs too."""
        mine = own_files.read(Store(found.run))
        if self._cut and not mine:
            return
        try:
            with self._aside_mutex:
                usual = own_files.read(self._undisturbed_run(0, shown) if self._cut else Store(shown.run))
                difference = own_files.differ(usual, mine)
                if difference.names and self._files_aside is None:
                    other = own_files.read(self._undisturbed_run(1 if self._cut else 0, shown))
                    self._files_aside = own_files.differ(usual, other)
        except (JobkitError, OSError) as error:
            found.warnings = (f"the files that it leaves were not compared: {error}",)
            return
        judge_files(found, difference.without(self.files_aside))

    @property
    def files_aside(self) -> own_files.Difference:
        """How the files of undisturbed runs differ."""
        return self._files_aside or own_files.Difference()

    def _undisturbed_run(self, number: int, shown: Shown) -> Store:
        """Return a run that nobody interrupts, once it is over.

        Raises:
            JobkitError: If it does not come to its end.
        """
        with self._aside_mutex:
            while len(self._undisturbed) <= number:
                self._telling.say("another undisturbed run tells what differs anyway: metrics, files")
                name = f"undisturbed-{len(self._undisturbed) + 1}"
                environ = {contract.ENV_DRILL: Drill(until=shown.until, save_every=shown.save_every).to_json()}
                store = self._finish(name, environ, shown)()
                asking.must_end(store)
                self._undisturbed.append(store)
            return self._undisturbed[number]

    def _varying(self, shown: Shown, comparer: Comparer) -> frozenset[str]:
        """Return the metrics that no run can be held to: another undisturbed run tells which."""
        with self._aside_mutex:
            if self.aside is None:
                self.aside = frozenset()
                with contextlib.suppress(JobkitError):  # it did not come to its end: nothing is let pass
                    again = self._undisturbed_run(0, shown)
                    self.aside = diagnosis.varying(comparer.compare(shown.run, again.url))
            return self.aside

    # Why.

    def diagnose(self, all_found: Sequence[Found], shown: Shown, comparer: Comparer) -> Diagnosis | None:
        """Find out why a run differs, if one does; that this fails costs no verdict."""
        differing = next((each for each in all_found if each.identical is False or each.donated), None)
        files = next((each for each in all_found if each.files), None)

        def start(name: str, environ: dict[str, str]) -> Callable[[], Store]:
            return self._finish(name, environ, shown)

        try:
            if differing is not None:
                self._telling.say(f"{differing.name} went another way than the reference; looking for the reason")
                return diagnosis.diagnose(differing.run, shown, comparer.compare, start)
            if files is not None:
                return diagnosis.of_files(files.files, self._probed_run(all_found, shown), Store(shown.run))
        except Exception as error:
            reason = str(error) if isinstance(error, JobkitError) else f"{type(error).__name__}: {error}"
            return diagnosis.failed(reason)
        return None

    def warnings(self, all_found: Sequence[Found], shown: Shown, told: Diagnosis | None) -> tuple[str, ...]:
        """Return what the scenarios warn of, and what the probe has seen."""
        lines = [line for each in all_found for line in each.warnings]
        try:
            store = self._probed_run(all_found, shown)
            lines += [line for line in diagnosis.warnings(store, Store(shown.run)) if not (told and told.names(line))]
        except Exception as error:
            lines.append(f"what the restart does not bring back is not known: {error}")
        return tuple(dict.fromkeys(lines))

    def _probed_run(self, all_found: Sequence[Found], shown: Shown) -> Store:
        """Return a run that was interrupted and probed: a scenario's, or, if none was fit for it, one more."""
        run = next((each.run for each in all_found if each.name == self._probed), "")
        if run:
            return Store(run)
        if self._probed_besides is None:
            drill = Drill(shown.until, shown.save_every, probe=diagnosis.FIRST)
            environ = {contract.ENV_DRILL: drill.to_json(), contract.ENV_FAULT: diagnosis.notice(shown)}
            self._probed_besides = self._finish("probed", environ, shown)()
        return self._probed_besides

    def _finish(self, name: str, environ: dict[str, str], shown: Shown) -> Callable[[], Store]:
        """Start a run; what is returned waits for its end."""
        store, _ = self.submit(name, environ, max_failures=1)  # the kill that is asked for
        deadline = time.monotonic() + 120 + 12 * shown.scenario_s + (0 if self._here else 2 * _QUEUE_S)

        def finished() -> Store:
            while not self._status(store).state.over and time.monotonic() < deadline and not self._aborted:
                if len(store.numbers(contract.ATTEMPTS)) > _ATTEMPTS:
                    break
                self._telling.moved(name, "running")
                time.sleep(0.1)
            self._end(store)
            return store

        return finished


def _last_long(slow: Sequence[tuple[int, float]]) -> tuple[int, float] | None:
    """Return the last of the longest steps: the first one may have compiled, and a busy machine makes short ones."""
    longest = max((seconds for _, seconds in slow), default=0.0)
    return max(((step, seconds) for step, seconds in slow if seconds >= longest / 5), default=None)


def _loops(store: Store) -> list[ledger.Event]:
    """Return the beginnings of the reference's `steps()` loops."""
    return [event for event in ledger.attempt_events(store, 0) if event["event"] == "loop"]


def _shown(store: Store, at: int | None = None) -> Shown:
    """Read from the reference's ledger what a scenario needs to know.

    Raises:
        ConfigError: If it made no step of ours, or fewer than those after which it is to be interrupted.
    """
    events = ledger.attempt_events(store, 0)
    named = {event["event"]: event for event in events}
    if "opened" not in named:
        raise ConfigError(
            "the program never opened a jobkit.Run, so there is nothing to drill: with jobkit.Run() as run: ..."
        )
    begun = float(events[0]["t"])
    steps = max(commits.steps(store), default=0)
    if steps < _LEAST_STEPS:
        raise ConfigError(f"the program made {steps} steps, too few to interrupt: let it make {_LEAST_STEPS} or more")
    if at is not None and at >= steps - 1:
        raise ConfigError(f"--at {at}: the program made {steps} steps; interrupt it before step {steps - 1}")
    looked = [event for event in events if event["event"] in ("unchanged", "changed")]
    if looked and looked[-1]["event"] == "unchanged":
        raise ConfigError(
            f"the program cannot be drilled, since nothing that it trains is saved: {looked[-1]['reason']}"
        )
    start = float(next((event["t"] for event in events if event["event"] == "first_step"), named["opened"]["t"]))
    end = float(next((event["t"] for event in events if event["event"] in ("stopped", "finished")), events[-1]["t"]))
    save_s = max((event["durable_s"] for event in events if event["event"] == "saved"), default=0.0)
    step_s = max(0.0, end - start - save_s) / max(1, steps - 1)
    finished = [float(event["t"]) for event in events if event["event"] == "finished"]
    ended = (orphans.read_outcome(store, 0) or {}).get("ended")
    times = named.get("step_times", {})
    return Shown(
        run=store.url,
        steps=steps,
        step_s=step_s,
        start_s=start - begun,
        save_s=save_s,
        save_every=max(1, (at or steps) // 4),
        pace_s=max(0.0, max(_SHORTEST_S, (start - begun) / 2) / steps - step_s),
        total=max((event["total"] for event in _loops(store)), default=None),
        at=at,
        loops=len(finished),
        tail_s=max(0.0, float(ended) - finished[-1]) if ended and finished else 0.0,
        usual_s=times.get("usual_s", 0.0),
        long_step=_last_long(times.get("slow", [])),
    )
