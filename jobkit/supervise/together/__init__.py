"""Several processes of an attempt that share nothing but the run's URL: how they find and lose each other there."""
