"""Every operator's gradient against finite differences, against torch's (stored), and its kernels against its reference."""

from pathlib import Path

import numpy as np
import pytest

from gristmill import autodiff
from gristmill.ops import OPS
from gristmill.runtime.session import Session
from gristmill.tensor import Dense
from ops.graphs import GRAPHS, INT8_GRAPHS

FIXTURE = Path(__file__).parents[1] / "fixtures" / "gradients.npz"
STEP = 1e-2


def run(graph, reference):
    """Return the loss and the gradients, and the session over writable parameters."""
    model = graph.model()
    parameters = {name: np.array(model.tensors[name].trainable) for name in graph.wrt}
    session = Session(autodiff.gradients(model, "loss", graph.wrt), threads=2, trainable=parameters, reference=reference)
    return session, parameters, session.run()


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.name)
def test_gradient_agrees_with_finite_differences(graph):
    session, parameters, result = run(graph, reference=True)
    rng = np.random.default_rng(0)
    for name, values in parameters.items():
        gradient = result[autodiff.gradient_name(name)]
        assert gradient.shape == values.shape
        direction = rng.standard_normal(values.shape).astype(np.float32)
        start = values.copy()
        values[...] = start + STEP * direction
        above = float(session.run()["loss"])
        values[...] = start - STEP * direction
        below = float(session.run()["loss"])
        values[...] = start
        slope, expected = (above - below) / (2 * STEP), float((gradient * direction).sum())
        scale = float(np.abs(gradient * direction).sum())
        assert abs(slope - expected) <= 3e-3 * scale + 1e-5, f"{graph.name} in {name}: {slope} against {expected}"


@pytest.mark.parametrize("graph", GRAPHS + INT8_GRAPHS, ids=lambda graph: graph.name)
def test_kernels_agree_with_reference(graph):
    _, _, want = run(graph, reference=True)
    _, _, got = run(graph, reference=False)
    # int8 kernels round the activations too; what that costs is bounded by half a step of the largest activation.
    tolerance = 3e-2 if graph in INT8_GRAPHS else 2e-5
    for name, value in want.items():
        scale = float(np.abs(value).max())
        np.testing.assert_allclose(got[name], value, rtol=0, atol=tolerance * max(scale, 1e-6), err_msg=f"{graph.name}: {name}")


@pytest.mark.parametrize("graph", INT8_GRAPHS, ids=lambda graph: graph.name)
def test_int8_gradients_pass_straight_through(graph):
    """dL/dx and dL/db are those of the dequantised weight; that of the gain is the projection of its dW on the weight."""
    _, _, got = run(graph, reference=True)
    dense = {**graph.tensors, "w": Dense(graph.tensors["w"].dense())}
    _, _, want = run(type(graph)(graph.name, graph.node, dense, graph.wrt), reference=True)
    for name in ("x", "b"):
        np.testing.assert_allclose(got[f"gradient:{name}"], want[f"gradient:{name}"], rtol=1e-5, atol=1e-6)
    projected = (want["gradient:w"] * graph.tensors["w"].dense()).sum(axis=1)
    np.testing.assert_allclose(got["gradient:w"], projected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.name)
def test_gradient_agrees_with_torch(graph):
    _, _, result = run(graph, reference=False)
    with np.load(FIXTURE) as stored:
        np.testing.assert_allclose(result["loss"], stored[f"{graph.name}/loss"], rtol=2e-5)
        for name in graph.wrt:
            want = stored[f"{graph.name}/{name}"]
            atol = 2e-5 * float(np.abs(want).max())
            np.testing.assert_allclose(
                result[autodiff.gradient_name(name)], want, rtol=0, atol=atol, err_msg=f"{graph.name}: {name}"
            )


def test_every_differentiable_operator_has_a_graph():
    covered = {(graph.node.domain, graph.node.op) for graph in GRAPHS}
    assert covered == {key for key, op in OPS.items() if op.differentiable}
