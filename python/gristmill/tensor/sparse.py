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
    starts at column `index[b] * c` (int32 [blocks], rising within a group). Blocks of 1 x 1 are unstructured sparsity and are
    stored with a bitmask of the elements; larger blocks are stored with one index each. With int8 values, `scale` is
    float32 [n].
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

    def reblocked(self, columns: int) -> "Sparse":
        """Return the same matrix in blocks of 1 x `columns`, zeros filled in; of a tensor in blocks of 1 x 1."""
        rows = np.repeat(np.arange(self.shape[0]), np.diff(self.row_offsets))
        blocks, place = np.unique(rows * (self.shape[1] // columns) + self.index // columns, return_inverse=True)
        values = np.zeros((len(blocks), 1, columns), self.values.dtype)
        values[place, 0, self.index % columns] = self.values[:, 0, 0]
        row_offsets = np.zeros(self.shape[0] + 1, np.int32)
        np.cumsum(np.bincount(blocks // (self.shape[1] // columns), minlength=self.shape[0]), out=row_offsets[1:])
        index = (blocks % (self.shape[1] // columns)).astype(np.int32)
        return Sparse(self.matrix_shape, values, row_offsets, index, self.scale)

    def parts(self) -> dict[str, Array]:
        parts = {"_values": self.values}
        if self.block == (1, 1):
            parts = {"_values": self.values.reshape(-1), "_bitmask": self._bitmask()}
        else:
            columns = self.shape[1] // self.block[1]
            parts["_block_index"] = self.index.astype(np.min_scalar_type(max(columns - 1, 0)))
            parts["_row_offsets"] = self.row_offsets
        if self.scale is not None:
            parts["_scale"] = self.scale[:, None]
        return parts

    def _bitmask(self) -> Array:
        mask = np.zeros(self.shape, bool)
        rows = np.repeat(np.arange(self.shape[0]), np.diff(self.row_offsets))
        mask[rows, self.index] = True
        return np.packbits(mask, axis=1, bitorder="little")

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
        if block == [1, 1]:
            values, row_offsets, index = _from_bitmask(parts, dtype, n, k)
        else:
            values = take(parts, "_values", dtype, (None, block[0], block[1]))
            row_offsets = take(parts, "_row_offsets", np.int32, (n // block[0] + 1,))
            stored = take(parts, "_block_index", np.min_scalar_type(max(k // block[1] - 1, 0)), (len(values),))
            index = stored.astype(np.int32)
        if dtype == "int8":
            check_codes(values, k)
        tensor = cls((n, k), values, row_offsets, index, scale)
        try:
            tensor.weight()  # the border checks offsets and indices
        except ValueError as error:
            raise FormatError(f"sparse index: {error}") from error
        return tensor


def _from_bitmask(parts: Mapping[str, Array], dtype: str, n: int, k: int) -> tuple[Array, Array, Array]:
    bits = take(parts, "_bitmask", np.uint8, (n, -(-k // 8)))
    mask = np.unpackbits(bits, axis=1, bitorder="little")
    if mask[:, k:].any():
        raise FormatError("the bitmask marks elements beyond the last column")
    values = take(parts, "_values", dtype, (int(np.count_nonzero(mask[:, :k])),))  # before the positions take eight bytes each
    rows, columns = np.nonzero(mask[:, :k])
    row_offsets = np.zeros(n + 1, np.int32)
    np.cumsum(np.bincount(rows, minlength=n), out=row_offsets[1:])
    return values.reshape(-1, 1, 1), row_offsets, columns.astype(np.int32)
