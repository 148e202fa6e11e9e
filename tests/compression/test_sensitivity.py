"""One weight at a time: the figures, their order, and going on after a break."""

import json

import numpy as np
import pytest

import gristmill as gm
from gristmill.compression import sweep
from gristmill.errors import DataError, FormatError, ModelError
from gristmill.tensor import Dense

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((60, 30)).astype("f4"), RNG.integers(0, 4, 60)
MODEL = gm.zoo.mlp([30, 32, 16, 4], seed=1)
PASSES = [gm.Prune(0.5), gm.Quantize("int8")]


def test_each_trial_is_the_model_with_one_weight_compressed():
    found = gm.sensitivity(MODEL, (X, Y), PASSES)
    assert found.weights == MODEL.weights
    assert found.settings == ("Prune 0.5 1x4", "Quantize int8")
    want = MODEL.run(x=X)["logits"].astype("f8")
    small, _ = gm.compress(MODEL, [gm.Quantize("int8")])
    for trial in found.trials:
        if trial.setting == "Quantize int8":
            alone = MODEL.replace(tensors={trial.weight: small.tensors[trial.weight]})
            got = alone.run(x=X)["logits"]
            assert trial.error == pytest.approx(np.linalg.norm(got - want) / np.linalg.norm(want), rel=1e-6)
            assert trial.drop == pytest.approx(gm.evaluate(MODEL, (X, Y)) - gm.evaluate(alone, (X, Y)))
            assert trial.bytes_after == small.tensors[trial.weight].nbytes < trial.bytes_before


def test_a_weight_that_a_pass_does_not_fit_is_left_out():
    found = gm.sensitivity(MODEL, X, PASSES)  # 30 inputs are no multiple of four
    first = found.trials[0]
    assert (first.weight, first.error, first.drop) == ("layer0.weight", None, None)
    assert "layer0.weight" not in found.ranking("Prune 0.5 1x4")
    assert "-" in str(found)


def test_the_ranking_begins_with_what_costs_most():
    weight = MODEL.tensors["layer1.weight"].dense().copy()
    weight[:, ::4] *= 40  # whatever scale serves the large columns rounds the others away
    model = MODEL.replace(tensors={"layer1.weight": Dense(weight)})
    found = gm.sensitivity(model, X, [gm.Quantize("int8")])
    errors = {trial.weight: trial.error for trial in found.trials}
    assert found.ranking() == tuple(sorted(errors, key=lambda name: -errors[name]))
    assert found.ranking() == found.ranking("Quantize int8")
    with pytest.raises(ModelError, match="was not tried"):
        found.ranking("Quantize int2")


def test_it_goes_on_after_a_break(tmp_path, monkeypatch):
    state = tmp_path / "state.json"
    tried, inner = [], sweep._tried

    def broken(*arguments):
        if len(tried) == 3:
            raise KeyboardInterrupt
        tried.append(arguments[2:4])
        return inner(*arguments)

    monkeypatch.setattr(sweep, "_tried", broken)
    with pytest.raises(KeyboardInterrupt):
        gm.sensitivity(MODEL, X, PASSES, state=state)
    assert len(json.loads(state.read_text())["trials"]) == 3
    with pytest.raises(ModelError, match="differs in data"):
        gm.sensitivity(MODEL, X[1:], PASSES, state=state)
    with pytest.raises(ModelError, match="differs in passes"):
        gm.sensitivity(MODEL, X, PASSES[1:], state=state)
    monkeypatch.setattr(sweep, "_tried", lambda *arguments: tried.append(arguments[2:4]) or inner(*arguments))
    found = gm.sensitivity(MODEL, X, PASSES, state=state)
    assert len(tried) == len(set(tried)) == 6
    fresh = gm.sensitivity(MODEL, X, PASSES)
    assert [trial.error for trial in found.trials] == [trial.error for trial in fresh.trials]
    state.write_text("{}")
    with pytest.raises(FormatError, match="no state of sensitivity"):
        gm.sensitivity(MODEL, X, PASSES, state=state)


def test_what_cannot_be_tried_is_refused(tmp_path):
    with pytest.raises(ModelError, match="list of passes"):
        gm.sensitivity(MODEL, X, [])
    with pytest.raises(ModelError, match="works on a whole model"):
        gm.sensitivity(MODEL, (X, Y), [gm.Distill()])
    with pytest.raises(DataError, match="'x' has shape"):
        gm.sensitivity(MODEL, X[:, :3])
    with pytest.raises(FileNotFoundError):
        gm.sensitivity(MODEL, X, PASSES, state=tmp_path / "absent" / "state.json")


def test_the_same_pass_twice_has_two_names():
    found = gm.sensitivity(MODEL, None, [gm.Clip(value=0.1), gm.Clip(value=0.01)])
    assert len(found.settings) == 2


def test_it_is_saved_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    found = gm.sensitivity(MODEL, X)
    found.save(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["trials"][0]["weight"] == "layer0.weight"
    found.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
