"""Control and the watchdog on a real SLURM cluster: save and stop from a login node, and a job that is suspended."""

import json
import time

import pytest

from jobkit.rundir.ledger import read_events
from tests.harness.login import Login


@pytest.mark.slow
def test_save_suspend_and_stop(login: Login) -> None:
    """A job saves when asked; suspended for longer than a step may take it is no stall; stopped it stays stopped."""
    job = login.submit("--stall", "10s", pause_s=0.3)
    login.until_step(2)
    saved = json.loads(login.jobkit("save", "run", "--json"))
    assert saved["done"]
    assert login.store.exists(f"checkpoints/{saved['committed_step']}/commit.json")
    login.cluster.run("scontrol", "suspend", job)
    assert login.cluster.job(job)["JobState"] == "SUSPENDED"
    time.sleep(12)
    login.cluster.run("scontrol", "resume", job)
    login.until_step((login.status()["step"] or 0) + 2)
    assert not [event for event in read_events(login.store) if event["event"] == "stalled"]
    stopped = json.loads(login.jobkit("stop", "run", "--json"))
    assert stopped["committed_step"] > saved["committed_step"]
    told = login.status()
    assert (told["state"], told["attempts"]) == ("cancelled", 1)
    assert told["reason"].startswith("stopped by ")
    login.until_no_job()
