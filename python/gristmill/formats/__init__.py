"""Model files: what a path holds decides who reads and writes it."""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from gristmill.errors import FormatError
from gristmill.formats.atomic import check_folder
from gristmill.model import Model, check_model

__all__ = ["check_target", "load", "save"]

MODULES = {".safetensors": "native", ".onnx": "onnx"}  # by suffix; imported when a file of theirs is met
FOLDERS = "hf"
OWN_FILE = "model.safetensors"  # of a folder that is not Hugging Face's


def load(path: str | os.PathLike[str]) -> Model:
    """Read a model; the suffix of the path tells the format.

    Args:
        path: a native `.safetensors` file, or a folder that holds one as model.safetensors and no config.json; an `.onnx` file
            (extra `onnx`); or a Hugging Face folder (config.json, model.safetensors; see `formats.hf`).

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
    if found.is_dir() and not (found / "config.json").exists() and (found / OWN_FILE).exists():
        found = found / OWN_FILE
    if not found.is_dir() and found.suffix not in MODULES:
        raise FormatError(f"{path}: loading {found.suffix or 'such'} files is not yet supported; known: {', '.join(MODULES)}")
    model: Model = _module(FOLDERS if found.is_dir() else MODULES[found.suffix]).load(found)
    return model


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write a model, whole or not at all; the suffix of the path tells the format.

    Args:
        model: what to write.
        path: a `.safetensors` or `.onnx` path in an existing folder; an existing file is replaced.

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
    _module(MODULES[wanted.suffix]).save(model, wanted)


def check_target(path: str | os.PathLike[str]) -> Path:
    """Return the path that `save` would write, to find out before a long computation that it would refuse.

    Raises:
        FormatError: the format is unknown.
        OSError: there is no folder to write in, it may not be written, or the path is a folder itself.
    """
    wanted = Path(path)
    if wanted.suffix not in MODULES:
        raise FormatError(f"{path}: saving {wanted.suffix or 'such'} files is not yet supported; known: {', '.join(MODULES)}")
    check_folder(wanted)
    return wanted


def _module(name: str) -> Any:
    return import_module(f"gristmill.formats.{name}")
