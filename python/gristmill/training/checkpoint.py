"""The state of a training run, and the file that brings it back to the same bits.

The file is safetensors: `params.<name>`, `optimizer.<name>`, `history.<name>`, and the rest as JSON in the metadata, with a
checksum over the tensors.
"""

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from gristmill.errors import FormatError, ModelError
from gristmill.formats import container
from gristmill.formats.atomic import replacing
from gristmill.tensor.parts import Array
from gristmill.training.spec import Spec

KEY = "gristmill.checkpoint"
VERSION = 1


@dataclass
class Cursor:
    """Where a run stands, and the sums over the epoch's steps so far.

    Args:
        epoch: complete epochs.
        batch: complete batches of the present epoch.
        step: complete steps of all.
        loss: sum over examples of the loss.
        squares: sum over steps of the squared norm of the gradient.
        seconds: spent in the present epoch.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss: float = 0.0
    squares: float = 0.0
    seconds: float = 0.0


@dataclass
class State:
    """All that changes while training.

    Args:
        params: float32 [size].
        optimizer: the optimiser's own arrays.
        cursor: where the run stands.
        history: one number for each epoch, by name.
    """

    params: Array
    optimizer: dict[str, Array]
    cursor: Cursor = field(default_factory=Cursor)
    history: dict[str, list[float]] = field(default_factory=lambda: {"loss": [], "gradient_norm": []})


def save(path: str | os.PathLike[str], state: State, spec: Spec, settings: Mapping[str, Any]) -> None:
    """Write a state, whole or not at all.

    Raises:
        OSError: it could not be written; an earlier file is still there.
    """
    arrays = {f"params.{name}": view for name, view in spec.views(state.params).items()}
    arrays |= {f"optimizer.{name}": array for name, array in state.optimizer.items()}
    arrays |= {f"history.{name}": np.asarray(values, np.float64) for name, values in state.history.items()}
    arrays = container.little_endian(arrays)
    description = {"version": VERSION, "settings": settings, "cursor": vars(state.cursor), "checksum": checksum(arrays)}
    try:
        with replacing(path) as temporary:
            save_file(arrays, temporary, {KEY: json.dumps(description)})
    except (OSError, SafetensorError) as error:
        kept = "; the earlier checkpoint is intact" if Path(path).exists() else ""
        raise OSError(f"cannot write checkpoint {path}: {getattr(error, 'strerror', None) or error}{kept}") from error


def load(path: str | os.PathLike[str], state: State, spec: Spec, settings: Mapping[str, Any]) -> None:
    """Fill a fresh state from a file.

    Raises:
        FormatError: the file is damaged or is no checkpoint.
        ModelError: it was written under other settings; the message names them.
        OSError: it cannot be read.
    """
    try:
        arrays, metadata = container.read(container.map_file(Path(path)))
        if KEY not in metadata:
            raise FormatError("not a training checkpoint")
        description = container.parse(metadata[KEY].encode(), "checkpoint")
        if description.get("version") != VERSION:
            raise FormatError(f"checkpoint version {description.get('version')!r}, this gristmill reads {VERSION}")
        if description.get("checksum") != checksum(arrays):
            raise FormatError("the checksum does not match: the file is damaged")
    except FormatError as error:
        raise FormatError(f"checkpoint {path}: {error}") from error
    _compare(path, description.get("settings"), settings)
    try:
        _restore(arrays, description["cursor"], state, spec)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"checkpoint {path}: a part is missing or does not fit ({error})") from error


def _restore(arrays: Mapping[str, Array], cursor: dict[str, Any], state: State, spec: Spec) -> None:
    spec.write({name: arrays[f"params.{name}"] for name in spec.shapes}, state.params)
    for name, array in state.optimizer.items():
        array[...] = arrays[f"optimizer.{name}"]
    state.cursor = Cursor(**cursor)
    history = {name: array for name, array in arrays.items() if name.startswith("history.")}
    state.history = {name.removeprefix("history."): array.tolist() for name, array in history.items()}


def _compare(path: str | os.PathLike[str], found: Any, wanted: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))
    found = found if isinstance(found, dict) else {}
    differences = [
        f"{name} was {found.get(name)!r} and is now {wanted.get(name)!r}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        raise ModelError(f"checkpoint {path} belongs to another run: {'; '.join(differences)}. Use another path, or resume=False")


def checksum(arrays: Mapping[str, Array]) -> int:
    """CRC-32 over the names and the bytes of arrays."""
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data, total)
    return total
