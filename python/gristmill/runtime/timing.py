"""Measure how long a session takes."""

import time
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from gristmill.model import Model
from gristmill.tensor.parts import Array

if TYPE_CHECKING:
    from gristmill.runtime.session import Session

REPEATS = 15
SECONDS = 0.15  # spent on one figure at most, but for the first call
LENGTH = 16  # what symbolic dimensions other than the batch are taken as: short sentences
MOVES = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Flatten")  # keep the values of their first input


def latency(session: "Session", inputs: Mapping[str, Array]) -> float:
    """Return the median seconds of a run after a first one that plans and packs."""
    session.execute(inputs)
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < SECONDS:
        begin = time.perf_counter()
        session.execute(inputs)
        times.append(time.perf_counter() - begin)
    return median(times)


def random_inputs(model: Model, batch: int, seed: int = 0) -> dict[str, Array]:
    """Draw inputs for a model: normal floats, ids within the tables that they are looked up in, ones for masks and flags.

    Symbolic leading dimensions are set to `batch`, other ones to LENGTH.
    """
    leading = {kind.shape[0] for kind in model.inputs.values() if kind.shape}
    shapes = {
        name: tuple((batch if dim in leading else LENGTH) if isinstance(dim, str) else dim for dim in kind.shape)
        for name, kind in model.inputs.items()
    }
    return draw(model, shapes, seed)


def draw(model: Model, shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Array]:
    """Draw inputs of these shapes."""
    rng, rows = np.random.default_rng(seed), table_rows(model)
    inputs = {}
    for name, kind in model.inputs.items():
        shape = shapes[name]
        if name in rows:
            inputs[name] = rng.integers(0, rows[name], shape).astype(kind.dtype)
        elif kind.dtype.kind in "biu":
            inputs[name] = np.ones(shape, kind.dtype)
        else:
            inputs[name] = rng.standard_normal(shape).astype(kind.dtype)
    return inputs


def table_rows(model: Model) -> dict[str, int]:
    """Return the rows of the smallest table that each input is looked up in, perhaps cast or reshaped first; at least 1."""
    source = {name: name for name in model.inputs}
    rows: dict[str, int] = {}
    for node in model.nodes:
        first = source.get(node.input(0))
        if first is not None and node.op in MOVES:
            source[node.name] = first
        name = source.get(node.input(1))
        if node.op in ("Gather", "GatherElements") and name is not None and model.types[node.inputs[0]].known:
            extent = model.types[node.inputs[0]].shape[node.attributes.get("axis", 0)]
            if isinstance(extent, int):
                rows[name] = max(1, min(extent, rows.get(name, extent)))
    return rows
