"""What every test starts from: a process that no launcher started, on the CPU."""

import os

for name in [name for name in os.environ if name.startswith("JOBKIT_")]:
    del os.environ[name]
os.environ["JAX_PLATFORMS"] = "cpu"
