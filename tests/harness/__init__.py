"""What tests use: clusters, engines, trainings, browsers."""
