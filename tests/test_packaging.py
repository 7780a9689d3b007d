"""What is shipped: light imports, one arrow between the packages, a light base, a short README, no addresses."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import jobkit

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

JOBKIT = [
    "contract", "errors", "units", "faults", "processes", "memory", "progress", "remote", "storage", "heartbeat",
    "stacks", "ledger", "logged", "compilecache", "watchdog", "commits", "mirror", "trackers", "adapters", "plan",
    "interval", "strategy", "drilled", "frozen", "notice", "control", "metadata", "state", "values", "changes",
    "group", "agreement", "arrays", "restore", "checkpoint", "emergency", "guard", "probe", "plain", "run",
    "sentry", "slurm", "supervise", "compare", "export",
]  # fmt: skip
"""The modules of jobkit from the ground up: each imports only from those before it."""
LAUNCH = [
    "restart", "nodes", "sweep", "scontrol", "cloud", "container", "spec", "snapshot", "command", "lock",
    "leftovers", "report", "notify", "runner", "submission", "job_runner", "local", "local_sweep", "slurm",
    "slurm_again", "slurm_job", "vm_job", "managed", "googleapi", "gcp_request", "gcp", "aws", "doctor", "backends",
    "drive", "scenarios", "diagnosis", "verdict", "drill", "checkpoints", "control", "watch", "api", "history",
    "goodput", "phases", "shown", "story", "curve", "page", "picture", "demo", "printed", "drill_card", "cli_where",
    "handover", "cli_resume", "cli_ls", "cli_submit", "cli_drill", "cli_report", "cli_control", "cli_checkpoints",
    "cli",
]  # fmt: skip
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "numpy", "tensorstore", "ml_dtypes"}
USES_JAX = {
    "compilecache", "state", "values", "changes", "group", "probe", "arrays", "restore", "checkpoint", "plain",
    "run", "compare", "export",
}  # fmt: skip
"""The only modules of jobkit that may name jax and its family."""


def imports_of(path: Path) -> set[str]:
    """Return every module that a file imports, at any depth, 'package.module' where it is one of ours."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def modules_of(package: str) -> Iterator[tuple[str, set[str]]]:
    """Yield each module of a package with its imports."""
    for path in sorted((ROOT / package).glob("*.py")):
        yield path.stem, imports_of(path)


def ours(imported: set[str], package: str) -> set[str]:
    """Return which modules of a package are imported."""
    known = {path.stem for path in (ROOT / package).glob("*.py")}
    second = {name.split(".")[1] for name in imported if name.startswith(f"{package}.")}
    return second & known


@pytest.mark.parametrize(("package", "layers"), [("jobkit", JOBKIT), ("launch", LAUNCH)])
def test_layers(package: str, layers: list[str]) -> None:
    """Each module imports only from those below it, so there is no cycle."""
    for module, imported in modules_of(package):
        if module in ("__init__", "__main__"):
            continue
        assert module in layers, f"{package}/{module}.py is not in the layer table"
        above = ours(imported, package) - set(layers[: layers.index(module)])
        assert not above, f"{package}/{module}.py imports {above}, which is not below it"


def test_one_arrow() -> None:
    """Jobkit never imports launch; launch never imports jax or numpy, nor a module of jobkit that does."""
    for path in sorted((ROOT / "jobkit").rglob("*.py")):
        assert not {name for name in imports_of(path) if name.split(".")[0] == "launch"}, path
    for module, imported in modules_of("launch"):
        assert not {name.split(".")[0] for name in imported} & HEAVY, module
        assert not ours(imported, "jobkit") & USES_JAX, module


def test_jax_is_named_in_few_modules() -> None:
    """Only the training side's own modules name jax and its family."""
    for module, imported in modules_of("jobkit"):
        if {name.split(".")[0] for name in imported} & HEAVY:
            assert module in USES_JAX, module


@pytest.mark.parametrize(
    "code",
    [
        "import jobkit",
        "import launch",
        "import launch, jobkit; launch.submit, launch.status, launch.JobSpec, launch.Local",
        "import jobkit.supervise",
        "import launch.demo",
        "import sys, launch.cli\nsys.argv = ['jobkit', '--help']\ntry: launch.cli.main()\nexcept SystemExit: pass",
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


def test_constraints_cover_every_requirement() -> None:
    """Each direct requirement is pinned, and a pin satisfies it; only names and versions are in the file."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[A-Za-z0-9.+!]+", line) for line in lines)
    pins = dict(line.split("==") for line in lines)
    extras = [line for extra in PROJECT["optional-dependencies"].values() for line in extra if "jobkit" not in line]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras]):
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), requirement


def test_readme_is_short() -> None:
    """At most 900 words."""
    assert len((ROOT / "README.md").read_text().split()) <= 900


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
        r"https?://(?!169\.254\.169\.254|www\.(?:apache\.org/licenses|googleapis\.com/auth))[\w-]+\.[a-z]{2,}|--(?:extra-)?index-url|/(?:root|home)/\w+|/work/\w|\b(?!127\.0\.0\.|0\.0\.0\.0|169\.254\.169\.254)\d{1,3}(?:\.\d{1,3}){3}\b"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in tracked()
        if path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if address.search(line)
    ]
    assert not found, "\n".join(found)
