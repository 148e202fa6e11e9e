"""Matrices of which only some blocks are stored, in float32 or int8."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gristmill import _core
from gristmill.errors import FormatError, ModelError
from gristmill.tensor.parts import Array, check_codes, check_scale, frozen, matrix_shape, take, with_gain


@dataclass(frozen=True, eq=False)
class Sparse:
    """An [n, k] matrix as `values` [blocks, r, c]; the rest is zero.

    The blocks of row group g (rows g*r ... g*r + r - 1) are `row_offsets[g] : row_offsets[g + 1]` (int32 [n/r + 1]); block b
    starts at column `index[b] * c` (int32 [blocks], rising within a group). With int8 values, `scale` is float32 [n]. Single
    elements are better stored as a `Bitmask`.
    """

    kind: ClassVar[str] = "sparse"
    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.float32)
    matrix_shape: tuple[int, int]
    values: Array
    row_offsets: Array
    index: Array
    scale: Array | None = None

    def __post_init__(self) -> None:
        for name in ("values", "row_offsets", "index", "scale"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, frozen(getattr(self, name)))

    @classmethod
    def from_dense(cls, array: Array, mask: Array, block: tuple[int, int]) -> "Sparse":
        """Keep the blocks of a float32 [n, k] matrix whose `mask` [n/r, k/c] is not 0.

        Raises:
            ModelError: the blocks do not tile the matrix.
        """
        array = np.ascontiguousarray(array, np.float32)
        rows, columns = block
        if array.ndim != 2 or array.shape[0] % rows or array.shape[1] % columns:
            raise ModelError(f"blocks of {rows}x{columns} do not tile a matrix of shape {array.shape}")
        values, row_offsets, index = _core.pack_blocks(array, np.ascontiguousarray(mask, np.uint8), (rows, columns))
        return cls((array.shape[0], array.shape[1]), values, row_offsets, index)

    def quantized(self, threads: int = 1) -> "Sparse":
        """The same blocks in int8, with one scale per row."""
        codes, scale = np.empty(self.values.shape, np.int8), np.empty(self.shape[0], np.float32)
        _core.quantize_blocks(self.float_values(), self.row_offsets, codes, scale, threads)
        return Sparse(self.matrix_shape, codes, self.row_offsets, self.index, scale)

    def float_values(self) -> Array:
        """The stored blocks in float32, scales applied."""
        if self.scale is None:
            return self.values
        return self.values.astype(np.float32) * self.scale[self.rows_of_values]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix_shape

    @property
    def block(self) -> tuple[int, int]:
        return self.values.shape[1], self.values.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts().values())

    @property
    def sparsity(self) -> float:
        return 1.0 - self.values.size / (self.shape[0] * self.shape[1])

    def weight(self) -> _core.Weight:
        """The view that kernels take."""
        return _core.Weight(self.values, self.matrix_shape, self.scale, self.row_offsets, self.index)

    def dense(self) -> Array:
        out = np.empty(self.shape, np.float32)
        _core.unpack_blocks(self.weight(), out)
        return out

    @property
    def trainable(self) -> Array:
        """Stored values in float32, a gain on each row's scale in int8; the positions are fixed."""
        return self.values if self.scale is None else np.ones(self.shape[0], np.float32)

    def with_trainable(self, values: Array) -> "Sparse":
        if self.scale is None:
            new = np.array(values, np.float32).reshape(self.values.shape)
            return Sparse(self.matrix_shape, new, self.row_offsets, self.index)
        codes, scale = with_gain(self.values, self.scale, values, self.rows_of_values)
        return Sparse(self.matrix_shape, codes, self.row_offsets, self.index, scale)

    @property
    def rows_of_values(self) -> Array:
        """The row that each stored value lies in, as [blocks, r, 1]."""
        groups = np.repeat(np.arange(len(self.row_offsets) - 1), np.diff(self.row_offsets))
        return (groups[:, None] * self.block[0] + np.arange(self.block[0]))[:, :, None]

    def parts(self) -> dict[str, Array]:
        columns = self.shape[1] // self.block[1]
        index = self.index.astype(np.min_scalar_type(max(columns - 1, 0)))
        parts = {"_values": self.values, "_block_index": index, "_row_offsets": self.row_offsets}
        if self.scale is not None:
            parts["_scale"] = self.scale[:, None]
        return parts

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "shape": list(self.shape), "block": list(self.block), "dtype": str(self.values.dtype)}

    @classmethod
    def from_parts(cls, spec: Mapping[str, Any], parts: Mapping[str, Array]) -> "Sparse":
        n, k = matrix_shape(spec)
        block, dtype = spec.get("block"), spec.get("dtype")
        if not (isinstance(block, list) and len(block) == 2 and all(type(d) is int and 0 < d <= 64 for d in block)):
            raise FormatError(f"block {block!r} is not two small positive integers")
        if dtype not in ("float32", "int8") or n % block[0] or k % block[1]:
            raise FormatError(f"{dtype!r} blocks of {block} cannot make a matrix of shape ({n}, {k})")
        scale = check_scale(take(parts, "_scale", np.float32, (n, 1)), "_scale")[:, 0] if dtype == "int8" else None
        values = take(parts, "_values", dtype, (None, block[0], block[1]))
        row_offsets = take(parts, "_row_offsets", np.int32, (n // block[0] + 1,))
        index = take(parts, "_block_index", np.min_scalar_type(max(k // block[1] - 1, 0)), (len(values),)).astype(np.int32)
        if dtype == "int8":
            check_codes(values, k)
        tensor = cls((n, k), values, row_offsets, index, scale)
        try:
            tensor.weight()  # the border checks offsets and indices
        except ValueError as error:
            raise FormatError(f"sparse index: {error}") from error
        return tensor
