"""Post-training quantisation: int8 weights with a scale per output channel, int4 weights and tables in groups, or bf16 weights.

int8 activations get a scale per row at run time or, with calibration data, one scale and zero point for good. int4 clips each
group to where the error is least: of the weights or, with calibration data, of the outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gristmill.compression.calibration import batches, norms, ranges, reads
from gristmill.compression.recipe import Context, Pass, is_number, targets
from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.ops import Node
from gristmill.tensor import BFloat16, Bitmask, Int4, Quantized, Sparse, Tensor, is_int8
from gristmill.tensor.int4 import LARGEST_GROUP
from gristmill.tensor.parts import Array

RATIOS = tuple(np.linspace(1.0, 0.5, 16))  # of a group's peak that clipping may leave


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantise the weights of Linear nodes, dense and sparse, and tables of embeddings.

    Weights that are quantised already stay, and so do blocks that no kernel reads: in int8 those whose inputs are no multiple of
    four, in int4 all.

    Args:
        precision: "int8"; "int4" in groups, for dense weights and tables, against int8 activations with a scale for each group;
            or "bf16", which halves dense weights, in the file as well, and rounds activations likewise where the CPU multiplies
            bf16.
        names: shell patterns of the weights to quantise; none for all.
        skip: shell patterns of weights to leave.
        calibration: None for int8 activation scales per row at run time, and for int4 weights of the least error themselves.
            Else what scales of int8 activations are fixed on, or what the inputs of int4 weights are, so that the error of their
            products is least: "data" for the data that `compress` is given, an array for a model of one input, a mapping of
            inputs, or an iterable of such batches. Static int8 scales are faster by the search for each row's largest value, less
            exact where values stray.
        percentile: of int8 activations, in (50, 100]; values beyond it on either side are clipped. 100 takes the smallest and the
            largest value.
        group: how many consecutive inputs of an int4 weight, or columns of a table, share a scale: a multiple of 8. 32 is more
            exact, 128 smaller (4.5 and 4.125 bits a weight).
        clip: whether an int4 group may clip its largest values, down to half of them, where that makes its error less.
        tables: int4 only: True for the tables that Gather looks rows up in as well, "only" for nothing else.

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
    group: int = 32
    clip: bool = True
    tables: bool | str = False

    def __post_init__(self) -> None:
        if self.precision not in ("int8", "int4", "bf16"):
            raise ModelError(f"Quantize: unknown precision {self.precision!r}; this version has int8, int4 and bf16")
        if self.calibration is not None and self.precision == "bf16":
            raise ModelError("Quantize: calibration chooses scales of int8 and int4; bf16 has none")
        if self.tables not in (False, True, "only") or (self.tables and self.precision != "int4"):
            raise ModelError(f'Quantize: tables is False or, with "int4", True or "only"; got {self.tables!r}')
        if type(self.group) is not int or self.group % 8 or not 8 <= self.group <= LARGEST_GROUP:
            raise ModelError(f"Quantize: group must be a multiple of 8 and at most {LARGEST_GROUP}, got {self.group!r}")
        if not is_number(self.percentile) or not 50 < self.percentile <= 100:
            raise ModelError(f"Quantize: percentile must lie above 50 and at most at 100, got {self.percentile!r}")

    @property
    def local(self) -> bool:
        return self.calibration is None

    def works_on(self, model: Model) -> list[str]:
        candidates = () if self.tables == "only" else model.weights
        if self.tables:
            candidates = tuple(dict.fromkeys((*candidates, *tables_of(model))))
        return targets(model, self.names, self.skip, candidates)

    def apply(self, model: Model, context: Context) -> Model:
        if self.precision == "int4":
            return self._int4(model, context)
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
            elif isinstance(tensor, Bitmask) and tensor.scale is None:
                quantized[name] = tensor.quantized("int8")
        result = model.replace(tensors=quantized)
        if self.calibration is None:
            return result
        kinds = Quantized, Sparse  # whose int8 products take static scales
        static = {name for name in chosen if isinstance(result.tensors[name], kinds) and is_int8(result.tensors[name])}
        data = batches(model, self.calibration, context, "Quantize")
        found = ranges(model, static, data, self.percentile, context.threads, "Quantize")
        return result.replace(nodes=tuple(with_scale(node, found) if reads(node, static) else node for node in result.nodes))

    def _int4(self, model: Model, context: Context) -> Model:
        chosen = [name for name in self.works_on(model) if is_float(model.tensors[name])]
        importance: dict[str, Array] = {}
        if self.calibration is not None:
            products = {name for name in chosen if name in model.weights}
            data = batches(model, self.calibration, context, "Quantize")
            importance = {name: norm**2 for name, norm in norms(model, products, data, context.threads, "Quantize").items()}
        ratios = RATIOS if self.clip else RATIOS[:1]
        tensors: dict[str, Tensor] = {}
        for name in chosen:
            tensor = model.tensors[name]
            values = tensor.dense()
            if not np.isfinite(values).all():
                raise ModelError(f"Quantize: '{name}' {list(values.shape)} is not finite")
            codes = Int4.from_dense(values, self.group, ratios, importance.get(name))
            tensors[name] = Bitmask.of(codes, tensor.mask) if isinstance(tensor, Bitmask) else codes
        return model.replace(tensors=tensors)


def is_float(tensor: Tensor) -> bool:
    """Whether a tensor can be int4 and is not quantised yet: a dense one, or single elements."""
    if isinstance(tensor, Bitmask):
        return tensor.scale is None
    return tensor.kind in ("dense", "bf16") and tensor.dtype == np.float32


def tables_of(model: Model) -> tuple[str, ...]:
    """Return the names of the matrices that are read by rows alone, or by rows and by products: tables of embeddings."""
    readers: dict[str, list[bool]] = {}
    for node in model.nodes:
        for place, name in enumerate(node.inputs):
            rows = node.op == "Gather" and place == 0 and node.attributes.get("axis", 0) in (0, -2)
            if rows or not (node.op == "Linear" and place == 1):
                readers.setdefault(name, []).append(rows)
    return tuple(n for n, tensor in model.tensors.items() if len(tensor.shape) == 2 and all(readers.get(n, (False,))))


def with_scale(node: Node, found: Mapping[str, tuple[float, float]]) -> Node:
    """Return a Linear that rounds its input with the 256 codes spread over the input's range, 0 among them."""
    low, high = found[node.inputs[0]]
    scale = float(np.float32(max((high - low) / 255, 2.0**-100)))
    attributes = {**node.attributes, "input_scale": scale, "input_zero_point": int(np.clip(np.rint(-low / scale), 0, 255))}
    return replace(node, attributes=attributes)
