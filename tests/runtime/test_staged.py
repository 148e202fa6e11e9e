"""Graphs whose shapes follow from arithmetic or from values."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gristmill import ops
from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.ops import Node, Op, TensorType
from gristmill.ops.op import Undetermined
from gristmill.runtime.session import Session
from gristmill.tensor import Dense

FLOAT = np.dtype(np.float32)


class Positive(Op):
    """The positive elements: how many depends on the values."""

    name = "TestPositive"
    arity = (1, 1)

    def infer(self, node, types, constants):
        raise Undetermined

    def reference(self, node, *inputs):
        return [inputs[0][inputs[0] > 0]]


class Fill(Op):
    """Ones of a shape given as a vector."""

    name = "TestFill"
    arity = (1, 1)

    def infer(self, node, types, constants):
        if constants[0] is None:
            raise Undetermined
        return [TensorType(FLOAT, tuple(int(dim) for dim in constants[0].dense()))]

    def reference(self, node, *inputs):
        return [np.ones(inputs[0], np.float32)]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for op in (Positive, Fill):
        monkeypatch.setitem(ops.OPS, ("", op.name), op())


def graph(*nodes, outputs, tensors=None, **inputs):
    return Model(nodes, tensors or {}, {name: TensorType(*kind) for name, kind in inputs.items()}, outputs)


def test_values_decide_shapes():
    nodes = (
        Node("Relu", ("x",), ("head",)),
        Node("TestPositive", ("head",), ("kept",)),
        Node("Relu", ("kept",), ("middle",)),
        Node("TestPositive", ("middle",), ("again",)),
        Node("Add", ("again", "one"), ("tail",)),
    )
    model = graph(
        *nodes, outputs=("head", "kept", "tail", "one"), tensors={"one": Dense(np.ones(1, np.float32))}, x=(FLOAT, ("n",))
    )
    session = Session(model)
    for x in (np.array([1, -2, 3], np.float32), np.array([-1, -2, -3], np.float32), np.array([4, 5, 6], np.float32)):
        made = session.run(x=x)
        np.testing.assert_array_equal(made["head"], np.maximum(x, 0))
        np.testing.assert_array_equal(made["kept"], x[x > 0])
        np.testing.assert_array_equal(made["tail"], x[x > 0] + 1)
        np.testing.assert_array_equal(made["one"], [1])


def test_a_shape_may_be_an_input():
    session = Session(graph(Node("TestFill", ("s",), ("y",)), outputs=("y",), s=(np.dtype(np.int64), (2,))))
    assert session.run(s=np.array([2, 3]))["y"].shape == (2, 3)
    assert session.run(s=np.array([4, 1]))["y"].shape == (4, 1)


def test_a_constant_shape_is_planned():
    model = graph(Node("TestFill", ("s",), ("y",)), outputs=("y",), tensors={"s": Dense(np.array([2, 3]))})
    assert model.types["y"] == TensorType(FLOAT, (2, 3))
    assert Session(model).run()["y"].shape == (2, 3)


def test_what_numpy_refuses_names_the_node():
    session = Session(graph(Node("TestFill", ("s",), ("y",)), outputs=("y",), s=(np.dtype(np.int64), (2,))))
    with pytest.raises(ModelError, match="TestFill 'y'"):
        session.run(s=np.array([-2, 3]))


def test_such_a_graph_cannot_write_to_bound_memory():
    session = Session(graph(Node("TestPositive", ("x",), ("y",)), outputs=("y",), x=(FLOAT, (3,))))
    with pytest.raises(ModelError, match="cannot be written"):
        session.execute({"x": np.ones(3, np.float32)}, {"y": np.ones(3, np.float32)})


def test_threads_share_a_session_of_stages():
    nodes = (Node("TestPositive", ("x",), ("kept",)), Node("Add", ("kept", "one"), ("y",)))
    session = Session(graph(*nodes, outputs=("y",), tensors={"one": Dense(np.ones(1, np.float32))}, x=(FLOAT, ("n",))), threads=2)
    rng = np.random.default_rng(0)
    given = [rng.standard_normal(n).astype(np.float32) for n in (1, 5, 5, 30, 100)]
    stacked = np.stack([np.arange(-1, 3)] * 3).astype(np.float32)

    def work(first):
        for i in range(10):
            x = given[(first + i) % len(given)]
            np.testing.assert_array_equal(session.run(x=x)["y"], x[x > 0] + 1)
            np.testing.assert_array_equal(session.map(x=stacked)["y"], [[2, 3]] * 3)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
