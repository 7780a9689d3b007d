"""Weights in and out of a run: what others wrote is read and matched with a program's parts; parts are saved alone."""
