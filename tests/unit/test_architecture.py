"""docs/architecture.md is true of the code: names, rooms, ledger events, variables, exit codes, fault points."""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from jobkit import contract, faults
from launch.backends import registry
from launch.drill import scenarios
from launch.lifecycle import submission
from tests.unit import test_rooms as rooms
from tests.unit.test_rooms import ROOT, all_imports, modules

PAGE = (ROOT / "docs" / "architecture.md").read_text()
SOURCES = {path: path.read_text() for package in ("jobkit", "launch") for path in modules(package)}
NAMED = re.compile(r"\b((?:jobkit|launch|tests)/[\w/]+\.py)(?::([A-Za-z_][\w.]*\w))?")
"""path/module.py, path/module.py:name or path/module.py:Class.name."""
CHOSEN = {
    "launch/lifecycle/submission.py:ask_to_cancel": {"cancelled", "stopped"},
    "jobkit/supervise/unsaved.py:Unsaved.failed": {"save_failed", "unchanged"},
}
"""Functions that choose the name of the event they append, and what they choose from."""
PASSES_ON = {
    "jobkit/rundir/ledger.py:Ledger.append",
    "launch/lifecycle/submission.py:record",
    "launch/lifecycle/runner.py:Runner._write_down",
}
"""Functions that append what their caller names."""


def table(heading: str) -> list[list[str]]:
    """Return the rows of the first table whose first column is headed so, by cell."""
    lines = iter(PAGE.splitlines())
    next(line for line in lines if line.startswith(f"| {heading} |"))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def quoted(cell: str) -> list[str]:
    """Return what a cell has in backticks."""
    return re.findall(r"`([^`]+)`", cell)


@cache
def definitions(path: Path) -> set[str]:
    """Return what a module defines: names, and Class.name of what stands in a class."""
    found = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(prefix + name.id for name in targets if isinstance(name, ast.Name))

    visit(ast.parse(path.read_text()).body, "")
    return found


def test_what_is_named_is_there() -> None:
    """Every module that the page names exists, and every function, class or constant with its path."""
    named = set(NAMED.findall(PAGE))
    assert len(named) > 100
    wrong = [path for path, _ in named if not (ROOT / path).is_file()]
    wrong += [
        f"{path}:{name}"
        for path, name in named - {(path, "") for path, _ in named}
        if path not in wrong and name not in definitions(ROOT / path)
    ]
    assert not wrong


def test_modules_that_the_code_names_are_there() -> None:
    """A docstring or comment that points to another module points to one that exists."""
    known = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    theirs = {"train.py", "sitecustomize.py", "probe.py"}  # the user's, Python's, and one of a probing job's own
    wrong = []
    for path, text in SOURCES.items():
        wrong += [f"{path}: {name}" for name in re.findall(r"\b\w+\.py\b", text) if name not in known | theirs]
        wrong += [f"{path}: {name}" for name, _ in NAMED.findall(text) if not (ROOT / name).is_file()]
    assert not wrong


@pytest.mark.parametrize(("heading", "order"), [("room of jobkit", "JOBKIT"), ("room of launch", "LAUNCH")])
def test_rooms_stand_in_order(heading: str, order: str) -> None:
    """The rooms stand in the order that tests/unit/test_rooms.py holds, each with a file to begin with."""
    rows = table(heading)
    assert [tuple(quoted(row[0])) for row in rows] == getattr(rooms, order)
    assert all(row[1] and NAMED.search(row[2]) for row in rows)


def test_what_launch_takes() -> None:
    """The light modules of other rooms are named."""
    assert all(f"`{name.replace('.', '/')}.py`" in PAGE for name in rooms.ALSO)


def claim(word: str) -> set[str]:
    """Return the modules that one of the claims of 'only here' names."""
    (paragraph,) = re.findall(rf"^- \*\*{word}\*\*.*?(?=^- |^$)", PAGE, flags=re.MULTILINE | re.DOTALL)
    return {path for path, _ in NAMED.findall(paragraph)}


def test_orbax_and_durability_are_where_the_page_says() -> None:
    """Orbax is imported, and fsync called, by the modules that the page names and by no other."""
    orbax = {path for path, text in SOURCES.items() if re.search(r"^\s*(import|from) orbax\b", text, re.MULTILINE)}
    synced = {path for path, text in SOURCES.items() if re.search(r"\bos\.f(data)?sync\b", text)}
    for word, paths in ("Orbax", orbax), ("Durability", synced):
        assert claim(word) == {str(path.relative_to(ROOT)) for path in paths}


def test_backends_are_found_in_one_place() -> None:
    """No module but the registry has a table of backends by name; the page knows each of them."""
    tables = [str(path.relative_to(ROOT)) for path, text in SOURCES.items() if re.search(r"dict\[str, Backend\]", text)]
    assert tables == ["launch/backends/registry.py"]
    assert claim("Backends by name") == set(tables)
    assert set(registry.NAMES) == {"local", "slurm", "gcp", "aws"}


def test_the_contract_costs_nothing() -> None:
    """What both sides agree on imports nothing but the standard library."""
    assert {name.split(".")[0] for name in all_imports(ROOT / "jobkit/contract.py")} <= sys.stdlib_module_names


class Appends(ast.NodeVisitor):
    """The events that a module appends to a ledger, with the fields it names.

    Args:
        where: Its path.
        text: Its source.
    """

    def __init__(self, where: str, text: str) -> None:
        self.events: dict[str, set[str]] = defaultdict(set)
        self.unknown: list[str] = []
        self._where, self._inside = where, [""]
        self.visit(ast.parse(text))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Remember in which function we are."""
        self._inside.append(f"{self._inside[-1]}.{node.name}".lstrip("."))
        self.generic_visit(node)
        self._inside.pop()

    visit_ClassDef = visit_FunctionDef  # type: ignore[assignment]  # noqa: N815

    def visit_Dict(self, node: ast.Dict) -> None:
        """Take an event that is written as a dictionary, for `append_all`."""
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
        if "event" in keys and "t" in keys:
            value = node.values[keys.index("event")]
            self._take(value, {str(key) for key in keys} - {"t", "event"})
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Take an event that is appended."""
        name = ast.unparse(node.func)
        called = name.rpartition(".")[2]
        # A list's own `append` takes no keywords, and one of rich's text a style.
        keywords = {word.arg for word in node.keywords} - {"style"}
        ledger = called == "append" and (name.endswith("ledger.append") or keywords)
        if ledger or called == "record" or (called == "_write_down" and self._where.startswith("launch/")):
            first = node.args[1 if called == "record" else 0]
            self._take(first, {word.arg for word in node.keywords if word.arg} - {"durable"})
        self.generic_visit(node)

    def _take(self, value: ast.expr, fields: set[str]) -> None:
        place = f"{self._where}:{self._inside[-1]}"
        if isinstance(value, ast.Constant):
            self.events[str(value.value)] |= fields
        elif isinstance(value, ast.IfExp):
            self._take(value.body, fields)
            self._take(value.orelse, fields)
        elif place in CHOSEN:
            for name in CHOSEN[place]:
                self.events[name] |= fields
        elif place not in PASSES_ON:
            self.unknown.append(f"{place}: {ast.unparse(value)}")


def appended(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return every event that some modules can append, with the fields that they name."""
    found: dict[str, set[str]] = defaultdict(set)
    for where, text in sources.items():
        one = Appends(where, text)
        assert not one.unknown, "an event whose name is not seen here: give it to CHOSEN, with what it chooses from"
        for name, fields in one.events.items():
            found[name] |= fields
    return found


def undocumented(sources: dict[str, str]) -> Iterator[str]:
    """Yield what of the events is not on the page, and what of the page no code appends."""
    found, told = appended(sources), defaultdict[str, set[str]](set)
    for event, _, fields, meaning in table("event"):
        assert meaning, event
        told[quoted(event)[0]] |= set(quoted(fields))
    yield from sorted(f"nothing appends {name}" for name in told.keys() - found.keys())
    for name, fields in sorted(found.items()):
        if name not in told:
            yield f"{name} is not documented"
        yield from sorted(f"{name}: its field {field} is not documented" for field in fields - told[name])


def test_every_event_is_documented() -> None:
    """Every event that the code can append stands in the table, with the fields it is given, and the reverse."""
    sources = {str(path.relative_to(ROOT)): text for path, text in SOURCES.items()}
    assert list(undocumented(sources)) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("self._ledger.append('planted', step=1)", "planted is not documented"),
        ("written.append('planted', durable=True)", "planted is not documented"),
        ("record(store, 'planted')", "planted is not documented"),
        ("self._write_down('saved' if new else 'planted')", "planted is not documented"),
        ("ledger.append_all([{'t': 0, 'event': 'planted'}])", "planted is not documented"),
        ("ledger.append('removed', planted=1)", "removed: its field planted is not documented"),
    ],
)
def test_a_planted_event_is_seen(line: str, said: str) -> None:
    """An event, or a field, that the page does not know fails the build."""
    assert said in undocumented({"launch/planted.py": line})


def test_an_event_whose_name_is_hidden_is_seen() -> None:
    """A name that is computed has to be listed here."""
    with pytest.raises(AssertionError, match="give it to CHOSEN"):
        appended({"launch/planted.py": "def f(name): ledger.append(name)"})


def variables() -> dict[str, list[str]]:
    """Return the page's rows of environment variables."""
    return {quoted(row[0])[0]: row for row in table("variable")}


def test_every_variable_is_documented() -> None:
    """The table has the variables of the contract and what else the code names, no other, with reader and writer."""
    ours = {value for name, value in vars(contract).items() if name.startswith("ENV_")}
    named = {name for text in SOURCES.values() for name in re.findall(r"\bJOBKIT_[A-Z_]*[A-Z]\b", text)}
    assert variables().keys() == ours | named
    assert all(row[1] and row[2] and {row[3], row[4]} <= {"yes", "no"} for row in variables().values())


def test_what_a_submit_hands_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A submit from inside a program hands on the variables of which the table says so."""
    for name in variables():
        monkeypatch.setenv(name, "1")
    told = {name for name, row in variables().items() if row[4] == "yes"}
    assert {name for name in submission.runner_environment() if name.startswith("JOBKIT_")} == told


def test_exit_codes() -> None:
    """The table has every exit code with its name and outcome."""
    rows = [(int(row[0]), quoted(row[1])[0], row[2]) for row in table("code")]
    assert rows == [(int(code), code.name, contract.outcome_of(code)) for code in contract.Exit]
    assert [word for word in contract.Outcome if f"{word}" not in PAGE] == []


def test_crash_points() -> None:
    """The table has every fault point, in the function that passes it, and who puts a SIGKILL there."""
    passed = defaultdict(set)
    for path, text in SOURCES.items():
        for point in re.findall(r'faults\.reach\("(\w+)"\)', text):
            passed[point].add(str(path.relative_to(ROOT)))
    rows = {quoted(row[0])[0]: row for row in table("point")}
    assert rows.keys() == passed.keys() == {*faults.POINTS, "step"}
    for point, row in rows.items():
        assert {path for path, _ in NAMED.findall(row[1])} == passed[point]
        assert row[2]
        assert row[3]
    drilled = {scenario.name for scenario in (*scenarios.ALL, *scenarios.ON_SLURM)}
    told = {name for row in rows.values() for name in quoted(row[3].partition("drill ")[2])}
    assert told
    assert told <= drilled


def test_files_of_a_run() -> None:
    """Every name of the layout has a row, but for those that only lead to others."""
    rows = " ".join(row[0] for row in table("file"))
    inside = {contract.ATTEMPTS, contract.CHECKPOINTS, contract.CODE, contract.SCORES, contract.LEASES}
    for name in (*contract.LAYOUT, contract.STRATEGY, contract.TRACKERS):
        assert f"`{name}`" in rows or f"`{name}/" in rows, name
    assert all(f"`{name}/" in rows for name in inside)
    assert f"is {contract.RUN_VERSION}, in run.json" in PAGE


def test_contents_and_links() -> None:
    """Each link of the page leads to one of its headings or to a file that exists."""
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in PAGE.splitlines()
        if line.startswith("#")
    }
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert len(links) > 8
    for link in links:
        found = link[1:] in headings if link.startswith("#") else (ROOT / "docs" / link).is_file()
        assert found, link
