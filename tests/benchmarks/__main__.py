"""Run every benchmark, and print what is claimed in one table: python -m tests.benchmarks [--quick]."""

import sys

from tests.benchmarks import (
    attempts,
    drills,
    intervals,
    notices,
    restarts,
    restores,
    rows,
    saves,
    silence,
    steps,
    uploads,
)

given = sys.argv[1:]
rows.parser(__doc__).parse_args(given)
every = []
for benchmark in (steps, saves, restores, restarts, notices, uploads, silence, intervals, attempts, drills):
    every += benchmark.claims(benchmark.PARSER.parse_args(given))
sys.exit(rows.show(every))
