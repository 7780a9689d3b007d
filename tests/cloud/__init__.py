"""Tests of batch services, on services that execute."""
