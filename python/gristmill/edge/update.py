"""What to update: the choice that decides how much memory training takes.

Biases need no activations of their layers' inputs, the last layers need no gradients below them (Cai et al., TinyTL, 2020).
Where a layer's int8 codes are to change, they do so through a float32 master copy that is quantised once, at the end.
"""

from dataclasses import dataclass

import numpy as np

from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.tensor import Bitmask, Dense, Quantized, Sparse, Tensor, has_gains, is_int8
from gristmill.tensor.parts import Array


@dataclass(frozen=True)
class Selection:
    """A model made ready for training, and what trains in it.

    Args:
        model: the original with masters in place of the int8 weights that are to change.
        names: the tensors that train.
        requantise: the names of the masters.
    """

    model: Model
    names: tuple[str, ...]
    requantise: tuple[str, ...]

    def finish(self, original: Model, trained: dict[str, Array]) -> Model:
        """Return the original model with trained values, masters quantised again."""
        tensors: dict[str, Tensor] = {}
        for name, values in trained.items():
            tensor = with_values(self.model.tensors[name], values)
            if name in self.requantise:
                tensor = tensor.quantized() if isinstance(tensor, (Sparse, Bitmask)) else Quantized.from_dense(tensor.dense())
            tensors[name] = tensor
        return original.replace(tensors=tensors)


def with_values(tensor: Tensor, values: Array) -> Tensor:
    """Return a tensor over an array that trained, without a copy where the kind allows it."""
    if tensor.kind == "dense":
        return Dense(values)
    if isinstance(tensor, Sparse) and tensor.scale is None:
        return Sparse(tensor.matrix_shape, values, tensor.row_offsets, tensor.index)
    if isinstance(tensor, Bitmask) and tensor.scale is None:
        return Bitmask(tensor.matrix_shape, tensor.bitmask, values, tensor.row_offsets)
    return tensor.with_trainable(values)


def select(model: Model, update: str) -> Selection:
    """Return what `update` names: "all", "bias", or "last:k" for the last k Linear layers.

    "bias" trains biases, normalisation parameters and, of int8 and int4 weights, the scales. Codes of int4 never change.

    Raises:
        ModelError: `update` is none of these, or the model has fewer layers.
    """
    linears = [node for node in model.nodes if node.op == "Linear"]
    if update == "bias":
        vectors = [name for name in model.trainable if len(model.tensors[name].shape) == 1 or has_gains(model.tensors[name])]
        return Selection(model, tuple(vectors), ())
    if update == "all":
        names = list(model.trainable)
    elif (
        isinstance(update, str) and update.startswith("last:") and update[5:].isdecimal() and 0 < int(update[5:]) <= len(linears)
    ):
        last = linears[len(linears) - int(update[5:]) :]
        names = list(dict.fromkeys(name for node in last for name in node.inputs[1:3] if name))
    else:
        raise ModelError(f"update must be 'all', 'bias' or 'last:k' with k from 1 to {len(linears)}, got {update!r}")
    masters = {name: master(model.tensors[name]) for name in names if is_int8(model.tensors[name])}
    return Selection(model.replace(tensors=masters), tuple(names), tuple(masters))


def master(tensor: Tensor) -> Tensor:
    """Return the shape of the float32 copy through which int8 codes train: its values, never read, take no memory yet."""
    if isinstance(tensor, Sparse):
        return Sparse(tensor.matrix_shape, np.empty(tensor.values.shape, np.float32), tensor.row_offsets, tensor.index)
    if isinstance(tensor, Bitmask):
        return Bitmask(tensor.matrix_shape, tensor.bitmask, np.empty(tensor.count, np.float32), tensor.row_offsets)
    return Dense(np.empty(tensor.shape, np.float32))


def write_start(tensor: Tensor, out: Array, has_master: bool) -> None:
    """Write the values that training starts from: of int8 codes that get a master, codes times scales."""
    if not has_master:
        out[...] = tensor.trainable
    elif isinstance(tensor, Bitmask):
        out[...] = tensor.float_values
    elif isinstance(tensor, Sparse):
        np.multiply(tensor.values, tensor.scale[tensor.rows_of_values], out=out)  # type: ignore[index]
    else:
        assert isinstance(tensor, Quantized)
        np.multiply(tensor.codes, tensor.scale[:, None], out=out)
