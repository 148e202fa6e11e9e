"""Weight clipping: bound the largest weights, so that a few outliers do not set the scale of all the others."""

from dataclasses import dataclass
from math import ceil

import numpy as np

from gristmill import _core
from gristmill.compression.recipe import Context, Pass, is_number, need_float, targets
from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array


@dataclass(frozen=True)
class Clip(Pass):
    """Clip the weights of Linear nodes to [-bound, bound].

    Args:
        value: the bound itself; or
        percentile: the bound of each weight is this percentile of its magnitudes (default 99.9).
        names: shell patterns of the weights to clip; none for all.
        skip: shell patterns of weights to leave.

    Raises:
        ModelError: both a value and a percentile are given, or one lies outside its range.

    Example:
        >>> import gristmill as gm
        >>> model, _ = gm.compress(gm.zoo.mlp([4, 3]), [gm.Clip(value=0.5)])
        >>> bool(abs(model.tensors["layer0.weight"].dense()).max() <= 0.5)
        True
    """

    value: float | None = None
    percentile: float | None = None
    names: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.value is not None and self.percentile is not None:
            raise ModelError("Clip takes a value or a percentile, not both")
        if self.value is not None and not (is_number(self.value) and self.value > 0):
            raise ModelError(f"Clip: value must be positive, got {self.value!r}")
        if self.percentile is not None and not (is_number(self.percentile) and 0 < self.percentile <= 100):
            raise ModelError(f"Clip: percentile must lie in (0, 100], got {self.percentile!r}")

    @property
    def local(self) -> bool:
        return True

    def apply(self, model: Model, context: Context) -> Model:
        clipped: dict[str, Tensor] = {}
        for name in targets(model, self.names, self.skip):
            need_float(model, name, "clip")
            tensor = model.tensors[name]
            bound = np.float32(self.value if self.value is not None else self._bound(tensor.trainable, context.threads))
            clipped[name] = tensor.with_trainable(np.clip(tensor.trainable, -bound, bound))
        return model.replace(tensors=clipped)

    def _bound(self, values: Array, threads: int) -> float:
        percentile = 99.9 if self.percentile is None else self.percentile
        rank = min(max(ceil(values.size * percentile / 100), 1), values.size)
        return _core.kth_magnitude(values.reshape(-1), rank, threads) if values.size else 0.0
