"""Names at the command line: of runs, as `jobkit ls` prints them, and of backends; a shell completes both."""

import os
import shlex
from pathlib import Path

import click
from click.shell_completion import CompletionItem

RUNS = "runs"
"""Where runs lie by default, and what `jobkit ls` lists."""


class RunName(click.ParamType):  # type: ignore[type-arg]
    """A run: a path, a URL, or its name below runs/. A run that is there under the path itself comes first."""

    name = "run"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the path or URL of a run; a name that is none stays as it was given, for the command to refuse."""
        from jobkit.rundir.store import is_remote

        if is_remote(value) or value.startswith((".", "/", "~")) or value in ("", RUNS):
            return value
        places = (value, os.path.join(RUNS, value))
        for holds in (_is_run, os.path.isdir):
            for place in places:
                if holds(place):
                    return place
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the names of runs below runs/ that begin so; paths where none does.

        The shell inserts a name as it is: one that it would take for more than a word is left out.
        """
        from launch.backends import registry

        names = [os.path.relpath(path, RUNS) for path in reversed(registry.find_runs(Path(RUNS)))]
        plain = (name for name in names if shlex.quote(name) == name)
        items = [CompletionItem(name) for name in plain if name.startswith(incomplete)]
        return items or [CompletionItem(incomplete, type="dir")]


class BeginningName(RunName):
    """A run, with @STEP or @best behind it or not."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the same with the path of the run; what is called so as a whole comes first."""
        whole = super().convert(value, param, ctx)
        run, at, step = value.rpartition("@")
        return whole if not at or os.path.isdir(whole) else f"{super().convert(run, param, ctx)}{at}{step}"


def _is_run(place: str) -> bool:
    from jobkit.rundir.store import Store
    from launch.spec import jobspec as specs

    store = Store(os.path.realpath(place))
    sweep = specs.sweep_of(store)
    return specs.exists(store) or specs.begun_by_hand(store) or (sweep is not None and specs.exists(sweep[0]))


class BackendName(click.ParamType):  # type: ignore[type-arg]
    """A backend, which the command looks up."""

    name = "text"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the names of backends that begin so."""
        from launch.backends import registry

        return [CompletionItem(name) for name in registry.NAMES if name.startswith(incomplete)]


RUN, BEGINNING, BACKEND = RunName(), BeginningName(), BackendName()
