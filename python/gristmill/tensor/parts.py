"""Checks that every tensor kind applies to the arrays it is made of."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gristmill.errors import FormatError

Array = np.ndarray[Any, Any]


def frozen(array: Array) -> Array:
    """Return a C-contiguous read-only view or copy of an array; the caller's own array stays writable."""
    view = np.asarray(array, order="C").view()  # ascontiguousarray would make a scalar a vector
    view.flags.writeable = False
    return view


def take(parts: Mapping[str, Array], name: str, dtype: Any, shape: tuple[int | None, ...]) -> Array:
    """Return part `name` after checking its dtype and shape (None admits any length).

    Raises:
        FormatError: the part is missing or is not what it must be.
    """
    if name not in parts:
        raise FormatError(f"part {name!r} is missing; found {sorted(parts)}")
    array = parts[name]
    if array.dtype != np.dtype(dtype):
        raise FormatError(f"part {name!r} has dtype {array.dtype}, expected {np.dtype(dtype)}")
    if array.ndim != len(shape) or any(want is not None and want != have for want, have in zip(shape, array.shape, strict=True)):
        raise FormatError(f"part {name!r} has shape {array.shape}, expected {shape}")
    return array


def matrix_shape(spec: Mapping[str, Any]) -> tuple[int, int]:
    """Return the [n, k] shape that a spec declares.

    Raises:
        FormatError: it is not two positive integers of a sane size.
    """
    shape = spec.get("shape")
    if not (isinstance(shape, (list, tuple)) and len(shape) == 2 and all(type(d) is int and 0 < d < 2**31 for d in shape)):
        raise FormatError(f"shape {shape!r} is not two positive integers")
    return int(shape[0]), int(shape[1])


def with_gain(codes: Array, scale: Array, gain: Array, rows_of_codes: Array) -> tuple[Array, Array]:
    """Return (codes, scale) of an int8 tensor whose rows are multiplied by `gain`. Scales stay positive; signs go to the codes,
    where -128 becomes 127.

    Args:
        codes: int8, any shape whose first dimensions `rows_of_codes` broadcasts over.
        scale: float32 [n].
        gain: float32 [n].
        rows_of_codes: the row index of each code, broadcastable to `codes`.
    """
    signs = np.sign(gain).astype(np.int16)[rows_of_codes]
    return np.minimum(codes * signs, 127).astype(np.int8), np.maximum(scale * np.abs(gain), np.finfo(np.float32).tiny)


WIDEST = 65793  # columns of which products of -128 by 255 fit an int32 sum


def check_codes(codes: Array, columns: int) -> None:
    """Demand that int8 codes of a matrix fit the sums of the kernels. Ours have no -128; files of others do.

    Raises:
        FormatError: they do not.
    """
    if columns > WIDEST and (codes == -128).any():
        raise FormatError(f"code -128 in a matrix of {columns} columns: sums of more than {WIDEST} products do not fit 32 bits")


def check_scale(scale: Array, what: str) -> Array:
    """Return a scale after checking that it is finite and positive."""
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise FormatError(f"{what}: every scale must be finite and positive")
    return scale


def nibbles(halves: Array) -> Array:
    """Return the halves of bytes, the low one of each first: uint8, twice as many along the last axis."""
    return np.stack([halves & 15, halves >> 4], axis=-1).reshape(*halves.shape[:-1], -1)
