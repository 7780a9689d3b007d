"""The life of a run on the launching side: submission, attempts, restarts, status, messages."""
