"""Orbax's layout on disk, written and read without Orbax's own work per leaf."""
