"""The supervisor of an attempt, and what it shares with the program."""
