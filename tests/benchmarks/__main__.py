"""Run every benchmark: python -m tests.benchmarks."""

import sys

from tests.benchmarks import attempts, drills, intervals, notices, restarts, restores, saves, silence, steps, uploads

sys.exit(
    steps.main()
    or saves.main([])
    or restores.main([])
    or restarts.main([])
    or notices.main()
    or uploads.main()
    or silence.main([])
    or intervals.main()
    or attempts.main()
    or drills.main()
)
