"""Distillation of vectors and hidden states, students of fewer layers, and pruning on the way."""

import os

import numpy as np
import pytest

import gristmill as gm
from gristmill.compression.distill import hidden_pairs
from gristmill.errors import DataError, ModelError
from gristmill.tensor import Dense

SIZES = {"hidden": 16, "heads": 2, "vocabulary": 50, "positions": 16}
NORMS = "*.output.LayerNorm"


@pytest.fixture(scope="module")
def teacher():
    """An encoder whose layers matter: of weights as BERT begins with, a layer hardly changes anything."""
    model = gm.zoo.bert(layers=2, **SIZES)
    return model.replace(tensors={name: Dense(15 * model.tensors[name].dense()) for name in model.weights})


@pytest.fixture(scope="module")
def data():
    ids = np.random.default_rng(0).integers(0, 50, (48, 8))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def agreement(teacher, student, data):
    return float((teacher.run(**data)["sentence_embedding"] * student.run(**data)["sentence_embedding"]).sum(axis=1).mean())


def test_a_student_of_fewer_layers_learns_vectors_and_hidden_states(teacher, data):
    hidden = {"encoder.layer.0.output.LayerNorm": "encoder.layer.1.output.LayerNorm"}
    remove = gm.RemoveLayers(layers=(0,))
    student, _ = gm.compress(teacher, [remove], data=data)
    (inside,) = [
        name for node in student.nodes for name in node.outputs if name.endswith(".output.LayerNorm") and "attention" not in name
    ]
    step = gm.Distill(8, loss="cosine", hidden={inside: next(iter(hidden.values()))}, optimizer=gm.AdamW(5e-3))
    trained, report = gm.compress(teacher, [remove, step], data=data)
    assert agreement(teacher, trained, data) > agreement(teacher, student, data)
    assert trained.meta["recipe"][1]["hidden"] == {inside: "encoder.layer.1.output.LayerNorm"}
    assert report.stages[-1].cosine > report.stages[-2].cosine


def test_hidden_states_pull_the_inside_towards_the_teacher(teacher, data):
    start = gm.zoo.bert(layers=2, seed=1, **SIZES)
    value = "encoder.layer.0.output.LayerNorm"

    def distance(model):
        found = model.replace(outputs=(value,)).run(**data)[value]
        return float(((found - teacher.replace(outputs=(value,)).run(**data)[value]) ** 2).mean())

    settings = {"loss": "mse", "optimizer": gm.AdamW(5e-3), "teacher": teacher}
    plain, _ = gm.compress(start, [gm.Distill(4, **settings)], data=data)
    guided, _ = gm.compress(start, [gm.Distill(4, hidden=(value,), **settings)], data=data)
    assert distance(guided) < 0.8 * distance(plain)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_pruning_on_the_way_leaves_sparse_weights(teacher, data, method):
    prune = gm.Prune(0.75, pattern="2x4", names=("encoder.*",), method=method, scope="layer")
    step = gm.Distill(3, loss="cosine", hidden=(NORMS,), prune=prune)
    small, _ = gm.compress(teacher, [step, gm.Quantize("int8", names=("encoder.*",))], data=data)
    for name in (name for name in small.weights if name.startswith("encoder.")):
        assert small.tensors[name].kind == "sparse"
        assert small.tensors[name].block == (2, 4)
        assert small.tensors[name].sparsity == pytest.approx(0.75, abs=0.02)


def test_logits_need_no_labels_where_they_do_not_count(data):
    model = gm.zoo.mlp([6, 8, 3])
    x = np.random.default_rng(0).standard_normal((32, 6)).astype(np.float32)
    gm.compress(model, [gm.Distill(1, alpha=1.0)], data=x)
    with pytest.raises(DataError, match=r"needs labels.*alpha=1"):
        gm.compress(model, [gm.Distill(1)], data=x)


def test_an_int8_student_trains_its_scales_with_the_rounding_in_place(teacher, data):
    rounded, _ = gm.compress(teacher, [gm.Quantize("int8")], data=data)
    tuned, _ = gm.compress(teacher, [gm.Quantize("int8"), gm.Distill(4, loss="cosine", optimizer=gm.AdamW(1e-5))], data=data)
    name = "encoder.layer.0.output.dense.weight"
    assert np.array_equal(tuned.tensors[name].codes, rounded.tensors[name].codes)
    assert not np.array_equal(tuned.tensors[name].scale, rounded.tensors[name].scale)
    assert agreement(teacher, tuned, data) > agreement(teacher, rounded, data) - 1e-4


def test_a_broken_off_run_goes_on_to_the_same_bits(teacher, data, tmp_path, monkeypatch):
    step = gm.Distill(3, loss="cosine", hidden=(NORMS,), prune=gm.Prune(0.5, pattern="1x4", names=("encoder.*",)))
    whole, _ = gm.compress(teacher, [step], data=data)

    class Stop(Exception):
        pass

    from gristmill.training import loop

    save, calls = loop.checkpoint.save, []

    def stopping(*arguments):
        save(*arguments)
        calls.append(1)
        if len(calls) == 2:
            raise Stop

    monkeypatch.setattr(loop.checkpoint, "save", stopping)
    with pytest.raises(Stop):
        gm.compress(teacher, [step], data=data, state=tmp_path / "state")
    assert any(name.endswith("distill.checkpoint") for _, _, files in os.walk(tmp_path) for name in files)
    monkeypatch.undo()
    again, _ = gm.compress(teacher, [step], data=data, state=tmp_path / "state")
    for name, tensor in whole.tensors.items():
        assert np.array_equal(tensor.dense(), again.tensors[name].dense()), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "euclid"}, "unknown loss 'euclid'"),
        ({"hidden_weight": 0.0}, "hidden_weight positive"),
        ({"prune": 0.8}, "prune must be a Prune"),
        ({"hidden": ("nowhere*",), "loss": "cosine"}, "'nowhere\\*' matches no value"),
        ({"hidden": {"pooled": "encoder.layer.0.output.LayerNorm"}, "loss": "cosine"}, "must have one type"),
        ({"prune": gm.Prune(pattern="2:4"), "loss": "cosine"}, "one sparsity in each weight"),
        ({"teacher": gm.zoo.bert(layers=1, hidden=8, heads=2, vocabulary=50, positions=16), "loss": "cosine"}, "must agree"),
    ],
)
def test_what_does_not_fit_is_refused(teacher, data, settings, message):
    with pytest.raises(ModelError, match=message):
        gm.compress(teacher, [gm.Distill(1, **settings)], data=data)


def test_a_sparse_weight_is_not_pruned_on_the_way(teacher, data):
    prune = gm.Prune(0.5, pattern="1x4", names=("encoder.*",))
    with pytest.raises(ModelError, match="it is sparse already"):
        gm.compress(teacher, [prune, gm.Distill(1, loss="cosine", prune=prune)], data=data)


def test_patterns_name_values_of_both_graphs(teacher):
    pairs = hidden_pairs(("encoder.layer.?.output.LayerNorm",), teacher, teacher)
    assert pairs == {f"encoder.layer.{i}.output.LayerNorm": f"encoder.layer.{i}.output.LayerNorm" for i in range(2)}
