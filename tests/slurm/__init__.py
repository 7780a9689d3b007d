"""Tests on a SLURM cluster of their own."""
