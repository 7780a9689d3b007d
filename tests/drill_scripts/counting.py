"""A learning rate that falls with each call; for globals_elsewhere.py."""

calls = 0


def rate() -> float:
    global calls
    calls += 1
    return 0.9**calls
