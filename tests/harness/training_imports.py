"""Imported once by the fork server: everything heavy, with no backend started and no thread of ours."""

import flax.nnx
import grain
import jax
import optax
import orbax.checkpoint

import jobkit.run.run

__all__ = ["flax", "grain", "jax", "jobkit", "optax", "orbax"]
