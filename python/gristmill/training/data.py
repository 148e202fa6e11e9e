"""What may be trained on: checks and conversions of the examples."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gristmill import losses
from gristmill.errors import DataError
from gristmill.model import Model
from gristmill.ops import TensorType
from gristmill.tensor.parts import Array

KINDS = "biufcSUMm"  # plain items; objects cannot be shared between processes


@dataclass(frozen=True)
class Dataset:
    """Arrays by name whose first axis is the examples; `structure` ("mapping", "tuple" or "single") says how they came."""

    arrays: dict[str, Array]
    structure: str


def own_data(data: Any) -> Dataset:
    """Take the data of a user's own gradient function: an array, a tuple of arrays, or a mapping of arrays.

    Raises:
        DataError: they are empty, of different lengths, or hold Python objects.
    """
    if isinstance(data, Mapping):
        named, structure = {str(name): value for name, value in data.items()}, "mapping"
    elif isinstance(data, tuple):
        named, structure = {str(i): value for i, value in enumerate(data)}, "tuple"
    else:
        named, structure = {"data": data}, "single"
    arrays = {name: as_array(name, value) for name, value in named.items()}
    for name, array in arrays.items():
        if array.dtype.kind not in KINDS:
            raise DataError(f"data '{name}' has dtype {array.dtype}, which workers cannot share; convert it to numbers")
    check_lengths(arrays)
    return Dataset(arrays, structure)


def check_lengths(arrays: Mapping[str, Array]) -> None:
    """Demand at least one example, and as many in every array.

    Raises:
        DataError: it is not so.
    """
    if not arrays or any(array.ndim == 0 for array in arrays.values()):
        raise DataError("data must be arrays whose first axis is the examples")
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"arrays must have one row for each example, but lengths differ: {lengths}")
    if 0 in lengths.values():
        raise DataError("there are no examples")


def model_data(model: Model, loss: losses.Loss, data: Any) -> dict[str, Array]:
    """Return the inputs of a model's training graph, of its dtypes.

    Dtypes are converted by NumPy's "same_kind" rule: float64 to float32, labels of any integer type to int64, integers to
    float32; never floats to integers.

    Args:
        model: without the loss.
        loss: what is attached to it.
        data: `(x, y)` for a loss that takes one input beside the model's: x is an array for a model with one input, else a
            mapping by input name, or a tuple of arrays in the order of `model.inputs`. Or all arrays by input name.

    Raises:
        DataError: an array is missing, does not fit, has values that are not finite, or labels outside the classes.
    """
    types = losses.attach(model, loss).inputs
    named = data if isinstance(data, Mapping) else _named(types, data)
    if named.keys() != types.keys():
        wanted = ", ".join(f"{name}: {kind}" for name, kind in types.items())
        raise DataError(f"training needs arrays {{{wanted}}}, got {sorted(map(str, named))}")
    arrays = {name: convert(name, named[name], kind) for name, kind in types.items()}
    check_lengths(arrays)
    symbols: dict[str, int] = {}
    for name, kind in types.items():
        _check_shape(name, arrays[name], kind, symbols)
        check_finite(name, arrays[name])
    if losses.LABELS in arrays:
        check_labels(arrays[losses.LABELS], model.types[model.outputs[0]].shape[-1])
    return arrays


def _named(types: Mapping[str, TensorType], data: Any) -> dict[str, Any]:
    """Name the parts of `(x, y)`; the input that the loss adds comes last."""
    pair = isinstance(data, (tuple, list)) and len(data) == 2
    *names, last = types
    x = data[0] if pair else None
    if pair and isinstance(x, Mapping) and last not in x:
        return {**x, last: data[1]}
    if pair and isinstance(x, tuple) and len(x) == len(names) > 1:
        return {**dict(zip(names, x, strict=True)), last: data[1]}
    if not pair or len(types) != 2:
        raise DataError(f"data must be (x, y) or a mapping; this training takes a mapping with {sorted(types)}")
    return dict(zip(types, data, strict=True))


def as_array(name: str, value: Any) -> Array:
    """Return a value as an array.

    Raises:
        DataError: it is a nest of lists of different lengths.
    """
    try:
        return np.asarray(value, order="C")
    except ValueError as error:
        raise DataError(f"'{name}' is no array: its rows have different shapes") from error


def convert(name: str, value: Any, kind: TensorType) -> Array:
    """Return an array of the dtype that the graph takes.

    Raises:
        DataError: that would lose what the values mean.
    """
    array = as_array(name, value)
    if array.dtype.kind not in "biuf" or not np.can_cast(array.dtype, kind.dtype, "same_kind"):
        raise DataError(f"'{name}' has dtype {array.dtype}, which does not convert to {kind.dtype}")
    with np.errstate(over="ignore"):  # what overflows is refused as not finite
        return np.asarray(array, kind.dtype, order="C")


def _check_shape(name: str, array: Array, kind: TensorType, symbols: dict[str, int]) -> None:
    fits = array.ndim == len(kind.shape) and all(
        have == (symbols.setdefault(want, have) if isinstance(want, str) else want)
        for have, want in zip(array.shape[1:], kind.shape[1:], strict=True)
    )
    if not fits:
        raise DataError(f"'{name}' has shape {array.shape}, the model takes {kind}")


def check_finite(name: str, array: Array) -> None:
    """Refuse NaN and infinity.

    Raises:
        DataError: names the first of them.
    """
    # A sum of float32 values in float64 cannot overflow, and it needs no array of flags.
    with np.errstate(invalid="ignore"):
        if array.dtype.kind != "f" or np.isfinite(np.add.reduce(array, axis=None, dtype=np.float64)):
            return
    where = tuple(int(axis[0]) for axis in np.nonzero(~np.isfinite(array)))
    raise DataError(f"'{name}' has a value that is not finite: {array[where]} at index {list(where)}")


def check_labels(labels: Array, classes: int | str) -> None:
    """Refuse labels outside [0, classes).

    Raises:
        DataError: names the first of them.
    """
    if not isinstance(classes, int) or (labels.min() >= 0 and labels.max() < classes):
        return
    index = int(np.nonzero((labels < 0) | (labels >= classes))[0][0])
    raise DataError(f"label {labels[index]} at index {index} lies outside the model's classes, 0 to {classes - 1}")
