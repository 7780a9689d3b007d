"""Write a run's parameters alone: `python -m jobkit.export RUN OUT [STEP [--json]]`; `jobkit checkpoints` calls it."""

import contextlib
import json
import sys

from jobkit.checkpoint.restore import export_params
from jobkit.contract import Exit
from jobkit.errors import JobkitError, flush, say
from jobkit.printable import printable


def main(arguments: list[str]) -> int:
    """Export and print the names of the leaves.

    Args:
        arguments: Run directory, output directory, and a step, 'latest' or 'best'; '--json' for one JSON document.
    """
    as_json = arguments[3:] == ["--json"]
    run, out, step = (*arguments, "latest")[:3]
    try:
        leaves = export_params(run, out, step=int(step) if step.isdecimal() else step)
    except JobkitError as error:
        say(str(error))
        return Exit.USAGE
    text = json.dumps({"run": run, "exported": out, "leaves": leaves}, indent=2) if as_json else "\n".join(leaves)
    with contextlib.suppress(BrokenPipeError):  # `... | head`: the parameters are written all the same
        print(printable(text))
    flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
