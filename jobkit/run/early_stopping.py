"""Early stopping whose patience is part of the state."""

import math
from typing import Any

from jobkit.errors import ConfigError


class EarlyStopping:
    """Says when a metric has not improved for a while: give it to `resume`, and ask it at each validation.

        if stopping.update(val_loss):
            break

    Args:
        patience: After how many updates in a row without improvement to stop.
        mode: 'min' where less is better, 'max' where more is.
        min_delta: By how much a value has to be better than the best to count.

    Raises:
        ConfigError: If an argument makes no sense.
    """

    def __init__(self, patience: int, *, mode: str = "min", min_delta: float = 0.0) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ConfigError(f"EarlyStopping(patience={patience!r}): give a number of updates, at least 1")
        if mode not in ("min", "max"):
            raise ConfigError(f"EarlyStopping(mode={mode!r}): give 'min' or 'max'")
        if not min_delta >= 0:
            raise ConfigError(f"EarlyStopping(min_delta={min_delta!r}): give a number, at least 0")
        self.patience, self._sign, self._min_delta = patience, 1.0 if mode == "min" else -1.0, min_delta
        self.best: float | None = None
        """The best value so far; None before the first one."""
        self.waited = 0
        """Updates since the best one."""

    @property
    def should_stop(self) -> bool:
        """Whether there was no improvement for so many updates."""
        return self.waited >= self.patience

    def update(self, value: Any) -> bool:
        """Take the metric of one validation, and tell whether to stop; NaN is no improvement.

        Args:
            value: A number, or an array of shape ().

        Returns:
            Whether to stop; the same as `should_stop` from then on.
        """
        number = float(value)
        best = math.inf if self.best is None else self._sign * self.best
        if self._sign * number < best - (self._min_delta if math.isfinite(best) else 0.0):
            self.best, self.waited = number, 0
        else:
            self.waited += 1
        return self.should_stop

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and how long ago it was."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back.

        Args:
            state: What `state_dict` returned.
        """
        self.best, self.waited = state["best"], state["waited"]
