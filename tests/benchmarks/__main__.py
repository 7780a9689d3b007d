"""Run every benchmark: python -m tests.benchmarks."""

import sys

from tests.benchmarks import saves, steps

sys.exit(steps.main() or saves.main())
