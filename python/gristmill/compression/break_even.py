"""Where sparsity begins to pay: one layer as it is stored against its dense twin, on this machine."""

import numpy as np

from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.ops import OWN, Node, TensorType
from gristmill.runtime import costs
from gristmill.runtime.session import Session
from gristmill.runtime.timing import latency, random_inputs
from gristmill.tensor import Bitmask, Dense, Int4, Quantized, Sparse, Tensor

BATCHES = (1, 256)  # rows that a layer is timed at
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
    None where even 99 % is not. It is what plans go by: see `runtime.costs`."""
    n, k = tensor.shape
    if isinstance(tensor, Bitmask):
        pattern, dtype = "bitmask", tensor.precision
    else:
        pattern, dtype = blocks_of(tensor), tensor.values.dtype.name
    found = {}
    for batch in BATCHES:
        try:
            share = costs.break_even(k, n, batch, pattern, dtype, threads)
        except ModelError:  # no product has such blocks
            share = None
        found[str(batch)] = None if share is None or share > NEVER else round(share, 4)
    return found


def blocks_of(tensor: Sparse) -> str:
    """Name the blocks of a weight, such as "1x4"."""
    return "x".join(map(str, tensor.block))
