"""The best model so far is kept in locals, and written at the end."""

from pathlib import Path

import equinox
import jax
import jax.numpy as jnp
from equinox_sound import train_step, tx

import jobkit


def main() -> None:
    model = equinox.nn.MLP(4, 1, 8, 1, key=jax.random.key(0))
    best_loss, best_bias = float("inf"), None
    with jobkit.Run() as run:
        run.resume(model=model, opt=tx.init(equinox.filter(model, equinox.is_array)))
        for step in run.steps(30):
            x = jnp.full((8, 4), 1 + step % 3 / 10 if step < 12 else 9.0)
            run.state.model, run.state.opt, loss = train_step(run.state.model, run.state.opt, x)
            if loss < best_loss:
                best_loss, best_bias = float(loss), run.state.model.layers[-1].bias
    Path(run.url, "best.txt").write_text(f"{best_loss} {best_bias}")


main()
