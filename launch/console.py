"""Rich's console, on which nothing but our own styles acts on the terminal."""

from collections.abc import Iterable
from typing import Any

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from jobkit.printable import printable
from launch.printing import unguarded


class Console(rich.console.Console):
    """A console whose texts are printable, whoever wrote them; the command line has no other."""

    @property
    def file(self) -> Any:
        """Where it writes: past the guard, which would take rich's own sequences for somebody else's."""
        return unguarded(super().file)

    @file.setter
    def file(self, new: Any) -> None:
        self._file = new

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render, and make printable what is no control sequence of rich's own."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
