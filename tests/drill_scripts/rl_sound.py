"""Off-policy learning: the replay buffer, a deque, and the generator that draws from it are parts."""

from collections import deque

import jax.numpy as jnp
import numpy as np

import jobkit


def train(saved: bool) -> None:
    buffer: deque[tuple[float, float]] = deque(maxlen=20)
    generator = np.random.default_rng(0)
    with jobkit.Run() as run:
        more = {"buffer": buffer} if saved else {}
        run.resume(q=jnp.zeros(()), generator=generator, optimizer=None, **more)
        for _ in run.steps(30):
            action = float(generator.normal())
            buffer.append((action, -abs(action - float(run.state.q))))
            drawn = [buffer[index] for index in generator.integers(len(buffer), size=4)]
            run.state.q = run.state.q + 0.1 * sum(action * (1 + reward) for action, reward in drawn)


if __name__ == "__main__":
    train(saved=True)
