"""The measurements behind a report."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from gristmill.compression.report import BATCHES, Layer, Stage
from gristmill.formats import native
from gristmill.metrics import evaluate
from gristmill.model import Model
from gristmill.ops import OWN, Node, TensorType
from gristmill.runtime.session import Session
from gristmill.runtime.timing import latency, random_inputs
from gristmill.tensor import Bitmask, Int4, Tensor
from gristmill.tensor.parts import Array

Examples = tuple[Array, Array | None]
SAMPLE = 1024  # examples that the output error is taken on
SEQUENCES = 64  # as many of them where an example is a sequence


def measure_model(
    name: str, model: Model, original: Model, data: Examples | None, metric: str, seconds: float, threads: int
) -> Stage:
    """Measure a whole model: metric and output error on data where there is any, sizes, and latency on this machine."""
    session = Session(model, threads=threads)
    return Stage(
        name=name,
        metric=None if data is None or data[1] is None else evaluate(model, (data[0], data[1]), metric=metric),
        error=output_error(model, original, data, threads),
        file_bytes=len(native.to_bytes(model)),
        weight_bytes=model.nbytes,
        latency_ms={batch: 1e3 * latency(session, random_inputs(model, batch)) for batch in BATCHES},
        kernels={row["node"]: row["kernel"] for row in session.explain() if row["weight"]},
        seconds=seconds,
    )


def output_error(model: Model, original: Model, data: Examples | None, threads: int) -> float:
    """Return |y - y0| / |y0| over the first output, on data where there is any, else on random inputs."""
    inputs = random_inputs(original, examples_of(original))
    if data is not None:
        (name,) = original.inputs
        inputs = {name: np.ascontiguousarray(data[0][:SAMPLE], original.inputs[name].dtype)}
    output = original.outputs[0]
    before = Session(original, threads=threads).execute(inputs)[output].astype(np.float64)
    after = Session(model, threads=threads).execute(inputs)[output]
    return float(np.linalg.norm(after - before) / max(float(np.linalg.norm(before)), 1e-30))


def examples_of(model: Model) -> int:
    """Return how many examples the output error is taken on: fewer where an example is a sequence, which takes longer to run."""
    sequences = any(isinstance(dim, str) for kind in model.inputs.values() for dim in kind.shape[1:])
    return SEQUENCES if sequences or len(model.inputs) > 1 else SAMPLE


def measure_layers(before: Model, after: Model, threads: int) -> Iterator[Layer]:
    """Compare every weight that the two models share. Weights alike in all that time depends on are timed once."""
    timed: dict[Any, dict[int, float]] = {}

    def latency_of(tensor: Tensor) -> dict[int, float]:
        key = tensor.kind, tensor.shape, _describe(tensor), tensor.nbytes
        if key not in timed:
            timed[key] = _layer_latency(tensor, threads)
        return timed[key]

    for name in before.weights:
        old, new = before.tensors[name], after.tensors.get(name)
        if new is None or new.shape != old.shape:
            continue
        dense = old.dense().astype(np.float64)
        error = float(np.linalg.norm(new.dense() - dense) / max(float(np.linalg.norm(dense)), 1e-30))
        yield Layer(
            name=name,
            kind=_describe(new),
            shape=new.shape,
            error=error,
            sparsity=new.sparsity,
            bytes_before=old.nbytes,
            bytes_after=new.nbytes,
            latency_ms_before=latency_of(old),
            latency_ms_after=latency_of(new),
        )


def _describe(tensor: Tensor) -> str:
    if isinstance(tensor, Int4):
        return f"int4 g{tensor.group}"
    if isinstance(tensor, Bitmask):
        return f"bitmask {tensor.precision}" + (f" g{tensor.group}" if tensor.group else "")
    if tensor.kind != "sparse":
        return {"dense": "float32", "bf16": "bf16", "quantized": "int8"}[tensor.kind]
    rows, columns = tensor.block  # type: ignore[union-attr]
    return f"{rows}x{columns} {tensor.values.dtype}"  # type: ignore[union-attr]


def _layer_latency(tensor: Tensor, threads: int) -> dict[int, float]:
    """Return the milliseconds of one Linear with this weight, by batch size."""
    k = tensor.shape[1]
    node = Node("Linear", ("x", "weight"), ("y",), domain=OWN)
    layer = Model((node,), {"weight": tensor}, {"x": TensorType(np.dtype(np.float32), ("batch", k))}, ("y",))
    session = Session(layer, threads=threads)
    return {batch: 1e3 * latency(session, random_inputs(layer, batch)) for batch in BATCHES}
