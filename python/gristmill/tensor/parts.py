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
    """Return (codes, scale) of an int8 tensor whose rows are multiplied by `gain`. Scales stay positive; signs go to the codes.

    Args:
        codes: int8, any shape whose first dimensions `rows_of_codes` broadcasts over.
        scale: float32 [n].
        gain: float32 [n].
        rows_of_codes: the row index of each code, broadcastable to `codes`.
    """
    signs = np.sign(gain).astype(np.int8)
    return codes * signs[rows_of_codes], np.maximum(scale * np.abs(gain), np.finfo(np.float32).tiny)


def check_scale(scale: Array, what: str) -> Array:
    """Return a scale after checking that it is finite and positive."""
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise FormatError(f"{what}: every scale must be finite and positive")
    return scale
