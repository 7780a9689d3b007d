"""Run, the front door of the training side."""
