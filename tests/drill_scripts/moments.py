"""Three mistakes beside the state, each seen by an interruption at one moment alone; a kill in mid-run shows none."""

import time
from pathlib import Path

from sound import Batches, jax, new_params, train_step, tx

import jobkit


def evaluate(best: Path, loss: float) -> None:
    """Write down the best loss: what is killed in between leaves half of it."""
    with best.open("w") as file:
        file.flush()
        time.sleep(0.6)
        file.write(str(loss))


def main() -> None:
    params, data = new_params(), Batches()
    with jobkit.Run() as run:
        run.resume(params=params, opt=tx.init(params), data=data, key=jax.random.key(0))
        mean, best = Path(run.url, "mean.txt"), Path(run.url, "best.txt")
        if run.attempt:
            float(mean.read_text())  # the first step writes it
        if best.exists():
            float(best.read_text())
        for step in run.steps(60):
            batch = next(data)
            if step == 0:
                mean.write_text(str(batch.mean()))
            run.state.key, key = jax.random.split(run.state.key)
            noise = jax.random.normal(key, (8, 1))
            run.state.params, run.state.opt, loss = train_step(run.state.params, run.state.opt, batch, noise)
            if step in (10, 57):  # far from the middle, where a kill must not fall into it
                evaluate(best, float(loss))
    print(float(loss))  # after a restart there is no loss


if __name__ == "__main__":
    main()
