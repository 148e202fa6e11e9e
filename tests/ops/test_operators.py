"""Operators one by one: symbolic shapes that stay, values that planning knows, views without copies, and what is refused."""

import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest

from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.ops import OPS, Node, TensorType
from gristmill.runtime.session import Session
from gristmill.tensor import Dense

FLOAT, INT64 = np.dtype(np.float32), np.dtype(np.int64)


def single(op, x, *constants, outputs=("y",), **attributes):
    """A model of one node over an input x and constants."""
    tensors = {f"c{i}": Dense(np.asarray(value)) for i, value in enumerate(constants)}
    node = Node(op, ("x", *tensors), outputs, attributes)
    return Model((node,), tensors, {"x": x if isinstance(x, TensorType) else TensorType(FLOAT, x)}, outputs)


def shape(op, x, *constants, **attributes):
    return single(op, x, *constants, **attributes).types["y"].shape


def ints(*items):
    return np.array(items, np.int64)


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (lambda: shape("Reshape", ("batch", "length", 384), ints(0, 0, 12, 32)), ("batch", "length", 12, 32)),
        (lambda: shape("Reshape", ("batch", "length", 12, 32), ints(0, 0, -1)), ("batch", "length", 384)),
        (lambda: shape("Reshape", ("batch", 512, 1, 1), ints(-1, 512)), ("batch", 512)),
        (lambda: shape("Reshape", ("batch", 4, 6), ints(-1, 6)), ("y.0", 6)),
        (lambda: shape("Flatten", ("batch", 3, 4)), ("batch", 12)),
        (lambda: shape("Unsqueeze", ("batch", "length"), ints(1, 2)), ("batch", 1, 1, "length")),
        (lambda: shape("Squeeze", ("batch", 1, 7), ints(1)), ("batch", 7)),
        (lambda: shape("Transpose", ("batch", "length", 12, 32), perm=(0, 2, 1, 3)), ("batch", 12, "length", 32)),
        (lambda: shape("ReduceMean", ("batch", "length", 8), ints(-1)), ("batch", "length", 1)),
        (lambda: shape("ReduceSum", ("batch", "length", 8), ints(1), keepdims=0), ("batch", 8)),
        (lambda: shape("Slice", ("batch", 9), ints(2), ints(-1), ints(1)), ("batch", 6)),
        (lambda: shape("Slice", ("batch", 9), ints(0), ints(2**63 - 1), ints(0)), ("batch", 9)),
        (lambda: shape("Expand", ("batch", 1), ints(1, 5)), ("batch", 5)),
        (lambda: shape("Pad", ("batch", 4), ints(0, 1, 0, 2)), ("batch", 7)),
        (lambda: shape("ArgMax", ("batch", 4), axis=1, keepdims=0), ("batch",)),
        (lambda: shape("TopK", ("batch", 9), ints(3), outputs=("y", "i")), ("batch", 3)),
        (lambda: shape("NonZero", ("batch", 9)), (2, "y.1")),
    ],
    ids=range(17),
)
def test_symbols_stay_where_they_pass(made, wanted):
    assert made() == wanted


@pytest.mark.parametrize("reference", [False, True])
def test_shape_arithmetic_costs_no_step(reference):
    nodes = (
        Node("Shape", ("x",), ("s",)),
        Node("Slice", ("s", "zero", "one"), ("batch",)),
        Node("Concat", ("batch", "rest"), ("target",), {"axis": 0}),
        Node("Reshape", ("x", "target"), ("y",)),
    )
    tensors = {"zero": Dense(ints(0)), "one": Dense(ints(1)), "rest": Dense(ints(2, 3))}
    model = Model(nodes, tensors, {"x": TensorType(FLOAT, ("batch", 6))}, ("y",))
    session = Session(model, threads=1, reference=reference)
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    np.testing.assert_array_equal(session.run(x=x)["y"], x.reshape(4, 2, 3))
    assert len(session.explain(x=(4, 6))) == int(reference)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.bool_, np.float16])
def test_views_are_no_steps_in_any_dtype(dtype):
    nodes = (
        Node("Unsqueeze", ("x", "axis"), ("a",)),
        Node("Identity", ("a",), ("b",)),
        Node("Transpose", ("b",), ("c",), {"perm": (1, 0, 2)}),
        Node("Flatten", ("c",), ("y",), {"axis": 2}),
    )
    kind = TensorType(np.dtype(dtype), ("batch", 5))
    session = Session(Model(nodes, {"axis": Dense(ints(1))}, {"x": kind}, ("y", "a")), threads=1)
    assert session.explain(x=(1, 5)) == []
    x = np.arange(5).reshape(1, 5).astype(dtype)
    made = session.run(x=x)
    np.testing.assert_array_equal(made["y"], x)
    np.testing.assert_array_equal(made["a"], x[:, None])
    made["y"][...] = 0
    np.testing.assert_array_equal(session.run(x=x)["y"], x)  # a caller's copy is its own


def test_a_view_of_what_a_caller_bound_lands_there():
    model = single("Reshape", (4, 6), ints(3, 8))
    out = np.zeros((3, 8), np.float32)
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert Session(model, threads=1).execute({"x": x}, {"y": out})["y"] is out
    np.testing.assert_array_equal(out, x.reshape(3, 8))


def test_a_shape_that_is_an_input_is_planned_when_it_is_known():
    kinds = {"x": TensorType(FLOAT, ("n",)), "target": TensorType(INT64, (2,))}
    nodes = (Node("Reshape", ("x", "target"), ("r",)), Node("Exp", ("r",), ("y",)))
    session = Session(Model(nodes, {}, kinds, ("y",)), threads=1)
    for rows in (2, 3, 2):
        made = session.run(x=np.zeros(6, np.float32), target=ints(rows, -1))["y"]
        np.testing.assert_array_equal(made, np.ones((rows, 6 // rows), np.float32))


REFUSED = [
    ("Reshape", (4, 6), [ints(5, 5)], {}, "cannot reshape"),
    ("Reshape", (4, 6), [ints(-1, -1)], {}, "cannot reshape"),
    ("Squeeze", (4, 6), [ints(0)], {}, "cannot squeeze"),
    ("Transpose", (4, 6), [], {"perm": (0, 0)}, "no order"),
    ("Concat", (4, 6), [np.zeros((4, 5), np.float32)], {"axis": 0}, "float32"),
    ("Add", (4, 6), [np.zeros((5,), np.float32)], {}, "do not broadcast"),
    ("Less", (4, 6), [np.zeros((6,), np.float64)], {}, "dtypes differ"),
    ("ReduceSum", (4, 6), [ints(2)], {}, "out of range"),
    ("ReduceSum", (4, 6), [ints(1, -1)], {}, "twice"),
    ("Softmax", (4, 6), [], {"axis": 2}, "out of range"),
    ("Split", (4, 6), [ints(1, 2)], {}, "cannot split"),
    ("Slice", (4, 6), [ints(0), ints(1), ints(0), ints(0)], {}, "step is 0"),
    ("Expand", (4, 6), [ints(3, 6)], {}, "do not broadcast"),
    ("Tile", (4, 6), [ints(1)], {}, "repeats"),
    ("Pad", (4, 6), [ints(-5, 0, 0, 0)], {}, "cut more"),
    ("TopK", (4, 6), [ints(7)], {}, "cannot take 7"),
    ("LayerNormalization", (4, 6), [np.zeros(5, np.float32)], {}, "scale and bias"),
    ("GRU", (2, 3, 4), [np.zeros((1, 6, 4), np.float32), np.zeros((1, 9, 3), np.float32)], {}, "do not fit"),
    ("Cast", (4, 6), [], {"to": "none such"}, "none such"),
    ("Attention", (2, 3, 8), [np.zeros((2, 3, 8), np.float32)] * 2, {"q_num_heads": 3, "kv_num_heads": 1}, "divide"),
]


@pytest.mark.parametrize(("op", "x", "constants", "attributes", "told"), REFUSED, ids=lambda value: str(value)[:24])
def test_what_does_not_fit_is_refused_when_the_model_is_made(op, x, constants, attributes, told):
    outputs = ("y", "z") if op == "Split" else ("y",)
    with pytest.raises(ModelError, match=told):
        single(op, x, *constants, outputs=outputs, **attributes)


@pytest.mark.parametrize("op", ["GatherElements", "ScatterElements"])
def test_an_index_out_of_range_is_an_error_of_the_node(op):
    rest = [np.zeros((1, 2), np.float32)] if op == "ScatterElements" else []
    model = single(op, (3, 2), np.array([[0, 3]]), *rest)
    with pytest.raises(ModelError, match=f"{op} 'y': .*out of range"):
        model.run(x=np.zeros((3, 2), np.float32))


def test_small_floats_are_summed_in_wider_ones():
    x = np.full(4096, 0.1, np.float16)
    made = single("ReduceSum", TensorType(np.dtype(np.float16), (4096,))).run(x=x)["y"]
    assert made.dtype == np.float16
    assert made == np.float16(x.astype(np.float64).sum())
    ml_dtypes = pytest.importorskip("ml_dtypes")
    small = np.dtype(ml_dtypes.bfloat16)
    made = single("Exp", TensorType(small, (3,))).run(x=np.array([0, 1, -2], small))["y"]
    np.testing.assert_array_equal(made, np.exp(np.float32([0, 1, -2])).astype(small))


def test_random_operators_are_not_folded_and_repeat_with_a_seed():
    drawn = [single("RandomNormalLike", (1000,)).run(x=np.zeros(1000, np.float32))["y"] for _ in range(2)]
    assert not np.array_equal(*drawn)
    seeded = [single("RandomNormalLike", (1000,), seed=3.5, mean=2.0).run(x=np.zeros(1000, np.float32))["y"] for _ in range(2)]
    np.testing.assert_array_equal(*seeded)
    assert abs(seeded[0].mean() - 2) < 0.2
    kept = single("Dropout", (1000,), np.float32(0.25), np.bool_(True), seed=1).run(x=np.ones(1000, np.float32))["y"]
    assert set(np.unique(kept)) == {np.float32(0), np.float32(1 / 0.75)}
    assert 0.6 < (kept > 0).mean() < 0.9


def test_lstm_state_carries_over_calls():
    rng = np.random.default_rng(0)
    w, r = (rng.standard_normal((1, 12, k)).astype(np.float32) for k in (4, 3))
    x = rng.standard_normal((6, 2, 4)).astype(np.float32)
    start = np.zeros((1, 2, 3), np.float32)

    def run(part, h, c):
        length = np.full(2, len(part), np.int32)
        tensors = {"w": w, "r": r, "b": np.zeros((1, 24), np.float32), "n": length, "h": h, "c": c}
        node = Node("LSTM", ("x", *tensors), ("y", "last_h", "last_c"))
        kept = {name: Dense(array) for name, array in tensors.items()}
        return Model((node,), kept, {"x": TensorType(FLOAT, part.shape)}, node.outputs).run(x=part)

    whole, half = run(x, start, start), run(x[:3], start, start)
    rest = run(x[3:], half["last_h"], half["last_c"])
    np.testing.assert_allclose(np.concatenate([half["y"], rest["y"]]), whole["y"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rest["last_c"], whole["last_c"], rtol=1e-5, atol=1e-6)


def test_no_operator_is_defined_twice():
    from gristmill import ops

    modules = [*ops.CORE, *(import_module(f"gristmill.ops.{name}") for name in ops.WIDE)]
    keys = [(op.domain, op.name) for module in modules for op in module.OPERATORS]
    assert len(keys) == len(set(keys)) == len(OPS), sorted({key for key in keys if keys.count(key) > 1})


def test_an_encoder_imports_no_operator_that_it_lacks():
    code = """
import sys, numpy as np, gristmill as gm
model = gm.zoo.bert(layers=1, hidden=8, heads=2, vocabulary=9, positions=4)
ids = np.ones((1, 3), np.int64)
gm.Session(model).run(input_ids=ids, attention_mask=ids, token_type_ids=0 * ids)
gm.load
from gristmill import ops
early = {"gristmill.formats.onnx", *(f"gristmill.ops.{name}" for name in ops.WIDE)} & sys.modules.keys()
assert not early, early
ops.find(ops.Node("Conv", ("x", "w"), ("y",)))
assert "gristmill.ops.convolution" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
