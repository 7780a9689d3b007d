"""What `run.log` records, and the trackers it goes to."""
