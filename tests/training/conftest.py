"""What tests of the training side share."""

from pathlib import Path

import pytest

from tests.harness import training


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train once on the local disk without interruption; return the run."""
    url = tmp_path_factory.mktemp("undisturbed") / "run"
    code, printed = training.attempt(url)
    assert code == 0, printed
    return url
