"""Runs as jobs of managed batch services."""
