"""The parameters are set after resume(): what was restored is lost."""

import numpy as np
from sound import Batches, new_params, train_step, tx

import jobkit


def main() -> None:
    data = Batches()
    noise = np.zeros((8, 1), np.float32)
    with jobkit.Run() as run:
        params = new_params()
        run.resume(params=params, opt=tx.init(params), data=data)
        run.state.params = new_params()
        for _ in run.steps(60):
            run.state.params, run.state.opt, loss = train_step(run.state.params, run.state.opt, next(data), noise)
            run.log(loss=loss)


if __name__ == "__main__":
    main()
