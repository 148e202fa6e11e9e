"""Calibration data as batches, and what the inputs of Linear nodes hold on them: ranges, norms and second moments.

Batches are cut so that the values of one take a bounded amount of memory, however many examples there are.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

import numpy as np

from gristmill.compression.examples import checked
from gristmill.compression.recipe import Context
from gristmill.errors import DataError
from gristmill.model import Model
from gristmill.ops import Node
from gristmill.runtime.session import Session
from gristmill.tensor.parts import Array

BATCH = 64  # examples that calibration runs at a time, at most
BYTES = 64 << 20  # of the values that it looks at in one run
MASK = "attention_mask"  # an input of that name marks the tokens that are no padding

Batch = Mapping[str, Array]


def reads(node: Node, weights: Iterable[str]) -> bool:
    """Whether a node is a Linear with one of these weights."""
    return node.op == "Linear" and node.inputs[1] in weights


def batches(model: Model, calibration: Any, context: Context, what: str) -> Iterator[Batch]:
    """Yield calibration data as the model's inputs.

    Args:
        model: what they are inputs of.
        calibration: "data" for the data that `compress` was given; what `compress` takes as inputs (an array for a model of one
            input, arrays by input name, a tuple, sentences); or an iterable of such batches, one of which is in memory at a time.
        context: of the recipe.
        what: the name of the pass, for errors.

    Raises:
        DataError: there are none, or they do not fit.
    """
    if isinstance(calibration, str):
        if calibration != "data" or context.data is None:
            raise DataError(f"{what}: calibration={calibration!r} needs data: pass compress(..., data=...) and 'data', or arrays")
        calibration = context.data.inputs
    if not isinstance(calibration, Iterable):
        raise DataError(f"{what}: calibration must be arrays or batches of them, got {type(calibration).__name__}")
    sentences = isinstance(calibration, list) and any(isinstance(part, str) for part in calibration)
    whole = sentences or isinstance(calibration, (np.ndarray, Mapping, tuple))
    empty = True
    for given in [calibration] if whole else calibration:
        empty = False
        yield fitting(model, given, what)
    if empty:
        raise DataError(f"{what}: there are no calibration batches")


def fitting(model: Model, given: Any, what: str) -> Batch:
    """Return one batch as arrays of the model's dtypes, by name.

    Raises:
        DataError: it does not fit the model.
    """
    try:
        return checked("calibration", model, given).by_name(model)
    except DataError as error:
        raise DataError(f"{what}: {error}") from error


def values_read(model: Model, weights: Iterable[str]) -> dict[str, str]:
    """Return the value that each of the weights multiplies, by weight. (A weight of several nodes has the first one's.)"""
    chosen = set(weights)
    found: dict[str, str] = {}
    for node in model.nodes:
        if reads(node, chosen):
            found.setdefault(node.inputs[1], node.inputs[0])
    return found


def observe(model: Model, values: Iterable[str], data: Iterable[Batch], threads: int) -> Iterator[dict[str, Array]]:
    """Run the model on the data and yield some of its values, and its inputs, piece by piece."""
    values = tuple(dict.fromkeys(values))
    made = tuple(name for name in values if name not in model.inputs)
    session = Session(model.replace(outputs=made or model.outputs), threads=threads)
    for batch in data:
        for piece in pieces(model, values, batch):
            yield {**piece, **session.execute(piece)}


def pieces(model: Model, values: Iterable[str], batch: Batch) -> Iterator[Batch]:
    """Cut a batch along the dimension that leads all inputs, where there is one, so that the values of a piece fit in BYTES."""
    leading = {kind.shape[:1] for kind in model.inputs.values()}
    symbol = next(iter(leading))[0] if len(leading) == 1 and () not in leading else None
    examples = len(next(iter(batch.values()))) if isinstance(symbol, str) else 0
    if not examples:
        yield batch
        return
    sizes: dict[Any, int] = {}
    for name, kind in model.inputs.items():
        sizes |= zip(kind.shape, batch[name].shape, strict=True)
    sizes[symbol] = 1
    each = sum(4 * prod(sizes.get(dim, dim if isinstance(dim, int) else 1) for dim in model.types[name].shape) for name in values)
    step = max(1, min(BATCH, BYTES // max(each, 1)))
    for first in range(0, examples, step):
        yield {name: array[first : first + step] for name, array in batch.items()}


def ranges(
    model: Model, weights: set[str], data: Iterable[Batch], percentile: float, threads: int, what: str
) -> dict[str, tuple[float, float]]:
    """Return the smallest and largest value, 0 among them, of what each Linear with one of the weights reads, by value.

    Args:
        percentile: in (50, 100]: what lies beyond it on either side in a piece of the data does not count.

    Raises:
        DataError: there are no batches, or a value is not finite.
    """
    values = tuple(dict.fromkeys(values_read(model, weights).values()))
    found: dict[str, tuple[float, float]] = dict.fromkeys(values, (0.0, 0.0))
    for piece in observe(model, values, data, threads):
        for name in values:
            low, high = np.percentile(piece[name], (100 - percentile, percentile)) if piece[name].size else (0.0, 0.0)
            check_finite(low + high, name, what)
            found[name] = (min(found[name][0], float(low)), max(found[name][1], float(high)))
    return found


def check_finite(sample: float, name: str, what: str) -> None:
    """Raise unless a number that was made from all of a value is finite.

    Raises:
        DataError: it is not.
    """
    if not np.isfinite(sample):
        raise DataError(f"{what}: '{name}' is not finite on the calibration data")


def tokens(model: Model, values: Iterable[str], data: Iterable[Batch], threads: int) -> Iterator[tuple[str, Array]]:
    """Yield (name, rows [tokens, k]) of some values, piece by piece, without the rows of padding where a mask tells them."""
    values = tuple(dict.fromkeys(values))
    named = {node.input(3) for node in model.nodes if node.op == "MaskedAttention"} | (model.inputs.keys() & {MASK})
    masks = sorted(named - {""} - model.tensors.keys())
    for piece in observe(model, (*values, *masks), data, threads):
        for name in values:
            array = piece[name]
            mask = next((piece[mask] for mask in masks if array.ndim == 3 and piece[mask].shape == array.shape[:2]), None)
            yield name, array.reshape(-1, array.shape[-1]) if mask is None else array[mask != 0]


def norms(model: Model, weights: Iterable[str], data: Iterable[Batch], threads: int, what: str) -> dict[str, Array]:
    """Return the L2 norm over all tokens of each input channel of each weight: float32 [k], by weight.

    Raises:
        DataError: there are no batches, or a value is not finite.
    """
    read = values_read(model, weights)
    sums: dict[str, Any] = dict.fromkeys(read.values(), 0.0)
    for name, rows in tokens(model, read.values(), data, threads):
        sums[name] = sums[name] + np.einsum("tk,tk->k", rows, rows, dtype=np.float64)
    for name, total in sums.items():
        check_finite(np.sum(total), name, what)
    return {weight: np.sqrt(sums[value]).astype(np.float32) for weight, value in read.items()}


def second_moments(
    model: Model, weights: Iterable[str], data: Iterable[Batch], threads: int, what: str, group: int | None = None
) -> dict[str, Array]:
    """Return the mean over all tokens of x x^T of the input x of each weight: float32 [k / group, group, group], by weight.

    Args:
        group: only products within groups of as many neighbouring channels; None for all of them, [1, k, k].

    Raises:
        DataError: there are no tokens, or a value is not finite.
    """
    read = values_read(model, weights)
    sums: dict[str, Any] = dict.fromkeys(read.values(), 0.0)
    counts = dict.fromkeys(read.values(), 0)
    for name, rows in tokens(model, read.values(), data, threads):
        grouped = rows.reshape(len(rows), -1, group or rows.shape[1]).swapaxes(0, 1)
        sums[name] = sums[name] + (grouped.swapaxes(1, 2) @ grouped).astype(np.float64)
        counts[name] += len(rows)
    for name, total in sums.items():
        if not counts[name]:
            raise DataError(f"{what}: the calibration data hold no tokens")
        check_finite(np.sum(total), name, what)
    return {weight: (sums[value] / counts[value]).astype(np.float32) for weight, value in read.items()}
