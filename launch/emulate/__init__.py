"""A bucket on this machine, to try everything offline: `jobkit emulate`, and the tests."""
