"""A run's directory: files, ledgers, commits, and their way to and from a bucket."""
