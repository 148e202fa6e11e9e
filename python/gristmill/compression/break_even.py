"""Where sparsity begins to pay: the time of one layer as it is stored against its dense twin, measured on this machine."""

from functools import lru_cache

import numpy as np

from gristmill.model import Model
from gristmill.ops import OWN, Node, TensorType
from gristmill.runtime.session import Session
from gristmill.runtime.timing import latency, random_inputs
from gristmill.tensor import Bitmask, Dense, Int4, Quantized, Sparse, Tensor
from gristmill.tensor.parts import Array

BATCHES = (1, 256)  # rows that a layer is timed at
SHARES = (0.5, 0.7, 0.9)  # sparsities that the line is drawn through
NEVER = 0.99


def layer_latency(tensor: Tensor, threads: int) -> dict[str, float]:
    """Return the milliseconds of one Linear with this weight, by rows."""
    k = tensor.shape[1]
    node = Node("Linear", ("x", "weight"), ("y",), domain=OWN)
    layer = Model((node,), {"weight": tensor}, {"x": TensorType(np.dtype(np.float32), ("batch", k))}, ("y",))
    session = Session(layer, threads=threads)
    return {str(batch): 1e3 * latency(session, random_inputs(layer, batch)) for batch in BATCHES}


def dense_twin(tensor: Sparse | Bitmask, threads: int) -> Tensor:
    """Return the same matrix stored whole, in the same precision."""
    if isinstance(tensor, Bitmask) and tensor.precision == "int4":
        return Int4.from_dense(tensor.dense(), tensor.group)
    return Dense(tensor.dense()) if tensor.scale is None else Quantized.from_dense(tensor.dense(), threads)


def break_even(tensor: Sparse | Bitmask, threads: int) -> dict[str, float | None]:
    """Return the sparsity from which a matrix of this shape, block and precision is faster than dense on this machine, by rows;
    None where even 99 % is not.

    A sparse layer takes a constant and a time for each block that is stored. Both come from a line through random matrices of
    three sparsities.
    """
    if isinstance(tensor, Bitmask):
        return dict(_break_even(tensor.matrix_shape, (1, 1), tensor.precision, threads))
    return dict(_break_even(tensor.shape, tensor.block, str(tensor.values.dtype), threads))


@lru_cache(maxsize=64)
def _break_even(
    shape: tuple[int, int], block: tuple[int, int], precision: str, threads: int
) -> tuple[tuple[str, float | None], ...]:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape, dtype=np.float32)
    times = []
    for share in SHARES:
        mask = rng.random((shape[0] // block[0], shape[1] // block[1])) >= share
        times.append(layer_latency(_stored(weight, mask, block, precision, threads), threads))
    whole = layer_latency(dense_twin(_stored(weight, np.ones_like(mask), block, precision, threads), threads), threads)
    return tuple((rows, _crossing([each[rows] for each in times], whole[rows])) for rows in whole)


def _stored(weight: Array, mask: Array, block: tuple[int, int], precision: str, threads: int) -> Sparse | Bitmask:
    if block == (1, 1):
        return Bitmask.from_dense(weight, mask, precision)
    sparse = Sparse.from_dense(weight, mask, block)
    return sparse.quantized(threads) if precision == "int8" else sparse


def _crossing(times: list[float], dense: float) -> float | None:
    """Return where the line through the times at SHARES meets the time of dense.

    Example:
        >>> _crossing([5.0, 3.0, 1.0], 4.0)
        0.6
    """
    slope, constant = np.polyfit([1 - share for share in SHARES], times, 1)
    if slope <= 0:  # what is stored costs nothing that could be measured
        return 0.0 if max(times) <= dense else None
    share = 1 - (dense - constant) / slope
    return None if share > NEVER else round(float(max(share, 0.0)), 4)
