"""Nodes that fail a run are left out of its next job on a real cluster, and no run waits for a node that is down."""

import pytest

from launch.lifecycle import run_status
from tests.harness.jobs import JOB
from tests.harness.login import Login


def submit(login: Login, *plan: str) -> str:
    """Submit a job whose attempts do what `plan` says; return its number."""
    (login.home / "job.py").write_text(
        JOB.replace('f"{run}.only"', f'"{login.home}/only-" + os.environ["SLURMD_NODENAME"]')
    )
    return login.submit_command("python", "job.py", *plan)


def where(login: Login) -> list[str]:
    """Return the node of each attempt."""
    return [outcome["node"] for outcome in login.outcomes()]


@pytest.mark.slow
def test_a_node_that_failed_twice_is_left_out(login: Login) -> None:
    """After two SIGKILLs of the program on one node the next attempt runs on another one, in a job that excludes it."""
    submit(login, "commit:1,kill:9", "commit:2,kill:9", "commit:3")
    told = login.until(lambda told: told["state"] in ("done", "failed"))
    assert (told["state"], told["committed_step"]) == ("done", 3), told
    first, second, third = where(login)
    assert first == second != third
    assert login.cluster.job(told["job"])["ExcNodeList"] == first


@pytest.mark.slow
def test_a_program_that_kills_itself_sees_few_nodes(login: Login) -> None:
    """A program that dies wherever it runs, with progress in between, is tried on three nodes and moved no more."""
    submit(login, *(f"commit:{step},kill:9" for step in range(1, 8)), "commit:8")
    told = login.until(lambda told: told["state"] in ("done", "failed"), 120)
    assert told["state"] == "done", told
    nodes = where(login)
    assert len(set(nodes)) == 3
    assert len(set(nodes[-4:])) == 1, nodes


@pytest.mark.slow
def test_a_run_never_waits_for_a_node_that_is_down(login: Login) -> None:
    """Where all other nodes are down, a run stays on the node that failed it rather than wait for them."""
    for node in login.cluster.nodes[1:]:
        login.cluster.set_down(node)
    job = submit(login, "commit:1,kill:9", "commit:2,kill:9", "commit:3")
    told = login.until(lambda told: told["state"] in ("done", "failed"))
    assert (told["state"], told["job"]) == ("done", job), told
    assert set(where(login)) == {login.cluster.nodes[0]}


@pytest.mark.slow
def test_a_lost_node_is_left_out_at_once(login: Login) -> None:
    """A node that SLURM gave up on is held against, so that the next job of the run leaves it out."""
    job = submit(login, "hold", "commit:5,kill:9", "commit:6,kill:9", "commit:7")
    login.until(lambda told: told["phase"] == "listening")
    lost = login.cluster.job(job)["BatchHost"]
    login.cluster.set_down(lost)
    login.until(lambda told: told["attempts"] > 1)
    login.cluster.resume(lost)
    told = login.until(lambda told: told["state"] in ("done", "failed"))
    assert told["state"] == "done", told
    strikes = [event for event in run_status.events(login.store) if event["event"] == "strike"]
    assert [(strike["node"], strike["lost"]) for strike in strikes[:1]] == [(lost, True)]
    second, third, _ = where(login)[1:]
    assert second == third != lost
    excluded = login.cluster.job(told["job"])["ExcNodeList"]
    assert login.cluster.run("scontrol", "show", "hostnames", excluded).split() == sorted([lost, second])
