"""The house: which room may import which, and how large a room and a module may grow.

The rooms and their order stand in docs/architecture.md; this holds the code to it. An import counts at any depth, in a
function or for types alone.
"""

import ast
import subprocess
import sys
from collections.abc import Collection, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from launch.backends import registry

ROOT = Path(__file__).parent.parent.parent
BASE = ("contract", "errors", "printable", "units", "names", "decode", "patience", "versions", "faults")
JOBKIT = [
    BASE,
    ("rundir",),
    ("compilecache", "group"),
    ("tracking",),
    ("data",),
    ("supervise",),
    ("checkpoint",),
    ("preemption",),
    ("drill",),
    ("run",),
    ("compare", "export"),
]
"""The rooms of jobkit and the modules beside them, from the ground up: a floor imports only from itself and below."""
LAUNCH = [
    ("printing", "console", "checkpoints"),
    ("emulate",),
    ("spec",),
    ("lifecycle",),
    ("backends",),
    ("report",),
    ("drill",),
    ("api",),
    ("cli",),
]
LIGHT = {"rundir", "supervise", *BASE}
"""What launch takes from jobkit: nothing that needs jax."""
ALSO = {"jobkit.drill.settings", "jobkit.drill.looks", "jobkit.checkpoint.interval", "jobkit.compilecache"}
"""Light modules of other rooms, which launch takes too."""
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "numpy", "tensorstore", "ml_dtypes"}
NAMES_JAX = {"checkpoint", "run", "data", "drill", "group", "compilecache", "compare", "export"}
"""The only rooms that may name jax and its family."""
MOST_MODULES, MOST_LINES, MOST_ATTRIBUTES = 14, 450, 20


def modules(package: str) -> list[Path]:
    """Return the source files of a package, but for the examples, which are programs of their own."""
    found = sorted((ROOT / package).rglob("*.py"))
    return [path for path in found if "examples" not in path.parts]


def name_of(path: Path) -> str:
    """Return the dotted name of a source file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path) for package in ("jobkit", "launch") for path in modules(package)}


def all_imports(path: Path) -> Iterator[str]:
    """Yield what a file imports: 'package.module', and 'package.module.name' of what it takes from there."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> Iterator[str]:
    """Yield the modules of ours that a file imports."""
    for name in all_imports(path):
        if name in NAMES:
            yield name
        elif name.rpartition(".")[0] in NAMES and name.count(".") > 1:
            yield name.rpartition(".")[0]


def room_of(name: str) -> str:
    """Return the room of a module, or the module itself where it stands beside the rooms."""
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize(("package", "order"), [("jobkit", JOBKIT), ("launch", LAUNCH)])
def test_each_room_imports_only_from_those_below(package: str, order: list[tuple[str, ...]]) -> None:
    """The table is whole, and no import climbs."""
    floor = {room: level for level, rooms in enumerate(order) for room in rooms}
    wrong = []
    for path in modules(package):
        name = name_of(path)
        if path.parent == ROOT / package and path.stem.startswith("__"):
            continue
        assert room_of(name) in floor, f"{name} stands in no room: give it a place in tests/unit/test_rooms.py"
        for other in imports_of(path):
            if other.split(".")[0] != package or not room_of(other):
                continue
            if floor[room_of(other)] > floor[room_of(name)]:
                wrong.append(f"{name} imports {other}")
    assert not wrong


@pytest.mark.parametrize("package", ["jobkit", "launch"])
def test_no_import_goes_in_a_circle(package: str) -> None:
    """Modules can be read from the ground up, inside a room too."""
    graph = {name_of(path): set(imports_of(path)) - {name_of(path)} for path in modules(package)}
    for name in [package, *(f"{package}.{room}" for room in ("run", "drill"))]:
        graph.pop(name, None)  # the package itself names its front door for types
    list(TopologicalSorter({k: {v for v in vs if v in graph} for k, vs in graph.items()}).static_order())


def test_launch_takes_from_jobkit_what_is_light() -> None:
    """It imports the run's directory, the supervisor's side and the ground of jobkit; jobkit nothing of it."""
    wrong = [
        f"{name_of(path)} imports {other}"
        for path in modules("launch")
        for other in imports_of(path)
        if other.startswith("jobkit.") and room_of(other) not in LIGHT and other not in ALSO
    ]
    wrong += [f"{path} imports {o}" for path in modules("jobkit") for o in imports_of(path) if o.startswith("launch")]
    assert not wrong


def test_jax_is_named_in_few_rooms() -> None:
    """The run's directory, the supervisor and all of launch know nothing of jax and its family."""
    for path in [*modules("jobkit"), *modules("launch")]:
        if {name.split(".")[0] for name in all_imports(path)} & HEAVY:
            assert name_of(path).split(".")[:2] in [["jobkit", room] for room in NAMES_JAX], path


BACKENDS = {"Backend", "Local", "Slurm", "Managed", "Gcp", "Aws"}


def asked_for(text: str, names: Collection[str]) -> Iterator[str]:
    """Yield where a source asks which backend it has to do with: by its name, or by its type."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            sides += [one for side in sides if isinstance(side, ast.Tuple | ast.Set | ast.List) for one in side.elts]
            if any(isinstance(side, ast.Constant) and side.value in names for side in sides):
                yield ast.unparse(node)
        elif isinstance(node, ast.Match):
            cases = [case.pattern for case in node.cases]
            if {one.value.value for one in cases if isinstance(one, ast.MatchValue)} & set(names):  # type: ignore[attr-defined]
                yield ast.unparse(node.subject)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "type"):
            yield from [ast.unparse(node)] * any(getattr(each, "id", "") in BACKENDS for each in ast.walk(node))


def test_nobody_asks_which_backend_it_is() -> None:
    """What others have to know of a backend it says itself: no comparison of names or types outside the registry."""
    for path in modules("launch"):
        found = list(asked_for(path.read_text(), registry.NAMES))
        assert not found, f"{path.relative_to(ROOT)}: {found[0]}; ask the backend: launch/lifecycle/verbs.py:Backend"


@pytest.mark.parametrize(
    "line", ['on == "slurm"', 'name not in ("gcp", "aws")', 'on in {"local"}', "isinstance(backend, Managed)"]
)
def test_a_comparison_of_backends_is_seen(line: str) -> None:
    """Each form of it."""
    assert list(asked_for(f"def f(on, name, backend):\n    return 1 if {line} else 2\n", registry.NAMES))


def test_rooms_and_modules_stay_small() -> None:
    """A folder that nobody can take in, or a module nobody reads to its end, is two."""
    folders: dict[Path, int] = {}
    for package in ("jobkit", "launch"):
        for path in modules(package):
            folders[path.parent] = folders.get(path.parent, 0) + 1
            lines, name = len(path.read_text().splitlines()), name_of(path)
            assert lines <= MOST_LINES, f"{name} has {lines} lines"
    assert not {str(folder): count for folder, count in folders.items() if count > MOST_MODULES}


RECORDS = {"launch.lifecycle.run_status.Status", "launch.spec.jobspec.JobSpec"}
"""`status --json` and run.json, whose fields lie side by side."""


def attributes(node: ast.ClassDef) -> set[str]:
    """Return the names of what instances of a class have: fields, and what any method assigns to itself."""
    fields = {one.target.id for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)}
    stored = (one for one in ast.walk(node) if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store))
    return fields | {one.attr for one in stored if isinstance(one.value, ast.Name) and one.value.id == "self"}


def test_classes_stay_small() -> None:
    """No instance carries more attributes than a reader can hold in mind."""
    classes = [
        (f"{name_of(path)}.{node.name}", len(attributes(node)))
        for package in ("jobkit", "launch")
        for path in modules(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert {name for name, count in classes if count > MOST_ATTRIBUTES} <= RECORDS


@pytest.mark.parametrize(
    "line", ["from launch.cli import main", "import launch.report.explain", "from jobkit import run"]
)
def test_a_wrong_import_is_seen(line: str, tmp_path: Path) -> None:
    """The tests above see each form of an import."""
    planted = tmp_path / "planted.py"
    planted.write_text(f"def f() -> None:\n    {line}\n")
    assert list(imports_of(planted))


def test_the_rooms_have_words() -> None:
    """Each room says in one sentence what it is for."""
    for package in ("jobkit", "launch"):
        for path in (ROOT / package).rglob("__init__.py"):
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_the_light_side_loads_no_jax() -> None:
    """Every module of launch, and all that it takes from jobkit, can be imported where there is no jax."""
    names = [name for name in sorted(NAMES) if name.startswith("launch") and not name.endswith("__main__")]
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
    code += f"heavy = sorted({HEAVY} & set(sys.modules))\nassert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
