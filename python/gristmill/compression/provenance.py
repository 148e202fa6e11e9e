"""Where a compressed model comes from: checksums of models and data, and what they were made with."""

import hashlib
import json
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np

import gristmill
from gristmill.errors import ModelError
from gristmill.formats.container import release
from gristmill.model import Model
from gristmill.runtime.kernels import kernels
from gristmill.tensor.parts import Array

ALGORITHM = "sha256"


def model_checksum(model: Model) -> str:
    """Return "sha256:" and the checksum of a model's graph and tensors. Its meta does not count, so that meta can hold it.

    Example:
        >>> import gristmill as gm
        >>> model = gm.zoo.mlp([4, 3])
        >>> model_checksum(model) == model_checksum(model.replace(meta={"name": "tiny"}))
        True
    """
    total = hashlib.new(ALGORITHM)
    graph = {
        "nodes": [[n.op, n.domain, n.inputs, n.outputs, dict(n.attributes)] for n in model.nodes],
        "inputs": [[name, str(kind.dtype), kind.shape] for name, kind in model.inputs.items()],
        "outputs": model.outputs,
    }
    total.update(json.dumps(graph, sort_keys=True, default=str).encode())
    for name in sorted(model.tensors):
        tensor = model.tensors[name]
        parts = tensor.parts()
        total.update(json.dumps([name, tensor.spec()], sort_keys=True).encode())
        _add_arrays(total, parts)
        release(parts.values())
    return f"{ALGORITHM}:{total.hexdigest()}"


def data_checksum(data: Any) -> str:
    """Return "sha256:" and the checksum of arrays: one, a list or tuple of them, or a mapping; None counts as absent."""
    total = hashlib.new(ALGORITHM)
    named = data if isinstance(data, Mapping) else dict(enumerate(data if isinstance(data, (tuple, list)) else (data,)))
    for name, value in named.items():
        if isinstance(value, Mapping):
            total.update(data_checksum(value).encode())
        elif value is not None:
            _add_arrays(total, {str(name): np.asarray(value)})
    return f"{ALGORITHM}:{total.hexdigest()}"


def _add_arrays(total: Any, arrays: Mapping[str, Array]) -> None:
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        total.update(f"{name} {array.dtype.str} {array.shape}".encode())
        total.update(array.reshape(-1).view(np.uint8).data if array.size else b"")


def made_with() -> dict[str, Any]:
    """Return the version of the package, and the instruction sets whose kernels serve this machine."""
    variants = sorted({kernel.variant for kernel in kernels().values()})
    return {"gristmill": gristmill.__version__, "machine": platform.machine(), "kernels": variants}


def check_finite_weights(model: Model) -> None:
    """Demand that every float of a model is finite, before anything is made of it.

    Raises:
        ModelError: names the first tensor that has NaN or infinity, and where.
    """
    for name, tensor in model.tensors.items():
        for array in _stored(tensor):
            if array.dtype.kind != "f":
                continue
            with np.errstate(invalid="ignore", over="ignore"):
                total = np.add.reduce(array, axis=None, dtype=np.float64)
            if not np.isfinite(total) and not np.isfinite(array).all():
                where = [int(axis[0]) for axis in np.nonzero(~np.isfinite(array))]
                raise ModelError(
                    f"tensor '{name}' of shape {tensor.shape} has a value that is not finite, {array[tuple(where)]} at {where}; "
                    "train it anew, or mend it with model.replace(tensors=...)"
                )
        release(_stored(tensor))


def _stored(tensor: Any) -> list[Array]:
    """The arrays that a tensor holds, without making those that only its file has."""
    return [value for value in vars(tensor).values() if isinstance(value, np.ndarray)]
