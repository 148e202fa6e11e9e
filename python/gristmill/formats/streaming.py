"""The native file written tensor by tensor: the bytes of `native.save`, without more than a few megabytes of a mapped model in
memory at any time."""

import json
import os
from collections.abc import Mapping
from typing import Any

from gristmill.formats import native
from gristmill.formats.atomic import replacing
from gristmill.formats.container import DTYPES, release
from gristmill.model import Model
from gristmill.tensor.parts import Array

CODES = {dtype: code for code, dtype in DTYPES.items()}
# The order of the safetensors library: larger elements first.
ORDER = ("U64", "I64", "F64", "F32", "U32", "I32", "F16", "U16", "I16", "I8", "U8", "BOOL")
ALIGN = 8  # of the first byte of data
PIECE = 1 << 22  # bytes that are written at a time


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write a model as `native.save` does, the pages of mapped tensors released as they are written.

    Raises:
        FormatError: the model has something that JSON or safetensors cannot hold.
        OSError: the folder is missing or cannot be written, or the disk is full.

    Example:
        >>> import tempfile, gristmill as gm
        >>> path = tempfile.mkdtemp() + "/tiny.safetensors"
        >>> model = gm.zoo.mlp([4, 3])
        >>> save(model, path)
        >>> open(path, "rb").read() == native.to_bytes(model)
        True
    """
    write(path, *native.encode(model))


def write(path: str | os.PathLike[str], arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of contiguous little-endian arrays, whole or not at all.

    Raises:
        OSError: as `save`.
    """
    names, header = head(arrays, metadata)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(header)
        for name in names:
            _write(file, arrays[name])
            release([arrays[name]])


def _write(file: Any, array: Array) -> None:
    if array.size:
        data = array.reshape(-1).view("u1").data
        for start in range(0, len(data), PIECE):
            file.write(data[start : start + PIECE])


def file_bytes(model: Model) -> int:
    """Return the size of the file that a model is saved to.

    Example:
        >>> import gristmill as gm
        >>> model = gm.zoo.mlp([4, 3])
        >>> file_bytes(model) == len(native.to_bytes(model))
        True
    """
    arrays, metadata = native.encode(model)
    return len(head(arrays, metadata)[1]) + sum(array.nbytes for array in arrays.values())


def head(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> tuple[list[str], bytes]:
    """Return the order of the tensors in the file, and all that comes before them."""
    names = sorted(arrays, key=lambda name: (ORDER.index(CODES[arrays[name].dtype]), name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    reached = 0
    for name in names:
        array = arrays[name]
        offsets = [reached, reached + array.nbytes]
        entries[name] = {"dtype": CODES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        reached += array.nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGN)
    return names, len(text).to_bytes(8, "little") + text
