"""`jobkit drill` and `jobkit demo`: what is done to a run, and what became of it."""
