"""Batches cut into items: the same bits as the whole, whatever the number of threads."""

import numpy as np
import pytest

import gristmill as gm
from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.ops import Node, TensorType
from gristmill.runtime.mapping import ROWS, Batch
from gristmill.runtime.session import Session
from gristmill.tensor import Dense


def rows(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def cut(session):
    """Whether the session's last run was of a batch in items."""
    return isinstance(next(reversed(session._runs.values())), Batch)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("precision", [None, "int8"])
@pytest.mark.parametrize("batch", [1, ROWS, 4 * ROWS, 4 * ROWS + 1, 9 * ROWS - 5])
def test_items_give_the_bits_of_the_whole(threads, precision, batch):
    model, x = gm.zoo.mlp([64, 96, 10]), rows(batch, 64)
    session = Session(model, threads, precision)
    made = session.run(x=x)["logits"]
    assert not cut(session) if batch == 1 else cut(session) or batch == ROWS
    alone = Session(model, 1, precision)
    np.testing.assert_array_equal(made, np.concatenate([alone.run(x=x[i : i + 1])["logits"] for i in range(batch)]))


def test_examples_that_meet_are_not_cut():
    x = TensorType(np.dtype(np.float32), ("batch", 8))
    constant = Dense(rows(600, 8))
    session = Session(Model((Node("Add", ("x", "c"), ("y",)),), {"c": constant}, {"x": x}, ("y",)), 2)
    given = rows(600, 8)
    np.testing.assert_array_equal(session.run(x=given)["y"], given + constant.array)
    assert not cut(session)


def test_a_budget_is_kept():
    from gristmill.runtime.arena import Memory

    session = Session(gm.zoo.mlp([64, 96, 10]), 2, memory=Memory(1 << 22))
    session.run(x=rows(8 * ROWS, 64))
    assert not cut(session)


def test_map_runs_every_element():
    model = gm.zoo.mlp([16, 8, 3])
    stack = rows(7, 5, 16)
    for session in (Session(model, 2), Session(model, 2, reference=True)):
        made = session.map(x=stack)["logits"]
        assert made.shape == (7, 5, 3)
        np.testing.assert_array_equal(made, np.stack([session.run(x=element)["logits"] for element in stack]))


def test_map_refuses_what_does_not_stack():
    session = Session(gm.zoo.mlp([16, 3]), 2)
    for bad in ({}, {"x": rows(0, 5, 16)}, {"x": np.float32(1)}, {"x": rows(3, 5, 4)}, {"z": rows(3, 5, 16)}):
        with pytest.raises(ModelError):
            session.map(**bad)
    with pytest.raises(ModelError, match="same leading dimension"):
        session.map(x=rows(3, 5, 16), y=rows(2, 1))


def test_shape_arithmetic_keeps_examples_apart():
    """A view may take its shape from the batch's; anything else that reads it may not."""
    x = TensorType(np.dtype(np.float32), ("batch", 4, 6))
    nodes = (
        Node("Shape", ("x",), ("batch",), {"start": 0, "end": 1}),
        Node("Concat", ("batch", "rest"), ("shape",), {"axis": 0}),
        Node("Reshape", ("x", "shape"), ("flat",)),
        Node("Relu", ("flat",), ("y",)),
    )
    tensors = {"rest": Dense(np.array([24]))}
    session, given = Session(Model(nodes, tensors, {"x": x}, ("y",)), 2), rows(600, 4, 6)
    np.testing.assert_array_equal(session.run(x=given)["y"], np.maximum(given, 0).reshape(600, 24))
    assert cut(session)
    tail = (*nodes[:3], Node("Cast", ("batch",), ("count",), {"to": "float32"}), Node("Add", ("flat", "count"), ("y",)))
    session = Session(Model(tail, tensors, {"x": x}, ("y",)), 2)
    np.testing.assert_array_equal(session.run(x=given)["y"], given.reshape(600, 24) + np.float32(600))
    assert not cut(session)


def test_an_encoder_is_cut():
    model = gm.zoo.bert(layers=1, hidden=16, heads=2, vocabulary=50, positions=32)
    ids = np.random.default_rng(0).integers(1, 50, (64, 16))
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    session = Session(model, 2)
    made = session.run(**given)
    assert cut(session)
    whole = Session(model, 1, reference=True).run(**given)
    for name, array in made.items():
        np.testing.assert_allclose(array, whole[name], atol=1e-4)
