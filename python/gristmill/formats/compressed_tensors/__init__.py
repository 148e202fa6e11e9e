"""Files that the compressed-tensors library writes and, for the sparse formats, used to write: read without it.

Formats: sparse-bitmask and sparse-24-bitmask (the library dropped both after 0.14), pack-quantized, int-quantized,
naive-quantized and float-quantized (E4M3), alone or a sparse one around a quantised one. Nothing is trusted: sizes, shapes,
numbers of values, offsets, indices and patterns are checked before they are used. docs/formats.md says what becomes of each.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from gristmill.errors import FormatError
from gristmill.formats.compressed_tensors.codes import DTYPES, numbers
from gristmill.formats.compressed_tensors.layers import assemble
from gristmill.formats.compressed_tensors.scheme import Scheme, read_scheme
from gristmill.formats.compressed_tensors.weight import Weight
from gristmill.formats.container import map_file
from gristmill.formats.container import read as read_container
from gristmill.formats.folder import Folder, widened
from gristmill.tensor.parts import Array

__all__ = ["Tensors", "read"]


class Tensors(Mapping[str, Array]):
    """The tensors of a compressed file by name. Each is unpacked when it is asked for, and not kept.

    Floats are float32: weights as the library decompresses them, which rounds to the type of their scales. Integers and
    booleans are as the file has them.
    """

    def __init__(self, stored: Mapping[str, Array | Weight], scheme: Scheme) -> None:
        self.stored, self.scheme = stored, scheme

    def __getitem__(self, name: str) -> Array:
        found = self.stored[name]
        if isinstance(found, Weight):
            return found.values()
        return widened(name, found) if found.dtype.kind == "f" else numbers(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without unpacking it."""
        return self.stored[name].shape


def read(path: str | os.PathLike[str]) -> Tensors:
    """Return the tensors of a compressed model whose graph is not needed, or is of an architecture that `gm.load` does not know.

    Args:
        path: a Hugging Face folder, or one of its safetensors files, whose config.json lies beside it.

    Raises:
        FormatError: the file is damaged, hostile or of a format that is not read.
        OSError: it cannot be read.

    Example:
        >>> import json, pathlib, tempfile
        >>> import numpy as np
        >>> from safetensors.numpy import save_file
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> weights = {"num_bits": 8, "strategy": "channel"}
        >>> group = {"targets": ["Linear"], "weights": weights}
        >>> config = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group}}
        >>> _ = (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
        >>> codes, scale = np.array([[1, -2], [3, 4]], np.int8), np.array([[0.5], [2.0]], np.float32)
        >>> save_file({"layer.weight": codes, "layer.weight_scale": scale}, folder / "model.safetensors")
        >>> read(folder)["layer.weight"].tolist()
        [[0.5, -1.0], [6.0, 8.0]]
    """
    found = Path(path)
    folder = Folder(found if found.is_dir() else found.parent)
    try:
        scheme = read_scheme(folder.fields("config.json").values) if folder.has("config.json") else None
        if found.is_dir():
            arrays = folder.tensors(DTYPES)
        else:
            arrays, _ = read_container(map_file(found), DTYPES, aligned=False)
        scheme = Scheme() if scheme is None else scheme
        return Tensors(assemble(arrays, scheme), scheme)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
