"""Any history of saves, commits, kills, damage and restores: what restores is what was saved, and the newest of it."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jobkit import contract
from jobkit.checkpoint.kinds import Part, ValuePart, part_of
from jobkit.contract import STAGE, TRASH
from jobkit.rundir import commits
from jobkit.rundir.store import Store
from tests.harness import training

KEEP = 2


def _life(url: str, saves: int, answer: str) -> None:
    """One attempt: restore, tell what was restored, save `saves` more steps, telling each commit."""
    import numpy as np

    from jobkit.checkpoint import state
    from jobkit.checkpoint.checkpointer import Checkpoints
    from jobkit.rundir import commits
    from jobkit.rundir.ledger import Ledger
    from jobkit.rundir.retention import Keep

    def tell(**what: Any) -> None:
        with open(answer, "a") as file:
            file.write(json.dumps(what) + "\n")

    store = Store(url)
    attempt = store.claim(contract.ATTEMPTS)
    ledger = Ledger(store.file(contract.events_file(attempt, 0)))
    part = part_of("x", {"weights": np.zeros(16, np.float32), "step": 0})
    assert isinstance(part, ValuePart)
    parts: dict[str, Part] = {"x": part}
    commits.sweep(store, attempt=attempt)
    checkpoints = Checkpoints(store, attempt=attempt, keep=Keep(KEEP), ledger=ledger)
    restored = checkpoints.restore_newest(parts)
    value = part.value
    tell(restored=restored, step=value["step"], sum=float(value["weights"].sum()))
    step = restored or 0
    for _ in range(saves):
        step += 1
        part.value = {"weights": np.full(16, step, np.float32), "step": step}
        checkpoints.save(state.take(parts), step, reason="asked", metrics={})
        checkpoints.wait()
        error = checkpoints.take_error()
        if error is not None:
            raise error
        tell(committed=step)
    checkpoints.close()


class Lives(RuleBasedStateMachine):
    """Attempts follow one another on one run directory; each may be killed at a named point, or find damage."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="jobkit-lives-"))
        self.store = Store(self.root / "run")
        self.told: set[int] = set()
        self.damaged: set[int] = set()

    def teardown(self) -> None:
        """Remove the run directory."""
        shutil.rmtree(self.root)

    @rule(
        saves=st.integers(0, 4),
        point=st.sampled_from(["", "before_write", "after_data", "before_rename", "after_rename", "during_retention"]),
        passes=st.integers(1, 3),
    )
    def live(self, saves: int, point: str, passes: int) -> None:
        """Live once; check what was restored against what is known to be committed."""
        answer = self.root / "answer"
        answer.unlink(missing_ok=True)
        whole = [step for step in commits.steps(self.store) if step not in self.damaged]
        was = commits.steps(self.store)
        fault = f"{point}:{passes}" if point else ""
        code, printed = training.attempt(
            self.root / "run", function=_life, fault=fault, saves=saves, answer=str(answer)
        )
        lines = [json.loads(line) for line in answer.read_text().splitlines()] if answer.exists() else []
        if was and not whole:
            assert code == contract.Exit.CONFIG, printed  # never silently from scratch
            assert "every checkpoint" in printed
            return
        if not lines and not whole and self.store.names(contract.SET_ASIDE):
            assert code == contract.Exit.CONFIG
            return
        assert code in (0, -9), printed
        restored = lines[0]
        assert restored["restored"] == (max(whole) if whole else None)
        assert restored["step"] == (restored["restored"] or 0)
        assert restored["sum"] == 16.0 * restored["step"]
        # What was newer than the restored step has been set aside; its number may be committed anew.
        self.damaged = {step for step in self.damaged & set(was) if step < (restored["restored"] or 0)}
        self.damaged &= set(commits.steps(self.store))
        for line in lines[1:]:
            self.told.add(line["committed"])
        if len(lines) > 1:
            newest = lines[-1]["committed"]
            assert max(commits.steps(self.store)) >= newest, "a commit that was told is lost"

    @precondition(lambda self: commits.steps(self.store))
    @rule(which=st.integers(0, 9), file=st.integers(0, 99), byte=st.integers(0, 9999), bit=st.integers(0, 7))
    def damage(self, which: int, file: int, byte: int, bit: int) -> None:
        """Flip one bit somewhere in a committed step."""
        steps = commits.steps(self.store)
        step = steps[-1 - which % len(steps)]
        if step in self.damaged:
            return  # flipping it back would mend it
        below = sorted(self.store.file(contract.step_dir(step)).rglob("*"))
        files = [path for path in below if path.is_file() and path.stat().st_size]
        path = files[file % len(files)]
        content = bytearray(path.read_bytes())
        content[byte % len(content)] ^= 1 << bit
        path.write_bytes(content)
        self.damaged.add(step)

    @invariant()
    def everything_committed_is_whole(self) -> None:
        """What is committed and was not damaged from outside checks out; damage is seen."""
        for step in commits.steps(self.store):
            assert bool(commits.problems(self.store, step)) == (step in self.damaged)

    @rule()
    def sweep_leaves_no_debris(self) -> None:
        """The next attempt's sweep removes what dead ones left."""
        commits.sweep(self.store, attempt=10**6)
        assert self.store.names(STAGE) == self.store.names(TRASH) == []


Lives.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[
        Phase.explicit,
        Phase.reuse,
        Phase.generate,
    ],  # shrinking takes minutes; the history printed is short anyway
)


@pytest.mark.filterwarnings("ignore")
class TestLives(Lives.TestCase):  # type: ignore[misc,name-defined,valid-type]
    """Run the machine."""
