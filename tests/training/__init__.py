"""Tests of the training side: state, checkpoints, storage, preemption, the drill."""
