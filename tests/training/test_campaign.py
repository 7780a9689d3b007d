"""Machines that share nothing but a bucket, under faults that a seed draws (tests/harness/campaign.py)."""

import os
import sys
from pathlib import Path

import pytest

from tests.harness.campaign import Campaign
from tests.harness.machines import Machines

REACHES = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 5) as there:
    print(there.getsockname()[0], socket.gethostbyname(socket.gethostname()))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make network namespaces")
def test_machines_share_no_network(tmp_path: Path) -> None:
    """Each machine has an address of its own, at which the others reach it by its name, and nobody's loopback."""
    with Machines(tmp_path, 2) as machines, machines.bucket() as server:
        assert not machines.alone
        port = server.url.rpartition(":")[2]
        here = [machine.start([sys.executable, "-c", REACHES, machines.host, port]) for machine in machines]
        assert [process.wait() for process in here] == [0, 0]
        seen = [machine.log.read_text().split() for machine in machines]
        assert all(out == own for out, own in seen), seen
        assert len({out for out, _ in seen} | {machines.host}) == 3
        lost = machines[0].start([sys.executable, "-c", REACHES, "127.0.0.1", port])
        assert lost.wait() != 0
        assert "refused" in machines[0].log.read_text()


def test_what_is_lost_with_a_machine(tmp_path: Path) -> None:
    """All that runs on a machine is killed when it is lost, orphans too; nothing of another one's is."""
    sleeps = "import subprocess, sys; subprocess.Popen(['sleep', '600']); sys.stdout.close()"
    with Machines(tmp_path, 2) as machines:
        for machine in machines:
            assert machine.start([sys.executable, "-c", sleeps]).wait() == 0
            (machine.place / "kept").touch()
        machines[0].lose(disk=True)
        assert (machines[0].pids(), len(machines[1].pids())) == ([], 1)
        assert [(machine.place / "kept").exists() for machine in machines] == [False, True]
        machines[1].lose()
        assert (machines[1].place / "kept").exists()


def lives(place: Path, seed: str, *counts: int, faults: int) -> Campaign:
    """Run lives of so many machines each; return what was found."""
    campaign = Campaign(place, seed)
    for number, count in enumerate(counts):
        campaign.live(number, count, faults)
    print(campaign.summary())
    return campaign


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_faults(tmp_path: Path) -> None:
    """Two machines under five faults: no commit is lost, every attempt ends, and the end is that of a quiet run."""
    campaign = lives(tmp_path, "five", 2, faults=5)
    assert campaign.defects == []
    assert len(campaign.fired) >= 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_25_faults(tmp_path: Path) -> None:
    """The same with 25 faults, some of them on four machines."""
    campaign = lives(tmp_path, "25", 2, 2, 4, 2, faults=7)
    assert campaign.defects == []
    assert len(campaign.fired) >= 25
