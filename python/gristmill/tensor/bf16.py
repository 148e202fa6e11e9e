"""Float32 values stored as their upper halves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gristmill.errors import FormatError
from gristmill.tensor.parts import Array, frozen


@dataclass(frozen=True, eq=False)
class BFloat16:
    """A tensor of bfloat16 `codes`, the upper 16 bits of float32 values as uint16; to all that reads it, a float32 tensor.

    Example:
        >>> import numpy as np
        >>> BFloat16.from_dense(np.array([1.0, 3.14159], np.float32)).dense().tolist()
        [1.0, 3.140625]
    """

    kind: ClassVar[str] = "bf16"
    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.float32)
    codes: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes", frozen(self.codes))

    @classmethod
    def from_dense(cls, array: Array) -> "BFloat16":
        """Round float32 values to the nearest bfloat16, half to even; NaN stays NaN."""
        array = np.asarray(array, np.float32, order="C")
        bits = array.view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))  # wraps for NaN only, which takes the other branch
        return cls((np.where(np.isnan(array), bits | np.uint32(0x400000), rounded) >> 16).astype(np.uint16))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes

    @property
    def sparsity(self) -> float:
        """The share of elements that are zero."""
        return 1.0 - np.count_nonzero(self.codes & np.uint16(0x7FFF)) / max(self.codes.size, 1)

    def dense(self) -> Array:
        return (self.codes.astype(np.uint32) << 16).view(np.float32)

    @property
    def trainable(self) -> Array:
        """The values in float32: what trains does so in full precision, and is rounded when it is put back."""
        return self.dense()

    def with_trainable(self, values: Array) -> "BFloat16":
        return BFloat16.from_dense(np.array(values, np.float32).reshape(self.shape))

    def parts(self) -> dict[str, Array]:
        return {"": self.codes}

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def from_parts(cls, spec: Mapping[str, Any], parts: Mapping[str, Array]) -> "BFloat16":
        if set(parts) != {""} or parts[""].dtype != np.uint16:
            found = {name: str(part.dtype) for name, part in parts.items()}
            raise FormatError(f"a bf16 tensor has one part of uint16, found {found}")
        return cls(parts[""])
