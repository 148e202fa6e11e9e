"""A compressed weight: codes, scales and zero points; the tensor kind that holds it, or its values."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gristmill.formats.compressed_tensors.codes import Codes, Masked, Packed, numbers
from gristmill.formats.folder import BF16
from gristmill.tensor import BFloat16, Bitmask, Dense, Int4, Quantized, Tensor
from gristmill.tensor.int4 import LARGEST_GROUP
from gristmill.tensor.parts import WIDEST, Array

CHUNK = 1 << 20  # elements that are unpacked at a time


@dataclass(frozen=True)
class Scales:
    """Scale and zero point of each element.

    Args:
        scale: as stored, [a, b]; BF16, float16, float32 or float64. Products are rounded to this type.
        zero: integers [a, b], or None.
        row: the row of `scale` of each row of the weight, or None where there is one for all.
        column: the column of `scale` of each column of the weight, or None where there is one for all.
        group: how many columns after one another share a column of `scale`; 0 where all do, or where they are in another order.
    """

    scale: Array
    zero: Array | None
    row: Array | None
    column: Array | None
    group: int

    @property
    def by_row(self) -> bool:
        """Whether elements of a row share a scale, and there is no zero point."""
        return self.zero is None and self.column is None

    def spread(self, values: Array, begin: int, end: int) -> Array:
        """Return one of the arrays [a, b] as it broadcasts against rows `begin` to `end` of the weight."""
        rows = numbers(values if self.row is None else values[self.row[begin:end]])
        return rows if self.column is None else rows[:, self.column]

    def of_rows(self, n: int) -> Array:
        """The scale of each row as float32 [n]."""
        return np.ascontiguousarray(np.broadcast_to(self.spread(self.scale, 0, n), (n, 1))[:, 0], np.float32)

    def applied(self, codes: Array, begin: int, end: int) -> Array:
        """Return (codes - zero) * scale for rows `begin` to `end`, float32, rounded as torch rounds in the scale's type."""
        scale = self.spread(self.scale, begin, end)
        wide = codes.astype(np.float64 if scale.dtype == np.float64 else np.float32)
        if self.zero is not None:  # exact: all are whole numbers up to 256
            wide = wide - self.spread(self.zero, begin, end).astype(wide.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            # A product of two float16 or two bfloat16 is exact in float32, so this rounds once.
            product = wide * scale.astype(wide.dtype)
            if self.scale.dtype == BF16:
                return BFloat16.from_dense(product).dense()
            return product.astype(np.float16).astype(np.float32) if scale.dtype == np.float16 else product.astype(np.float32)


@dataclass(frozen=True)
class Weight:
    """A weight as the file has it.

    Args:
        name: of the tensor that it stands for.
        shape: of that tensor; all dimensions but the last count as rows of the codes.
        codes: its elements.
        scales: what they are multiplied by; None where they are values themselves.
    """

    name: str
    shape: tuple[int, ...]
    codes: Codes
    scales: Scales | None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def values(self) -> Array:
        """Return the weight as float32, as compressed-tensors decompresses it: rounded in the type of its scales."""
        n, k = self.codes.shape
        made = np.empty((n, k), np.float32)
        for begin, end in _chunks(n, k):
            codes = self.codes.rows(begin, end)
            with np.errstate(over="ignore"):
                made[begin:end] = codes if self.scales is None else self.scales.applied(codes, begin, end)
        return made.reshape(self.shape)

    @cached_property
    def obstacle(self) -> str | None:
        """What keeps every kind of tensor but Dense from holding the weight exactly; None if nothing does."""
        if len(self.shape) != 2:
            return "no matrices"
        if self.scales is None:
            return None if isinstance(self.codes, Masked) else "float codes"
        if not self.codes.whole:
            return "float codes"
        if self.scales.zero is not None:
            return "zero points"
        scale = numbers(self.scales.scale)
        if scale.dtype == np.float64:
            return "float64 scales"
        if not (scale > 0 if self.scales.by_row else scale != 0).all():
            return "scales that are not positive"
        if self.shape[1] > WIDEST:
            return "very long rows"
        if self.scales.by_row:
            return None
        fits = not isinstance(self.codes, Masked) and 0 < self.scales.group <= LARGEST_GROUP and self.scales.group % 8 == 0
        return None if fits and self._nibbles() is not None else "several scales in a row"

    def tensor(self) -> Tensor:
        """Return the weight as a kind of tensor that holds it exactly.

        Codes and scales of kinds that have them are those of the file, and their products are not rounded to the type of the
        scales. A bitmask stays one where that is smaller.
        """
        if self.obstacle is not None:
            return Dense(self.values())
        if self.scales is None:
            assert isinstance(self.codes, Masked)
            return self._bitmask(self.codes, numbers(self.codes.values).astype(np.float32), {})
        packed = isinstance(self.codes, Packed) and self.codes.bits == 4
        if packed or not self.scales.by_row:
            return self._int4()
        scale = self.scales.of_rows(self.shape[0])
        quantized = Quantized(self._integers(), scale)
        if not isinstance(self.codes, Masked):
            return quantized
        bitmask = self._bitmask(self.codes, numbers(self.codes.values), {"_scale": scale[:, None]})
        return bitmask if bitmask.nbytes < quantized.nbytes else quantized

    def _integers(self) -> Array:
        n, k = self.codes.shape
        codes = np.empty((n, k), np.int8)
        for begin, end in _chunks(n, k):
            codes[begin:end] = self.codes.rows(begin, end)
        return codes

    def _bitmask(self, masked: Masked, values: Array, scale: dict[str, Array]) -> Bitmask:
        spec = {"shape": list(self.shape), "dtype": values.dtype.name}
        parts = {"_bitmask": masked.mask, "_compressed": values, "_row_offsets": masked.begins[:-1]}
        return Bitmask.from_parts(spec, {**parts, "_shape": np.array(self.shape, np.int64), **scale})

    def _int4(self) -> Int4:
        assert self.scales is not None
        n, k = self.codes.shape
        group = self.scales.group or -(-k // 8) * 8
        groups = -(-k // group)
        scale = numbers(self.scales.scale)
        scale = scale if scale.dtype == np.float16 else scale.astype(np.float32)
        scale = np.broadcast_to(scale if self.scales.row is None else scale[self.scales.row], (n, groups))
        words = self._nibbles()
        assert words is not None
        parts = {"_packed": words, "_scale": np.ascontiguousarray(scale), "_shape": np.array(self.shape, np.int64)}
        return Int4.from_parts({"shape": [n, k], "group": group}, parts)

    def _nibbles(self) -> Array | None:
        """Return codes as int32 words of eight; None where they do not fit four bits."""
        if isinstance(self.codes, Packed) and self.codes.bits == 4:
            return np.ascontiguousarray(self.codes.words, np.int32)
        n, k = self.codes.shape
        words = np.empty((n, -(-k // 8)), np.int32)
        for begin, end in _chunks(n, k):
            codes = self.codes.rows(begin, end)
            if codes.min() < -8 or codes.max() > 7:
                return None
            raised = np.zeros((end - begin, words.shape[1] * 8), np.uint8)
            raised[:, :k] = codes + 8
            words[begin:end] = (raised[:, ::2] | raised[:, 1::2] << 4).view("<i4")
        return words


def _chunks(n: int, k: int) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK // k)
    for begin in range(0, n, step):
        yield begin, min(begin + step, n)
