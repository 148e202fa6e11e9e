"""TensorProto to array and back. What a tensor claims about its size is held against the bytes that exist, before any use.

Specification: onnx.proto (TensorProto, TensorProto.DataLocation) and docs/ExternalData.md of the onnx project.
"""

import mmap
import os
import stat
import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from gristmill.errors import FormatError
from gristmill.tensor.parts import Array

RANK = 32  # dimensions, the limit of NumPy before 2.0
NAMES = {  # TensorProto.DataType to the name of a NumPy dtype; strings and complex numbers are not here
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16", 17: "float8_e4m3fn", 18: "float8_e4m3fnuz",
    19: "float8_e5m2", 20: "float8_e5m2fnuz", 21: "uint4", 22: "int4", 23: "float4_e2m1fn", 24: "float8_e8m0fnu",
    25: "uint2", 26: "int2",
}  # fmt: skip
CODES = {name: code for code, name in NAMES.items()}
UNSUPPORTED = {0: "undefined", 8: "string", 14: "complex64", 15: "complex128"}
BITS = {"uint4": 4, "int4": 4, "float4_e2m1fn": 4, "uint2": 2, "int2": 2}  # dtypes of several elements to a byte
FIELDS = {
    "float32": "float_data",
    "float64": "double_data",
    "int64": "int64_data",
    "uint32": "uint64_data",
    "uint64": "uint64_data",
}
DATA = ("raw_data", "float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def dtype_name(code: int) -> str:
    """Return the NumPy name of a TensorProto.DataType.

    Raises:
        FormatError: it has none here.
    """
    if code not in NAMES:
        raise FormatError(f"element type {UNSUPPORTED.get(code, code)} is not supported")
    return NAMES[code]


def dtype_of(code: int) -> np.dtype[Any]:
    """Return the dtype of a TensorProto.DataType."""
    import ml_dtypes  # noqa: F401  (it gives NumPy the names of the small floats)

    return np.dtype(dtype_name(code))


class Folder:
    """The files beside a model that hold the data of its tensors, each mapped once. None stands for a model without a path."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.nbytes = 0
        self._maps: dict[str, mmap.mmap | bytes] = {}

    def read(self, location: str, offset: int, length: int) -> memoryview:
        """Return `length` bytes of a file.

        Raises:
            FormatError: the file lies outside of the model's folder, is missing, or is shorter.
        """
        if location not in self._maps:
            self._maps[location] = self._map(location)
            self.nbytes += len(self._maps[location])
        data = self._maps[location]
        if offset > len(data) or length > len(data) - offset:
            raise FormatError(f"bytes {offset} to {offset + length} of '{location}', which has {len(data)}")
        return memoryview(data)[offset : offset + length]

    def _map(self, location: str) -> mmap.mmap | bytes:
        if self.path is None:
            raise FormatError(f"its data is in the file '{location}', and the model was not read from a folder")
        parts = Path(location.replace("\\", "/"))
        if not location or "\0" in location or parts.is_absolute() or ".." in parts.parts or ":" in location:
            raise FormatError(f"its data is in '{location}': a path inside of the model's folder is needed")
        home = self.path.resolve()
        target = (home / parts).resolve()
        if not target.is_relative_to(home):
            raise FormatError(f"its data is in '{location}', which leads out of the model's folder")
        try:
            flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
            with open(target, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise FormatError(f"'{location}' is not a regular file")
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if found.st_size else b""
        except OSError as error:
            raise FormatError(f"its data is in '{location}', which cannot be read: {error}") from error


def to_array(proto: Any, folder: Folder) -> Array:
    """Return the array of a TensorProto, a read-only view of the file where that is possible.

    Raises:
        FormatError: the data is not what the type and the shape ask for.
    """
    try:
        return _array(proto, folder)
    except FormatError as error:
        raise FormatError(f"tensor '{proto.name}': {error}") from error


def _array(proto: Any, folder: Folder) -> Array:
    dtype = dtype_of(proto.data_type)
    shape = tuple(proto.dims)
    if len(shape) > RANK or any(dim < 0 for dim in shape):
        raise FormatError(f"shape {shape[:RANK]} is not {RANK} dimensions from 0 or fewer")
    # NumPy multiplies even the dimensions of empty arrays, so zeros must not hide an overflow.
    if prod(dim or 1 for dim in shape) * dtype.itemsize >= 2**62:
        raise FormatError(f"shape {shape} is too large")
    if proto.HasField("segment"):
        raise FormatError("data in segments is not supported")
    count = prod(shape)
    if proto.data_location == 1:
        data: Any = _external(proto, _packed_bytes(dtype, count), folder)
    elif proto.HasField("raw_data"):
        data = proto.raw_data
    else:
        return _typed(proto, dtype, count).reshape(shape)
    if len(data) != _packed_bytes(dtype, count):
        raise FormatError(f"{dtype} of shape {shape} takes {_packed_bytes(dtype, count)} bytes, it has {len(data)}")
    return _from_bytes(data, dtype, count).reshape(shape)


def _packed_bytes(dtype: np.dtype[Any], count: int) -> int:
    return -(-count * BITS.get(dtype.name, 8 * dtype.itemsize) // 8)


def _external(proto: Any, needed: int, folder: Folder) -> memoryview:
    entries = {entry.key: entry.value for entry in proto.external_data}
    numbers = {key: entries.get(key, default) for key, default in (("offset", "0"), ("length", str(needed)))}
    if not all(text.isascii() and text.isdigit() and len(text) <= 19 for text in numbers.values()):
        raise FormatError(f"external data at {numbers}: offset and length must be numbers from 0")
    offset, length = int(numbers["offset"]), int(numbers["length"])
    if length != needed:
        raise FormatError(f"it takes {needed} bytes, its external data has {length}")
    return folder.read(entries.get("location", ""), offset, length)


def _from_bytes(data: Any, dtype: np.dtype[Any], count: int) -> Array:
    if dtype.name in BITS:
        return _unpack(np.frombuffer(data, np.uint8), dtype, count)
    array = np.frombuffer(data, dtype, count)
    if dtype == np.bool_ and array.view(np.uint8).max(initial=0) > 1:
        raise FormatError("booleans other than 0 and 1")
    if sys.byteorder == "big":
        return array.byteswap()
    return array if array.flags.aligned else array.copy()


def _unpack(packed: Array, dtype: np.dtype[Any], count: int) -> Array:
    """Return one element a byte; the first element has the lowest bits."""
    bits = BITS[dtype.name]
    parts = np.stack([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], axis=-1).reshape(-1)[:count]
    if dtype.name.startswith("int"):
        top = np.uint8(1 << (bits - 1))
        return ((parts ^ top).astype(np.int8) - top.astype(np.int8)).astype(dtype)
    return parts.view(dtype) if dtype.name.startswith("float") else parts.astype(dtype)


def _typed(proto: Any, dtype: np.dtype[Any], count: int) -> Array:
    """Return what the field of a type holds: integers and floats of less than 32 bits are the bits of int32."""
    field = FIELDS.get(dtype.name, "int32_data")
    other = [name for name in DATA if name != field and len(getattr(proto, name))]
    values = getattr(proto, field)
    needed = _packed_bytes(dtype, count) if dtype.name in BITS else count
    if other or len(values) != needed:
        raise FormatError(f"{dtype} takes {needed} values of {field}, it has {len(values)} and {other or 'no others'}")
    wide = np.fromiter(
        values, {"float_data": "f4", "double_data": "f8", "int64_data": "i8", "uint64_data": "u8"}.get(field, "i4"), needed
    )
    if field in ("float_data", "double_data", "int64_data") or wide.dtype == dtype:
        return wide
    bits = np.dtype(
        np.uint8 if dtype.name in BITS or dtype == np.bool_ else dtype if dtype.kind in "iu" else f"u{dtype.itemsize}"
    )
    span = (0, 1) if dtype == np.bool_ else (np.iinfo(bits).min, np.iinfo(bits).max)
    if wide.size and not (span[0] <= wide.min() and wide.max() <= span[1]):
        raise FormatError(f"{field} has values that are no {dtype}")
    narrow = wide.astype(bits)
    if dtype.name in BITS:
        return _unpack(narrow, dtype, count)
    return narrow.astype(dtype) if dtype.kind in "iub" else narrow.view(dtype)


def to_proto(name: str, array: Array) -> Any:
    """Return the TensorProto of an array.

    Raises:
        FormatError: ONNX has no such element type.
    """
    from onnx import TensorProto

    if array.dtype.name not in CODES:
        raise FormatError(f"tensor '{name}' has dtype {array.dtype}, which ONNX files do not have")
    data = np.ascontiguousarray(array)
    if array.dtype.name in BITS:
        data = _pack(data.reshape(-1), BITS[array.dtype.name])
    elif sys.byteorder == "big":
        data = data.byteswap()
    return TensorProto(name=name, data_type=CODES[array.dtype.name], dims=array.shape, raw_data=data.tobytes())


def _pack(values: Array, bits: int) -> Array:
    codes = values.view(np.uint8) if values.dtype.name.startswith("float") else values.astype(np.int8).view(np.uint8)
    per = 8 // bits
    padded = np.zeros(-(-codes.size // per) * per, np.uint8)
    padded[: codes.size] = codes & (2**bits - 1)
    lanes = padded.reshape(-1, per) << (bits * np.arange(per, dtype=np.uint8))
    return np.asarray(np.bitwise_or.reduce(lanes, axis=1), np.uint8)
