"""The search for bounds finds what trying all of them finds, and pays after quantisation."""

import numpy as np
import pytest

import gristmill as gm
from gristmill.compression.clip import least_error_bounds, queries_and_keys
from gristmill.compression.recipe import Context
from gristmill.errors import DataError, ModelError


def clipped(model, step):
    return step.apply(model, Context(model, None, 0, 1, False))


@pytest.mark.parametrize("group", [None, 8])
def test_bounds_are_the_best_of_all_candidates(group):
    rng = np.random.default_rng(0)
    weight = rng.standard_t(3, (6, 32)).astype(np.float32)
    weight[2] = 0
    x = (rng.standard_normal((200, 32)) @ rng.standard_normal((32, 32))).astype(np.float32)
    size = group or 32
    moments = np.stack([x[:, i : i + size].T @ x[:, i : i + size] / len(x) for i in range(0, 32, size)])
    bounds = least_error_bounds(weight, moments.astype(np.float32), 7, 11)
    assert bounds.shape == (6, 32 // size)
    for row in range(6):
        for at in range(32 // size):
            part, rows = weight[row, at * size : (at + 1) * size].astype(np.float64), x[:, at * size : (at + 1) * size]
            errors = {}
            for share in np.linspace(1, 0.5, 11):
                scale = max(share * np.abs(part).max() / 7, 1e-30)
                error = part - scale * np.clip(np.rint(part / scale), -7, 7)
                errors[share] = np.mean((rows @ error) ** 2)
            best = min(errors.values())
            got = bounds[row, at] / max(np.abs(part).max(), 1e-30)
            nearest = min(errors, key=lambda share: abs(share - got)) if part.any() else 1.0
            assert errors[nearest] <= best * 1.001 + 1e-9


@pytest.mark.parametrize(("bits", "group"), [(4, None), (4, 16), (3, None)])
def test_the_output_errs_less_after_quantisation(bits, group):
    model = gm.zoo.mlp([64, 48], seed=2)
    rng = np.random.default_rng(1)
    weight = rng.standard_t(4, (48, 64)).astype(np.float32)
    model = model.replace(tensors={"layer0.weight": type(model.tensors["layer0.weight"])(weight)})
    x = (rng.standard_normal((500, 64)) * rng.uniform(0.1, 2, 64)).astype(np.float32)

    def error(model):
        found, levels = model.tensors["layer0.weight"].dense(), 2 ** (bits - 1) - 1
        parts = found.reshape(48, -1, group or 64)
        scale = np.abs(parts).max(axis=2, keepdims=True) / levels
        return np.linalg.norm(x @ (weight - (scale * np.rint(parts / scale)).reshape(48, 64)).T)

    small = clipped(model, gm.Clip(calibration=x, bits=bits, group=group))
    assert error(small) < 0.95 * error(model)
    ratio = np.abs(small.tensors["layer0.weight"].dense()).max(axis=1) / np.abs(weight).max(axis=1)
    assert 0.4999 <= ratio.min() < 1
    assert ratio.max() <= 1


def test_queries_and_keys_stay_unless_they_are_named():
    model = gm.zoo.bert(layers=1, hidden=16, heads=2, vocabulary=30)
    spared = {f"encoder.layer.0.attention.self.{name}.weight" for name in ("query", "key")}
    assert queries_and_keys(model) == spared
    ids = np.random.default_rng(0).integers(1, 30, (4, 9))
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    small = clipped(model, gm.Clip(calibration=batch, bits=3))
    changed = {name for name in model.weights if small.tensors[name] is not model.tensors[name]}
    assert changed == set(model.weights) - spared
    small = clipped(model, gm.Clip(calibration=batch, bits=3, names=("*query*",)))
    assert not np.array_equal(*(m.tensors["encoder.layer.0.attention.self.query.weight"].dense() for m in (model, small)))


def test_what_cannot_be_is_refused():
    for make in (
        lambda: gm.Clip(value=1, calibration="data"), lambda: gm.Clip(bits=1), lambda: gm.Clip(bits=9),
        lambda: gm.Clip(candidates=1), lambda: gm.Clip(candidates=2.5), lambda: gm.Clip(group=0),
    ):  # fmt: skip
        with pytest.raises(ModelError, match="Clip"):
            make()
    model, x = gm.zoo.mlp([8, 6]), np.ones((3, 8), np.float32)
    with pytest.raises(ModelError, match=r"groups of 3 do not divide the 8 inputs of 'layer0.weight'"):
        clipped(model, gm.Clip(calibration=x, group=3))
    with pytest.raises(DataError, match="Clip: calibration"):
        clipped(model, gm.Clip(calibration=x[:, :5]))
    with pytest.raises(ModelError, match="search for its bounds before Prune"):
        clipped(clipped(model, gm.Prune(0.5)), gm.Clip(calibration=x))
