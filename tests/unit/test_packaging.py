"""What is shipped: light imports, a light base, a short README, no addresses."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import jobkit

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "numpy", "tensorstore", "ml_dtypes"}


@pytest.mark.parametrize(
    "code",
    [
        "import jobkit",
        "import launch",
        "import launch, jobkit; launch.submit, launch.status, launch.JobSpec, launch.Local",
        "import jobkit.supervise.supervisor",
        "import launch.drill.demo",
        "import sys; from launch.cli.main import main; sys.argv[1:] = ['--help']\ntry: main()\nexcept SystemExit: pass",
    ],
)
def test_light_imports(code: str) -> None:
    """None of these load jax or numpy."""
    heavy = sorted(HEAVY | {"matplotlib"})
    check = f"{code}\nimport sys\nfound = set({heavy}) & set(sys.modules)\nassert not found, found"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def needs(requirement: str, seen: set[str]) -> set[str]:
    """Return all distributions that a requirement brings in, by their installed metadata."""
    parsed = Requirement(requirement)
    name = parsed.name.lower().replace("_", "-")
    if name in seen or (parsed.marker and not parsed.marker.evaluate({"extra": ""})):
        return seen
    seen.add(name)
    try:
        inner = requires(name) or []
    except PackageNotFoundError:  # behind a marker of another platform
        inner = []
    for line in inner:
        needs(line, seen)
    return seen


def test_base_is_light() -> None:
    """What a login node installs brings in neither jax nor numpy."""
    found: set[str] = set()
    for requirement in PROJECT["dependencies"]:
        needs(requirement, found)
    assert "click" in found
    assert not found & {"numpy", "jax", "jaxlib", "flax", "scipy", "protobuf", "grpcio"}


def direct() -> list[Requirement]:
    """Return all requirements of the project and its extras."""
    extras = [line for extra in PROJECT["optional-dependencies"].values() for line in extra if "jobkit" not in line]
    return [Requirement(line) for line in [*PROJECT["dependencies"], *extras]]


def pins_of(name: str) -> dict[str, str]:
    """Return the versions in a file of constraints; only names and versions are in it."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[A-Za-z0-9.+!]+", line) for line in lines)
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-lowest.txt", "constraints-newest.txt"])
def test_constraints_cover_every_requirement(name: str) -> None:
    """Each direct requirement is pinned, and a pin satisfies it."""
    pins = pins_of(name)
    for requirement in direct():
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_the_floors_are_the_lowest_set() -> None:
    """What pyproject allows at the least is what `make test-lowest` installs, to the digit."""
    pins = pins_of("constraints-lowest.txt")
    for requirement in direct():
        (bound,) = requirement.specifier
        assert bound.operator == ">=", requirement
        assert Version(bound.version) == Version(pins[canonicalize_name(requirement.name)]), requirement


def test_the_newest_set_is_newer() -> None:
    """Nothing in the newest set is older than in the one that `make` installs."""
    pinned, newest = pins_of("constraints.txt"), pins_of("constraints-newest.txt")
    for name in map(canonicalize_name, (requirement.name for requirement in direct())):
        assert Version(newest[name]) >= Version(pinned[name]), name


def test_nothing_installs_a_distribution_of_our_name() -> None:
    """No file tells anybody to install jobkit from an index, where that name is a stranger's program.

    Hints name the missing package of a third party, or the checkout.
    """
    stranger = re.compile(r"pip3? install[^\n]*(?<![/.\w-])jobkit\b(?!'s)|(?<![/.\w-])jobkit\[")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in tracked()
        if path != Path(__file__).resolve()
        for match in stranger.finditer(path.read_text(errors="replace"))
    ]
    assert not found, "\n".join(found)


def test_extras_refer_to_this_project() -> None:
    """The extra that takes all others in takes them from this project, under its own name."""
    ours = [Requirement(line) for line in PROJECT["optional-dependencies"]["all"]]
    assert [one.name for one in ours] == [PROJECT["name"]] == ["jobkit-jax"]
    assert ours[0].extras <= PROJECT["optional-dependencies"].keys()


def test_readme_is_short() -> None:
    """Under 900 words."""
    assert len((ROOT / "README.md").read_text().split()) < 900


def test_changelog_has_this_version() -> None:
    """The newest entry is of the version in the package."""
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == jobkit.__version__


def test_types_are_shipped() -> None:
    """Both packages say that they are typed."""
    assert (ROOT / "jobkit/py.typed").exists()
    assert (ROOT / "launch/py.typed").exists()


def tracked() -> list[Path]:
    """Return the files of the project: those git knows or would take."""
    told = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if told.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in told.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and path.suffix not in (".png", ".gz")]


def test_no_addresses() -> None:
    """No index, registry or machine's own path is written into the project."""
    address = re.compile(
        r"https?://(?![\w.-]+\.invalid\b|169\.254\.169\.254|www\.(?:apache\.org/licenses|googleapis\.com/auth))[\w-]+\.[a-z]{2,}|--(?:extra-)?index-url|/(?:root|home)/\w+|/work/\w|(?<![=>]=)\b(?!127\.0\.0\.|0\.0\.0\.0|169\.254\.169\.254|168\.63\.129\.16|100\.100\.100\.200)\d{1,3}(?:\.\d{1,3}){3}\b"
    )  # of addresses those of this machine and of clouds' metadata services may be named; a version after == is none
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in tracked()
        if path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if address.search(line)
    ]
    assert not found, "\n".join(found)


def test_what_contributors_read_is_true() -> None:
    """Every target and file that CONTRIBUTING.md names is there, and CITATION.cff cites this version."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"\bmake ([a-z][\w-]*)", text))
    made = subprocess.run(
        ["make", "--dry-run", *sorted(targets)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert len(targets) > 5
    assert made.returncode == 0, made.stderr
    files = set(re.findall(r"[\w./-]+\.(?:py|txt|md|toml)\b", text))
    assert len(files) > 5
    assert [name for name in files if not (ROOT / name).exists()] == []
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], cited["license"]) == (jobkit.__version__, "Apache-2.0")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert all(hook["entry"].split()[0].removeprefix(".venv/bin/") in ("ruff", "mypy") for hook in hooks)
