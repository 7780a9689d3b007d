"""What a drill needs inside the program: its settings, fingerprints and a clock that stands still."""
