"""A plain array."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gristmill.errors import FormatError
from gristmill.tensor.parts import Array, frozen


@dataclass(frozen=True, eq=False)
class Dense:
    """A tensor that holds every element.

    Example:
        >>> import numpy as np
        >>> Dense(np.ones((2, 3), np.float32)).nbytes
        24
    """

    kind: ClassVar[str] = "dense"
    array: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "array", frozen(self.array))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    @property
    def sparsity(self) -> float:
        """The share of elements that are zero."""
        return 1.0 - np.count_nonzero(self.array) / max(self.array.size, 1)

    def dense(self) -> Array:
        return self.array

    @property
    def trainable(self) -> Array:
        """The part that gradient descent changes, in the shape that its gradient has."""
        return self.array

    def with_trainable(self, values: Array) -> "Dense":
        return Dense(np.array(values, self.array.dtype).reshape(self.array.shape))

    def parts(self) -> dict[str, Array]:
        """The arrays to store, by the suffix that their names get."""
        return {"": self.array}

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def from_parts(cls, spec: Mapping[str, Any], parts: Mapping[str, Array]) -> "Dense":
        if set(parts) != {""}:
            raise FormatError(f"a dense tensor has one part, found {sorted(parts)}")
        return cls(parts[""])
