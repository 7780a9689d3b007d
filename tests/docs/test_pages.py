"""What the pages in docs/ say is true: their snippets run.

What can be held to the code without running it is in tests/unit/test_pages.py.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import pytest

from tests.docs.snippets import ROOT, blocks, play, train_py
from tests.fakes.gcs_server import GcsServer

if TYPE_CHECKING:
    from tests.harness.login import Login

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
ELSEWHERE = {"slurm.md", "gcp.md", "aws.md", "loops.md"}
"""Pages whose commands need what stands for a cluster or a cloud; test_loops.py runs the programs of loops.md."""
NOT_RUN = {"start.md": 2, "slurm.md": 1, "gcp.md": 4, "aws.md": 3, "containers.md": 1, "offline.md": 1}
"""How many blocks of a page cannot be run here; each says why."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_block_hides_from_these_tests(page: Path) -> None:
    """Blocks are of a language that is run; how many of a page are not is written down here, and why beside them."""
    found = blocks(page)
    if page.name != "architecture.md":
        assert {block.language for block in found} <= {"python", "bash", "toml"}
    assert sum(bool(block.not_run) for block in found) == NOT_RUN.get(page.name, 0)
    files = [block for block in found if block.language in ("python", "toml") and block.name]
    later = "\n".join(command for block in found for command in block.commands)
    assert all(block.name in later or block.name == "jobkit.toml" for block in files)
    assert all(block.name for block in found if block.language == "toml")


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in ELSEWHERE and any(b.commands and not b.not_run for b in blocks(page))],
    ids=lambda page: page.stem,
)
def test_commands_here(page: Path, tmp_path: Path) -> None:
    """The commands and programs of a page work on this machine, in their order."""
    (tmp_path / "train.py").write_text(train_py())
    assert list(play(page, tmp_path))


@pytest.mark.slow
def test_slurm(login: "Login") -> None:
    """The commands for SLURM work on a cluster: scripts are printed, and the doctor speaks."""
    (login.home / "train.py").write_text(train_py())
    printed = dict(play(DOCS / "slurm.md", login.home, login.cluster.environment))
    assert len(printed) >= 6
    assert all("#SBATCH --partition=low" in out for line, out in printed.items() if "submit" in line)
    assert not list(login.home.glob("runs/*"))


@pytest.mark.slow
def test_gcp(tmp_path: Path) -> None:
    """The commands for Google Cloud print requests that name what was asked for, and leave the bucket empty."""
    (tmp_path / "train.py").write_text(train_py())
    with GcsServer(buckets=["bucket"]) as server:
        printed = dict(play(DOCS / "gcp.md", tmp_path, {"STORAGE_EMULATOR_HOST": server.url}))
        assert server.names() == []
    requests = [out for line, out in printed.items() if "submit" in line]
    assert len(requests) == 4
    assert [out.count('"taskCount": "4"') for out in requests] == [0, 0, 0, 1]
    assert all("trainer@my-project" in out for out in requests), requests


@pytest.mark.slow
def test_aws(moto: dict[str, str], tmp_path: Path) -> None:
    """The commands for AWS print requests that name what was asked for, and leave the bucket empty."""
    (tmp_path / "train.py").write_text(train_py())
    storage = fsspec.filesystem("s3", endpoint_url=moto["AWS_ENDPOINT_URL"], key="a", secret="b")
    storage.mkdir("bucket")
    printed = dict(play(DOCS / "aws.md", tmp_path, moto))
    assert storage.ls("bucket") == []
    requests = [out for line, out in printed.items() if "submit" in line]
    assert len(requests) == 3
    assert all('"jobQueue": "spot"' in out and '"28672"' in out for out in requests)
