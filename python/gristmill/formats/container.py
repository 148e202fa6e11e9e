"""The safetensors container: 8 bytes of header length, a JSON header, then the data of all tensors.

The header is untrusted. All of it is checked before any of the data is used, and nothing is allocated by a size that it claims.
Specification: https://huggingface.co/docs/safetensors (metadata parsing).
"""

import json
import mmap
import os
import stat
from collections.abc import Iterable, Mapping
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np

from gristmill.errors import FormatError
from gristmill.tensor.parts import Array

HEADER_BYTES = 100_000_000  # the limit of every safetensors reader
JSON_ITEMS = 1_000_000  # bounds the memory that parsing takes, at some 100 bytes an item
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    **{f"{sign}{8 * size}": np.dtype(f"<{sign.lower()}{size}") for sign in "IU" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
}

Buffer = bytes | mmap.mmap


def map_file(path: Path) -> mmap.mmap:
    """Map a regular file read-only.

    Raises:
        FormatError: it is no regular file, or too short to be one of this format.
        OSError: it cannot be read; FileNotFoundError if there is none.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise FormatError("not a regular file")
        if found.st_size < 8:
            raise FormatError(f"{found.st_size} bytes are too few for a safetensors file")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read(
    data: Buffer, dtypes: Mapping[str, np.dtype[Any]] = DTYPES, aligned: bool = True
) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the tensors of a safetensors file as read-only views, and its metadata.

    Args:
        data: the whole file.
        dtypes: the NumPy dtype of each code that is accepted.
        aligned: refuse tensors whose data are not aligned for their dtype, as those of some older writers are.

    Raises:
        FormatError: the header is damaged or lies about the file.
    """
    if len(data) < 8:
        raise FormatError(f"{len(data)} bytes are too few for a safetensors file")
    length = int.from_bytes(data[:8], "little")
    if length > HEADER_BYTES or length > len(data) - 8:
        raise FormatError(
            f"the header claims {length} bytes; the file has {len(data) - 8} for it and the limit is {HEADER_BYTES}"
        )
    header = parse(data[8 : 8 + length], "header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("__metadata__ must be an object of strings")
    start = 8 + length
    entries = [(*_entry(name, entry, dtypes), name) for name, entry in header.items()]
    _check_cover(entries, len(data) - start)
    arrays = {}
    for begin, _, dtype, shape, name in entries:
        array: Array = np.ndarray(shape, dtype, data, start + begin)
        if aligned and not array.flags.aligned:
            raise FormatError(f"tensor '{name}' starts at byte {start + begin}, which is not aligned for {dtype}")
        if dtype == np.bool_ and array.view(np.uint8).max(initial=0) > 1:
            raise FormatError(f"tensor '{name}' has booleans other than 0 and 1")
        arrays[name] = array
    return arrays, metadata


def parse(text: bytes, what: str) -> dict[str, Any]:
    """Return a JSON object of bounded size; repeated keys and numbers that are not finite are refused.

    Raises:
        FormatError: it is not such an object.
    """
    if sum(map(text.count, (b",", b"[", b"{"))) > JSON_ITEMS:
        raise FormatError(f"the {what} has more than {JSON_ITEMS} items")
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, integers of thousands of digits, deep nesting
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"the {what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"the {what} is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise FormatError(f"name {twice!r} appears twice")
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise FormatError(f"number {text} is not finite")
    return value


def _entry(name: str, entry: Any, dtypes: Mapping[str, np.dtype[Any]]) -> tuple[int, int, np.dtype[Any], tuple[int, ...]]:
    """Return (begin, end, dtype, shape) of a header entry."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"tensor {name!r}: its entry must have dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in dtypes:
        raise FormatError(f"tensor {name!r} has dtype {code!r}; supported: {', '.join(dtypes)}. Convert it to F32 first")
    dtype = dtypes[code]
    if not (_counts(shape) and len(shape) <= 32):
        raise FormatError(f"tensor {name!r}: shape {_short(shape)} is not a list of at most 32 sizes from 0")
    # NumPy multiplies even the dimensions of empty arrays, so zeros must not hide an overflow.
    if prod(dim or 1 for dim in shape) * dtype.itemsize >= 2**62:
        raise FormatError(f"tensor {name!r}: shape {_short(shape)} is too large")
    if not (_counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise FormatError(f"tensor {name!r}: data_offsets {_short(offsets)} are not two rising offsets")
    needed = prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise FormatError(
            f"tensor {name!r}: {dtype} of shape {shape} takes {needed} bytes, offsets {offsets} give another number"
        )
    return offsets[0], offsets[1], dtype, tuple(shape)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**62 for item in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_cover(entries: list[tuple[int, int, np.dtype[Any], tuple[int, ...], str]], size: int) -> None:
    """Demand that the tensors lie one after the other over all of the data: no overlap, no gap, nothing left over."""
    reached = 0
    for begin, end, _, _, name in sorted(entries, key=lambda entry: entry[:2]):
        if begin != reached:
            fault = "overlaps the tensor before it" if begin < reached else f"leaves bytes {reached} to {begin} unused"
            raise FormatError(f"tensor {name!r} at data offset {begin} {fault}")
        reached = end
    if reached != size:
        raise FormatError(f"the tensors take {reached} bytes of data but the file has {size}: it is truncated or has a tail")


def little_endian(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return arrays as safetensors stores them: contiguous and little-endian.

    Raises:
        FormatError: an array has a dtype that the format does not have.
    """
    stored = {}
    for name, array in arrays.items():
        dtype = array.dtype.newbyteorder("<")
        if dtype not in DTYPES.values():
            raise FormatError(f"tensor '{name}' has dtype {array.dtype}, which cannot be stored")
        stored[name] = np.ascontiguousarray(array, dtype).reshape(array.shape)
    return stored


def release(arrays: Iterable[Array]) -> None:
    """Give back the memory that pages of mapped files take; they are read again when they are touched again."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    for array in arrays:
        base: Any = array
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, memoryview):
            base = base.obj
        if isinstance(base, mmap.mmap) and memoryview(base).readonly:  # what was written to a private map would be lost
            base.madvise(mmap.MADV_DONTNEED)
