"""Post-training quantisation: int8 weights with a scale per output channel, or bf16 weights.

int8 activations get a scale per row at run time or, with calibration data, one scale and zero point for good.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gristmill.compression.calibration import batches, ranges, reads
from gristmill.compression.recipe import Context, Pass, is_number, targets
from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.ops import Node
from gristmill.tensor import BFloat16, Quantized, Sparse, Tensor


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

    @property
    def local(self) -> bool:
        return self.calibration is None

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
        static = {name for name in chosen if result.tensors[name].kind == "quantized"}
        data = batches(model, self.calibration, context, "Quantize")
        found = ranges(model, static, data, self.percentile, context.threads, "Quantize")
        return result.replace(nodes=tuple(with_scale(node, found) if reads(node, static) else node for node in result.nodes))

    def describe(self) -> dict[str, Any]:
        calibration = self.calibration if self.calibration is None or isinstance(self.calibration, str) else "given"
        return {**replace(self, calibration=None).as_settings(), "calibration": calibration}

    def as_settings(self) -> dict[str, Any]:
        return super().describe()


def with_scale(node: Node, found: Mapping[str, tuple[float, float]]) -> Node:
    """Return a Linear that rounds its input with the 256 codes spread over the input's range, 0 among them."""
    low, high = found[node.inputs[0]]
    scale = float(np.float32(max((high - low) / 255, 2.0**-100)))
    attributes = {**node.attributes, "input_scale": scale, "input_zero_point": int(np.clip(np.rint(-low / scale), 0, 255))}
    return replace(node, attributes=attributes)
