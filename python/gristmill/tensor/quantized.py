"""Symmetric int8 with one scale per output channel."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gristmill import _core
from gristmill.errors import ModelError
from gristmill.tensor.parts import Array, check_codes, check_scale, frozen, matrix_shape, take, with_gain


@dataclass(frozen=True, eq=False)
class Quantized:
    """An [n, k] matrix as int8 `codes` [n, k] times float32 `scale` [n].

    Codes that are made here lie in [-127, 127]; files of others have -128 too. Stored as compressed-tensors' `int-quantized`
    names it: `<name>` and `<name>_scale` [n, 1].
    """

    kind: ClassVar[str] = "quantized"
    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.float32)
    codes: Array
    scale: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes", frozen(self.codes))
        object.__setattr__(self, "scale", frozen(self.scale))

    @classmethod
    def from_dense(cls, array: Array, threads: int = 1) -> "Quantized":
        """Quantise a finite float32 [n, k] matrix: scale = max|row| / 127, codes rounded half to even.

        Raises:
            ModelError: the matrix is not two-dimensional or not finite.
        """
        array = np.ascontiguousarray(array, np.float32)
        if array.ndim != 2 or not np.isfinite(array).all():
            raise ModelError(f"only finite matrices can be quantised, got shape {array.shape}")
        codes, scale = np.empty(array.shape, np.int8), np.empty(array.shape[0], np.float32)
        _core.quantize_weight(array, codes, scale, threads)
        return cls(codes, scale)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    @property
    def sparsity(self) -> float:
        return 1.0 - np.count_nonzero(self.codes) / max(self.codes.size, 1)

    def dense(self) -> Array:
        return self.codes.astype(np.float32) * self.scale[:, None]

    @property
    def trainable(self) -> Array:
        """A gain on each channel's scale, 1 at first: relative, so that one learning rate suits scales of any size."""
        return np.ones(self.shape[0], np.float32)

    def with_trainable(self, values: Array) -> "Quantized":
        return Quantized(*with_gain(self.codes, self.scale, values, np.arange(self.shape[0])[:, None]))

    def parts(self) -> dict[str, Array]:
        return {"": self.codes, "_scale": self.scale[:, None]}

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "shape": list(self.shape)}

    @classmethod
    def from_parts(cls, spec: Mapping[str, Any], parts: Mapping[str, Array]) -> "Quantized":
        n, k = matrix_shape(spec)
        codes = take(parts, "", np.int8, (n, k))
        check_codes(codes, k)
        return cls(codes, check_scale(take(parts, "_scale", np.float32, (n, 1)), "_scale")[:, 0])
