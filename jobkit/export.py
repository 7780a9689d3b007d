"""Write a run's parameters alone: `python -m jobkit.export RUN OUT [STEP]`, what `jobkit checkpoints` calls."""

import sys

from jobkit.contract import Exit
from jobkit.errors import JobkitError
from jobkit.restore import export_params


def main(arguments: list[str]) -> int:
    """Export and print the names of the leaves.

    Args:
        arguments: Run directory, output directory, and a step, 'latest' or 'best'.
    """
    run, out, step = (*arguments, "latest")[:3]
    try:
        leaves = export_params(run, out, step=int(step) if step.isdecimal() else step)
    except JobkitError as error:
        print(f"jobkit: {error}", file=sys.stderr)
        return Exit.USAGE
    print("\n".join(leaves))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
