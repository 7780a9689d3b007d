"""Compare two runs bit for bit: `python -m jobkit.compare RUN_A RUN_B`.

What an interruption may not change: every leaf of the newest committed step (arrays by their bytes, so that NaN equals
NaN and -0.0 differs from 0.0), RNGs and data positions, the step itself, and every logged value. A step that ran twice
must have logged the same value each time.
"""

import json
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import click

from jobkit.contract import Exit
from jobkit.errors import ConfigError, JobkitError, say
from jobkit.printable import printable
from jobkit.rundir import commits
from jobkit.rundir.ledger import Series, read_metrics
from jobkit.rundir.store import Store


@dataclass(frozen=True)
class Difference:
    """The first place in which two runs differ.

    Args:
        name: The leaf ('model/out/kernel') or the metric ('loss').
        step: Where: the step logged, or the completed steps of the checkpoint.
        a: What the first run has, for a person.
        b: What the second run has.
    """

    name: str
    step: int
    a: str
    b: str


@dataclass(frozen=True)
class Comparison:
    """What was compared, and the first difference.

    Args:
        equal: Whether all of it is the same to the last bit.
        step: Newest committed step of the first run.
        leaves: Leaves compared, RNGs and data positions included.
        values: Logged values compared.
        repeated: Steps that ran more than once, in either run, summed over metrics.
        difference: The first one by step, None if equal.
        leaf: The first leaf of the newest committed step that differs, None if all are the same.
        metric: The first logged value that differs, None if all are the same.
        metrics: The names of all metrics with a value that differs.
    """

    equal: bool
    step: int
    leaves: int
    values: int
    repeated: int
    difference: Difference | None = None
    leaf: Difference | None = None
    metric: Difference | None = None
    metrics: tuple[str, ...] = ()


def compare(a: str, b: str) -> Comparison:
    """Compare the newest committed step and the logged values of two runs.

    Raises:
        ConfigError: If one of them has no committed step.
        StorageError: If a checkpoint is damaged.
    """
    stores = Store(a), Store(b)
    for store in stores:
        if store.remote is not None:
            from jobkit.checkpoint import restore

            restore.fetch(store, "latest")
    steps = [_newest(store) for store in stores]
    logged = [read_metrics(store) for store in stores]
    differing = list(_metric_differences(*logged))
    metrics = [difference for _, difference in differing]
    leaves = 0
    if steps[0] != steps[1]:
        state = [Difference("the newest committed step", min(steps), str(steps[0]), str(steps[1]))]
    else:
        left, right = (_leaves(store, step) for store, step in zip(stores, steps, strict=True))
        leaves = len(left.keys() | right.keys())
        state = list(_leaf_differences(left, right, steps[0]))
    differences = metrics + state
    return Comparison(
        equal=not differences,
        step=steps[0],
        leaves=leaves,
        values=sum(len(line) for line in logged[0].values.values()),
        repeated=sum(len(line) for series in logged for line in series.repeated.values()),
        difference=_first(differences),
        leaf=_first(state),
        metric=_first(metrics),
        metrics=tuple(sorted({name for name, _ in differing})),
    )


def _first(differences: list[Difference]) -> Difference | None:
    return min(differences, key=lambda difference: difference.step, default=None)


def _newest(store: Store) -> int:
    known = commits.steps(store)
    if not known:
        raise ConfigError(f"{store.url} has no committed checkpoint: is it the directory of a run?")
    return known[-1]


def _metric_differences(a: Series, b: Series) -> Iterator[tuple[str, Difference]]:
    """Yield every logged value that differs between the runs, or between two passes over one step, by metric."""
    for name in sorted(a.values.keys() | b.values.keys()):
        left, right = a.values.get(name, {}), b.values.get(name, {})
        for step in sorted(left.keys() | right.keys()):
            if step not in left or step not in right or _bits(left[step]) != _bits(right[step]):
                yield name, Difference(name, step, repr(left.get(step, "absent")), repr(right.get(step, "absent")))
    for series in (a, b):
        for name, line in series.repeated.items():
            for step, values in line.items():
                if len({_bits(value) for value in values}) > 1:
                    label = f"{name}, logged twice by one run"
                    yield name, Difference(label, step, repr(values[0]), repr(values[-1]))


def _bits(value: float) -> bytes:
    return struct.pack("<d", value)


def _leaf_differences(a: Mapping[str, Any], b: Mapping[str, Any], step: int) -> Iterator[Difference]:
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in a or name not in b:
            yield Difference(name, step, "present" if name in a else "absent", "present" if name in b else "absent")
        elif a[name] != b[name]:
            yield Difference(name, step, *_show(a[name], b[name]))


def _show(a: tuple[str, Any], b: tuple[str, Any]) -> tuple[str, str]:
    """Say how two leaves differ: by what they are, or by how many bytes and where first."""
    if a[0] != b[0] or not isinstance(a[1], bytes) or not isinstance(b[1], bytes):
        return f"{a[0]} {_text(a[1])}".strip(), f"{b[0]} {_text(b[1])}".strip()
    places = [index for index, (x, y) in enumerate(zip(a[1], b[1], strict=True)) if x != y]
    first = places[0] // 8 * 8
    summary = f"{len(places)} of {len(a[1])} bytes differ, at {first}:"
    return f"{a[0]}, {summary} {a[1][first : first + 8].hex()}", f"{b[0]}, {b[1][first : first + 8].hex()}"


def _text(value: Any) -> str:
    return "" if isinstance(value, bytes) else str(value)


def _leaves(store: Store, step: int) -> dict[str, tuple[str, Any]]:
    """Return every leaf of a committed step as (what it is, its bytes or value), by name.

    Raises:
        StorageError: If the step is damaged.
    """
    from jobkit.checkpoint import orbax_io, restore, state

    restore.find_step(store, step)  # what that leaves out is verified as it is read
    table = state.table_of(store, step)
    found = orbax_io.read(store, step, dict.fromkeys(state.stored_paths(table)), alone=True)
    arrays = {"/".join(path): array for path, array in found.items()}
    leaves: dict[str, tuple[str, Any]] = {}
    for part, entry in table.items():
        for key, record in entry["leaves"].items():
            name = f"{part}/{key}" if key else part
            array = arrays.get(name)
            leaves[name] = (_kind(record), record.get("value") if array is None else array.tobytes())
        if entry.get("skeleton") is not None:
            leaves[f"{part} (its state)"] = (entry["kind"], json.dumps(entry["skeleton"], sort_keys=True))
    return leaves


def _kind(record: Mapping[str, Any]) -> str:
    shape = "x".join(map(str, record.get("shape", [])))
    return f"{record['is']} {record.get('dtype') or record.get('impl') or record.get('type')} [{shape}]".strip()


@click.command()
@click.argument("run_a")
@click.argument("run_b")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(run_a: str, run_b: str, as_json: bool) -> None:
    """Compare two runs bit for bit; exit 0 if equal, 1 if not, 2 if there is nothing to compare.

    With '-' as RUN_B it reads the names of two runs a line from standard input, separated by a tab, and answers each
    with a line of JSON.
    """
    if run_b == "-":
        _answer()
        return
    try:
        result = compare(run_a, run_b)
    except JobkitError as error:
        say(str(error))
        sys.exit(int(Exit.USAGE))
    if as_json:
        print(json.dumps(asdict(result)))
    elif result.difference is None:
        print(
            f"equal to the last bit: {result.leaves} leaves of step {result.step}, {result.values} logged values "
            f"({result.repeated} of them logged again by a step that ran twice)"
        )
    else:
        first = result.difference
        summary = f"different: first at step {first.step}, {first.name}\n  {run_a}: {first.a}\n  {run_b}: {first.b}"
        print(printable(summary))
    sys.exit(0 if result.equal else 1)


def _answer() -> None:
    """Compare pair after pair, so that what takes long, loading jax, is done once."""
    for line in sys.stdin:
        a, _, b = line.rstrip("\n").partition("\t")
        try:
            answer: dict[str, Any] = asdict(compare(a, b))
        except JobkitError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
