"""Where sparsity begins to pay: one layer as it is stored against its dense twin, on this machine."""

import numpy as np

from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.ops import OWN, Node, TensorType
from gristmill.runtime import costs
from gristmill.runtime.session import Session
from gristmill.runtime.timing import latency, random_inputs
from gristmill.tensor import Dense, Quantized, Sparse, Tensor

BATCHES = (1, 256)  # rows that a layer is timed at
NEVER = 0.99


def layer_latency(tensor: Tensor, threads: int) -> dict[str, float]:
    """Return the milliseconds of one Linear with this weight, by rows."""
    k = tensor.shape[1]
    node = Node("Linear", ("x", "weight"), ("y",), domain=OWN)
    layer = Model((node,), {"weight": tensor}, {"x": TensorType(np.dtype(np.float32), ("batch", k))}, ("y",))
    session = Session(layer, threads=threads)
    return {str(batch): 1e3 * latency(session, random_inputs(layer, batch)) for batch in BATCHES}


def dense_twin(tensor: Sparse, threads: int) -> Tensor:
    """Return the same matrix stored whole, in the same precision."""
    return Dense(tensor.dense()) if tensor.scale is None else Quantized.from_dense(tensor.dense(), threads)


def break_even(tensor: Sparse, threads: int) -> dict[str, float | None]:
    """Return the sparsity from which a matrix of this shape, block and precision is faster than dense on this machine, by rows;
    None where even 99 % is not. It is what plans go by: see `runtime.costs`."""
    n, k = tensor.shape
    rows, columns = tensor.block if tensor.scale is None or tensor.block[1] > 1 else (1, 4)  # single codes run in blocks
    found = {}
    for batch in BATCHES:
        try:
            share = costs.break_even(k, n, batch, f"{rows}x{columns}", tensor.values.dtype.name, threads)
        except ModelError:  # no product has such blocks
            share = None
        found[str(batch)] = None if share is None or share > NEVER else round(share, 4)
    return found
