"""Rates are taken from a list that begins anew in each attempt, and are only printed: the state is the same, what is
printed is not.
"""

from sound import Batches, jax, new_params, train_step, tx

import jobkit


def main() -> None:
    params, data = new_params(), Batches()
    rates = [0.1 / (1 + number) for number in range(60)]
    with jobkit.Run() as run:
        run.resume(params=params, opt=tx.init(params), data=data, key=jax.random.key(0))
        for _, rate in zip(run.steps(60), rates, strict=False):
            batch = next(data)
            run.state.key, key = jax.random.split(run.state.key)
            noise = jax.random.normal(key, (8, 1))
            run.state.params, run.state.opt, loss = train_step(run.state.params, run.state.opt, batch, noise)
            print(rate, loss)


if __name__ == "__main__":
    main()
