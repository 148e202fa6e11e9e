"""The model refuses graphs that do not hold together, and says why."""

import gc
import weakref

import numpy as np
import pytest

import gristmill as gm
from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.ops import OWN, Node, TensorType
from gristmill.tensor import Dense

FLOAT = np.dtype(np.float32)
X = {"x": TensorType(FLOAT, ("batch", 4))}


def weight(n=3, k=4):
    return Dense(np.ones((n, k), np.float32))


def test_nodes_are_put_in_order():
    nodes = (Node("Relu", ("h",), ("y",)), Node("Linear", ("x", "w"), ("h",), domain=OWN))
    model = Model(nodes, {"w": weight()}, X, ("y",))
    assert [node.op for node in model.nodes] == ["Linear", "Relu"]
    assert str(model.types["y"]) == "float32[batch, 3]"


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ((Node("Relu", ("b",), ("a",)), Node("Relu", ("a",), ("b",))), "cyclic"),
        ((Node("Relu", ("nowhere",), ("y",)),), "nowhere"),
        ((Node("Relu", ("x",), ("y",)), Node("Tanh", ("x",), ("y",))), "made twice"),
        ((Node("Relu", ("x",), ("x",)),), "made twice"),
        ((Node("Frobnicate", ("x",), ("y",)),), "unknown operator"),
        ((Node("Relu", ("x", "x"), ("y",)),), "takes 1 to 1 inputs"),
        ((Node("Relu", ("",), ("y",)),), "takes 1 to 1 inputs"),
        ((Node("Relu", ("x",), ("y", "z")),), "2 are named"),
        ((Node("Relu", ("x",), ("y",), {"slope": 1.0}),), "unknown attribute"),
        ((Node("LayerNormalization", ("x", "g"), ("y",), {"epsilon": "small"}),), "attribute epsilon"),
        ((Node("Linear", ("x", "wide"), ("y",), domain=OWN),), "last dimensions must be equal"),
        ((Node("Linear", ("x", "x"), ("y",), domain=OWN),), "must be a tensor of the model"),
        ((Node("Linear", ("x", "w", "g"), ("y",), domain=OWN),), "bias"),
        ((Node("Add", ("x", "wide"), ("y",)),), "do not broadcast"),
    ],
)
def test_bad_graphs_are_refused(nodes, message):
    tensors = {"w": weight(), "wide": weight(3, 5), "g": Dense(np.ones(4, np.float32))}
    with pytest.raises(ModelError, match=message):
        Model(nodes, tensors, X, ("y",))


def test_outputs_must_exist():
    with pytest.raises(ModelError, match="nothing"):
        Model((), {}, X, ("nothing",))
    with pytest.raises(ModelError, match="none given"):
        Model((), {}, X, ())


def test_a_name_is_an_input_or_a_tensor():
    with pytest.raises(ModelError, match="both"):
        Model((), {"x": weight()}, X, ("x",))


def test_models_are_immutable_and_share_tensors():
    model = gm.zoo.mlp([4, 3])
    other = model.replace(tensors={"layer0.bias": Dense(np.ones(3, np.float32))})
    assert other.tensors["layer0.weight"] is model.tensors["layer0.weight"]
    assert not model.tensors["layer0.bias"].array.any()
    with pytest.raises(TypeError):
        model.tensors["layer0.bias"] = weight()
    with pytest.raises(AttributeError):
        model.outputs = ()
    with pytest.raises(ValueError, match="read-only"):
        model.tensors["layer0.weight"].array[0, 0] = 1


def test_mlp_is_seeded():
    a, b, c = gm.zoo.mlp([4, 3], seed=1), gm.zoo.mlp([4, 3], seed=1), gm.zoo.mlp([4, 3], seed=2)
    assert np.array_equal(a.tensors["layer0.weight"].array, b.tensors["layer0.weight"].array)
    assert not np.array_equal(a.tensors["layer0.weight"].array, c.tensors["layer0.weight"].array)


@pytest.mark.parametrize("bad", [([4],), ([4, 0],), ([4, 3], "softplus")])
def test_mlp_refuses(bad):
    with pytest.raises(ModelError):
        gm.zoo.mlp(*bad)


def test_a_model_and_its_session_are_freed():
    model = gm.zoo.mlp([4, 3])
    model.run(x=np.zeros((1, 4), np.float32))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
