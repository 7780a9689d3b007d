"""A run begins with a committed step of another one: `jobkit submit --from RUN[@STEP|best] --run NEW`.

The step is copied before run.json makes the new run exist, every byte checked against the checksums of its commit; in a
bucket it is committed there first, too. Nothing of the source is touched. What a submit that was killed in between has
left counts as nothing: a copy is known by its reason, 'from', and the next submit takes it away.
"""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec

from jobkit import contract
from jobkit.errors import ConfigError, StorageError
from jobkit.rundir import commits, remote_steps, retention
from jobkit.rundir.commits import Commit
from jobkit.rundir.files import remove_tree
from jobkit.rundir.ledger import Ledger
from jobkit.rundir.store import Store, in_words, is_remote
from launch.lifecycle import orphans, submission
from launch.spec import jobspec as specs

_STEP = re.compile(r"(.+)@(\d+|best|latest)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Beginning:
    """The step of another run that a run begins with.

    Args:
        source: The other run.
        commit: The step, as it is committed there.
        step: Its number in the new run.
    """

    source: Store
    commit: Commit
    step: int

    def copy(self, store: Store) -> dict[str, Any]:
        """Commit the step in a new run; return what the ledger is to say of it.

        Durability: it is on storage on return, on the run's URL too.

        Raises:
            StorageError: If a file of the source is damaged, or cannot be read.
        """
        stage = commits.new_stage(store, self.step, 0)
        try:
            self._bring(stage)
            # What the leaf table holds is written anew; every other file is measured, and has to be what it was.
            state = json.loads((stage / contract.STATE).read_bytes())
            measured = commits.measure(stage, self.commit.files)
            wrong = [name for name, record in self.commit.files.items() if measured[name] != record]
            if wrong:
                raise self._damaged(f"{wrong[0]} differs from its checksum")
            del measured[contract.STATE]
            begun = msgspec.structs.replace(
                self.commit, step=self.step, attempt=0, reason=orphans.COPIED, files={}, early_stops=[]
            )
            commits.publish(store, stage, state=state, commit=begun, measured=measured)
        finally:
            remove_tree(stage)
        if store.remote is not None:
            with_ledger = Ledger(store.file(contract.EVENTS))
            try:
                remote_steps.push(store, self.step, attempt=0, ledger=with_ledger)
            finally:
                with_ledger.close()
            commits.remove(store, self.step)  # a home knows whose it is once an attempt is claimed: it is fetched then
        return {"source": self.source.url, "step": self.commit.step, "begins": self.step}

    def _bring(self, stage: Path) -> None:
        """Copy the files of the step into a directory."""
        stage.mkdir()
        here = self.source.file(contract.step_dir(self.commit.step))
        if self.source.remote is not None and self.commit.step not in commits.steps(self.source):
            wrong = remote_steps.download(self.source.remote, self.commit, into=stage)
            if wrong:
                raise self._damaged(wrong[0])
            return
        with in_words(f"cannot copy step {self.commit.step} of {self.source.url}", absent=True):
            for name in self.commit.files:
                (stage / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    shutil.copyfile(here / name, stage / name, follow_symlinks=False)
                except FileNotFoundError:
                    raise self._damaged(f"{name} is missing") from None

    def _damaged(self, what: str) -> StorageError:
        where = f"{self.source.url} is damaged: {what}; choose another step"
        return StorageError(f"step {self.commit.step} of {where}: --from {self.source.url}@STEP")


def choose(text: str, *, reset_step: bool) -> Beginning:
    """Find the step that `--from` names; writes nothing but what a look at a bucket brings into its home.

    Args:
        text: The run, with @STEP, @best or @latest behind it; by default the newest step. A directory that is called so
            as a whole is meant.
        reset_step: Whether the new run counts its steps from 0.

    Raises:
        ConfigError: If there is no such run or step.
    """
    match = None if not is_remote(text) and os.path.isdir(text) else _STEP.fullmatch(text)
    url, which = (match[1], match[2]) if match else (text, "latest")
    if not url.strip():
        raise ConfigError("--from is empty: name a run, or RUN@STEP, RUN@best")
    source = submission.open_run(url)
    remote = source.remote
    known = commits.steps(source)
    if remote is not None:
        known = sorted({*known, *remote_steps.steps(remote)})
    if not known:
        there = "has no committed checkpoint" if source.path.is_dir() else "does not exist; 'jobkit ls' lists the runs"
        raise ConfigError(f"--from {url}: it {there}")
    if which == "best":
        keep = retention.keep_of(source)
        scores = commits.metrics(source) | ({} if remote is None else remote_steps.metrics(remote))
        step = keep.best_of(scores)
        if step is None:
            raise ConfigError(f"--from {text}: no step of it is the best: its Run has no keep_best, or no step a score")
    else:
        step = known[-1] if which == "latest" else int(which)
    if step not in known:
        have = ", ".join(map(str, known))
        raise ConfigError(f"--from {text}: step {step} is not committed there; committed are {have}")
    here = step in commits.steps(source)
    commit = commits.read(source, step) if here or remote is None else remote_steps.read(remote, step)
    return Beginning(source, commit, 0 if reset_step else step)


def refuse_own(store: Store) -> None:
    """Raise ConfigError if a directory holds a training that was begun by hand: it has a beginning of its own."""
    if specs.begun_by_hand(store):
        raise ConfigError(
            f"{store.url} was trained by hand and has checkpoints of its own, with which it goes on: leave --from out, "
            "or give a new --run"
        )
