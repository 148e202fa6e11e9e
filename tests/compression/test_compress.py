"""Each pass does what it says; what it makes is smaller and runs on the kernel that gains from it."""

import json

import numpy as np
import pytest

import gristmill as gm
from gristmill.compression import measure
from gristmill.errors import DataError, ModelError
from gristmill.runtime.session import Session


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((4, 32)).astype(np.float32)
    labels = rng.integers(0, 4, 400)
    return (centres[labels] + 0.5 * rng.standard_normal((400, 32))).astype(np.float32), labels


@pytest.fixture(scope="module")
def model(data):
    start = gm.zoo.mlp([32, 64, 48, 4], seed=1)
    return gm.fit(start, data, optimizer=gm.Adam(3e-3), engine="inline", epochs=5).model


def served(model, product):
    """Whether a product can serve each weight; layers as small as these may run dense."""
    rows = [row for row in Session(model).explain(x=(256, 32)) if row["weight"]]
    return all(product in (row["product"], *(other["product"] for other in row["alternatives"])) for row in rows)


def test_clip_by_value_and_by_percentile(model):
    clipped, _ = gm.compress(model, [gm.Clip(value=0.1)])
    assert np.abs(clipped.tensors["layer0.weight"].dense()).max() == np.float32(0.1)
    weight = model.tensors["layer0.weight"].dense()
    clipped, _ = gm.compress(model, [gm.Clip(percentile=90)])
    magnitudes = np.sort(np.abs(weight).reshape(-1))
    bound_at = magnitudes[int(np.ceil(0.9 * magnitudes.size)) - 1]
    np.testing.assert_array_equal(clipped.tensors["layer0.weight"].dense(), np.clip(weight, -bound_at, bound_at))


@pytest.mark.parametrize("pattern", ["1x4", "unstructured"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_prune_drops_exactly_the_smallest(model, pattern, scope):
    pruned, report = gm.compress(model, [gm.Prune(0.75, pattern=pattern, scope=scope)])
    assert report.sparsity == pytest.approx(0.75, abs=2e-3)
    columns = 4 if pattern == "1x4" else 1
    kept, dropped = [], []
    for name in model.weights:
        before, after = model.tensors[name].dense(), pruned.tensors[name].dense()
        scores = (before.reshape(before.shape[0], -1, columns) ** 2).sum(axis=2)
        zero = (after.reshape(before.shape[0], -1, columns) == 0).all(axis=2)
        np.testing.assert_array_equal(after, np.where(np.repeat(zero, columns, axis=1), 0, before))
        if scope == "layer":
            assert scores[zero].max() <= scores[~zero].min()
        kept.append(scores[~zero])
        dropped.append(scores[zero])
    if scope == "global":
        assert np.concatenate(dropped).max() <= np.concatenate(kept).min()


@pytest.mark.parametrize(
    ("recipe", "product"),
    [
        ([gm.Prune(0.8)], "blocks 1x4 float32"),
        ([gm.Prune(0.8, pattern="unstructured")], "bitmask float32"),
        ([gm.Quantize()], "dense int8"),
        ([gm.Prune(0.8), gm.Quantize()], "blocks 1x4 int8"),
        ([gm.Prune(0.8, pattern="unstructured"), gm.Quantize()], "bitmask int8"),
    ],
)
def test_what_is_compressed_runs_on_its_kernel_and_is_smaller(model, recipe, product, tmp_path):
    small, report = gm.compress(model, recipe)
    assert served(small, product)
    gm.save(model, tmp_path / "model.safetensors")
    gm.save(small, tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size < 0.5 * (tmp_path / "model.safetensors").stat().st_size
    x = np.random.default_rng(0).standard_normal((37, 32)).astype(np.float32)
    want = Session(small, reference=True).run(x=x)["logits"]
    got = gm.load(tmp_path / "small.safetensors").run(x=x)["logits"]
    np.testing.assert_allclose(got, want, rtol=0, atol=0.03 * np.abs(want).max())
    assert report.bytes_after == (tmp_path / "small.safetensors").stat().st_size


@pytest.mark.parametrize("threads", [1, 2])
def test_bf16_halves_the_file_and_runs_as_its_reference(model, threads, tmp_path):
    small, _ = gm.compress(model, [gm.Quantize("bf16")])
    gm.save(model, tmp_path / "model.safetensors")
    gm.save(small, tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size < 0.6 * (tmp_path / "model.safetensors").stat().st_size
    x = np.random.default_rng(0).standard_normal((37, 32)).astype(np.float32)
    want = Session(small, reference=True).run(x=x)["logits"]
    loaded = gm.load(tmp_path / "small.safetensors")
    assert {loaded.tensors[name].kind for name in loaded.weights} == {"bf16"}
    for precision, tolerance in ((None, 0.02), ("float32", 1e-5), ("int8", 0.05)):
        got = Session(loaded, threads=threads, precision=precision).run(x=x)["logits"]
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def test_bf16_weights_train_as_float32_and_are_rounded_at_the_end(model, data):
    small, _ = gm.compress(model, [gm.Quantize("bf16")])
    trained = gm.fit(small, data, loss="cross_entropy", optimizer=gm.SGD(0.05), epochs=1, batch_size=32).model
    assert {trained.tensors[name].kind for name in trained.weights} == {"bf16"}
    assert any((trained.tensors[name].codes != small.tensors[name].codes).any() for name in trained.weights)


@pytest.mark.parametrize("given", ["data", "array", "mapping", "batches"])
@pytest.mark.parametrize("percentile", [100.0, 99.9])
def test_static_scales_come_from_calibration(model, data, given, percentile):
    calibration = {"data": "data", "array": data[0], "mapping": {"x": data[0]}, "batches": [data[0][:50], data[0][50:]]}[given]
    small, _ = gm.compress(model, [gm.Quantize("int8", calibration=calibration, percentile=percentile)], data=data)
    linears = [node for node in small.nodes if node.op == "Linear"]
    assert all(node.attributes["input_scale"] > 0 and 0 <= node.attributes["input_zero_point"] <= 255 for node in linears)
    assert json.dumps(small.meta["recipe"])
    if percentile == 100:
        low, high = min(data[0].min(), 0), data[0].max()
        assert linears[0].attributes["input_scale"] == pytest.approx((high - low) / 255, rel=1e-6)
    x = data[0][:77]
    want, float32 = Session(small, reference=True).run(x=x)["logits"], model.run(x=x)["logits"]
    got = small.run(x=x)["logits"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    assert np.linalg.norm(got - float32) < 0.05 * np.linalg.norm(float32)


def test_calibration_that_cannot_work_is_refused(model, data):
    for bad in ("other", "data", 3, [], [{"x": np.full((2, 32), np.nan, np.float32)}]):
        with pytest.raises(DataError, match="Quantize"):
            gm.compress(model, [gm.Quantize(calibration=bad)])
    for make in (lambda: gm.Quantize("bf16", calibration="data"), lambda: gm.Quantize(calibration="data", percentile=20)):
        with pytest.raises(ModelError, match="Quantize"):
            make()


def test_distillation_recovers_what_pruning_lost(model, data):
    pruned, _ = gm.compress(model, [gm.Prune(0.9)])
    distilled, report = gm.compress(model, [gm.Prune(0.9), gm.Distill(epochs=20)], data=data)
    lost = gm.evaluate(model, data) - gm.evaluate(pruned, data)
    assert gm.evaluate(model, data) - gm.evaluate(distilled, data) < max(0.5 * lost, 0.02)
    for name in model.weights:
        np.testing.assert_array_equal(distilled.tensors[name].index, pruned.tensors[name].index)
    assert [stage.name for stage in report.stages] == ["original", "Prune", "Distill"]


def test_an_int8_student_trains_its_scales(model, data):
    small, _ = gm.compress(model, [gm.Quantize(), gm.Distill(epochs=1)], data=data)
    before, _ = gm.compress(model, [gm.Quantize()])
    weight = small.tensors["layer1.weight"]
    np.testing.assert_array_equal(weight.codes, before.tensors["layer1.weight"].codes)
    assert not np.array_equal(weight.scale, before.tensors["layer1.weight"].scale)


def test_another_teacher_may_be_given(model, data):
    student = gm.zoo.mlp([32, 16, 4], seed=5)
    taught, _ = gm.compress(student, [gm.Distill(epochs=8, alpha=0.9, teacher=model, optimizer=gm.Adam(1e-2))], data=data)
    assert gm.evaluate(taught, data) > gm.evaluate(student, data) + 0.3
    with pytest.raises(ModelError, match="must agree"):
        gm.compress(gm.zoo.mlp([32, 5]), [gm.Distill(teacher=model)], data=data)


def test_the_report_is_complete_and_json(model, data):
    small, report = gm.compress(model, [gm.Clip(), gm.Prune(0.8), gm.Quantize()], data=data)
    figures = json.loads(json.dumps(report.as_dict()))
    assert {"bytes_before", "bytes_after", "sparsity", "error", "drop", "latency_ms_after"} <= figures["total"].keys()
    for layer in figures["layers"]:
        assert layer["bytes_after"] < layer["bytes_before"]
        assert layer["error"] > 0
        assert layer["latency_ms_after"]["1"] > 0
    assert [step["pass"] for step in figures["recipe"]] == ["Clip", "Prune", "Quantize"]
    assert small.meta["recipe"] == figures["recipe"]
    assert "blocks 1x4 int8" in str(report)


def test_inputs_alone_are_enough_for_the_output_error(model, data):
    _, report = gm.compress(model, [gm.Quantize()], data=data[0])
    assert report.drop is None
    assert 0 < report.stages[-1].error < 0.1


def test_names_select_weights(model):
    small, _ = gm.compress(model, [gm.Quantize(names=("layer[01]*",), skip=("layer1*",))])
    assert [small.tensors[name].kind for name in small.weights] == ["quantized", "dense", "dense"]
    with pytest.raises(ModelError, match="matches none"):
        gm.compress(model, [gm.Quantize(names=("encoder*",))])


def test_weights_that_blocks_do_not_tile_stay_dense():
    model = gm.zoo.mlp([30, 32, 8])
    small, _ = gm.compress(model, [gm.Prune(0.8)])
    assert [small.tensors[name].kind for name in small.weights] == ["dense", "sparse"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: gm.Prune(0.0), lambda: gm.Prune(1.0), lambda: gm.Prune(0.5, pattern="3x3"), lambda: gm.Prune(0.5, scope="all"),
        lambda: gm.Clip(value=-1), lambda: gm.Clip(value=1, percentile=2), lambda: gm.Clip(percentile=0),
        lambda: gm.Quantize("int2"), lambda: gm.Distill(epochs=0), lambda: gm.Distill(alpha=2),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(make):
    with pytest.raises(ModelError):
        make()


def test_recipes_that_cannot_work_are_refused(model):
    with pytest.raises(ModelError, match="list of passes"):
        gm.compress(model, [])
    with pytest.raises(DataError, match="data="):
        gm.compress(model, [gm.Distill()])
    with pytest.raises(ModelError, match="Quantize last"):
        gm.compress(model, [gm.Quantize(), gm.Prune(0.5)])


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_encoder_is_measured_on_ids_within_its_tables(precision):
    model = gm.zoo.bert(layers=1, hidden=32, heads=2, vocabulary=50, positions=64)
    small, report = gm.compress(model, [gm.Quantize(precision)])
    assert 0 < report.stages[-1].error < 0.1
    assert len(report.layers) == len(small.weights) == 6
    with pytest.raises(DataError, match=r"takes several inputs.*input_ids.*attention_mask"):
        gm.compress(model, [gm.Quantize(precision)], np.zeros((4, 8), np.int64))


def test_weights_that_are_alike_are_timed_once(monkeypatch):
    timed = []
    monkeypatch.setattr(measure, "layer_latency", lambda tensor, threads: timed.append(tensor) or {1: 0.0, 256: 0.0})
    model = gm.zoo.mlp([32, 32, 32, 32, 8])
    layers = list(measure.measure_layers(model, model, threads=1))
    assert len(layers) == 4
    assert len(timed) == 2
