"""Model files: what a path holds decides who reads and writes it."""

import os
from pathlib import Path

from gristmill.errors import FormatError
from gristmill.formats import hf, native, onnx
from gristmill.formats.atomic import check_folder
from gristmill.model import Model, check_model

__all__ = ["check_target", "load", "save"]

LOADERS = {".safetensors": native.load, ".onnx": onnx.load}
SAVERS = {".safetensors": native.save, ".onnx": onnx.save}


def load(path: str | os.PathLike[str]) -> Model:
    """Read a model; the suffix of the path tells the format.

    Args:
        path: a native `.safetensors` file, or a Hugging Face folder (config.json, model.safetensors; see `formats.hf`).

    Raises:
        FormatError: the format is unknown, or the file is damaged, hostile or holds no graph.
        OSError: the file cannot be read; FileNotFoundError if there is none.

    Example:
        >>> import tempfile, gristmill as gm
        >>> path = tempfile.mkdtemp() + "/tiny.safetensors"
        >>> save(gm.zoo.mlp([4, 3]), path)
        >>> load(path).outputs
        ('logits',)
    """
    found = Path(path)
    if not found.exists():
        raise FileNotFoundError(f"there is no model file {path}")
    if found.is_dir():
        return hf.load(found)
    if found.suffix not in LOADERS:
        raise FormatError(f"{path}: loading {found.suffix or 'such'} files is not yet supported; known: {', '.join(LOADERS)}")
    return LOADERS[found.suffix](found)


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write a model, whole or not at all; the suffix of the path tells the format.

    Args:
        model: what to write.
        path: a `.safetensors` path in an existing folder; an existing file is replaced.

    Raises:
        ModelError: `model` is no Model.
        FormatError: the format is unknown, or cannot hold the model.
        OSError: the folder is missing or cannot be written, or the disk is full.

    Example:
        >>> import tempfile, gristmill as gm
        >>> save(gm.zoo.mlp([4, 3]), tempfile.mkdtemp() + "/tiny.safetensors")
    """
    check_model(model)
    wanted = check_target(path)
    SAVERS[wanted.suffix](model, wanted)


def check_target(path: str | os.PathLike[str]) -> Path:
    """Return the path that `save` would write, to find out before a long computation that it would refuse.

    Raises:
        FormatError: the format is unknown.
        OSError: there is no folder to write in, it may not be written, or the path is a folder itself.
    """
    wanted = Path(path)
    if wanted.suffix not in SAVERS:
        raise FormatError(f"{path}: saving {wanted.suffix or 'such'} files is not yet supported; known: {', '.join(SAVERS)}")
    check_folder(wanted)
    return wanted
