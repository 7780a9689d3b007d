"""A moving average of the parameters that is a part, and is evaluated now and then."""

import jax
import jax.numpy as jnp

import jobkit

loss_of = jax.jit(lambda w, x: ((x @ w - x.sum(-1)) ** 2).mean())
grad = jax.jit(jax.grad(loss_of))
with jobkit.Run() as run:
    run.resume(w=jnp.zeros(4), ema=jnp.zeros(4), optimizer=None)
    for step in run.steps(40):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (8, 4))
        run.state.w -= 0.05 * grad(run.state.w, x)
        run.state.ema = 0.9 * run.state.ema + 0.1 * run.state.w
        if step % 10 == 9:
            run.log(ema_loss=loss_of(run.state.ema, x))
