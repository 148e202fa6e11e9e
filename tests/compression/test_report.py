"""Figures of the report against oracles; the gate and what it reverts; tables and plots."""

import json

import numpy as np
import pytest

import gristmill as gm
from gristmill.compression.break_even import break_even
from gristmill.compression.examples import checked
from gristmill.compression.measure import Yardstick
from gristmill.compression.provenance import data_checksum, model_checksum
from gristmill.compression.quality import agreement_of_ranks, answers, averaged, check_metric, cosines, measured
from gristmill.compression.report import Layer, tables
from gristmill.compression.revert import revert
from gristmill.errors import DataError, ModelError
from gristmill.tensor import Sparse

RNG = np.random.default_rng(0)
CENTRES = RNG.standard_normal((4, 32)).astype("f4")
Y = RNG.integers(0, 4, 300)
X = (CENTRES[Y] + 0.5 * RNG.standard_normal((300, 32))).astype("f4")


@pytest.fixture(scope="module")
def model():
    start = gm.zoo.mlp([32, 64, 64, 48, 4], seed=1)
    return gm.fit(start, (X, Y), optimizer=gm.Adam(3e-3), engine="inline", epochs=6).model


def naive_ranks(values):
    return np.array([np.sum(values < v) + (np.sum(values == v) + 1) / 2 for v in values])


def naive_spearman(a, b):
    return np.corrcoef(naive_ranks(a), naive_ranks(b))[0, 1]


@pytest.mark.parametrize("ties", [False, True])
def test_the_rank_correlation_of_similarities(ties):
    before = RNG.standard_normal((30, 8))
    after = before + 0.7 * RNG.standard_normal((30, 8))
    if ties:
        before, after = np.round(before), np.round(after)
        before[3], after[5] = before[2], after[4]

    def pairs(values):
        unit = values / np.linalg.norm(values, axis=1, keepdims=True)
        return np.array([unit[i] @ unit[j] for i in range(30) for j in range(i + 1, 30)]).round(12)

    figure = agreement_of_ranks(after, before)
    assert figure.value == pytest.approx(naive_spearman(pairs(after), pairs(before)), abs=1e-9)
    assert figure.low < figure.value < figure.high
    assert agreement_of_ranks(before, before).value == pytest.approx(1)
    assert agreement_of_ranks(-before, before).value == pytest.approx(1)
    assert agreement_of_ranks(after[:2], before[:2]) == (1, 1, 1)


def test_cosines_with_zeros():
    a = np.array([[1.0, 0], [0, 0], [0, 0], [3, 4]])
    b = np.array([[0.0, 1], [0, 0], [1, 0], [6, 8]])
    np.testing.assert_allclose(cosines(a, b), [0, 1, 0, 1])


def test_metrics_are_those_of_evaluate(model):
    output = model.run(x=X)["logits"]
    for metric in ("accuracy", "cross_entropy"):
        assert measured(metric, output, output, Y).value == pytest.approx(gm.evaluate(model, (X, Y), metric), rel=1e-5)
    target = RNG.standard_normal((300, 4)).astype("f4")
    assert measured("mse", output, output, target).value == pytest.approx(gm.evaluate(model, (X, target), "mse"), rel=1e-5)
    worst = measured(lambda out, labels: float((out.argmax(1) == labels).mean()), output, output, Y)
    assert worst.value == measured("accuracy", output, output, Y).value


def test_the_interval_is_that_of_a_mean():
    scores = RNG.standard_normal(400)
    figure = averaged(scores)
    half = 1.96 * scores.std() / 20
    assert figure.low == pytest.approx(figure.value - half, abs=0.15 * half)
    assert figure.high == pytest.approx(figure.value + half, abs=0.15 * half)


@pytest.mark.parametrize(
    ("metric", "target", "message"),
    [("accuracy", None, "needs labels"), ("accuracy", Y + 1, r"in \[0, 4\)"), ("mse", Y, "needs a target of shape"),
     ("accuracy", Y[:, None], "needs a target of shape")],
)  # fmt: skip
def test_labels_that_do_not_fit_the_metric(model, metric, target, message):
    output = model.run(x=X)["logits"]
    with pytest.raises(DataError, match=message):
        measured(metric, output, output, target)


def test_metrics_are_chosen_and_checked():
    labelled, bare = (checked("data", gm.zoo.mlp([32, 4]), data) for data in ((X, Y), X))
    assert check_metric(None, labelled) == "accuracy"
    assert check_metric(None, bare) is None
    assert check_metric(None, checked("data", gm.zoo.mlp([32, 4]), (X, X[:, :4]))) == "mse"
    with pytest.raises(ModelError, match="unknown metric"):
        check_metric("f1", labelled)
    with pytest.raises(DataError, match="pass data"):
        check_metric("cosine", None)


def test_a_metric_that_falls_drops_when_it_rises(model):
    _, report = gm.compress(model, [gm.Prune(0.9)], (X, Y), metric="cross_entropy")
    assert report.stages[-1].metric > report.stages[0].metric
    assert report.drop == report.stages[-1].metric - report.stages[0].metric


def test_the_report_has_what_a_reader_needs(model, tmp_path):
    small, report = gm.compress(model, [gm.Prune(0.8, skip="layer3*"), gm.Quantize("int8", skip="layer3*")], (X, Y), seed=3)
    figures = json.loads(json.dumps(report.as_dict()))
    first, _, last = figures["stages"]
    assert first["metric_interval"][0] <= first["metric"] <= first["metric_interval"][1]
    assert first["cosine"] == first["spearman"] == 1
    assert 0 < last["cosine"] < 1
    assert last["per_second"]["256"] == pytest.approx(256e3 / last["latency_ms"]["256"])
    assert last["peak_bytes"] > 1e7
    ranks = {layer["name"]: layer["sensitivity_rank"] for layer in figures["layers"]}
    assert sorted(rank for rank in ranks.values() if rank) == [1, 2, 3]
    assert ranks["layer3.weight"] is None  # it is as it was
    for layer in figures["layers"][:3]:
        assert 0 < layer["output_error"] < 2
        assert layer["seconds"] > 0
        assert layer["break_even"].keys() == {"1", "256"}
        assert layer["latency_ms_dense"]["256"] > 0
    entry = small.meta["compression"][0]
    assert entry == figures["provenance"]
    assert entry["input"] == model_checksum(model)
    assert entry["output"] == model_checksum(small)
    assert entry["data"] == data_checksum((X, Y))
    assert (entry["seed"], entry["gristmill"]) == (3, gm.__version__)
    assert entry["kernels"]
    gm.save(small, tmp_path / "small.safetensors")
    assert report.bytes_after == (tmp_path / "small.safetensors").stat().st_size
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == figures
    printed = str(report)
    assert all(text in printed for text in ("spearman", "layer2.weight", "sparse_linear_int8", "pays from"))
    assert [len(set(map(len, rows))) for rows in tables(figures)] == [1, 1]


def test_checksums_tell_models_and_data_apart(model):
    assert model_checksum(model) != model_checksum(gm.compress(model, [gm.Clip(value=0.01)])[0])
    assert data_checksum((X, None)) != data_checksum((X, Y))
    assert data_checksum({"a": X}) != data_checksum({"b": X})
    assert data_checksum(X) != data_checksum(X.astype("f8"))


def layer(**changes):
    given = {
        "name": "w", "kind": "1x4 int8", "shape": (8, 8), "error": 0.1, "output_error": None, "sensitivity_rank": None,
        "sparsity": 0.5, "seconds": None, "bytes_before": 9, "bytes_after": 3, "latency_ms_before": {"1": 1.0, "256": 4.0},
        "latency_ms_after": {"1": 2.0, "256": 1.0}, "latency_ms_dense": {"1": 1.0, "256": 2.0},
        "break_even": {"1": 0.9, "256": 0.3},
    }  # fmt: skip
    return Layer(**{**given, **changes})


def test_a_layer_that_sparsity_makes_slower_is_told_of(model):
    assert layer().slower == {"1": 2.0}
    assert layer(sparsity=0.95).slower == {}
    assert layer(break_even={"1": None, "256": None}).slower == {"1": 2.0}
    _, report = gm.compress(model, [gm.Prune(0.5)])
    slow = report.__class__(report.stages, (layer(),), (), "", {})
    assert "w: 1x4 int8 at 50% is 2.00 times slower than dense on 1 row on this CPU; it pays from 90%" in str(slow)


def test_the_break_even_lies_between_none_and_all():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 64), dtype=np.float32)
    found = break_even(Sparse.from_dense(weight, rng.random((64, 16)) > 0.5, (1, 4)), 1)
    assert found.keys() == {"1", "256"}
    assert all(share is None or 0 <= share <= 0.99 for share in found.values())


def brutal(model):
    """Prune that leaves one layer unharmed and ruins another."""
    return [gm.Prune({"layer1*": 0.98, "layer2*": 0.3})]


def test_the_most_sensitive_layers_are_reverted_until_the_drop_is_met(model):
    _, before = gm.compress(model, brutal(model), (X, Y))
    assert before.drop > 0.05
    assert before.gate is None
    small, report = gm.compress(model, brutal(model), (X, Y), max_drop=0.02)
    assert report.gate["met"]
    assert report.gate["reverted"] == ["layer1.weight"]
    assert report.gate["evaluations"] <= 3
    assert report.drop <= 0.02
    assert small.tensors["layer1.weight"] is model.tensors["layer1.weight"]
    assert small.tensors["layer2.weight"].kind == "sparse"
    assert [stage.name for stage in report.stages] == ["original", "Prune", "revert"]
    assert [each.name for each in report.layers if each.reverted] == ["layer1.weight"]
    assert small.meta["compression"][0]["reverted"] == ["layer1.weight"]
    assert "reverted to keep to max_drop: layer1.weight" in str(report)


def test_nothing_is_reverted_where_the_drop_is_met(model):
    small, report = gm.compress(model, [gm.Quantize()], X, max_drop=0.01)
    assert report.metric == "cosine"
    assert report.gate == {"max_drop": 0.01, "met": True, "reverted": [], "evaluations": 0}
    assert {small.tensors[name].kind for name in small.weights} == {"quantized"}


def test_static_scales_go_back_with_their_weight(model):
    recipe = [gm.Prune(0.95, names="layer1*"), gm.Quantize("int8", calibration="data")]
    small, report = gm.compress(model, recipe, (X, Y), max_drop=0.005)
    assert report.gate["met"]
    for node in small.nodes:
        if node.op == "Linear":
            reverted = small.tensors[node.inputs[1]].kind == "dense"
            assert ("input_scale" in node.attributes) == (small.tensors[node.inputs[1]].kind == "quantized")
            assert reverted == (node.inputs[1] in report.gate["reverted"])


def test_everything_goes_back_where_nothing_less_will_do(model):
    changed = gm.compress(model, [gm.Prune(0.97)])[0]
    changed = changed.replace(tensors={"layer0.bias": model.tensors["layer0.bias"].with_trainable(np.full(64, 50.0))})
    changed = changed.replace(tensors={"layer3.bias": model.tensors["layer3.bias"].with_trainable(np.array([0, 9, 9, 99.0]))})
    examples = checked("data", model, (X, Y))
    yardstick = Yardstick(model, examples, "accuracy", answers(model, examples, 1))
    outcome = revert(model, changed, yardstick, 0.0, 1)
    assert outcome.met
    assert outcome.evaluations <= 2 + np.log2(5)
    assert len(outcome.names) == 4
    np.testing.assert_array_equal(outcome.model.run(x=X)["logits"], model.run(x=X)["logits"])


@pytest.mark.parametrize(
    ("bound", "data", "error"), [(-1, (X, Y), ModelError), ("a", (X, Y), ModelError), (0.1, None, DataError)]
)
def test_a_bound_that_cannot_be_kept_to(model, bound, data, error):
    with pytest.raises(error, match="max_drop"):
        gm.compress(model, [gm.Clip()], data, max_drop=bound)


def test_plots_are_drawn(model, tmp_path):
    pytest.importorskip("matplotlib")
    _, report = gm.compress(model, brutal(model), (X, Y), max_drop=0.02)
    paths = report.plot(tmp_path / "plots")
    assert [path.name for path in paths] == ["quality.png", "layers.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "plots").iterdir())) == 2
