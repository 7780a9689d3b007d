"""Sphinx reads the pages as they are: what it needs beside them is added here, and they stay plain Markdown elsewhere.

`make docs` builds them from the root of the checkout, so that their links lead where they do on a code host. Every
warning is an error.
"""

import posixpath
import re

from sphinx.application import Sphinx

import jobkit

project = "jobkit"
version = release = jobkit.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = ["*.md", "docs/*.md", "docker/*.md"]
exclude_patterns = [".*", "build", "dist", "runs"]
root_doc = "docs/index"
html_theme = "furo"
html_title = f"jobkit {release}"
html_copy_source = html_show_copyright = False
myst_heading_anchors = 3
default_role = "code"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Collective", "Durability", "Signals"]

LINK = re.compile(r"\]\(([\w./-]+)\.md\)")
NAME = re.compile(r"^## `((?:jobkit|launch)\.\w+)`$", flags=re.MULTILINE)


def contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Give the index its table of contents: the pages in the order of its links, then those it does not link to."""
    if page == root_doc:
        linked = dict.fromkeys(posixpath.normpath(f"docs/{link}") for link in LINK.findall(source[0]))
        pages = [*linked, *sorted(app.env.found_docs - linked.keys() - {root_doc})]
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "".join(f"/{page}\n" for page in pages) + "```\n"


def reference(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the docstring below each heading of the reference that is a public name."""
    if page == "docs/api":
        source[0] = NAME.sub(lambda match: f"{match[0]}\n\n{directive(match[1])}", source[0])


def directive(name: str) -> str:
    """Return what has autodoc describe a name, with its public members where it is a class."""
    package, member = name.split(".")
    kind = "class" if isinstance(getattr(__import__(package), member), type) else "function"
    return f"```{{eval-rst}}\n.. auto{kind}:: {name}\n" + ("   :members:\n" if kind == "class" else "") + "```"


def examples(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Mark what a docstring sets off by a blank line and an indentation as code, as reStructuredText wants it."""
    for i in range(len(lines) - 1, 1, -1):
        if lines[i].startswith("    ") and not lines[i - 1].strip() and not lines[i - 2].startswith(" "):
            lines[i:i] = ["::", ""]


def setup(app: Sphinx) -> None:
    """Have Sphinx pass pages and docstrings through here."""
    app.connect("source-read", contents)
    app.connect("source-read", reference)
    app.connect("autodoc-process-docstring", examples, priority=400)  # before napoleon
