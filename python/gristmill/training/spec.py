"""Named float32 arrays laid out in one flat vector, so that aggregation and updates are single passes over memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np

from gristmill.errors import ModelError
from gristmill.tensor.parts import Array

ALIGN = 16  # float32 items in a cache line, where every array starts


@dataclass(frozen=True)
class Spec:
    """The names and shapes of parameters, in the order in which they lie in a flat vector of `size` items.

    The items between two arrays are zero in parameters and gradients, and optimisers keep them so.

    Example:
        >>> Spec({"weight": (3, 5), "bias": (3,)}).size
        32
    """

    shapes: Mapping[str, tuple[int, ...]]
    offsets: dict[str, int] = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        offsets, end = {}, 0
        for name, shape in self.shapes.items():
            offsets[name] = end
            end += -(-prod(shape) // ALIGN) * ALIGN
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "size", end)

    def views(self, flat: Array) -> dict[str, Array]:
        """Return the named arrays as views of a flat vector."""
        return {
            name: flat[self.offsets[name] : self.offsets[name] + prod(shape)].reshape(shape)
            for name, shape in self.shapes.items()
        }

    def write(self, arrays: Mapping[str, Array], flat: Array) -> None:
        """Copy named arrays into a flat vector."""
        flat[:] = 0.0
        for name, view in self.views(flat).items():
            view[...] = arrays[name]


def describe(params: Mapping[str, Array]) -> tuple[Spec, dict[str, Array]]:
    """Return the spec of named parameters and the parameters as float32.

    Raises:
        ModelError: there are none, or one is not a finite floating-point array.
    """
    arrays = {name: np.asarray(value) for name, value in params.items()}
    if not any(array.size for array in arrays.values()):
        raise ModelError("there is nothing to train: no parameters were given")
    for name, array in arrays.items():
        if array.dtype.kind != "f":
            raise ModelError(f"parameter '{name}' must be a floating-point array, got {array.dtype}")
        arrays[name] = array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ModelError(f"parameter '{name}' has values that are not finite float32 numbers before the first step")
    return Spec({name: array.shape for name, array in arrays.items()}), arrays
