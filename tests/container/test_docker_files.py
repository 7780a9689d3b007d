"""The files for a machine of one's own: their timeouts are in order, and systemd understands the unit."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.harness.engine import ROOT

UNIT = ROOT / "docker" / "jobkit.service"
NOTICE_S = 30
"""The shortest notice of the three clouds."""


def number(pattern: str, text: str) -> int:
    """Return the one number that a pattern finds."""
    (found,) = set(re.findall(pattern, text, re.MULTILINE))
    return int(found)


def test_timeouts_of_the_unit() -> None:
    """A save is shorter than docker's patience, that than systemd's, and that than the cloud's."""
    text = UNIT.read_text()
    save = number(r"JOBKIT_GRACE_S=(\d+)", text)
    patience = number(r"--stop-timeout=(\d+)", text)
    assert patience == number(r"^ExecStop=.* -t (\d+) ", text)
    assert save < patience < number(r"^TimeoutStopSec=(\d+)$", text) < NOTICE_S


def test_timeouts_of_the_compose_file() -> None:
    """The same order there; and it is a service that goes on after a preemption, with the host's network."""
    (service,) = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"].values()
    patience = int(service["stop_grace_period"].removesuffix("s"))
    assert int(service["environment"]["JOBKIT_GRACE_S"]) < patience < NOTICE_S
    assert (service["restart"], service["network_mode"], service["read_only"]) == ("on-failure", "host", True)


def test_an_image_for_aws() -> None:
    """AWS Batch keeps an image's ENTRYPOINT, and ours has one: the instructions say how to be rid of it."""
    assert re.search("^ENTRYPOINT ", (ROOT / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    (told,) = [line for line in (ROOT / "docker" / "README.md").read_text().splitlines() if "--on aws" in line]
    assert "`ENTRYPOINT []`" in told


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    """Every line of the unit means something to systemd; a misspelt one would be ignored on the day it is needed."""
    unit = tmp_path / "jobkit.service"
    text = UNIT.read_text().replace("/usr/bin/docker", "/bin/true").replace("Requires=docker.service", "")
    for written, good in ((text, True), (text.replace("TimeoutStopSec", "TimeoutStopSecs"), False)):
        unit.write_text(written)
        verify = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=one", str(unit)]
        done = subprocess.run(verify, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == good, done.stderr
