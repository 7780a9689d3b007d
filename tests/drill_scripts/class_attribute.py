"""A class counts in an attribute of its own."""

import jax
import jax.numpy as jnp

import jobkit

grad = jax.jit(jax.grad(lambda w, x: ((x @ w - x.sum(-1)) ** 2).mean()))


class Schedule:
    """A learning rate that falls with each call."""

    calls = 0

    @classmethod
    def rate(cls) -> float:
        """Return the next one."""
        cls.calls += 1
        return 0.1 / cls.calls


with jobkit.Run() as run:
    run.resume(w=jnp.zeros(4), optimizer=None)
    for step in run.steps(40):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (8, 4))
        run.state.w -= Schedule.rate() * grad(run.state.w, x)
