"""Tests that start nothing: `make check` runs them, with lint and types."""
