"""The docstrings of what a user imports: each says what goes in and what comes out."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

import jobkit
import launch
from tests.harness.jobs import ROOT

HEADINGS = r"Args|Returns|Yields|Raises|Durability|Signals|Collective"
NAMES = re.findall(r"^## `((?:jobkit|launch)\.\w+)`$", (ROOT / "docs/api.md").read_text(), flags=re.MULTILINE)


def public(name: str) -> Any:
    """Return what has a public name."""
    package, _, member = name.partition(".")
    return getattr({"jobkit": jobkit, "launch": launch}[package], member)


def callables(name: str) -> Iterator[tuple[str, Any]]:
    """Yield a public function, or a public class and its public methods, but for those of an interface."""
    thing = public(name)
    yield name, thing
    for member, function in vars(thing).items() if inspect.isclass(thing) else ():
        inherited = any(hasattr(base, member) for base in thing.__mro__[1:])
        if inspect.isfunction(function) and not member.startswith("_") and not inherited:
            yield f"{name}.{member}", function


def section(text: str, heading: str) -> str:
    """Return what stands below a heading of a docstring; '' without one."""
    found = re.search(rf"^{heading}:\n(.*?)(?=^(?:{HEADINGS}):|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def documented(text: str) -> set[str]:
    """Return the names below `Args:`."""
    lines = re.findall(r"^    (\w[\w, ]*):", section(text, "Args"), flags=re.MULTILINE)
    return {name.strip() for line in lines for name in line.split(",")}


@pytest.mark.parametrize("name", NAMES)
def test_what_goes_in_and_comes_out(name: str) -> None:
    """Each argument stands in the docstring, and what a function returns, or a generator yields, does too."""
    for what, thing in callables(name):
        text = inspect.getdoc(thing) or ""
        assert text, what
        plain = inspect.isclass(thing) and issubclass(thing, Exception) and "__init__" not in vars(thing)
        signature = inspect.Signature() if plain else inspect.signature(thing)
        assert signature.parameters.keys() - {"self"} <= documented(text), what
        returns = "" if inspect.isclass(thing) else str(signature.return_annotation)
        if returns not in ("", "None"):
            first = text.partition(".")[0]
            said = section(text, "Returns") or section(text, "Yields") or re.search(r"\b[Rr]eturns?\b", first)
            assert said, f"{what} -> {returns}"
