"""Measure how long a session takes."""

import time
from collections.abc import Mapping
from statistics import median

import numpy as np

from gristmill.model import Model
from gristmill.runtime.session import Session
from gristmill.tensor.parts import Array

REPEATS = 15
SECONDS = 0.15  # spent on one figure at most, but for the first call


def latency(session: Session, inputs: Mapping[str, Array]) -> float:
    """Return the median seconds of a run after a first one that plans and packs."""
    session.execute(inputs)
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < SECONDS:
        begin = time.perf_counter()
        session.execute(inputs)
        times.append(time.perf_counter() - begin)
    return median(times)


def random_inputs(model: Model, batch: int, seed: int = 0) -> dict[str, Array]:
    """Draw float32 inputs for a model, symbolic dimensions set to `batch`."""
    rng = np.random.default_rng(seed)
    inputs = {}
    for name, kind in model.inputs.items():
        shape = tuple(batch if isinstance(dim, str) else dim for dim in kind.shape)
        inputs[name] = rng.standard_normal(shape).astype(kind.dtype)
    return inputs
