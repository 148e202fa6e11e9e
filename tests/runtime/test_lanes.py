"""Sparse layers whose values stay in lanes or in codes from one product to the next."""

import numpy as np
import pytest

import gristmill as gm
from gristmill import _core
from gristmill.compression.recipe import Context
from gristmill.runtime.plan import Layout, Options
from gristmill.runtime.shapes import determine
from gristmill.tensor import Sparse

WIDE = {"input_ids": np.arange(24).reshape(2, 12) % 50, "attention_mask": np.ones((2, 12), np.int64)}


def encoder(block, calibration=None):
    model = gm.zoo.bert(layers=2, hidden=32, heads=2, vocabulary=50, positions=12)
    rng, sparse = np.random.default_rng(3), {}
    for name in {node.inputs[1] for node in model.nodes if node.op == "Linear"}:
        weight = rng.standard_normal(model.tensors[name].shape).astype(np.float32) * 0.2
        mask = rng.random([have // by for have, by in zip(weight.shape, block, strict=True)]) < 0.4
        sparse[name] = Sparse.from_dense(weight, mask, block)
    model = model.replace(tensors=sparse)
    context = Context(model, None, 0, 1, False)
    return model, gm.Quantize("int8", calibration=calibration).apply(model, context)


def inputs(model, given=WIDE):
    known = {"token_type_ids": np.zeros(given["input_ids"].shape, np.int64), **given}
    return {name: known[name] for name in model.inputs}


def kernels(model, feed, threads=1):
    types = {name: gm.ops.TensorType(array.dtype, array.shape) for name, array in feed.items()}
    layout = Layout(gm.runtime.fuse.fuse(model), determine(gm.runtime.fuse.fuse(model), types, {}), threads, {}, {}, Options())
    return [step.kernel for step in layout.steps]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("block", [(1, 4), (2, 4), (4, 4)])
def test_an_int8_encoder_agrees_with_its_reference(block, static):
    plain, _ = encoder(block)
    model, small = encoder(block, [inputs(plain)] if static else None)
    feed = inputs(small)
    wanted = gm.Session(model, reference=True).run(**feed)
    got = gm.Session(small, threads=1).run(**feed)
    for name, value in got.items():
        a, b = value.reshape(-1).astype(float), wanted[name].reshape(-1).astype(float)
        assert a @ b / np.sqrt((a @ a) * (b @ b)) > 0.999
        again = gm.Session(small, threads=2).run(**feed)
        np.testing.assert_array_equal(again[name], value)


def test_values_stay_in_lanes_and_in_codes():
    _, small = encoder((4, 4))
    found = kernels(small, inputs(small))
    assert found.count(_core.sparse_linear_to_codes) == 2  # the wide layer's result is never there in float32
    assert found.count(_core.transpose) == 2  # the first residual, and the last layer's result
