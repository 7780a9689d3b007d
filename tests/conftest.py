"""What every test starts from: a process that no launcher started, on the CPU."""

import os
import signal

for name in [name for name in os.environ if name.startswith("JOBKIT_")]:
    del os.environ[name]
os.environ["JAX_PLATFORMS"] = "cpu"
# A shell's background job has SIGINT ignored, and what it starts inherits that; the tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
