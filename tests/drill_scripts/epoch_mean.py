"""The mean of an epoch decides over the learning rate, and is a part as long as it grows."""

import jax
import jax.numpy as jnp

import jobkit

value_and_grad = jax.jit(jax.value_and_grad(lambda w, x: ((x @ w - x.sum(-1)) ** 2).mean()))
with jobkit.Run() as run:
    run.resume(w=jnp.zeros(4), total=0.0, rate=0.1, optimizer=None)
    for step in run.steps(40):
        loss, grads = value_and_grad(
            run.state.w, jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (8, 4))
        )
        run.state.w -= run.state.rate * grads
        run.state.total += float(loss)
        if step % 8 == 7:
            run.state.rate *= 0.5 if run.state.total / 8 < 1 else 1.0
            run.state.total = 0.0
