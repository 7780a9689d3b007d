"""Where runs go: this machine, SLURM, batch services of clouds."""
