"""Patience, jobkit's and its own, and a schedule that are no parts: each begins anew, which no step of these shows."""

from collections.abc import Iterator

import jax.numpy as jnp

import jobkit


class Plateau:
    """Patience of the program's own, with the methods that a part has."""

    def __init__(self) -> None:
        self.best, self.waited = float("inf"), 0

    def update(self, value: float) -> bool:
        """Tell whether it has been no better for long."""
        self.best, self.waited = min(self.best, value), self.waited + 1 if value >= self.best else 0
        return self.waited > 1000

    def state_dict(self) -> dict[str, float]:
        """Return what it knows."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take it back."""
        self.best, self.waited = state["best"], int(state["waited"])


def rates() -> Iterator[float]:
    for step in range(10_000):
        yield 0.1 if step < 1000 else 0.01


def main() -> None:
    schedule, plateau, stopping = rates(), Plateau(), jobkit.EarlyStopping(patience=1000)
    with jobkit.Run() as run:
        state = run.resume(w=jnp.ones(()), optimizer=None)
        for _ in run.steps(40):
            state.w = state.w - next(schedule) * state.w
            if plateau.update(float(state.w)) or stopping.update(state.w):
                break


main()
