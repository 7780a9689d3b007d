"""What the pages in docs/ say is true of the code: messages, exit codes, public names, links."""

import ast
import re
from functools import cache

import pytest

import jobkit
import launch
from jobkit.contract import Exit
from tests.unit.test_rooms import ROOT, modules

DOCS = ROOT / "docs"
READ = sorted({*DOCS.glob("*.md"), *ROOT.glob("*.md"), ROOT / "docker" / "README.md"})
"""The pages that `make docs` builds."""
ROW = re.compile(r"^\| `(.+?)` \|", flags=re.MULTILINE)
LINK = re.compile(r"\]\((?!\w+:)([^)#]*)(?:#([\w-]*))?\)")
MESSAGES = ROW.findall((DOCS / "troubleshooting.md").read_text())


@cache
def texts() -> list[str]:
    """Return every text in the code, with … for a value that is put into it."""
    found = []
    for path in (path for package in ("jobkit", "launch") for path in modules(package)):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append(re.sub("…+", "…", "".join(map(str, parts))))
    return found


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_code(message: str) -> None:
    """What the troubleshooting page explains is a message of the code, word for word."""
    assert any(message in text for text in texts()), f"reworded or gone: {message}"


def test_each_message_is_explained_once() -> None:
    """No message stands twice on the page, and each has a cause and a remedy."""
    assert len(MESSAGES) > 60
    assert len(set(MESSAGES)) == len(MESSAGES)
    rows = [line for line in (DOCS / "troubleshooting.md").read_text().splitlines() if line.startswith("| `")]
    assert all(len(line.strip("|").split(" | ")) == 3 for line in rows)


def test_exit_codes() -> None:
    """The table of exit codes has each of them."""
    table = re.findall(r"^\| (\d+) \|", (DOCS / "failures.md").read_text(), flags=re.MULTILINE)
    assert [int(code) for code in table] == sorted(Exit)


def test_public_names() -> None:
    """The reference has each public name, and no other."""
    named = re.findall(r"^## `([\w.]+)`$", (DOCS / "api.md").read_text(), flags=re.MULTILINE)
    public = {f"{package.__name__}.{name}" for package in (jobkit, launch) for name in package.__all__}
    assert set(named) == public
    assert len(named) == len(public)


def test_links_lead_somewhere() -> None:
    """Each link to a file has that file, and each to a heading that heading."""
    wrong = []
    for page in READ:
        for target, heading in LINK.findall(page.read_text()):
            there = (page.parent / target) if target else page
            if not there.exists() or (heading and heading not in headings(there.read_text())):
                wrong.append(f"{page.name}: {target}#{heading}")
    assert wrong == []


def headings(text: str) -> set[str]:
    """Return the anchors of a page, as code hosts and MyST make them."""
    found = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_the_index_links_every_page() -> None:
    """Whoever begins at the index finds every page."""
    linked = {target for target, _ in LINK.findall((DOCS / "index.md").read_text())}
    assert {page.name for page in DOCS.glob("*.md")} - {"index.md"} <= linked
