"""Post-training quantisation: int8 weights with a scale per output channel, or bf16 weights.

int8 activations get a scale per row at run time or, with calibration data, one scale and zero point for good.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gristmill.compression.recipe import Context, Pass, is_number, targets
from gristmill.errors import DataError, ModelError
from gristmill.model import Model
from gristmill.ops import Node
from gristmill.runtime.session import Session
from gristmill.tensor import BFloat16, Quantized, Sparse, Tensor, is_int8
from gristmill.tensor.parts import Array

BATCH = 64  # examples that calibration runs at a time


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantise the weights of Linear nodes, dense and sparse.

    Weights that are int8 already stay, and so do sparse ones whose inputs are no multiple of four: no int8 kernel reads them.

    Args:
        precision: "int8"; or "bf16", which halves dense weights, in the file as well, and rounds activations likewise where the
            CPU multiplies bf16.
        names: shell patterns of the weights to quantise; none for all.
        skip: shell patterns of weights to leave.
        calibration: None for activation scales per row at run time. Else what scales of int8 activations are fixed on: "data"
            for the data that `compress` is given, an array for a model of one input, a mapping of inputs, or an iterable of such
            batches. Faster by the search for each row's largest value, less exact where values stray.
        percentile: in (50, 100]; values beyond it on either side are clipped. 100 takes the smallest and the largest value.

    Raises:
        ModelError: the precision is unknown, or a setting does not go with it.

    Example:
        >>> import gristmill as gm
        >>> model, _ = gm.compress(gm.zoo.mlp([64, 32]), [gm.Quantize("int8")])
        >>> model.tensors["layer0.weight"].kind
        'quantized'
    """

    precision: str = "int8"
    names: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    calibration: Any = None
    percentile: float = 100.0

    def __post_init__(self) -> None:
        if self.precision not in ("int8", "bf16"):
            raise ModelError(f"Quantize: unknown precision {self.precision!r}; this version has int8 and bf16")
        if self.calibration is not None and self.precision != "int8":
            raise ModelError("Quantize: calibration chooses the scales of int8 activations; bf16 has none")
        if not is_number(self.percentile) or not 50 < self.percentile <= 100:
            raise ModelError(f"Quantize: percentile must lie above 50 and at most at 100, got {self.percentile!r}")

    def apply(self, model: Model, context: Context) -> Model:
        chosen = targets(model, self.names, self.skip)
        quantized: dict[str, Tensor] = {}
        for name in chosen:
            tensor = model.tensors[name]
            if self.precision == "bf16":
                if tensor.kind == "dense" and tensor.dtype == np.float32:
                    quantized[name] = BFloat16.from_dense(tensor.dense())
            elif tensor.kind in ("dense", "bf16"):
                quantized[name] = Quantized.from_dense(tensor.dense(), context.threads)
            elif isinstance(tensor, Sparse) and tensor.scale is None and tensor.shape[1] % 4 == 0:
                quantized[name] = tensor.quantized(context.threads)
        result = model.replace(tensors=quantized)
        if self.calibration is None:
            return result
        static = {name for name in chosen if is_int8(result.tensors[name])}
        ranges = observed(model, static, batches(model, self.calibration, context), self.percentile, context.threads)
        return result.replace(nodes=tuple(with_scale(node, ranges) if reads(node, static) else node for node in result.nodes))

    def describe(self) -> dict[str, Any]:
        calibration = self.calibration if self.calibration is None or isinstance(self.calibration, str) else "given"
        return {**replace(self, calibration=None).as_settings(), "calibration": calibration}

    def as_settings(self) -> dict[str, Any]:
        return super().describe()


def reads(node: Node, weights: set[str]) -> bool:
    """Whether a node is a Linear with one of these weights."""
    return node.op == "Linear" and node.inputs[1] in weights


def batches(model: Model, calibration: Any, context: Context) -> Iterator[Mapping[str, Array]]:
    """Yield calibration data as the model's inputs.

    Raises:
        DataError: there are none, or they do not fit.
    """
    if isinstance(calibration, str):
        if calibration != "data" or context.data is None:
            raise DataError(
                f"Quantize: calibration={calibration!r} needs data: pass compress(..., data=...) and 'data', or arrays"
            )
        calibration = context.data[0]
    if isinstance(calibration, (np.ndarray, Mapping)):
        calibration = [calibration]
    if not isinstance(calibration, Iterable):
        raise DataError(f"Quantize: calibration must be arrays or batches of them, got {type(calibration).__name__}")
    for batch in calibration:
        if isinstance(batch, Mapping):
            yield batch
            continue
        if len(model.inputs) != 1:
            raise DataError(f"Quantize: the model has inputs {list(model.inputs)}; calibration batches must map each to an array")
        ((name, kind),) = model.inputs.items()
        array = np.ascontiguousarray(batch, kind.dtype)
        for first in range(0, len(array), BATCH):
            yield {name: array[first : first + BATCH]}


def observed(
    model: Model, weights: set[str], data: Iterable[Mapping[str, Array]], percentile: float, threads: int
) -> dict[str, tuple[float, float]]:
    """Return the range of every value that a Linear with one of the weights reads, over all batches.

    Raises:
        DataError: there are no batches, or a value is not finite.
    """
    values = tuple(dict.fromkeys(node.inputs[0] for node in model.nodes if reads(node, weights)))
    made = tuple(name for name in values if name not in model.inputs)
    session = Session(model.replace(outputs=made or model.outputs), threads=threads)
    ranges: dict[str, tuple[float, float]] = {}
    for batch in data:
        found = {**batch, **session.execute(batch)}
        for name in values:
            low, high = np.percentile(found[name], (100 - percentile, percentile)) if found[name].size else (0.0, 0.0)
            if not (np.isfinite(low) and np.isfinite(high)):
                raise DataError(f"Quantize: '{name}' is not finite on the calibration data")
            before = ranges.get(name, (0.0, 0.0))
            ranges[name] = (min(before[0], float(low)), max(before[1], float(high)))
    if not ranges:
        raise DataError("Quantize: there are no calibration batches")
    return ranges


def with_scale(node: Node, ranges: Mapping[str, tuple[float, float]]) -> Node:
    """Return a Linear that rounds its input with the 256 codes spread over the input's range, 0 among them."""
    low, high = ranges[node.inputs[0]]
    scale = float(np.float32(max((high - low) / 255, 2.0**-100)))
    attributes = {**node.attributes, "input_scale": scale, "input_zero_point": int(np.clip(np.rint(-low / scale), 0, 255))}
    return replace(node, attributes=attributes)
