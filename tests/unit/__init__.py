"""Tests that start no training and no service: `make check` runs them, with lint and types."""
