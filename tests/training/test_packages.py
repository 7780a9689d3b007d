"""What no storage answers, out of Orbax, is said to be the package's: at once, with the version that mends it."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from jobkit import contract
from jobkit.checkpoint import orbax_io
from jobkit.errors import ConfigError, DamagedError, JobkitError, PackageError, StorageError
from jobkit.group import raise_told, told_error
from jobkit.rundir import commits
from jobkit.rundir.store import Store
from tests.harness import training

ROOT = Path(__file__).parent.parent.parent


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """Raise an error as a library does, and return it."""
    try:
        raise error from cause
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (TypeError("unexpected keyword 'use_compression'"), PackageError, "TypeError: unexpected keyword"),
        (AttributeError("module has no attribute"), PackageError, "AttributeError: module has no"),
        (ImportError("cannot import name"), PackageError, "ImportError"),
        (raised(RuntimeError("in the background"), TypeError("inside")), PackageError, "in the background"),
        (ValueError("NOT_FOUND: Error opening zarr3 driver"), StorageError, "NOT_FOUND"),
        (ValueError("Error writing: No space left on device"), StorageError, "the disk is full"),
        (ValueError("INTERNAL: Stale file handle [path]"), StorageError, "Stale file handle"),
        (raised(TypeError("while closing"), OSError(5, "Input/output error")), StorageError, "Input/output error"),
        (PermissionError(13, "Permission denied"), ConfigError, "permission denied"),
        (DamagedError("as it was"), DamagedError, "as it was"),
    ],
)
def test_whose_failure_it_is(error: BaseException, kind: type[JobkitError], told: str) -> None:
    """What the system says is the storage's, what only a wrong call raises is the package's, and else the storage's."""
    said = orbax_io.failure(raised(error, error.__cause__), "cannot save")
    assert type(said) is kind
    assert told in str(said)


def test_the_version_that_messages_name() -> None:
    """The version in the remedy is the one that the tests run with."""
    assert f"orbax-checkpoint=={orbax_io.TESTED}" in (ROOT / "constraints.txt").read_text().split()


def test_every_process_hears_the_kind() -> None:
    """What ends one process for good ends those that hear of it for good."""
    for error in (PackageError("a"), ConfigError("b"), StorageError("c")):
        with pytest.raises(type(error), match=str(error)):
            raise_told(told_error(error))


def _with_old_orbax(url: str, **options: Any) -> None:
    import orbax.checkpoint as ocp

    real: Any = ocp.PyTreeCheckpointHandler

    class Old(real):  # type: ignore[misc]
        """As it was before `use_compression`."""

        def __init__(self, *, use_ocdbt: bool = True, use_zarr3: bool = False, multiprocessing_options: Any) -> None:
            super().__init__(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3, multiprocessing_options=multiprocessing_options)

    ocp.PyTreeCheckpointHandler = Old
    training.train(url, writer="orbax", **options)


def test_an_orbax_of_another_version(tmp_path: Path) -> None:
    """A package that does not know what it is asked ends the run at its first save with 78, and is named."""
    url = tmp_path / "run"
    code, printed = training.attempt(url, function=_with_old_orbax)
    assert code == contract.Exit.CONFIG, printed
    assert f"orbax-checkpoint {version('orbax-checkpoint')} failed as no storage makes it fail (TypeError: " in printed
    assert f"jobkit is tested with {orbax_io.TESTED}: pip install 'orbax-checkpoint=={orbax_io.TESTED}'" in printed
    assert "Traceback" in printed
    assert commits.steps(Store(url)) == []


def _with_no_reader(url: str, **options: Any) -> None:
    import orbax.checkpoint as ocp

    def restore(*_: Any, **__: Any) -> None:
        raise TypeError("an argument that this version does not know")

    ocp.Checkpointer.restore = restore
    training.train(url, writer="orbax", **options)


def test_a_step_that_the_package_cannot_read_is_whole(tmp_path: Path) -> None:
    """A step whose bytes are right is not set aside because the installed package cannot read it back."""
    url = tmp_path / "run"
    code, printed = training.attempt(url, function=_with_no_reader)
    assert code == contract.Exit.CONFIG, printed
    store = Store(url)
    assert commits.steps(store)
    assert store.names(contract.SET_ASIDE) == []
