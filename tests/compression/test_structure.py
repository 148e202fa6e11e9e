"""Layers and heads that are removed are really gone, the rest computes what it did, and the student trains."""

from pathlib import Path

import numpy as np
import pytest

import gristmill as gm
from gristmill.autodiff import gradients
from gristmill.compression.layers import encoder_layers
from gristmill.compression.recipe import Context
from gristmill.compression.recipe_file import from_dict, to_dict
from gristmill.errors import DataError, ModelError
from gristmill.runtime.session import Session
from gristmill.runtime.timing import random_inputs
from gristmill.tensor import Dense

SHAPE = {"hidden": 24, "heads": 6, "vocabulary": 40, "positions": 32}
ONNX = sorted((Path(__file__).parents[1] / "fixtures" / "onnx").glob("*.onnx"))


def encoder(layers=4, **changes):
    return gm.zoo.bert(layers=layers, seed=5, **{**SHAPE, **changes})


def texts(examples=6, length=9):
    rng = np.random.default_rng(3)
    ids = rng.integers(1, 40, (examples, length))
    mask = (np.arange(length) < rng.integers(1, length + 1, (examples, 1))).astype(np.int64)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def applied(model, *steps):
    for step in steps:
        model = step.apply(model, Context(model, None, 0, 1, False))
    return model


def answers(model, batch):
    return next(iter(model.run(**batch).values()))


@pytest.mark.parametrize(
    ("step", "left"),
    [
        (gm.RemoveLayers((1, 3)), (0, 2)),
        (gm.RemoveLayers(layers=(-1, 0)), (1, 2)),
        (gm.RemoveLayers(keep=(0, 3)), (0, 3)),
        (gm.RemoveLayers(every=2), (0, 2)),
        (gm.RemoveLayers(every=3), (0, 1, 3)),
        (gm.RemoveLayers((0, 1, 2)), (3,)),
    ],
)
@pytest.mark.parametrize("pooling", ["mean", None])
def test_a_student_is_the_encoder_of_the_layers_that_are_left(step, left, pooling):
    model = encoder(pooling=pooling, normalize=pooling is not None)
    small = applied(model, step)
    fewer = encoder(len(left), pooling=pooling, normalize=pooling is not None)
    tensors = dict(model.tensors)
    for new, old in enumerate(left):
        at = f"encoder.layer.{old}."
        tensors |= {n.replace(at, f"encoder.layer.{new}."): t for n, t in model.tensors.items() if n.startswith(at)}
    wanted = fewer.replace(tensors={name: tensors[name] for name in fewer.tensors})
    np.testing.assert_array_equal(answers(small, texts()), answers(wanted, texts()))
    assert len(small.tensors) == len(fewer.tensors)
    assert small.nbytes == fewer.nbytes
    assert small.outputs == model.outputs
    assert dict(small.inputs) == dict(model.inputs)
    assert len(encoder_layers(small)) == len(left)


@pytest.mark.parametrize("heads", [{0: (1, 3)}, {1: [5]}, {0: (0, 1, 2, 3, 4), 1: (2,)}, {-1: (0, 5)}])
def test_without_heads_the_rest_computes_what_it_did(heads):
    model = encoder(2)
    small = applied(model, gm.RemoveHeads(heads))
    silenced = {}
    for layer, gone in heads.items():
        name = f"encoder.layer.{layer % 2}.attention.output.dense.weight"
        weight = model.tensors[name].dense().copy().reshape(24, 6, 4)
        weight[:, list(gone)] = 0
        silenced[name] = Dense(weight.reshape(24, 24))
        left = 4 * (6 - len(gone))
        assert small.tensors[name].shape == (24, left)
        for role in ("query", "key", "value"):
            at = f"encoder.layer.{layer % 2}.attention.self.{role}"
            assert small.tensors[f"{at}.weight"].shape == (left, 24)
            assert small.tensors[f"{at}.bias"].shape == (left,)
    np.testing.assert_allclose(answers(small, texts()), answers(model.replace(tensors=silenced), texts()), atol=1e-6)


def test_heads_are_scored():
    model = encoder(2)
    weights = {}
    for layer, low in ((0, (1, 4)), (1, (0, 2))):  # the heads that are made to matter little
        for role, axis in (("self.query", 0), ("self.key", 0), ("self.value", 0), ("output.dense", 1)):
            name = f"encoder.layer.{layer}.attention.{role}.weight"
            weight = np.moveaxis(model.tensors[name].dense().copy(), axis, 0).reshape(6, 4, 24)
            weight[list(low)] *= 0.01 if layer == 0 else 0.1
            weights[name] = Dense(np.ascontiguousarray(np.moveaxis(weight.reshape(24, 24), 0, axis)))
    model = model.replace(tensors=weights)
    batch = texts()
    for method in ("magnitude", "wanda"):
        given = batch if method == "wanda" else None
        for step, counts in (
            (gm.RemoveHeads(fraction=1 / 3, method=method, calibration=given), [4, 4]),
            (gm.RemoveHeads(fraction=1 / 4, method=method, calibration=given, scope="global"), [4, 5]),
        ):
            small = applied(model, step)
            assert [node.attributes["heads"] for node in small.nodes if node.op == "MaskedAttention"] == counts
            first = small.tensors["encoder.layer.0.attention.output.dense.weight"].dense()
            kept = [0, 2, 3, 5]
            whole = model.tensors["encoder.layer.0.attention.output.dense.weight"].dense().reshape(24, 6, 4)
            np.testing.assert_array_equal(first, whole[:, kept].reshape(24, 16))
    everything = applied(model, gm.RemoveHeads(fraction=0.99))
    assert [node.attributes["heads"] for node in everything.nodes if node.op == "MaskedAttention"] == [1, 1]


def test_wandas_score_of_a_head_is_what_it_adds():
    """A head whose weights are large but whose values are small goes before one that is the other way round."""
    model = encoder(1)
    at = "encoder.layer.0.attention"
    value, output = (model.tensors[f"{at}.{name}.weight"].dense().copy() for name in ("self.value", "output.dense"))
    bias = model.tensors[f"{at}.self.value.bias"].dense().copy()
    value[:4], bias[:4], output[:, :4] = 0, 0, 50
    changed = {f"{at}.self.value.weight": value, f"{at}.self.value.bias": bias, f"{at}.output.dense.weight": output}
    model = model.replace(tensors={name: Dense(array) for name, array in changed.items()})
    small = applied(model, gm.RemoveHeads(fraction=1 / 6, method="wanda", calibration=texts()))
    np.testing.assert_array_equal(small.tensors[f"{at}.output.dense.weight"].dense(), output[:, 4:])
    by_size = applied(model, gm.RemoveHeads(fraction=1 / 6))
    assert by_size.tensors[f"{at}.output.dense.weight"].dense().max() == 50


STUDENTS = ((gm.RemoveLayers(every=2),), (gm.RemoveHeads(fraction=0.5),), (gm.RemoveLayers((0,)), gm.RemoveHeads({0: (1,)})))


@pytest.mark.parametrize("steps", STUDENTS)
def test_a_student_trains_on_its_teachers_vectors(steps, tmp_path):
    teacher = encoder(2)
    student, batch = applied(teacher, *steps), texts(24)
    target = answers(teacher, batch)
    result = gm.fit(
        student, ({name: batch[name] for name in student.inputs}, target), "cosine", gm.AdamW(5e-3), batch_size=8, epochs=6,
        engine="inline",
    )  # fmt: skip
    assert result.history["loss"][-1] < 0.5 * result.history["loss"][0]
    gm.save(result.model, tmp_path / "student.safetensors")
    loaded = gm.load(tmp_path / "student.safetensors")
    np.testing.assert_array_equal(answers(loaded, batch), answers(result.model, batch))


def test_gradients_of_a_model_with_fewer_heads_are_right():
    model = applied(encoder(1, normalize=False), gm.RemoveHeads({0: (0, 4)}))
    name = "encoder.layer.0.attention.self.key.weight"
    graph = gm.Session(gradients(with_loss(model), with_loss(model).outputs[0], [name]))
    batch = {**texts(), "target": np.zeros((6, 24), np.float32)}
    made = next(array for key, array in graph.run(**batch).items() if key.startswith("gradient"))
    weight, step = model.tensors[name].dense(), np.float32(1e-2)
    losses = []
    for sign in (1, -1):
        moved = weight.copy()
        moved[3, 5] += sign * step
        losses.append(np.mean(answers(model.replace(tensors={name: Dense(moved)}), texts()).astype(np.float64) ** 2))
    assert made[3, 5] == pytest.approx((losses[0] - losses[1]) / (2 * float(step)), rel=0.05, abs=1e-6)


def with_loss(model):
    from gristmill import losses

    return losses.attach(model, losses.find("mse"))


@pytest.mark.parametrize("path", ONNX, ids=lambda path: path.stem)
def test_imported_encoders(path):
    model = gm.load(path)
    if not any(node.op == "MaskedAttention" for node in model.nodes):
        with pytest.raises(ModelError, match="no encoder layers are found"):
            applied(model, gm.RemoveLayers((0,)))
        return
    inputs = random_inputs(model, 2)
    shape = answers(model, inputs).shape
    quantized = any(tensor.kind == "quantized" for tensor in model.tensors.values())
    for step in (gm.RemoveLayers((0,)), gm.RemoveLayers((1,)), gm.RemoveHeads({0: (0,), 1: (1,)})):
        if quantized and isinstance(step, gm.RemoveHeads):
            with pytest.raises(ModelError, match="before Prune and Quantize"):
                applied(model, step)
            continue
        small = applied(model, step)
        got = answers(small, inputs)
        assert got.shape == shape
        assert small.nbytes < model.nbytes
        reference = next(iter(Session(small, reference=True).run(**inputs).values()))
        np.testing.assert_allclose(got, reference, rtol=0, atol=0.03 * np.abs(reference).max())


def test_hidden_states_that_a_model_returns_stay():
    model = encoder(3)
    layers = encoder_layers(model)
    model = model.replace(outputs=(*model.outputs, layers[0].output, layers[2].output))
    small = applied(model, gm.RemoveLayers((2,)))
    made = small.run(**texts())
    np.testing.assert_array_equal(
        made[layers[2].output], model.replace(outputs=(layers[1].output,)).run(**texts())[layers[1].output]
    )
    inner = model.replace(outputs=(*model.outputs, layers[1].attention.name))
    with pytest.raises(ModelError, match="which the model returns, lie inside removed layers"):
        applied(inner, gm.RemoveLayers((1,)))


def test_what_cannot_be_is_refused():
    model = encoder(2)
    for step, message in (
        (gm.RemoveLayers((2,)), "there is no layer 2"),
        (gm.RemoveLayers((-3,)), "there is no layer -3"),
        (gm.RemoveLayers((0, 1)), "2 of 2 layers"),
        (gm.RemoveLayers(keep=(0, 1)), "0 of 2 layers"),
        (gm.RemoveLayers(every=3), "0 of 2 layers"),
        (gm.RemoveHeads({2: (0,)}), "there is no layer 2"),
        (gm.RemoveHeads({0: (6,)}), "has heads 0 to 5"),
        (gm.RemoveHeads({0: range(6)}), "keeps at least one"),
        (gm.RemoveHeads(fraction=0.01), "is none"),
    ):
        with pytest.raises(ModelError, match=message):
            applied(model, step)
    for make in (
        lambda: gm.RemoveLayers(), lambda: gm.RemoveLayers((0,), keep=(1,)), lambda: gm.RemoveLayers("0"),
        lambda: gm.RemoveLayers((0.5,)), lambda: gm.RemoveLayers(every=1), lambda: gm.RemoveHeads(),
        lambda: gm.RemoveHeads({0: (1,)}, fraction=0.5), lambda: gm.RemoveHeads({0: ()}), lambda: gm.RemoveHeads({"a": (1,)}),
        lambda: gm.RemoveHeads(3), lambda: gm.RemoveHeads(fraction=1.0), lambda: gm.RemoveHeads(fraction=0.5, method="best"),
        lambda: gm.RemoveHeads(fraction=0.5, calibration="data"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match="Remove"):
            make()
    with pytest.raises(DataError, match="RemoveHeads: calibration"):
        applied(model, gm.RemoveHeads(fraction=0.5, method="wanda", calibration={"input_ids": np.ones((2, 3), np.int64)}))
    with pytest.raises(ModelError, match="before Prune and Quantize"):
        applied(model, gm.Quantize(), gm.RemoveHeads({0: (1,)}))
    with pytest.raises(ModelError, match="no encoder layers are found"):
        applied(gm.zoo.mlp([4, 3]), gm.RemoveHeads({0: (1,)}))


def test_layers_that_share_weights_keep_their_heads():
    model = encoder(2)
    first, second = (f"encoder.layer.{i}.attention.self.query.weight" for i in range(2))
    nodes = [n if second not in n.inputs else type(n)(n.op, tuple(first if i == second else i for i in n.inputs), n.outputs,
             n.attributes, n.domain) for n in model.nodes]  # fmt: skip
    shared = model.replace(nodes=tuple(nodes))
    with pytest.raises(ModelError, match="shared by several nodes"):
        applied(shared, gm.RemoveHeads({0: (1,)}))
    assert len(encoder_layers(applied(shared, gm.RemoveLayers((1,))))) == 1


def test_recipes_are_plain_data_and_back():
    recipe = [gm.RemoveLayers(every=2), gm.RemoveHeads({1: (2, 0)}), gm.RemoveHeads(fraction=0.25, method="wanda")]
    assert from_dict(to_dict(recipe)) == recipe
    assert from_dict([{"RemoveHeads": {"heads": {"1": [0, 2]}}}]) == [gm.RemoveHeads({1: (0, 2)})]
