"""A run goes on with other code, or another command: `jobkit resume RUN --new-code [-- COMMAND]`.

run.json alone says which snapshot and which command a run has. So the new archive is written beside the old one first,
then run.json is replaced in one step, while nobody else can start the run: killed at any instant, it goes on with all
of the old or all of the new. What differs is put together from both archives when a resume finds that the ledger does
not know yet what run.json says, so that it is in the ledger before an attempt runs it, whoever was killed in between.
"""

import contextlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from jobkit import contract
from jobkit.contract import State
from jobkit.errors import ConfigError, JobkitError, StorageError, say
from jobkit.rundir.ledger import Event
from jobkit.rundir.store import Store
from launch.lifecycle import orphans, run_status, submission, targets
from launch.lifecycle.verbs import Change
from launch.spec import changes, snapshot, sweep
from launch.spec import jobspec as specs
from launch.spec.changes import Changes
from launch.spec.command import check_command, check_script
from launch.spec.jobspec import JobSpec

_MOST = 50
"""So many names of files of a kind the ledger gets, and how many there are."""


def prepare(store: Store, command: Sequence[str]) -> Change:
    """Check what a run is to go on with; writes nothing. What is returned takes the snapshot and writes it down.

    Args:
        store: The run.
        command: Its command from now on; empty for the one that it has.

    Raises:
        ConfigError: If it cannot work, or nothing has changed.
    """
    spec = specs.read(store)
    if spec.sweep or spec.sweep_url:
        raise ConfigError(f"{store.url} belongs to a sweep, whose points share one snapshot: submit the sweep again")
    words = tuple(command) or spec.command
    if not words[0].strip():
        raise ConfigError("the command is empty; write it after '--': jobkit resume RUN --new-code -- python train.py")
    sweep.refuse_names(words)
    cwd = _code_of(store, spec, named=bool(command))
    if spec.cloud is None and spec.container is None:
        check_command(words, cwd, os.environ)
    else:
        check_script(words, cwd, in_snapshot=spec.code is not None)
    fields: dict[str, Any] = {"command": words} if command else {}
    tree: snapshot.Tree | None = None
    if spec.code is not None:
        tree = snapshot.find(cwd, store.path, secret=targets.files(spec.notify))
        imports = submission.imports_of(tree)
        fields |= {"cwd": str(cwd.resolve()), "root": str(tree.root), "links": tree.links, "imports": imports}
        specs.check_places(msgspec.structs.replace(spec, **fields))
    same = words == spec.command and (tree is None or snapshot.digest(tree) == spec.code)
    unseen = tree is None and run_status.has_ended(store, State.DONE)  # a directory itself, which may have changed
    if same and not unseen and not _pending(store, spec):
        what = f"the code below {tree.root} is" if tree else f"it runs in {spec.root} itself (--no-snapshot), which is"
        raise ConfigError(
            f"{what} what {store.url} runs already, with the same command: leave --new-code out, or change them first"
        )

    def change(store: Store, spec: JobSpec) -> JobSpec:
        if tree is not None:
            fields["code"] = code = snapshot.take(tree, store)
            if store.remote is not None:  # before run.json names it
                name = snapshot.archive_name(code)
                store.remote.write(name, store.read(name))
        file = specs.read_file(store)
        mended = msgspec.structs.replace(file.spec, **fields)
        specs.rewrite(store, mended, file.backend, file.created)
        specs.write_readme(store, mended)
        return write_down(store, msgspec.structs.replace(spec, **fields))

    return change


def _code_of(store: Store, spec: JobSpec, *, named: bool) -> Path:
    """Return the directory that the code is taken from; raises ConfigError if it is not the one that it was in, and no
    command is named.
    """
    if os.path.isdir(spec.cwd):
        return Path(spec.cwd)
    here = Path.cwd()
    if spec.code is not None and not named:
        raise ConfigError(
            f"{spec.cwd}, where {store.url} was submitted from, is not on this machine: change to the directory whose "
            f"code it is to have, and name the command too: jobkit resume {store.url} --new-code -- "
            f"{shlex.join(spec.command)}"
        )
    if spec.code is not None:
        say(f"{spec.cwd} is not on this machine: {store.url} goes on with the code of {here}")
    return here


def write_down(store: Store, spec: JobSpec) -> JobSpec:
    """Have the ledger know which code and which command a run has from here, if it does not; return `spec`."""
    before = _known(run_status.events(store))
    if spec.sweep or before is None or (before["code"], before["command"]) == (spec.code, list(spec.command)):
        return spec
    fields: dict[str, Any] = {}
    if None not in (before["code"], spec.code) and before["code"] != spec.code:
        with contextlib.suppress(ConfigError, StorageError):  # the old archive is gone or damaged: nobody can tell
            which = _between(store, str(before["code"]), str(spec.code))
            fields = {kind: list(names[:_MOST]) for kind, names in vars(which).items() if names}
            fields["files"] = sum(map(len, vars(which).values()))
    submission.record(
        store,
        "new_code",
        code=spec.code,
        before=before["code"],
        command=list(spec.command),
        **fields,
        options=changes.of_commands(before["command"], spec.command),
        attempts=len(store.numbers(contract.ATTEMPTS)),
        committed=orphans.committed_step(store),
        by=submission.who(),
    )
    return spec


def _known(events: Sequence[Event]) -> Event | None:
    """Return which code and command the ledger says that a run has; None if it does not say."""
    known = [event for event in events if event["event"] in ("submitted", "new_code")]
    if not known or not isinstance(known[-1].get("command"), list):
        return None
    return {"code": known[-1].get("code"), "command": [str(word) for word in known[-1]["command"]]}


def _pending(store: Store, spec: JobSpec) -> bool:
    """Tell whether run.json was changed by somebody who was killed before the run was resumed."""
    events = run_status.events(store)
    before = _known(events)
    if before is not None and (before["code"], before["command"]) != (spec.code, list(spec.command)):
        return True
    begun = [event["event"] for event in events if event["event"] in ("submitted", "resumed", "new_code")]
    return begun[-1:] == ["new_code"]


def _between(store: Store, before: str, after: str) -> Changes:
    return changes.between(changes.of_archive(store, before), changes.of_archive(store, after))


def since_snapshot(url: str) -> tuple[Path, Changes] | None:
    """Return where the code of a run is, and which files have changed there since its snapshot was taken; None if none
    has, or if it is not on this machine.
    """
    store = submission.open_run(url)
    with contextlib.suppress(JobkitError, OSError):
        spec = specs.read(store)
        if spec.code and Path(spec.cwd).is_dir():
            tree = snapshot.find(Path(spec.cwd), store.path, secret=targets.files(spec.notify))
            if tree.root == Path(spec.root) and snapshot.digest(tree) != spec.code:
                taken = changes.of_archive(specs.code_store(store, spec), spec.code)
                return tree.root, changes.between(taken, changes.of_tree(tree))
    return None
