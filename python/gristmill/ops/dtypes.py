"""Dtypes that NumPy has no arithmetic for, or too coarse a one: bfloat16, float16, and what ml_dtypes adds."""

from typing import Any

import numpy as np

from gristmill.errors import ModelError
from gristmill.tensor.parts import Array

FLOAT = np.dtype(np.float32)
INT64 = np.dtype(np.int64)
BOOL = np.dtype(np.bool_)


def dtype_of(name: str) -> np.dtype[Any]:
    """Return a dtype by its name, which `ml_dtypes` may have to know.

    Raises:
        ModelError: there is none of that name, or it takes a package that is not installed.
    """
    try:
        return np.dtype(name)
    except TypeError:
        pass
    try:
        import ml_dtypes
    except ImportError:
        raise ModelError(f"dtype {name} needs the package ml_dtypes") from None
    found = getattr(ml_dtypes, name, None)
    if found is None:
        raise ModelError(f"unknown dtype {name!r}")
    return np.dtype(found)


def is_foreign(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is one that ml_dtypes registered with NumPy."""
    return dtype.isbuiltin == 2  # not by its kind: that of float8_e5m2 is "f"


def is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or (is_foreign(dtype) and "float" in dtype.name)


def wide(x: Array) -> Array:
    """Return an array to compute with: float32 for narrower floats, int32 for narrower integers that NumPy lacks."""
    x = np.asarray(x)
    if x.dtype == np.float16 or is_foreign(x.dtype):
        return x.astype(np.float32 if is_float(x.dtype) else np.int32)
    return x


def narrow(y: Any, dtype: np.dtype[Any]) -> Array:
    """Return what was computed in the dtype that the operator promises."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(y).astype(dtype, copy=False)
