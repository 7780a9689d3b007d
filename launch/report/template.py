"""Pages of HTML from the templates: whatever a program said is escaped, and none of it acts on who looks."""

from typing import Any

from jobkit.printable import printable


def render(name: str, **values: Any) -> str:
    """Return a page.

    Args:
        name: Its template in launch/templates/.
        values: What the template names: all of it has to be there.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("launch"),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(**values)
