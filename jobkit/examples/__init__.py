"""Small, real trainings: each one runs as `python -m jobkit.examples.NAME`."""
