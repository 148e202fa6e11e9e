"""Matrices of which single elements are stored: a bit for each element, and the packed values in float32, int8 or int4."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gristmill import _core
from gristmill.errors import FormatError, ModelError
from gristmill.tensor.dense import Dense
from gristmill.tensor.int4 import Int4
from gristmill.tensor.parts import Array, check_codes, check_scale, frozen, matrix_shape, nibbles, take, with_gain
from gristmill.tensor.quantized import Quantized

PRECISIONS = {"float32": np.float32, "int8": np.int8, "int4": np.uint8}  # and the dtype of what holds the values
LARGEST_GROUP = 65536  # columns that share a scale of int4: their sum fits an int32
BITS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
HALF = np.finfo(np.float16)


@dataclass(frozen=True, eq=False)
class Bitmask:
    """An [n, k] matrix as a bit for each element and the `values` of those that are set, row after row; the rest is zero.

    Any pattern fits, N of M as well as unstructured. Bit i % 8 of `bitmask[row, i // 8]` (uint8 [n, ceil(k / 8)]) marks column i;
    the values of a row are `row_offsets[row] : row_offsets[row + 1]` (int64 [n + 1]). They are

    - float32 [count]; they train, the positions are fixed;
    - int8 [count], with `scale` float32 [n];
    - int4 in [-8, 7] as two's complement, uint8 [ceil(count / 2)], the lower half of a byte first, with `scale` float16 or
      float32 [n, ceil(k / group)], one for each `group` of consecutive columns, as `Int4` chooses them.

    Stored as compressed-tensors' `sparse-bitmask` names it: `<name>_compressed`, `<name>_bitmask`, `<name>_row_offsets` int64
    [n], where each row begins, and `<name>_shape` int64 [2]; and `<name>_scale`.

    Example:
        >>> import numpy as np
        >>> tensor = Bitmask.from_dense(np.array([[0, 3, 0], [5, 0, 7.0]]), np.array([[0, 1, 0], [1, 0, 1]]))
        >>> tensor.values.tolist(), tensor.row_offsets.tolist(), tensor.bitmask.tolist()
        ([3.0, 5.0, 7.0], [0, 1, 3], [[2], [5]])
    """

    kind: ClassVar[str] = "bitmask"
    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.float32)
    matrix_shape: tuple[int, int]
    bitmask: Array
    values: Array
    row_offsets: Array
    scale: Array | None = None
    group: int = 0

    def __post_init__(self) -> None:
        for name in ("bitmask", "values", "row_offsets", "scale"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, frozen(getattr(self, name)))

    @classmethod
    def from_dense(cls, array: Array, mask: Array, dtype: str = "float32", group: int = 128) -> "Bitmask":
        """Keep the elements of a float32 [n, k] matrix whose `mask` [n, k] is not 0, as float32, int8 or int4.

        Args:
            array: float32 [n, k].
            mask: any dtype, [n, k].
            dtype: "float32", "int8" with a scale for each row, or "int4".
            group: columns that share a scale of int4, a multiple of 8.

        Raises:
            ModelError: the shapes differ, the dtype is unknown, or values to be rounded are not finite.
        """
        array, mask = np.asarray(array, np.float32), np.asarray(mask) != 0
        if array.ndim != 2 or mask.shape != array.shape:
            raise ModelError(f"a mask of shape {mask.shape} does not fit a matrix of shape {array.shape}")
        if dtype not in PRECISIONS:
            raise ModelError(f"a bitmask holds {', '.join(PRECISIONS)}, not {dtype!r}")
        if dtype == "float32":
            return cls.of(Dense(array), mask)
        kept = np.where(mask, array, np.float32(0))
        return cls.of(Quantized.from_dense(kept) if dtype == "int8" else Int4.from_dense(kept, group), mask)

    @classmethod
    def of(cls, tensor: Dense | Quantized | Int4, mask: Array) -> "Bitmask":
        """Keep the elements of a matrix whose `mask` [n, k] is not 0, with the codes and scales that it has.

        Raises:
            ModelError: the shapes differ, or a group of int4 is too large.
        """
        mask = np.asarray(mask) != 0
        if len(tensor.shape) != 2 or mask.shape != tensor.shape:
            raise ModelError(f"a mask of shape {mask.shape} does not fit a matrix of shape {tensor.shape}")
        bitmask = np.packbits(mask, axis=1, bitorder="little")
        shape = (mask.shape[0], mask.shape[1])
        if isinstance(tensor, Dense):
            return cls(shape, bitmask, tensor.array[mask], _offsets(bitmask))
        if isinstance(tensor, Quantized):
            return cls(shape, bitmask, tensor.codes[mask], _offsets(bitmask), tensor.scale)
        if tensor.group > LARGEST_GROUP:
            raise ModelError(f"groups of int4 under a bitmask have at most {LARGEST_GROUP} columns, got {tensor.group}")
        return cls(shape, bitmask, _nibbles(tensor.codes[mask]), _offsets(bitmask), tensor.scale, tensor.group)

    def quantized(self, dtype: str = "int8", group: int = 128) -> "Bitmask":
        """The same elements in int8, with one scale per row, or in int4, with one per group.

        Raises:
            ModelError: the dtype is unknown, or a value is not finite.
        """
        return Bitmask.from_dense(self.dense(), self.mask, dtype, group)

    @property
    def precision(self) -> str:
        """What the stored values are: "float32", "int8" or "int4"."""
        return next(name for name, dtype in PRECISIONS.items() if self.values.dtype == dtype)

    @property
    def mask(self) -> Array:
        """Which elements are stored, as bool [n, k]."""
        return np.unpackbits(self.bitmask, axis=1, count=self.shape[1], bitorder="little").astype(bool)

    @property
    def count(self) -> int:
        """How many elements are stored."""
        return int(self.row_offsets[-1])

    @property
    def codes(self) -> Array:
        """The stored values before scales apply: int8 [count], or float32 where they are that."""
        if self.precision != "int4":
            return self.values
        return (nibbles(self.values)[: self.count] ^ 8).astype(np.int8) - np.int8(8)

    @property
    def float_values(self) -> Array:
        """The stored values in float32 [count], scales applied."""
        return self.values if self.scale is None else self.dense()[self.mask]

    @property
    def rows_of_values(self) -> Array:
        """The row that each stored value lies in, [count]."""
        return np.repeat(np.arange(self.shape[0]), np.diff(self.row_offsets))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix_shape

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts().values())

    @property
    def sparsity(self) -> float:
        return 1.0 - self.count / max(self.shape[0] * self.shape[1], 1)

    def weight(self, trained: Array | None = None) -> _core.Weight:
        """The view that kernels take, what trains replaced by memory that somebody else updates."""
        values, factors = self.values, trained
        if self.precision == "float32":
            values, factors = self.values if trained is None else trained.reshape(-1), None
        elif self.precision == "int8" and trained is None:
            factors = self.scale
        groups = self.scale if self.precision == "int4" else None
        return _core.Weight(
            values, self.matrix_shape, factors, self.row_offsets, bitmask=self.bitmask, group_scales=groups, group=self.group
        )

    def dense(self) -> Array:
        out = np.empty(self.shape, np.float32)
        _core.unpack_bitmask(self.weight(), out)
        return out

    @property
    def trainable(self) -> Array:
        """Stored values in float32, a gain on each row's scales otherwise; the positions are fixed."""
        return self.values if self.scale is None else np.ones(self.shape[0], np.float32)

    def with_trainable(self, values: Array) -> "Bitmask":
        """The same matrix with trained values, or with its rows multiplied by gains."""
        same = (self.matrix_shape, self.bitmask)
        if self.scale is None:
            return Bitmask(*same, np.array(values, np.float32).reshape(self.values.shape), self.row_offsets)
        gain = np.asarray(values, np.float32)
        if self.precision == "int8":
            return Bitmask(*same, *_gained(self.values, self.scale, gain, self))
        scale = self.scale.astype(np.float32) * gain[:, None]
        size = np.clip(np.abs(scale), np.finfo(np.float32).tiny, np.finfo(np.float32).max)
        fits = self.scale.dtype == np.float16 and HALF.tiny <= size.min(initial=1) and size.max(initial=1) <= HALF.max
        scale = np.copysign(size, scale).astype(np.float16 if fits else np.float32)
        return Bitmask(*same, self.values, self.row_offsets, scale, self.group)

    def parts(self) -> dict[str, Array]:
        parts = {
            "_compressed": self.values,
            "_bitmask": self.bitmask,
            "_row_offsets": self.row_offsets[:-1],
            "_shape": np.array(self.matrix_shape, np.int64),
        }
        if self.scale is not None:
            parts["_scale"] = self.scale[:, None] if self.precision == "int8" else self.scale
        return parts

    def spec(self) -> dict[str, Any]:
        grouped = {"group": self.group} if self.precision == "int4" else {}
        return {"kind": self.kind, "shape": list(self.shape), "dtype": self.precision, **grouped}

    @classmethod
    def from_parts(cls, spec: Mapping[str, Any], parts: Mapping[str, Array]) -> "Bitmask":
        n, k = matrix_shape(spec)
        dtype, group = spec.get("dtype"), spec.get("group", 0)
        if not isinstance(dtype, str) or dtype not in PRECISIONS:
            raise FormatError(f"a bitmask holds {', '.join(PRECISIONS)}, not {dtype!r}")
        bitmask, row_offsets = _checked_bits(parts, n, k)
        if take(parts, "_shape", np.int64, (2,)).tolist() != [n, k]:
            raise FormatError(f"part '_shape' is {parts['_shape'].tolist()}, the matrix is {[n, k]}")
        values = _checked_values(parts, "_compressed", dtype, int(row_offsets[-1]), k)
        if not np.array_equal(take(parts, "_row_offsets", np.int64, (n,)), row_offsets[:-1]):
            raise FormatError("part '_row_offsets' does not count the bits of the bitmask row by row")
        return cls((n, k), bitmask, values, row_offsets, *_checked_scale(parts, dtype, group, n, k))

    @classmethod
    def from_blocks_of_one(cls, spec: Mapping[str, Any], parts: Mapping[str, Array]) -> "Bitmask":
        """Read what files held while single elements were sparse blocks of 1 x 1."""
        n, k = matrix_shape(spec)
        dtype = spec.get("dtype")
        if dtype not in ("float32", "int8"):
            raise FormatError(f"{dtype!r} blocks of [1, 1] cannot make a matrix of shape ({n}, {k})")
        bitmask, row_offsets = _checked_bits(parts, n, k)
        values = _checked_values(parts, "_values", dtype, int(row_offsets[-1]), k)
        return cls((n, k), bitmask, values, row_offsets, *_checked_scale(parts, dtype, 0, n, k))


def _offsets(bitmask: Array) -> Array:
    """Where the values of each row begin, and the last end: int64 [n + 1]."""
    offsets = np.zeros(len(bitmask) + 1, np.int64)
    np.cumsum(BITS[bitmask].sum(axis=1, dtype=np.int64), out=offsets[1:])
    return offsets


def _nibbles(codes: Array) -> Array:
    """Pack int8 codes in [-8, 7] two to a byte, the lower half first."""
    halves = np.zeros(len(codes) + len(codes) % 2, np.uint8)
    halves[: len(codes)] = codes.view(np.uint8) & 15
    return halves[::2] | halves[1::2] << 4


def _gained(codes: Array, scale: Array, gain: Array, tensor: Bitmask) -> tuple[Array, Array, Array]:
    """Return (codes, row_offsets, scale) of int8 rows multiplied by `gain`."""
    codes, scale = with_gain(codes, scale, gain, tensor.rows_of_values)
    return codes, tensor.row_offsets, scale


def _checked_bits(parts: Mapping[str, Array], n: int, k: int) -> tuple[Array, Array]:
    bitmask = take(parts, "_bitmask", np.uint8, (n, -(-k // 8)))
    if k % 8 and (bitmask[:, -1] >> k % 8).any():
        raise FormatError("the bitmask marks elements beyond the last column")
    return bitmask, _offsets(bitmask)


def _checked_values(parts: Mapping[str, Array], name: str, dtype: str, count: int, columns: int) -> Array:
    values = take(parts, name, PRECISIONS[dtype], (None,))
    held = -(-count // 2) if dtype == "int4" else count
    if len(values) != held:
        what = "bytes of int4 pairs" if dtype == "int4" else "values"
        raise FormatError(f"the bitmask marks {count} elements, which take {held} {what}, but part {name!r} has {len(values)}")
    if dtype == "int8":
        check_codes(values, columns)
    return values


def _checked_scale(parts: Mapping[str, Array], dtype: str, group: Any, n: int, k: int) -> tuple[Array | None, int]:
    if dtype == "float32":
        return None, 0
    if dtype == "int8":
        return check_scale(take(parts, "_scale", np.float32, (n, 1)), "_scale")[:, 0], 0
    if type(group) is not int or group % 8 or not 8 <= group <= LARGEST_GROUP:
        raise FormatError(f"a group of int4 codes under a bitmask is a multiple of 8 and at most {LARGEST_GROUP}, got {group!r}")
    half = "_scale" in parts and parts["_scale"].dtype == np.float16
    scale = take(parts, "_scale", np.float16 if half else np.float32, (n, -(-k // group)))
    if not (np.isfinite(scale).all() and scale.all()):
        raise FormatError("_scale: every scale must be finite and not zero")
    return scale, group
