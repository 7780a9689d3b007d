"""The moving average of the parameters, which is what gets deployed, is a local."""

from pathlib import Path

import jax
import jax.numpy as jnp
from linen_sound import new_state, train_step

import jobkit


def main() -> None:
    state = new_state()
    with jobkit.Run() as run:
        run.resume(params=state.params, opt=state.opt_state)
        average = run.state.params
        for step in run.steps(30):
            state = state.replace(params=run.state.params, opt_state=run.state.opt)
            state = train_step(state, jnp.full((8, 4), jnp.sin(step)))
            run.state.params, run.state.opt = state.params, state.opt_state
            average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, state.params)
    Path(run.url, "deployed.txt").write_text(str(jax.tree.map(lambda a: a.tolist(), average)))


main()
