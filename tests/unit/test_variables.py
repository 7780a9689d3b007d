"""Variables of an attempt: one table says how far each is handed on, and a run submitted from inside gets none."""

import json
import os
from pathlib import Path

import pytest

from jobkit import contract
from launch.backends.slurm import batch_script
from tests.harness.jobs import until
from tests.harness.login import Login

OUTER = """\
import json, os, subprocess, sys
words = ["submit", "--on", "slurm", "--run", "inner", "--no-snapshot", "--json", "--", "python", "inner.py"]
done = subprocess.run([sys.executable, "-m", "launch", *words], capture_output=True, text=True, check=False)
open("outer.json", "w").write(json.dumps({"told": done.stdout + done.stderr, "environ": dict(os.environ)}))
"""
INNER = """\
import json, os
open("inner.tmp", "w").write(json.dumps(dict(os.environ)))
os.rename("inner.tmp", "inner.json")
"""


def test_every_variable_is_in_the_table() -> None:
    """The table has each name that the contract has, once."""
    names = [variable.name for variable in contract.VARIABLES]
    assert sorted(names) == sorted(value for name, value in vars(contract).items() if name.startswith("ENV_"))
    assert len(names) == len(set(names))


def test_nothing_of_an_attempt_is_handed_on() -> None:
    """Inside an attempt a person's settings stay, and all that tells of the attempt goes, drills included."""
    inside = {variable.name: "1" for variable in contract.VARIABLES} | {"PATH": "/bin"}
    kept = {
        contract.ENV_HOME,
        contract.ENV_GATHER,
        contract.ENV_METADATA,
        contract.ENV_AZURE_METADATA,
        contract.ENV_JOB,
        contract.ENV_BACKEND,
    }
    assert contract.handed_on(inside) == dict.fromkeys(kept, "1") | {"PATH": "/bin"}
    outside = {contract.ENV_FAULT: "after_rename:1", contract.ENV_GRACE: "9"}
    assert contract.handed_on(outside) == {contract.ENV_FAULT: "after_rename:1"}


def test_what_sbatch_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What SLURM says of the job around a submit is hidden from sbatch and back afterwards; a person's words stay."""
    ours = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_END_TIME": "9",
        "SLURM_PROCID": "3",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
    }
    theirs = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_MPI_TYPE": "pmix", "SLURM_HINT": "nomultithread"}
    for name, value in (ours | theirs | {contract.ENV_ENDS_AT: "9"}).items():
        monkeypatch.setenv(name, value)
    with batch_script.clean_environment():
        assert {name: os.environ.get(name) for name in theirs} == theirs
        assert not {*ours, contract.ENV_ENDS_AT} & os.environ.keys()
    assert {name: os.environ.get(name) for name in ours} == ours


@pytest.mark.slow
def test_a_submit_from_inside_a_slurm_attempt(login: Login) -> None:
    """The inner job knows nothing of the outer one: neither its grace, its end, its processes, nor its place."""
    (login.home / "outer.py").write_text(OUTER)
    (login.home / "inner.py").write_text(INNER)
    options = ["--no-snapshot", "-p", "requeue5", "--time", "00:20:00", "--grace", "17s", "--stall", "77s"]
    login.submit_command("python", "outer.py", options=options)
    until((login.home / "inner.json").exists, "the inner job runs", seconds=120)
    told = json.loads((login.home / "outer.json").read_text())
    outer, inner = told["environ"], json.loads((login.home / "inner.json").read_text())
    assert outer[contract.ENV_STALL] == "77"
    assert outer[contract.ENV_WARNED] == "17"
    assert contract.ENV_ENDS_AT in outer, told["told"]
    assert contract.ENV_STALL not in inner
    assert inner.get(contract.ENV_ENDS_AT) != outer[contract.ENV_ENDS_AT]
    assert Path(inner[contract.ENV_RUN]).name == "inner"
    assert inner[contract.ENV_SUPERVISOR] != outer[contract.ENV_SUPERVISOR]
    login.until_no_job()
