"""Options that say where a run runs and on what: the same for `jobkit submit` and `jobkit resume --on`."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from jobkit.errors import ConfigError

if TYPE_CHECKING:
    from launch.lifecycle.verbs import Backend
    from launch.spec.container import Container
    from launch.spec.profiles import Placement

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option("-p", "--partition", help="SLURM: partition. [default: the cluster's]"),
    click.option("--account", help="SLURM: account. [default: the cluster's]"),
    click.option("--qos", help="SLURM: quality of service. [default: the cluster's]"),
    click.option("-N", "--nodes", type=int, help="SLURM, gcp: number of nodes. [default: 1]"),
    click.option("--ntasks-per-node", type=int, help="Processes per node. [default: 1]"),
    click.option("--gpus-per-node", help="SLURM: GPUs per node, such as 8 or a100:8."),
    click.option("--cpus-per-task", type=int, help="SLURM: CPU cores per process. [default: the cluster's]"),
    click.option("--mem", help="SLURM: memory per node, such as 64G. [default: the cluster's]"),
    click.option("--time", help="SLURM: limit of one job; a run goes on in the next. gcp, aws: limit of the run."),
    click.option("--constraint", help="SLURM: features that nodes must have."),
    click.option("--sbatch", multiple=True, metavar="NAME[=VALUE]", help="SLURM: any other option of sbatch."),
    click.option("--image", help="Container image with jobkit in it, on every backend."),
    click.option("--container-runtime", help="SLURM, local: apptainer, singularity or pyxis; docker."),
    click.option("--mount", multiple=True, metavar="SOURCE[:TARGET]", help="SLURM, local: what is in --image too."),
    click.option("--project", help="gcp: project. [default: the credentials' own]"),
    click.option("--region", help="gcp, aws: region. [default: gcp: that of --zones]"),
    click.option("--zones", metavar="ZONE,...", help="gcp: zones to try. [default: all of the region]"),
    click.option("--machine-type", help="gcp: machine type. [default: one with the GPUs, else e2-standard-4]"),
    click.option("--gpus", metavar="TYPE:COUNT", help="gcp: GPUs, such as L4:1. aws: their number."),
    click.option("--spot/--no-spot", default=None, help="gcp: spot or standard VMs. [default: spot]"),
    click.option("--max-restarts", type=int, metavar="N", help="gcp, aws: restarts of lost VMs. [default: no limit]"),
    click.option("--env", multiple=True, metavar="NAME[=VALUE]", help="gcp, aws: environment of the program."),
    click.option("--secret", multiple=True, metavar="NAME=SECRET", help="gcp, aws: variable from the secret manager."),
    click.option("--label", multiple=True, metavar="NAME=VALUE", help="gcp, aws: label of the job and its VM."),
    click.option("--service-account", help="gcp: that the VM acts as. aws: role of the job."),
    click.option("--network", help="gcp: network."),
    click.option("--subnetwork", help="gcp: subnetwork."),
    click.option("--boot-disk-size", metavar="SIZE", help="gcp: boot disk, such as 200GB."),
    click.option("--queue", help="aws: job queue."),
    click.option("--execution-role", metavar="ARN", help="aws: role with which Batch reads each --secret."),
    click.option("--cpus", type=int, help="aws: vCPUs of the container. [default: 4]"),
    click.option("--memory", metavar="SIZE", help="aws: memory of the container. [default: 14GiB]"),
    click.option("--price-per-hour", type=float, metavar="PRICE", help="What an hour costs, for the ledger."),
    click.option("--max-time", metavar="DURATION", help="Commit and stop after so long in attempts, all together."),
    click.option("--max-cost", type=float, metavar="MONEY", help="The same in money, by --price-per-hour."),
)  # fmt: skip


_OF = re.compile(r"((?:local|SLURM|gcp|aws)(?:, (?:local|SLURM|gcp|aws))*): (.*)", re.DOTALL)
"""How the help of an option begins that is for some backends alone."""


class Grouped(click.Command):
    """A command whose help has the options for some backends alone under the names of those."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, each under its backends."""
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx) if isinstance(option, click.Option) else None
            if record is None:
                continue
            words, text = record
            for_some = _OF.fullmatch(text)
            title = f"Options for {for_some[1].replace(', ', ' and ')}" if for_some else "Options"
            text = for_some[2] if for_some else text
            text = text[:1].upper() + text[1:] if text[:2].islower() else text
            groups.setdefault(title, []).append((words, text))
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


class Launching(Grouped):
    """A command whose last argument is COMMAND: an option of ours behind that, without `--`, is asked about."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; refuse what would go to the program though it is spelled as ours."""
        given = list(args)
        rest = super().parse_args(ctx, args)
        command: tuple[str, ...] = ctx.params.get("command") or ()
        before = len(given) - len(command) - 1
        if not command or (before >= 0 and given[before] == "--"):
            return rest
        own = {name for option in self.params for name in option.opts + option.secondary_opts if name.startswith("--")}
        for word in command:
            if word == "--":
                break
            if (name := word.partition("=")[0]) in own:
                raise ConfigError(
                    f"{name} stands behind the command, which would get it: write it before {command[0]}; if it is the "
                    f"program's own, write -- before the command: jobkit {ctx.info_name} -- {command[0]} ..."
                )
        return rest


def placement_options(function: F) -> F:
    """Add the options to a command."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def placement(options: dict[str, Any], given: dict[str, Any]) -> "Placement":
    """Merge a profile's options and the command line's, which win.

    Raises:
        ConfigError: If an option is of another backend than the one that is asked for.
    """
    from jobkit.units import duration_s
    from launch.backends import registry
    from launch.spec import cloud_options as cloud
    from launch.spec.profiles import SBATCH, Placement

    name = given["on"] or options.get("on", "local")
    backend = registry.named(name)
    refuse_foreign(backend, options, given)
    managed = not backend.options.isdisjoint(cloud.OPTIONS)
    sbatch = {str(key): str(value) for key, value in options.get("sbatch", {}).items()}
    for text in given["sbatch"]:
        key, _, value = text.lstrip("-").partition("=")
        sbatch[key] = value
    sbatch |= {key: str(value) for key in SBATCH if (value := _choose(key, options, given)) is not None}
    time = sbatch.pop("time", "") if managed else ""
    tables = {table: options.get(table, {}) | _pairs(given[table], table) for table in ("env", "secret", "label")}
    plain = [option for option in cloud.OPTIONS if option not in tables]
    asked = {option: value for option in plain if (value := _choose(option, options, given)) is not None}
    asked |= {option: table for option, table in tables.items() if table}
    container = container_of(backend, asked.pop("image", None), given, options) if not managed else None
    fields = cloud.fields_of(asked, time=time) if managed else None
    max_time = _choose("max-time", options, given)
    return Placement(
        name,
        sbatch,
        fields,
        container,
        price_per_hour=_choose("price-per-hour", options, given),
        max_time_s=None if max_time is None else duration_s(max_time),
        max_cost=_choose("max-cost", options, given),
    )


def setup_lines(options: Mapping[str, Any], given: Iterable[str], name: str) -> tuple[str, ...]:
    """Return the lines of a profile's `setup` and of `--setup`, in this order.

    Raises:
        ConfigError: If the backend has no use for them.
    """
    from launch.backends import registry

    lines = (*map(str, options.get("setup", ())), *given)
    refuse_foreign(registry.named(name), {}, {"setup": lines})
    return lines


def refuse_foreign(backend: "Backend", options: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse an option, of a profile or of the command line, that its backend does not know.

    Raises:
        ConfigError: With the backends that do.
    """
    from launch.backends import registry

    for option in sorted(registry.OPTIONS - backend.options):
        if given.get(option.replace("-", "_")) not in (None, ()) or options.get(option) is not None:
            knowing = " or ".join(registry.knowing(option))
            raise ConfigError(f"--{option} is for --on {knowing}; this is --on {backend.name}")


def container_of(
    backend: "Backend", image: str | None, given: Mapping[str, Any], options: Mapping[str, Any]
) -> "Container | None":
    """Read what the processes of an attempt are in, on this machine or in a SLURM job."""
    from launch.spec.container import Container

    if image is None:
        if given["container_runtime"] or given["mount"]:
            raise ConfigError("--container-runtime and --mount say how an image is used: give --image too")
        return None
    runtime = _choose("container-runtime", options, given) or backend.runtimes[0]
    return Container(image=image, runtime=runtime, mounts=(*options.get("mount", ()), *given["mount"]))


def _choose(name: str, options: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    value = given[name.replace("-", "_")]
    return options.get(name) if value is None else value


def _pairs(texts: Iterable[str], option: str) -> dict[str, str]:
    """Read NAME=VALUE; of --env a NAME alone is taken from here."""
    import os

    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals and option == "env" and name in os.environ:
            value = os.environ[name]
        elif not equals or not name:
            raise ConfigError(f"--{option} {text!r} is not NAME=VALUE")
        pairs[name] = value
    return pairs
