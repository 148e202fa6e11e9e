"""When training ends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gristmill.errors import ModelError


@dataclass(frozen=True)
class Until:
    """Conditions that end training, looked at after every epoch; the first that holds does.

    Args:
        epochs: at most this many.
        gradient_norm: stop when the norm of the gradient (root mean square over the epoch's steps) is at most this.
        improvement: stop when, for `patience` epochs, the loss has not fallen below its best by more than this share of it.
        patience: see `improvement`.

    Raises:
        ModelError: no condition is given, or one lies outside its range.

    Example:
        >>> Until(epochs=100, gradient_norm=1e-3).reached({"loss": [0.5], "gradient_norm": [1e-4]})
        'gradient_norm'
    """

    epochs: int | None = None
    gradient_norm: float | None = None
    improvement: float | None = None
    patience: int = 3

    def __post_init__(self) -> None:
        if self.epochs is None and self.gradient_norm is None and self.improvement is None:
            raise ModelError("say when training ends: epochs=, or until=Until(epochs=, gradient_norm=, improvement=)")
        for name, least in (("epochs", 1), ("patience", 1), ("gradient_norm", 0.0), ("improvement", 0.0)):
            value = getattr(self, name)
            kind = (int, np.integer) if least == 1 else (int, float, np.number)
            if (value is not None or name == "patience") and not (isinstance(value, kind) and value >= least):
                raise ModelError(f"{name} must be at least {least}{' and whole' if least == 1 else ''}, got {value!r}")

    def reached(self, history: Mapping[str, Sequence[float]]) -> str | None:
        """Return the name of the condition that holds, or None."""
        losses = history["loss"]
        if not losses:
            return None
        if self.gradient_norm is not None and history["gradient_norm"][-1] <= self.gradient_norm:
            return "gradient_norm"
        if self.improvement is not None and stalled(losses, self.improvement) >= self.patience:
            return "improvement"
        return "epochs" if self.epochs is not None and len(losses) >= self.epochs else None


def stalled(losses: Sequence[float], improvement: float) -> int:
    """Return for how many epochs the loss has not improved."""
    best, since = losses[0], 0
    for loss in losses[1:]:
        since += 1
        if loss < best - improvement * abs(best):
            best, since = loss, 0
    return since
