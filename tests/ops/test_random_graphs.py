"""Any graph that a Model accepts runs, on kernels as on references; what cannot run is refused when the Model is made."""

import warnings
from typing import Any, ClassVar

import numpy as np
import pytest

from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.ops import OPS, OWN, Node, Op, TensorType
from gristmill.runtime.session import Session
from gristmill.tensor import Dense, Quantized, Sparse, Tensor, is_int8

SIZES = (0, 1, 2, 4, 4, 8)
SYMBOLS = ("batch", "length")
ATTRIBUTES = {
    "activation": ("relu", "gelu", "none such"),
    "temperature": (2.0, -1.0),
    "alpha": (0.5, 1.0),
    "axis": (-1, 0, 1),
    "epsilon": (1e-5,),
    "reduction": ("mean",),
    "approximate": ("tanh", "none"),
    "input_scale": (0.03, -1.0),
    "input_zero_point": (90, 128, 300),
    "to": ("float32", "float64", "int64"),
    "dtype": ("float32", "int64"),
    "mode": ("constant", "edge", "wrap", "linear", "nearest", "DCR"),
    "size": (1, 3, 0),
    "p": (1, 2, 0),
    "kernel_shape": ((1,), (2,), (2, 1)),
    "strides": ((1,), (2, 1), (0,)),
    "pads": ((0, 1), (1, 0, 1, 1)),
    "auto_pad": ("SAME_UPPER", "VALID", "none such"),
    "group": (1, 2, 0),
    "blocksize": (2, 0),
    "num_groups": (1, 2),
    "axes": ((0,), (-1, 1), (5,)),
    "block_size": (0, 2),
    "function": ("Exp", "Sqrt", "none such"),
    "perm": ((0,), (1, 0), (0, 1), (2, 0, 1), (1, 2, 0), (0, 2, 1)),
}
BY_TYPE = {int: (-1, 0, 1, 2), float: (0.5, 1.0), str: ("none", "float32"), tuple: ((), (0,), (1, 1), (0, 1, 2))}
WITH_KERNELS = [key for key, op in OPS.items() if type(op).bind is not Op.bind and op.pure]
ALL = [key for key, op in OPS.items() if op.pure]


class Draw:
    """Random parts of a small graph; most combinations do not fit, which is the point."""

    dtypes: ClassVar = (np.float32, np.float32, np.float32, np.float64, np.int64)

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def one(self, values):
        return values[self.rng.integers(len(values))]

    def array(self, shape, dtype):
        return (2 * self.rng.standard_normal(shape)).astype(dtype)

    def tensor(self) -> Tensor:
        if self.rng.random() < 0.5:
            return Dense(self.array([self.one(SIZES) for _ in range(self.rng.integers(4))], self.one(self.dtypes)))
        matrix = self.array((self.one(SIZES[1:]), 4 * self.one(SIZES[1:])), np.float32)
        block = self.one(((1, 1), (1, 2), (1, 4)))
        mask = self.rng.random((matrix.shape[0], matrix.shape[1] // block[1])) < 0.5
        sparse = Sparse.from_dense(matrix, mask.astype(np.uint8), block)
        return self.one((Quantized.from_dense(matrix), sparse, sparse.quantized()))

    def input(self) -> TensorType:
        shape = tuple(self.one((*SYMBOLS, *SIZES)) for _ in range(self.rng.integers(4)))
        return TensorType(np.dtype(self.one(self.dtypes)), shape)

    def attribute(self, key: str, kind: type) -> Any:
        return self.one(ATTRIBUTES[key]) if key in ATTRIBUTES else self.one(BY_TYPE[kind])

    def node(self, number: int, values: list[str]) -> Node:
        domain, name = self.one((*self.one((ALL, WITH_KERNELS)), (OWN, "Linear"), (OWN, "Linear")))
        op = OPS[domain, name]
        count = self.rng.integers(op.arity[0], max(op.arity[0], min(op.arity[1], 6)) + 1)
        inputs = [self.one(values) for _ in range(count)]
        if name == "Linear" and count > 2 and self.rng.random() < 0.3:
            inputs[2] = ""
        attributes = {key: self.attribute(key, kind) for key, kind in op.attributes.items() if self.rng.random() < 0.8}
        outputs = self.one((1, 1, 1, 2, 3))
        return Node(name, inputs, [f"n{number}.{i}" for i in range(outputs)], attributes, domain)

    def model(self) -> Model:
        tensors = {f"t{i}": self.tensor() for i in range(self.rng.integers(1, 6))}
        inputs = {f"x{i}": self.input() for i in range(self.rng.integers(1, 3))}
        values, nodes = [*tensors, *inputs], []
        while len(nodes) < 4:
            node = self.node(len(nodes), values)
            try:
                Model((*nodes, node), tensors, inputs, (node.name,))
            except ModelError:
                if self.rng.random() < 0.02:
                    break
                continue
            nodes.append(node)
            values += node.outputs
        return Model(nodes, tensors, inputs, tuple(dict.fromkeys(self.one(values) for _ in range(4))))

    def feed(self, model: Model) -> dict[str, np.ndarray]:
        sizes = {symbol: self.one((0, 1, 3, 4)) for symbol in SYMBOLS}
        return {name: self.array([sizes.get(dim, dim) for dim in kind.shape], kind.dtype) for name, kind in model.inputs.items()}


def answer(model: Model, inputs: dict[str, np.ndarray], reference: bool) -> dict[str, np.ndarray] | None:
    """Return the outputs; None if these sizes of the symbols do not fit, which only a run can know."""
    try:
        return Session(model, threads=2, reference=reference).run(**inputs)
    except ModelError:
        return None


@pytest.mark.parametrize("seed", range(8))
def test_kernels_and_references_agree(seed):
    compared = 0
    for graph in range(250):
        draw = Draw(1000 * seed + graph)
        model = draw.model()
        inputs = draw.feed(model)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of means over nothing
            want, got = answer(model, inputs, reference=True), answer(model, inputs, reference=False)
        assert (want is None) == (got is None), model.nodes
        if want is None or got is None or any(is_int8(tensor) for tensor in model.tensors.values()):
            continue
        compared += 1
        for name, value in want.items():
            assert got[name].dtype == value.dtype
            np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-3, err_msg=f"{name} of {model.nodes}")
    assert compared > 10
