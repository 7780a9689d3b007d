"""What the launching side and the training side agree on: environment, exit codes, run-directory layout.

Nothing here imports more than the standard library, so that a login node, a supervisor and a trainer can all
read it at no cost. docs/architecture.md says of each variable, code and file who sets, reads or writes it.
"""

import enum
import math
import os
import re
import signal
from collections.abc import Mapping
from typing import NamedTuple

RUN_VERSION = 1
"""Version of the run directory's layout; written to run.json and commit.json."""

ENV_RUN = "JOBKIT_RUN"
"""URL of the run directory."""
ENV_ATTEMPT = "JOBKIT_ATTEMPT"
"""Number of this attempt, counted from 0."""
ENV_SUPERVISOR = "JOBKIT_SUPERVISOR"
"""Node-local directory that the supervisor shares with the program: heartbeat and alive pipe (see heartbeat.py)."""
ENV_RUNNER = "JOBKIT_RUNNER_PID"
"""Pid of the local runner, whose death is a notice to its supervisor."""
ENV_HOME = "JOBKIT_HOME"
"""Where a run on an object store is written on this node before it is uploaded."""
ENV_PROCESS = "JOBKIT_PROCESS"
"""Index of this process in its attempt; SLURM_PROCID where it is not given."""
ENV_PROCESSES = "JOBKIT_PROCESSES"
"""How many processes the attempt has; 1 where it is not given."""
ENV_COORDINATOR = "JOBKIT_COORDINATOR"
"""host:port where process 0 of this attempt serves JAX's coordination service."""
ENV_GATHER = "JOBKIT_GATHER_S"
"""Seconds that the processes of an attempt wait for each other on the run's URL (see together/gathering.py)."""
ENV_GRACE = "JOBKIT_GRACE_S"
"""Seconds from a SIGTERM, with which nobody tells more, until SIGKILL, as far as the launcher knows."""
ENV_WARNED = "JOBKIT_WARNED_S"
"""The same from a SIGUSR1 or SIGUSR2, with which a scheduler warns before a time limit."""
ENV_STALL = "JOBKIT_STALL_S"
"""Seconds that a step may take before the program counts as stalled; 0: it never does; absent: learned."""
ENV_METADATA = "JOBKIT_METADATA"
"""Whose metadata server is watched for a preemption: gce, aws, azure, off, or auto for the cloud that this is."""
ENV_AZURE_METADATA = "JOBKIT_AZURE_METADATA"
"""URL of another server than Azure's own; the other clouds have variables for that themselves."""
ENV_ENDS_AT = "JOBKIT_ENDS_AT"
"""When this attempt is killed at the latest, in seconds since the epoch; SLURM_JOB_END_TIME where it is not given."""
ENV_FAULT = "JOBKIT_FAULT"
"""Signal this process at a named point, for drills and tests (see faults.py)."""
ENV_DRILL = "JOBKIT_DRILL"
"""What `jobkit drill` asks of the program, as JSON (see settings.py)."""
ENV_DRILL_CLOCK = "JOBKIT_DRILL_CLOCK"
"""The time at which a drill has the program's clock stand still, in seconds since the epoch."""
ENV_JOB = "JOBKIT_JOB"
"""The id of a batch service's job, as the submit chose it."""
ENV_BACKEND = "JOBKIT_BACKEND"
"""The batch service that runs the job."""


class Variable(NamedTuple):
    """An environment variable of ours, and how far it is handed on.

    Args:
        name: Its name.
        of_attempt: Whether it tells of one attempt: a run that is submitted from inside never gets it. The others are
            a person's or of what is around the run, and hold for all that is started below.
        crosses: Whether it goes into a container by name, since its value is not known when the words are made.
        ends_here: Whether it ties the supervisor to who started it, and the program does not get it.
    """

    name: str
    of_attempt: bool = True
    crosses: bool = True
    ends_here: bool = False


ENV_SETUP = "JOBKIT_SETUP"
"""Lines of `--setup`, as JSON, that a job gives its successor."""
VARIABLES = (
    Variable(ENV_RUN),
    Variable(ENV_ATTEMPT),
    Variable(ENV_SUPERVISOR, crosses=False),
    Variable(ENV_RUNNER, ends_here=True),
    Variable(ENV_HOME, of_attempt=False),
    Variable(ENV_PROCESS),
    Variable(ENV_PROCESSES),
    Variable(ENV_COORDINATOR),
    Variable(ENV_GATHER, of_attempt=False),
    Variable(ENV_GRACE),
    Variable(ENV_WARNED),
    Variable(ENV_ENDS_AT),
    Variable(ENV_STALL, crosses=False),
    Variable(ENV_SETUP, crosses=False),
    Variable(ENV_METADATA, of_attempt=False, crosses=False),
    Variable(ENV_AZURE_METADATA, of_attempt=False, crosses=False),
    Variable(ENV_FAULT, of_attempt=False, crosses=False),
    Variable(ENV_DRILL, of_attempt=False, crosses=False),
    Variable(ENV_DRILL_CLOCK, of_attempt=False, crosses=False),
    Variable(ENV_JOB, of_attempt=False, crosses=False),
    Variable(ENV_BACKEND, of_attempt=False, crosses=False),
)
"""All that a run's processes share; who hides one, hands one on or takes one away asks this table."""


OF_ATTEMPT = tuple(variable.name for variable in VARIABLES if variable.of_attempt)
"""Variables that an attempt, and nothing that is started beside it, has."""


def handed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment as a run that is submitted from it gets it: with nothing of an attempt that it is in."""
    excluded = set(OF_ATTEMPT)
    if ENV_ATTEMPT in environ:
        excluded |= {ENV_FAULT, ENV_DRILL, ENV_DRILL_CLOCK}  # of the drill that goes on around it
    return {name: value for name, value in environ.items() if name not in excluded}


class Exit(enum.IntEnum):
    """Exit codes of a program under jobkit, of the supervisor, and so of a job (sysexits.h where it has a word)."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    """A mistake at the command line; nothing was done."""
    STORAGE = 74
    """EX_IOERR: could not commit or restore."""
    PREEMPTED = 75
    """EX_TEMPFAIL: stopped on notice, committed."""
    STALLED = 76
    """No progress within the phase's budget."""
    CONFIG = 78
    """EX_CONFIG: no restart can help."""


class Outcome(enum.StrEnum):
    """How an attempt ended."""

    DONE = "done"
    PREEMPTED = "preempted"
    STORAGE = "storage"
    CONFIG = "config"
    STALLED = "stalled"
    FAILED = "failed"
    KILLED = "killed"


_BY_CODE = {
    Exit.DONE: Outcome.DONE,
    Exit.STORAGE: Outcome.STORAGE,
    Exit.PREEMPTED: Outcome.PREEMPTED,
    Exit.STALLED: Outcome.STALLED,
    Exit.CONFIG: Outcome.CONFIG,
}


def outcome_of(exit_code: int) -> Outcome:
    """Name an exit code; 128+n (and subprocess's -n) is a death by signal n.

    Args:
        exit_code: 0..255, or negative as `subprocess` reports a signal.
    """
    if exit_code < 0 or 128 < exit_code < 128 + signal.NSIG:
        return Outcome.KILLED
    return _BY_CODE.get(exit_code, Outcome.FAILED)  # type: ignore[call-overload, no-any-return]


def describe_exit(exit_code: int) -> str:
    """Say an exit code in words: 'exit code 1', 'SIGKILL'."""
    number = -exit_code if exit_code < 0 else exit_code - 128
    if outcome_of(exit_code) is Outcome.KILLED:
        try:
            return signal.Signals(number).name
        except ValueError:
            return f"signal {number}"
    return f"exit code {exit_code}"


class State(enum.StrEnum):
    """State of a run on every backend."""

    QUEUED = "queued"
    RUNNING = "running"
    REQUEUED = "requeued"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def over(self) -> bool:
        """Whether nothing will happen to the run any more by itself."""
        return self in (State.DONE, State.FAILED, State.CANCELLED)


# The run directory. Every name is relative to the run's URL, with forward slashes.
RUN_JSON = "run.json"
README = "README.md"
CANCEL = "cancel.json"
SAVE = "save.json"
"""Asks for a commit now; like cancel.json it comes from outside (see control.py)."""
ID = "run.id"
"""On an object store: tells a run from another one that is at the same URL later."""
STRATEGY = "strategy.json"
"""What to save and keep, as the program's `Run` was told."""
EVENTS = "events.jsonl"
LOCK = "lock"
CODE = "code"
CHECKPOINTS = "checkpoints"
STAGE = "checkpoints/.stage"
TRASH = "checkpoints/.trash"
SET_ASIDE = "checkpoints/.set-aside"
COMMIT = "commit.json"
STATE = "state.json"
LOCAL = "local.bin"
"""In a run of several processes: the arrays that are each process's own (see `of_process`)."""
PART = "part.json"
"""In a run of several processes without a shared disk: what makes a process's part of a step be there."""
ORBAX_ITEM = "default"
"""Name of the Orbax item inside a step; the one that a plain CheckpointManager reads."""
CHUNKS = "chunks.json"
"""Below the item, where jobkit wrote it without stock Orbax: dtype, shape and chunks of each array, with checksums."""
VALUES = "values/"
"""Below the item, likewise: files of chunks and nothing else, which a restore checks chunk by chunk as it reads."""
SCORES = "scores"
"""Metrics that came after their step was committed; a commit itself is never changed."""
ATTEMPTS = "attempts"
LEASES = "leases"
"""Who may run attempts, one file a runner, newest number first (see launch/lifecycle/lease.py)."""
RESTARTED = "restarted"
"""How often each VM of a job of several was started again (see launch/backends/cloud/vm_member.py)."""
OUTCOME = "outcome.json"
REPORT = "report"
CACHE = "cache"
TRACKERS = "trackers.json"
"""By which names W&B and MLflow know the run."""
TENSORBOARD = "tensorboard"
TENSORBOARD_MARK = "tensorboard/.written"
RUNNER_LOG = "runner.log"
POINTS = "points"
"""The points of a sweep, each a run directory."""
SLURM = "slurm"
"""The job's script and SLURM's own output."""
LAYOUT = (
    RUN_JSON, ID, README, CANCEL, SAVE, EVENTS, LOCK, CODE, CHECKPOINTS, SCORES, ATTEMPTS, LEASES, RESTARTED, REPORT,
    CACHE, TENSORBOARD, RUNNER_LOG, POINTS, SLURM,
)  # fmt: skip
"""What the launching side leaves at the top of a run directory, and what it has the program leave there."""


def is_own(name: str) -> bool:
    """Tell whether something at the top of a run directory is jobkit's, rather than the program's."""
    return name in LAYOUT or name in (STRATEGY, TRACKERS) or name.startswith(".")


def attempt_dir(attempt: int) -> str:
    """Return the directory of one attempt."""
    return f"{ATTEMPTS}/{attempt}"


def log_file(attempt: int, process: int = 0) -> str:
    """Return the log of one process of one attempt."""
    return f"{ATTEMPTS}/{attempt}/log-{process}.txt"


def events_file(attempt: int, writer: int | str) -> str:
    """Return the ledger of one writer (a process index, or 'supervisor') of one attempt."""
    return f"{ATTEMPTS}/{attempt}/events-{writer}.jsonl"


def process_outcome(attempt: int, process: int) -> str:
    """Return where the supervisor of one of several processes says how its process ended."""
    return f"{ATTEMPTS}/{attempt}/process-{process}.json"


def joined_file(attempt: int, process: int) -> str:
    """Return the object by which a process of an attempt has its place (see together/gathering.py)."""
    return f"{ATTEMPTS}/{attempt}/joined-{process}.json"


def gathered_file(attempt: int) -> str:
    """Return the object that says where the processes of an attempt meet, or that they never will."""
    return f"{ATTEMPTS}/{attempt}/gathered.json"


def broken_file(attempt: int) -> str:
    """Return where the first of several processes that ended badly says so (see together/peers.py)."""
    return f"{ATTEMPTS}/{attempt}/broken.json"


def of_process(name: str, process: int) -> str:
    """Return what a process calls a file of its own: 'outcome.json' for process 0, 'outcome-2.json' for process 2."""
    stem, dot, ending = name.partition(".")
    return f"{stem}-{process}{dot}{ending}" if process else name


def store_of(process: int) -> str:
    """Return what one of several processes writes of the arrays into, relative to the step: as stock Orbax calls it."""
    return f"{ORBAX_ITEM}/ocdbt.process_{process}"


_OF_VALUES = re.compile(rf"{ORBAX_ITEM}/(ocdbt\.process_\d+/)?{VALUES}")
_OF_PROCESS = re.compile(rf"{ORBAX_ITEM}/ocdbt\.process_(\d+)/|(?:state-|local-)(\d+)\.")


def is_values(name: str) -> bool:
    """Tell whether a file of a step holds chunks and nothing else."""
    return _OF_VALUES.match(name) is not None


def process_of(name: str) -> int:
    """Return which of several processes a file of a step belongs to; what describes the whole is process 0's."""
    found = _OF_PROCESS.match(name)
    return int(found[1] or found[2]) if found else 0


def step_dir(step: int) -> str:
    """Return the directory of one committed step."""
    return f"{CHECKPOINTS}/{step}"


def grace_s_from(number: int, environ: Mapping[str, str] = os.environ) -> float | None:
    """Read from the launcher's environment how long after a signal SIGKILL comes; None where nobody knows."""
    warned = number in (signal.SIGUSR1, signal.SIGUSR2) and ENV_WARNED in environ
    return _number(environ.get(ENV_WARNED if warned else ENV_GRACE, ""))


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def stall_s_from(environ: Mapping[str, str] = os.environ) -> float | None:
    """Read from the launcher's environment how long a step may take, 0 for ever; None where nobody said."""
    return _number(environ.get(ENV_STALL, ""))


def longest_grace_s(environ: Mapping[str, str] = os.environ) -> float:
    """Return how long before its end an attempt may be warned; 0 where nobody knows."""
    return max(grace_s_from(number, environ) or 0.0 for number in (signal.SIGTERM, signal.SIGUSR1))


def ends_at_from(environ: Mapping[str, str] = os.environ) -> float | None:
    """Read from the launcher's or SLURM's environment when this attempt is killed at the latest; None if it is not."""
    return _number(environ.get(ENV_ENDS_AT) or environ.get("SLURM_JOB_END_TIME") or "") or None  # SLURM's from 23.02 on


def attempt_from(environ: Mapping[str, str] = os.environ) -> int | None:
    """Read the attempt's number from the launcher's environment, None outside of one."""
    text = environ.get(ENV_ATTEMPT, "")
    return int(text) if text.isdigit() else None


def process_from(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Read from the launcher's environment which process of its attempt this is, and how many there are."""
    count = environ.get(ENV_PROCESSES, "")
    index = environ.get(ENV_PROCESS) or environ.get("SLURM_PROCID") or ""
    return (int(index), int(count)) if count.isdigit() and index.isdigit() else (0, 1)
