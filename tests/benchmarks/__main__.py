"""Run every benchmark: python -m tests.benchmarks."""

import sys

from tests.benchmarks import intervals, notices, requeue, saves, steps, uploads

sys.exit(steps.main() or saves.main() or notices.main() or uploads.main() or requeue.main() or intervals.main())
