"""Inputs that models are measured on are inputs that they can take."""

import numpy as np
import pytest

import gristmill as gm
from gristmill.ops import Node, TensorType
from gristmill.runtime.timing import LENGTH, random_inputs, table_rows
from gristmill.tensor import Dense


def test_ids_lie_within_tables_and_masks_are_ones():
    model = gm.zoo.bert(layers=1, hidden=8, heads=2, vocabulary=9, positions=20)
    inputs = random_inputs(model, 64)
    assert {array.shape for array in inputs.values()} == {(64, LENGTH)}
    assert sorted(np.unique(inputs["input_ids"])) == list(range(9))
    assert (inputs["attention_mask"] == 1).all()
    model.run(**inputs)


@pytest.mark.parametrize("axis", [0, 1])
def test_ids_that_are_cast_first_and_tables_that_other_axes_index(axis):
    nodes = (
        Node("Cast", ("ids",), ("cast",), {"to": "int64"}),
        Node("Gather", ("table", "cast"), ("y",), {"axis": axis}),
    )
    kind = TensorType(np.dtype(np.int32), ("n",))
    model = gm.Model(nodes, {"table": Dense(np.zeros((3, 5), np.float32))}, {"ids": kind}, ("y",))
    assert table_rows(model) == {"ids": (3, 5)[axis]}
    model.run(**random_inputs(model, 100))


def test_floats_are_drawn_as_ever():
    assert random_inputs(gm.zoo.mlp([4, 3]), 2)["x"].dtype == np.float32
