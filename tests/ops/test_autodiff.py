"""Gradients of graphs in which values are shared, or reach the loss by other ways than its first input."""

import numpy as np
import pytest

from gristmill import autodiff
from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.ops import OWN, Node
from gristmill.runtime.session import Session
from gristmill.tensor import Dense


def draw(*shape, seed=0):
    return Dense(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def gradient(model, name):
    return Session(autodiff.gradients(model, "loss", [name])).run()[autodiff.gradient_name(name)]


def test_both_sides_of_a_squared_error_have_a_gradient():
    tensors = {"a": draw(3, 4), "b": draw(3, 4, seed=1)}
    model = Model([Node("MeanSquaredError", ("a", "b"), ("loss",), domain=OWN)], tensors, {}, ("loss",))
    expected = (tensors["a"].array - tensors["b"].array) * 2 / 12
    np.testing.assert_allclose(gradient(model, "a"), expected, rtol=1e-6)
    np.testing.assert_allclose(gradient(model, "b"), -expected, rtol=1e-6)


def test_a_term_added_to_the_loss_gets_the_gradient_of_the_loss():
    nodes = [Node("MeanSquaredError", ("a", "b"), ("error",), domain=OWN), Node("Add", ("error", "c"), ("loss",))]
    model = Model(nodes, {"a": draw(2), "b": draw(2, seed=1), "c": draw()}, {}, ("loss",))
    assert gradient(model, "c") == 1.0


def test_a_teacher_that_depends_on_the_student_is_refused():
    attributes = {"temperature": 2.0, "alpha": 0.5}
    node = Node("DistillationLoss", ("logits", "teacher", "labels"), ("loss",), attributes, OWN)
    tensors = {"logits": draw(2, 3), "teacher": draw(2, 3, seed=1), "labels": Dense(np.array([0, 2]))}
    model = Model([node], tensors, {}, ("loss",))
    assert gradient(model, "logits").shape == (2, 3)
    with pytest.raises(ModelError, match="teacher must not depend"):
        gradient(model, "teacher")
