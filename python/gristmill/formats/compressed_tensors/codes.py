"""How the elements of a compressed weight are stored. Every form gives any rows of its matrix, so that nothing large is unpacked.

Matrices are [n, k]. Sizes are checked against the arrays, so that what a form gives is at most 32 times the bytes of the file.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from gristmill.errors import FormatError
from gristmill.formats.folder import ACCEPTED, BF16, widened
from gristmill.tensor.parts import Array

LARGEST, WIDEST = 2**31 - 1, 2**22  # of any dimension, and of the last one: rows are unpacked whole
FP8 = np.dtype([("float8_e4m3", "u1")])  # a dtype that no other has
DTYPES = {**ACCEPTED, "F8_E4M3": FP8}
BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)  # how many a byte has


def numbers(array: Array) -> Array:
    """Return elements as NumPy numbers: BF16 and FP8 as float32, the rest as it is; aligned."""
    if array.dtype == BF16:
        return widened("", array)
    if array.dtype == FP8:
        return E4M3[np.array(array).view(np.uint8).reshape(array.shape)]
    return array if array.flags.aligned else array.copy()


def _e4m3() -> Array:
    """The values of all 256 codes of FP8 E4M3: bias 7, no infinities, one NaN of each sign."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    return np.where(code & 127 == 127, np.nan, np.where(code < 128, size, -size)).astype(np.float32)


E4M3 = _e4m3()


@dataclass(frozen=True)
class Plain:
    """Elements one after the other, integers or floats."""

    array: Array

    @property
    def shape(self) -> tuple[int, int]:
        return self.array.shape[0], self.array.shape[1]

    @property
    def whole(self) -> bool:
        """Whether elements are integers."""
        return bool(self.array.dtype == np.int8)

    def rows(self, begin: int, end: int) -> Array:
        """Return rows `begin` to `end` as numbers [rows, k]."""
        return numbers(self.array[begin:end])


@dataclass(frozen=True)
class Packed:
    """Integers of `bits` bits in the bits of words, int32 [n, words], lowest bits first, raised by 2 ** (bits - 1).

    `crossing`: 32 integers fill `bits` words and may lie in two of them; else a word holds 32 // bits and its highest bits
    are unused.
    """

    words: Array
    bits: int
    columns: int
    crossing: bool

    whole = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.words.shape[0], self.columns

    def rows(self, begin: int, end: int) -> Array:
        """Return rows `begin` to `end` as int8 [rows, k]."""
        part = np.ascontiguousarray(self.words[begin:end], "<i4")
        units = self._units(part)
        each = (8 if units.dtype == np.uint8 else 32 * units.shape[2] if self.crossing else 32) // self.bits
        kind, low = units.dtype.type, np.uint8(2 ** (self.bits - 1))
        codes = np.empty((part.shape[0], units.shape[1], each), np.int8)
        for i in range(each):
            word, bit = divmod(i * self.bits, 32)
            value = units[:, :, word] >> kind(bit)
            if bit + self.bits > 32:
                value |= units[:, :, word + 1] << kind(32 - bit)
            codes[:, :, i] = ((value & kind(2**self.bits - 1)).astype(np.uint8) - low).view(np.int8)
        return codes.reshape(part.shape[0], -1)[:, : self.columns]

    def _units(self, part: Array) -> Array:
        """Return words as [rows, units, words of a unit], a unit a whole number of integers: bytes where it can be."""
        rows = part.shape[0]
        if 8 % self.bits == 0:
            return part.view(np.uint8).reshape(rows, -1, 1)
        together = self.bits if self.crossing else 1
        spare = -part.shape[1] % together
        part = np.pad(part, ((0, 0), (0, spare))) if spare else part
        return part.view(np.uint32).reshape(rows, -1, together).astype(np.uint64)


@dataclass(frozen=True)
class Masked:
    """The elements that a bitmask [n, ceil(k / 8)] marks, lowest bit first, row by row; all others are 0."""

    values: Array
    mask: Array
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.mask.shape[0], self.columns

    @property
    def whole(self) -> bool:
        return bool(self.values.dtype == np.int8)

    @cached_property
    def begins(self) -> Array:
        """Where the values of each row begin, int64 [n + 1]."""
        begins = np.zeros(len(self.mask) + 1, np.int64)
        np.cumsum(BITS[self.mask].sum(axis=1, dtype=np.int64), out=begins[1:])
        return begins

    def rows(self, begin: int, end: int) -> Array:
        """Return rows `begin` to `end` as numbers [rows, k]."""
        values = numbers(self.values[self.begins[begin] : self.begins[end]])
        made = np.zeros((end - begin, self.columns), values.dtype)
        made[np.unpackbits(self.mask[begin:end], axis=1, count=self.columns, bitorder="little").astype(bool)] = values
        return made


Codes = Plain | Packed | Masked


def packed(name: str, words: Array, bits: int, shape: tuple[int, int], crossing: bool) -> Packed:
    """Return packed integers after checking the words' number.

    Raises:
        FormatError: the words are too few or too many for the shape.
    """
    if words.dtype != np.int32 or words.ndim != 2:
        raise FormatError(f"tensor '{name}' is {_text(words)} but packed values are an int32 matrix")
    n, k = shape
    counts = {True: -(-k * bits // 32), False: -(-k // (32 // bits))}
    if words.shape != (n, counts[crossing]):
        other = words.shape == (n, counts[not crossing])
        hint = "; that is how a release before or after 0.17.0 packs: is `version` in config.json right?" if other else ""
        raise FormatError(
            f"tensor '{name}' is {list(words.shape)} but {n} x {k} values of {bits} bits take [{n}, {counts[crossing]}]{hint}"
        )
    return Packed(words, bits, k, crossing)


def masked(name: str, values: Array, mask: Array, shape: tuple[int, ...], paired: bool) -> Masked:
    """Return masked elements after checking that as many values are there as the mask marks.

    Args:
        name: of the tensors, without their suffix.
        values: 1-D, or [n, k / 2] where they are `paired`.
        mask: uint8 [..., ceil(k / 8)].
        shape: [..., k]; leading dimensions count as rows.
        paired: two of every four elements are marked, in the order of the matrix.

    Raises:
        FormatError: they disagree.
    """
    wanted = (*shape[:-1], -(-shape[-1] // 8))
    if mask.dtype != np.uint8 or mask.shape != wanted:
        raise FormatError(
            f"tensor '{name}.bitmask' is {_text(mask)} but a weight of shape {list(shape)} takes uint8 {list(wanted)}"
        )
    mask = mask.reshape(-1, wanted[-1])
    spare = -shape[-1] % 8
    if spare and (mask[:, -1] >> (8 - spare)).any():
        raise FormatError(f"tensor '{name}.bitmask' marks elements beyond the last column")
    marked = int(BITS[mask].sum(dtype=np.int64))
    sizes = (shape[0], shape[1] // 2) if paired else (marked,)
    if values.shape != sizes or values.size != marked:
        raise FormatError(
            f"tensor '{name}.compressed' is {_text(values)} but its bitmask marks {marked} elements of {list(shape)}"
        )
    made = Masked(values.reshape(-1), mask, shape[-1])
    if paired:
        _check_pairs(name, made)
    return made


def _check_pairs(name: str, masked: Masked) -> None:
    n, k = masked.shape
    step = max(1, (1 << 22) // (4 * k)) * 4  # a multiple of 4 rows is one of 4 elements
    for begin in range(0, n, step):
        bits = np.unpackbits(masked.mask[begin : begin + step], axis=1, count=k, bitorder="little").reshape(-1)
        if bits.size % 4 or (bits.reshape(-1, 4).sum(axis=1) != 2).any():
            raise FormatError(f"tensor '{name}.bitmask' does not mark two of every four elements")


def check_row_offsets(name: str, offsets: Array, mask: Array) -> None:
    """Demand that row offsets are what the mask says, as the library computes them.

    Raises:
        FormatError: they are not.
    """
    counts = BITS[mask].sum(axis=-1, dtype=np.int64)
    wanted = (np.cumsum(counts, axis=0) - counts).reshape(counts.shape) if counts.ndim else np.zeros((), np.int64)
    if offsets.dtype != np.int64 or offsets.shape != wanted.shape or (offsets != wanted).any():
        raise FormatError(f"tensor '{name}.row_offsets' is {_text(offsets)} and disagrees with the bitmask")


def stored_shape(name: str, array: Array) -> tuple[int, ...]:
    """Return the shape that a tensor holds.

    Raises:
        FormatError: it holds no shape.
    """
    values = [int(value) for value in array.reshape(-1)] if array.dtype in (np.int64, np.int32) and array.size <= 8 else []
    column = array.ndim == 2 and array.shape[1:] == (1,)
    if not values or (array.ndim != 1 and not column) or not all(0 < value <= LARGEST for value in values):
        raise FormatError(f"tensor '{name}' is {_text(array)} but must hold one to eight positive sizes")
    if values[-1] > WIDEST:
        raise FormatError(f"tensor '{name}' holds {values}: rows of more than {WIDEST} elements are not read")
    if prod(values) >= 2**62:
        raise FormatError(f"tensor '{name}' holds sizes of a product that is too large: {values}")
    return tuple(values)


def _text(array: Array) -> str:
    kind = {BF16: "bfloat16", FP8: "float8"}.get(array.dtype, array.dtype)
    return f"{kind} {list(array.shape)}"
