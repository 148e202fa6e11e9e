"""The protocol's datatypes and raw tensors: little-endian bytes in row-major order."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from gristmill.serving.refusal import need

Array = np.ndarray[Any, Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
}
DATATYPES = {dtype: name for name, dtype in DTYPES.items()}


def from_raw(buffer: bytes, offset: int, nbytes: int, dtype: np.dtype[Any], shape: Sequence[int], name: str) -> Array:
    """Return a view of raw bytes as an array; nothing is copied on a little-endian machine.

    Raises:
        Refusal: the byte count is not what the shape and the datatype need, or a BOOL byte is neither 0 nor 1.
    """
    count = math.prod(shape)
    need(nbytes == count * dtype.itemsize, f"input '{name}': {nbytes} bytes, its shape needs {count * dtype.itemsize}")
    if not count:
        return np.zeros(shape, dtype)
    if dtype == np.bool_:
        octets = np.frombuffer(buffer, np.uint8, count, offset)
        need(int(octets.max()) <= 1, f"input '{name}': a BOOL is one byte, 0 or 1")
    array = np.frombuffer(buffer, dtype.newbyteorder("<"), count, offset)
    return array.reshape(shape) if sys.byteorder == "little" else array.astype(dtype).reshape(shape)


def to_raw(array: Array) -> bytes:
    """Return the little-endian bytes of an array in row-major order."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
