"""Signed 4-bit codes with one scale for each group of a row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gristmill import _core
from gristmill.errors import FormatError, ModelError
from gristmill.tensor.parts import Array, frozen, matrix_shape, nibbles, take

LARGEST_GROUP = 131072  # that the kernels sum without overflow
CHUNK = 1 << 16  # elements searched at a time, whose copies stay in cache
HALF_MOST, HALF_LEAST = 65504.0, 2.0**-24  # what float16 holds
HALF_PEAK = 2.0**-11  # least largest scale at which the step of subnormal halves does not matter


@dataclass(frozen=True, eq=False)
class Int4:
    """An [n, k] matrix of codes in [-8, 7] times a scale for each `group` of consecutive k in a row.

    A scale may be negative: whichever end of a group reaches further takes the code -8, so that all 16 codes are used. Scales are
    float16, or float32 where they leave its range; codes are chosen for the rounded scales.

    Stored as compressed-tensors' `pack-quantized` names it: `<name>_packed` int32 [n, ceil(k / 8)] with codes plus 8, low bits
    first, `<name>_scale` [n, ceil(k / group)] and `<name>_shape` int64 [2].

    Example:
        >>> import numpy as np
        >>> Int4.from_dense(np.array([[-4, -1, 0, 2.0]], np.float32), group=8).dense().tolist()
        [[-4.0, -1.0, 0.0, 2.0]]
    """

    kind: ClassVar[str] = "int4"
    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.float32)
    matrix_shape: tuple[int, int]
    group: int
    words: Array
    scale: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", frozen(self.words))
        object.__setattr__(self, "scale", frozen(self.scale))

    @classmethod
    def from_dense(
        cls, array: Array, group: int = 32, ratios: Sequence[float] = (1.0,), importance: Array | None = None
    ) -> "Int4":
        """Quantise a finite float32 [n, k] matrix.

        The scale of a group is ratio * (its value of largest magnitude) / -8. Of several ratios each group takes the one with the
        least squared error after rounding and clipping, the first of equals.

        Args:
            array: float32 [n, k].
            group: a multiple of 8; k need not be a multiple of it.
            ratios: candidates in (0, 1]; below 1, the largest values are clipped.
            importance: what errors are weighed with along the input, [k], not negative: the mean squares of the inputs make it
                the error of the outputs, inputs taken to be independent (AWQ's observation; Lin et al., 2023).

        Raises:
            ModelError: the matrix is not two-dimensional or not finite, or an argument does not fit.
        """
        array = np.ascontiguousarray(array, np.float32)
        if array.ndim != 2 or not np.isfinite(array).all():
            raise ModelError(f"only finite matrices can be quantised, got shape {array.shape}")
        if type(group) is not int or group % 8 or not 8 <= group <= LARGEST_GROUP:
            raise ModelError(f"a group of int4 codes is a multiple of 8 and at most {LARGEST_GROUP}, got {group!r}")
        if len(ratios) == 0 or not all(0 < ratio <= 1 for ratio in ratios):
            raise ModelError(f"ratios of int4 scales must lie in (0, 1], got {ratios!r}")
        n, k = array.shape
        groups = -(-k // group)
        weighing = _weighing(importance, k, groups * group)
        peak = float(np.abs(array).max(initial=0.0))
        dtype = np.float16 if 8 * HALF_PEAK <= peak <= 8 * HALF_MOST or peak == 0 else np.float32
        words, scale = np.empty((n, -(-k // 8)), np.int32), np.empty((n, groups), dtype)
        step = max(1, CHUNK // max(groups * group, 1))
        for first in range(0, n, step):
            rows = slice(first, min(first + step, n))
            padded = np.zeros((rows.stop - first, groups * group), np.float32)
            padded[:, :k] = array[rows]
            codes, found = _search(padded.reshape(-1, group), ratios, weighing, dtype)
            scale[rows] = found.reshape(-1, groups)
            words[rows] = _packed(codes.reshape(len(padded), -1)[:, : words.shape[1] * 8])
        return cls((n, k), group, words, scale)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix_shape

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts().values())

    @property
    def sparsity(self) -> float:
        """The share of elements that are zero."""
        codes = self.codes
        return 1.0 - np.count_nonzero(codes) / max(codes.size, 1)

    @property
    def codes(self) -> Array:
        """The codes as int8 [n, k]."""
        n, k = self.matrix_shape
        return nibbles(self.words.astype("<i4").view(np.uint8)).reshape(n, -1)[:, :k].astype(np.int8) - np.int8(8)

    @property
    def view(self) -> _core.Int4Weight:
        """What kernels read."""
        return _core.Int4Weight(self.words, self.matrix_shape, self.scale, self.group)

    def dense(self) -> Array:
        out = np.empty((1, *self.matrix_shape), np.float32)
        program = _core.Program()
        _core.gather(program, self.view, np.arange(self.matrix_shape[0]), out)
        program.run()
        return out[0]

    @property
    def trainable(self) -> Array:
        """A gain on all scales of a row, 1 at first."""
        return np.ones(self.matrix_shape[0], np.float32)

    def with_trainable(self, values: Array) -> "Int4":
        scale = self.scale * np.asarray(values, np.float32)[:, None]
        most = float(np.abs(scale).max(initial=0.0))
        fits = self.scale.dtype == np.float16 and HALF_PEAK <= most <= HALF_MOST
        return Int4(self.matrix_shape, self.group, self.words, _stored(scale, np.float16 if fits else np.float32))

    def parts(self) -> dict[str, Array]:
        return {"_packed": self.words, "_scale": self.scale, "_shape": np.array(self.matrix_shape, np.int64)}

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "shape": list(self.matrix_shape), "group": self.group}

    @classmethod
    def from_parts(cls, spec: Mapping[str, Any], parts: Mapping[str, Array]) -> "Int4":
        n, k = matrix_shape(spec)
        group = spec.get("group")
        if type(group) is not int or group % 8 or not 8 <= group <= LARGEST_GROUP:
            raise FormatError(f"a group of int4 codes is a multiple of 8 and at most {LARGEST_GROUP}, got {group!r}")
        words = take(parts, "_packed", np.int32, (n, -(-k // 8)))
        half = "_scale" in parts and parts["_scale"].dtype == np.float16
        scale = take(parts, "_scale", np.float16 if half else np.float32, (n, -(-k // group)))
        if not (np.isfinite(scale).all() and scale.all()):
            raise FormatError("_scale: every scale must be finite and not zero")
        if take(parts, "_shape", np.int64, (2,)).tolist() != [n, k]:
            raise FormatError(f"part '_shape' is {parts['_shape'].tolist()}, the matrix is {[n, k]}")
        return cls((n, k), group, words, scale)


def _weighing(importance: Array | None, k: int, padded: int) -> Array | None:
    if importance is None:
        return None
    found = np.asarray(importance, np.float32)
    if found.shape != (k,) or not (np.isfinite(found).all() and (found >= 0).all()):
        raise ModelError(f"importance must be {k} finite numbers, none negative, got {found.dtype} {found.shape}")
    weighing = np.zeros(padded, np.float32)
    weighing[:k] = found / max(float(found.max(initial=0.0)), float(np.finfo(np.float32).tiny))
    return weighing


def _stored(scale: Array, dtype: Any) -> Array:
    """Round scales to a dtype, away from 0 and infinity."""
    least, most = (HALF_LEAST, HALF_MOST) if dtype == np.float16 else (np.finfo(np.float32).tiny, np.finfo(np.float32).max)
    size = np.clip(np.abs(scale), least, most)
    return np.asarray(np.copysign(size, scale), dtype)


def _search(values: Array, ratios: Sequence[float], weighing: Array | None, dtype: Any) -> tuple[Array, Array]:
    """Return the codes [groups, group] as int8 and the scales [groups] of values [groups, group]."""
    largest = np.take_along_axis(values, np.abs(values).argmax(axis=1)[:, None], axis=1)
    full = np.where(largest == 0, np.float32(1), largest * np.float32(-1 / 8))
    weights = np.ones(values.shape[1], np.float32)
    least = np.full(len(values), np.inf, np.float32)
    chosen = _stored(full, dtype)
    if len(ratios) > 1 or ratios[0] != 1:
        unit = values / full  # errors in units of the group's full scale: no overflow, no underflow
        codes, error = np.empty_like(values), np.empty_like(values)
        for ratio in ratios:
            scale = _stored(full * np.float32(ratio), dtype)
            relative = scale.astype(np.float32) / full
            np.multiply(unit, 1 / relative, out=codes)
            np.rint(codes, out=codes)
            np.clip(codes, -8, 7, out=codes)
            np.multiply(codes, relative, out=codes)
            np.subtract(codes, unit, out=error)
            np.multiply(error, error, out=error)
            if weighing is not None:
                error.reshape(-1, weighing.size)[...] *= weighing
            total = error @ weights
            better = total < least
            least[better] = total[better]
            chosen[better] = scale[better]
    codes = np.clip(np.rint(values / chosen.astype(np.float32)), -8, 7)
    return codes.astype(np.int8), chosen[:, 0]


def _packed(codes: Array) -> Array:
    """Return codes [n, 8 w] or less as int32 [n, w]."""
    n, k = codes.shape
    halves = np.zeros((n, -(-k // 8) * 8), np.uint8)
    halves[:, :k] = codes + 8
    return (halves[:, ::2] | halves[:, 1::2] << 4).view("<i4").astype(np.int32)
