"""run.json and profiles: round trips, other versions, damage, and every mistake a person can make in a profile."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobkit.errors import ConfigError, JobkitError
from jobkit.storage import Store
from launch import spec as specs
from launch.spec import JobSpec

words = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    st.builds(
        JobSpec,
        command=st.lists(words, min_size=1).map(tuple),
        run=words,
        name=words,
        code=st.none() | words,
        links=st.lists(words).map(tuple),
        grace_s=st.floats(0, 1e6),
    )
)
def test_round_trip(spec: JobSpec) -> None:
    """What is written is what is read, whatever the words."""
    import msgspec

    content = specs.encode(spec, "local")
    assert msgspec.convert(json.loads(content)["spec"], JobSpec) == spec


def test_created_once(tmp_path: Path) -> None:
    """The second run.json in one directory is not written."""
    store = Store(tmp_path)
    assert specs.create(store, JobSpec(command=("a",)), "local")
    assert not specs.create(store, JobSpec(command=("b",)), "local")
    assert specs.read(store).command == ("a",)


def test_newer_version_is_named(tmp_path: Path) -> None:
    """A run directory of a newer layout is refused with the version that can read it."""
    (tmp_path / "run.json").write_text('{"version": 99, "jobkit": "7.1.0", "spec": {"strange": 1}}')
    with pytest.raises(ConfigError, match=r"layout version 99, written by jobkit 7.1.0.*upgrade to jobkit 7.1.0"):
        specs.read(Store(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', '{"version": "x"}', "\x00\x01", "null", "\xff"])
def test_damaged(tmp_path: Path, content: str) -> None:
    """A damaged run.json is one sentence with the remedy, never a traceback."""
    (tmp_path / "run.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(JobkitError, match=r"run.json is damaged .*; put it back from a copy, or submit to a new"):
        specs.read(Store(tmp_path))


def test_not_a_run(tmp_path: Path) -> None:
    """A directory without run.json is not a run, and the message says how to find runs."""
    with pytest.raises(ConfigError, match=r"is not a run: it has no run\.json; 'jobkit ls'"):
        specs.read(Store(tmp_path))


def test_profile_of_the_project_comes_first(tmp_path: Path) -> None:
    """The project's jobkit.toml is asked before the user's, which is asked too."""
    cwd, home = tmp_path / "p", tmp_path / "h"
    (home / ".config" / "jobkit").mkdir(parents=True)
    cwd.mkdir()
    (cwd / "jobkit.toml").write_text('[profile.a]\ngrace = "1m"\nmax_failures = 3\n')
    (home / ".config" / "jobkit" / "jobkit.toml").write_text("[profile.a]\ngrace = 5\n[profile.b]\nsnapshot = false\n")
    assert specs.read_profile("a", cwd=cwd, home=home) == {"grace": "1m", "max-failures": 3}
    assert specs.read_profile("b", cwd=cwd, home=home) == {"snapshot": False}


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("", "no profile 'x'; there are none. Write a table"),
        ("[profile.y]", "no profile 'x'; known are: y"),
        ("[profile.x]\ntpus = 3", "has an unknown option 'tpus'; valid are name, run, on, grace, max-failures"),
        ("[profile.x]\nmax-failures = true", "max-failures is true; it must be a number"),
        ("[profile.x]\nsnapshot = 'no'", 'snapshot is "no"; it must be true or false'),
        ("[profile.x]\nname = 3", "name is 3; it must be text"),
        ("[profile]\nx = 3", "is not a table"),
        ("profile = 3", "is not a table"),
        ("[profile.x", "cannot read .*jobkit.toml"),
    ],
)
def test_bad_profiles(tmp_path: Path, toml: str, message: str) -> None:
    """Every mistake in a profile is named with what is valid."""
    (tmp_path / "jobkit.toml").write_text(toml)
    with pytest.raises(ConfigError, match=message):
        specs.read_profile("x", cwd=tmp_path, home=tmp_path / "nobody")
