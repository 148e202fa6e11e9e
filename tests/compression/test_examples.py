"""Data of every form that compress takes, for models of one input and of several."""

import numpy as np
import pytest

import gristmill as gm
from gristmill.compression.examples import checked
from gristmill.errors import DataError, ModelError

RNG = np.random.default_rng(0)
MLP = gm.zoo.mlp([6, 5, 3], seed=1)
X, Y = RNG.standard_normal((20, 6)).astype("f4"), RNG.integers(0, 3, 20)
BERT = gm.zoo.bert(layers=1, hidden=32, heads=2, vocabulary=50, positions=64)
IDS, ONES, TYPES = RNG.integers(0, 50, (8, 12)), np.ones((8, 12), np.int64), np.zeros((8, 12), np.int64)
NAMED = {"input_ids": IDS, "attention_mask": ONES, "token_type_ids": TYPES}

FORMS = {
    "x": (MLP, X, False),
    "pair": (MLP, (X, Y), True),
    "mapping": (MLP, {"x": X}, False),
    "labelled": (MLP, {"x": X, "labels": Y}, True),
    "float64": (MLP, X.astype("f8"), False),
    "lists": (MLP, (X.tolist(), Y.tolist()), True),
    "generator": (MLP, (part for part in (X[:7], X[7:])), False),
    "batches": (MLP, [{"x": X[:7]}, {"x": X[7:]}], False),
    "batches and labels": (MLP, ([{"x": X[:7]}, {"x": X[7:]}], Y), True),
    "by name": (BERT, NAMED, False),
    "by order": (BERT, (IDS, ONES, TYPES), False),
    "several and labels": (BERT, ((IDS, ONES, TYPES), Y[:8]), True),
    "named and labels": (BERT, (NAMED, Y[:8]), True),
    "int32": (BERT, {name: array.astype("i4") for name, array in NAMED.items()}, False),
}


@pytest.mark.parametrize(("model", "data", "labelled"), FORMS.values(), ids=FORMS)
def test_every_form_means_the_same(model, data, labelled):
    found = checked("data", model, data)
    wanted = {"x": X} if model is MLP else NAMED
    assert found.number == len(next(iter(wanted.values())))
    assert (found.target is not None) == labelled
    for name, array in found.by_name(model).items():
        assert array.dtype == model.inputs[name].dtype
        np.testing.assert_array_equal(array, wanted[name])
    assert isinstance(found.inputs, dict) == (model is BERT)


def test_batches_of_different_lengths_are_padded():
    parts = [{name: array[rows, :length] for name, array in NAMED.items()} for rows, length in ((slice(3), 12), (slice(3, 8), 7))]
    found = checked("data", BERT, parts).by_name(BERT)
    assert found["input_ids"].shape == (8, 12)
    assert found["attention_mask"].sum(axis=1).tolist() == [12] * 3 + [7] * 5
    before = [BERT.run(**part)[BERT.outputs[0]] for part in parts]
    after = BERT.run(**found)[BERT.outputs[0]]
    np.testing.assert_allclose(after[:3], before[0], atol=1e-5)
    np.testing.assert_allclose(after[3:], before[1], atol=1e-5)


BAD = {
    "shape": (MLP, RNG.standard_normal((20, 7)), r"'x' has shape \(20, 7\), the model takes"),
    "rank": (MLP, np.ones(6), "'x' has shape"),
    "batched labels": (MLP, (X, Y[:19]), "same number of examples"),
    "nan": (MLP, np.full((2, 6), np.nan), "not finite"),
    "nan labels": (MLP, (X, np.full(20, np.nan)), "not finite"),
    "empty": (MLP, X[:0], "numbers"),
    "text": (MLP, ["a sentence"], "a model with a tokenizer"),
    "file": (MLP, "data.npz", "numbers"),
    "names": (MLP, {"y": X}, "holds y, but the model takes x"),
    "both": (MLP, {"x": X, "labels": Y, "target": Y}, "labels and target"),
    "one of three": (BERT, {"input_ids": IDS}, "missing: attention_mask, token_type_ids"),
    "array": (BERT, IDS, "takes several inputs"),
    "floats": (BERT, {**NAMED, "input_ids": IDS + 0.5}, "float64, which does not convert"),
    "lengths": (BERT, {**NAMED, "attention_mask": ONES[:, :5]}, "'attention_mask' has shape"),
    "number": (BERT, {**NAMED, "attention_mask": ONES[:5]}, "same number of examples"),
    "two of three": (BERT, ((IDS, ONES), Y[:8]), "got 2 arrays"),
    "no batches": (MLP, iter(()), "no batches"),
    "uneven": (MLP, [{"x": X}, {"x": X[:, :3]}], "differ beyond their first axis"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "data", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_named(model, data, message):
    with pytest.raises(DataError, match=message):
        checked("data", model, data)


def test_encoders_are_compressed_with_data_of_several_inputs():
    small, report = gm.compress(BERT, [gm.Quantize("int8", calibration="data")], NAMED)
    assert sum("input_scale" in node.attributes for node in small.nodes) == 6
    last = report.stages[-1]
    assert 0.99 < last.cosine < 1
    assert last.cosine_interval[0] <= last.cosine <= last.cosine_interval[1]
    assert 0.9 < last.spearman <= 1
    assert last.metric is None
    assert set(last.latency_ms) == {"1x16"}  # 64 positions are too few for 128 tokens


def test_nan_weights_are_found_before_anything(tmp_path):
    weight = MLP.tensors["layer1.weight"].dense().copy()
    weight[1, 2] = np.nan
    broken = MLP.replace(tensors={"layer1.weight": MLP.tensors["layer1.weight"].with_trainable(weight)})
    with pytest.raises(ModelError, match=r"tensor 'layer1.weight' of shape \(3, 5\) .*nan at \[1, 2\]"):
        gm.compress(broken, [gm.Clip()], state=tmp_path / "state")
    gm.save(broken, tmp_path / "broken.safetensors")
    with pytest.raises(ModelError, match=r"layer1.weight"):
        gm.compress_file(tmp_path / "broken.safetensors", tmp_path / "out.safetensors", [gm.Clip()])
    assert [path.name for path in tmp_path.iterdir()] == ["broken.safetensors"]
