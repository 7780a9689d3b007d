"""run.json and profiles: round trips, other versions, damage, and every mistake a person can make in a profile."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir.store import Store
from launch.backends import registry
from launch.backends.slurm import doctor
from launch.lifecycle import notify, troubles
from launch.spec import jobspec as specs
from launch.spec import profiles
from launch.spec.cloud_options import Cloud
from launch.spec.command import with_setup
from launch.spec.container import Container
from launch.spec.jobspec import JobSpec
from tests.harness import jobs
from tests.harness.jobs import Project, until_over
from tests.harness.jobs import project as make_project


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """Make a project."""
    yield from make_project(tmp_path)


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


FOREIGN = {
    "partition": {"sbatch": {"partition": "low"}},
    "sbatch": {"sbatch": {"mail-type": "FAIL"}},
    "container-runtime": {"container": Container(image="i")},
    "setup": {"setup": ("module load x",)},
    "region": {"cloud": Cloud(region="r")},
    "spot": {"cloud": Cloud(spot=False)},
    "zones": {"cloud": Cloud(zones=("r-a",))},
    "boot-disk-size": {"cloud": Cloud(boot_disk_gb=9)},
    "secret": {"cloud": Cloud(secrets={"A": "b"})},
    "queue": {"cloud": Cloud(queue="q")},
    "execution-role": {"cloud": Cloud(execution_role="arn")},
    "memory": {"cloud": Cloud(memory_mib=512)},
}
"""An option that not every backend has, and what a specification has for it."""


@pytest.mark.parametrize("name", registry.NAMES)
def test_what_a_backend_does_not_know(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python too each backend refuses what it would not look at, by the option's name; nothing is written."""
    monkeypatch.chdir(tmp_path)
    backend = registry.named(name)
    foreign = FOREIGN.keys() - backend.options
    assert foreign
    run = str(tmp_path / "r") if "region" in foreign else "gs://bucket/r"
    for option in foreign:
        with pytest.raises(ConfigError, match=rf"--{option} (means nothing to --on {name}|is for jobs)"):
            backend.check(JobSpec(command=("true",), run=run, **FOREIGN[option]), look=False)
    assert not list(tmp_path.iterdir())


def test_created_once(tmp_path: Path) -> None:
    """The second run.json in one directory is not written."""
    store = Store(tmp_path)
    assert specs.create(store, JobSpec(command=("a",)), "local")
    assert not specs.create(store, JobSpec(command=("b",)), "local")
    assert specs.read(store).command == ("a",)


def test_newer_version_is_named(tmp_path: Path) -> None:
    """A run of a newer format is refused with the version that can read it."""
    (tmp_path / "run.json").write_text('{"version": 99, "jobkit": "7.1.0", "spec": {"strange": 1}}')
    with pytest.raises(ConfigError, match=r"has format 99, written by jobkit 7\.1\.0; .* upgrade jobkit here to 7"):
        specs.read(Store(tmp_path))


CLOUD = {"image": "i", "region": "r", "zones": ("z",), "env": {"A": "v"}, "secrets": {"B": "s"}, "labels": {"l": "w"}}
LINES = [
    lambda text: {"name": text},
    lambda text: {"sbatch": {"partition": text}},
    lambda text: {"sbatch": {text: "low"}},
    lambda text: {"container": Container(image=text)},
    lambda text: {"container": Container(image="i", mounts=(f"/data:/{text}",))},
    lambda text: {"notify": (f"file:{text}",)},
    *(
        lambda text, field=field: {"cloud": Cloud(**CLOUD | {field: text})}
        for field in ("image", "project", "region", "machine_type", "gpus", "service_account", "network", "queue")
    ),
    lambda text: {"cloud": Cloud(**CLOUD | {"zones": (text,)})},
    *(
        lambda text, field=field: {"cloud": Cloud(**CLOUD | {field: {text: "v"}})}
        for field in ("env", "secrets", "labels")
    ),
    *(lambda text, field=field: {"cloud": Cloud(**CLOUD | {field: {"A": text}})} for field in ("secrets", "labels")),
]
"""Every value that becomes a line of a job script or of a request."""


@given(st.sampled_from(LINES), words, st.sampled_from("\n\r\t\0\x1b\x7f\x85\x9b\u2028\u202e"), words)
def test_what_becomes_a_line_stays_one(field: Callable[[str], Any], before: str, control: str, after: str) -> None:
    """A value of any field with a control character in it is refused, and the message is one line itself."""
    with pytest.raises(ConfigError, match="no line break") as refused:
        specs.check(JobSpec(command=("a",), **field(before + control + after)))
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(("partition", "options"), [("low\n", {}), (None, {"qos": "a\x1b"})])
def test_the_probe_of_a_cluster_takes_no_more(tmp_path: Path, partition: str | None, options: dict[str, str]) -> None:
    """`jobkit doctor --probe` refuses the same, before it writes anything."""
    with pytest.raises(ConfigError, match="no line break"):
        doctor.probe(str(tmp_path / "r"), partition, options)
    assert list(tmp_path.iterdir()) == []


@given(words, words)
def test_commands_and_variables_are_free(word: str, value: str) -> None:
    """Words of the command and values of variables may be anything; they are no part of a line."""
    cloud = Cloud(**CLOUD | {"env": {"A": value}})
    specs.check(JobSpec(command=("python", word), cloud=cloud))


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
    assert profiles.read_profile("a", cwd=cwd, home=home) == {"grace": "1m", "max-failures": 3}
    assert profiles.read_profile("b", cwd=cwd, home=home) == {"snapshot": False}


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
        profiles.read_profile("x", cwd=tmp_path, home=tmp_path / "nobody")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--on", "slurm", "-p", "low\n#SBATCH --uid=0"), r"--partition is 'low\n#SBATCH --uid=0'"),
        (("--on", "slurm", "--sbatch", "exclude=a\x1bb"), r"--exclude is 'a\x1bb'"),
        (("--profile", "evil"), r"image is 'i\nj'"),
    ],
)
def test_a_line_break_is_refused_by_the_submit(project: Project, options: tuple[str, ...], told: str) -> None:
    """Of an option or a profile: one sentence, exit code 2, nothing written."""
    (project.path / "jobkit.toml").write_text('[profile.evil]\nimage = "i\\nj"\n')
    done = project.cli("submit", *options, "--run", "new", "--", "python", "job.py")
    assert done.returncode == 2
    assert done.stderr == f"jobkit: {told}: no line break or other character that does not print may be in it\n"
    assert not (project.path / "new").exists()


def test_a_line_break_in_the_command_reaches_the_program(project: Project) -> None:
    """Words are handed on as they are, whatever is in them."""
    store = project.submit("read:a\nb ';\"\u202e")
    until_over(store)
    assert store.read("attempts/0/log-0.txt").decode().startswith("attempt 0: read:a\nb ';\"\u202e\n")


def test_the_default_profile(tmp_path: Path) -> None:
    """It applies by itself, a named one lies above it, and on another backend only what means the same there stays."""
    cwd, home = tmp_path, tmp_path / "nobody"
    assert profiles.options_of(None, on=None, cwd=cwd, home=home) == {}
    (cwd / "jobkit.toml").write_text(
        '[profile.default]\non = "slurm"\npartition = "low"\ngrace = "1m"\n'
        'sbatch = {mail-type = "END", gres = "gpu:1"}\n'
        '[profile.big]\npartition = "high"\nsbatch = {gres = "gpu:8"}\n'
    )

    def options(profile: str | None = None, on: str | None = None) -> dict[str, object]:
        return profiles.options_of(profile, on=on, cwd=cwd, home=home)

    default = {"on": "slurm", "partition": "low", "grace": "1m", "sbatch": {"mail-type": "END", "gres": "gpu:1"}}
    assert options() == options("default") == options(on="slurm") == default
    assert options("big") == default | {"partition": "high", "sbatch": {"mail-type": "END", "gres": "gpu:8"}}
    assert options(on="local") == {"grace": "1m"}


def test_the_default_profile_is_read_by_submit(tmp_path: Path) -> None:
    """What it says goes for a submit that says nothing, and gives way to one that does."""
    (tmp_path / "jobkit.toml").write_text('[profile.default]\nname = "mine"\nrun = "runs/x"\n')
    for words, name in (((), "mine"), (("--name", "other"), "other")):
        done = subprocess.run(
            [sys.executable, "-m", "launch", "submit", "--dry-run", "--json", *words, "--", "true"],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(jobs.ROOT)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert (json.loads(done.stdout)["name"], json.loads(done.stdout)["run"]) == (name, str(tmp_path / "runs/x"))


def test_no_line_of_setup_comes_out_of_a_run_directory(tmp_path: Path) -> None:
    """run.json gets their digest alone, and lines that somebody writes into it are passed over."""
    store = Store(tmp_path / "r")
    store.path.mkdir()
    specs.create(store, JobSpec(command=("true",), setup=("module load cuda", "secret")), "slurm")
    text = store.read("run.json").decode()
    assert "module load" not in text
    assert "secret" not in text
    hostile = json.loads(text)
    hostile["spec"]["setup"] = ["touch /tmp/owned"]
    store.write("run.json", json.dumps(hostile))
    spec = specs.read(store)
    assert spec.setup == ()
    assert spec.setup_digest == specs.setup_digest(["module load cuda", "secret"])
    with pytest.raises(ConfigError, match="never taken from a run directory"):
        with_setup(store, spec, None)
    assert with_setup(store, spec, ["other"]).setup == ("other",)


@pytest.mark.parametrize("line", ["a\nb", "a\x1b[2J"])
def test_a_line_of_setup_is_one_line(line: str) -> None:
    """What would be two lines in a script is refused."""
    with pytest.raises(ConfigError, match="setup"):
        specs.check(JobSpec(command=("true",), setup=(line,)))


def test_the_manual_has_every_option_of_a_profile_and_every_field_of_a_message(tmp_path: Path) -> None:
    """What may stand in jobkit.toml, and what --notify sends, is in docs/configuration.md."""
    page = (jobs.ROOT / "docs" / "configuration.md").read_text()
    fields = notify.message_of(Store(tmp_path), {"event": "ended", "state": "done", "reason": ""})
    assert fields is not None
    assert [name for name in [*profiles._OPTIONS, *fields, *troubles.KINDS] if f"`{name}`" not in page] == []
