"""The order of a set of words decides how numbers are added up."""

import numpy as np
from sound import Batches, new_params, train_step, tx

import jobkit

WORDS = {f"word-{number}" for number in range(50)}


def main() -> None:
    params = new_params()
    data = Batches()
    with jobkit.Run() as run:
        run.resume(params=params, opt=tx.init(params), data=data)
        for _ in run.steps(60):
            sizes = [int(word.partition("-")[2]) for word in WORDS][:8]
            noise = np.array(sizes, np.float32).reshape(8, 1) / 50
            run.state.params, run.state.opt, loss = train_step(run.state.params, run.state.opt, next(data), noise)
            run.log(loss=loss)


if __name__ == "__main__":
    main()
