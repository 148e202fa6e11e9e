"""Training end to end: the same bits wherever it runs, and the algorithm of the textbook."""

import numpy as np
import pytest

import gristmill as gm
from gristmill import losses
from gristmill.errors import ModelError, WorkerError
from gristmill.training import aggregate, shards
from gristmill.training.convergence import Until, stalled
from training.programs import bits, blobs, linear_gradient, linear_problem, small_model

PLACES = [("inline", 1), ("inline", 2), ("inline", 4), ("processes", 1), ("processes", 2), ("processes", 4)]


@pytest.mark.parametrize("optimizer", [gm.SGD(0.1, momentum=0.9), gm.Adam(1e-2, clip_norm=0.5)], ids=["momentum", "adam"])
def test_the_same_bits_wherever_it_runs(optimizer):
    x, y = blobs(101)  # the last batch and its slices are smaller
    results = [
        gm.fit(small_model(), (x, y), optimizer=optimizer, batch_size=16, epochs=2, engine=engine, workers=workers, seed=7)
        for engine, workers in PLACES
    ]
    assert {bits(result) for result in results} == {bits(results[0])}
    for result in results:
        np.testing.assert_array_equal(result.history["loss"], results[0].history["loss"])
        np.testing.assert_array_equal(result.history["gradient_norm"], results[0].history["gradient_norm"])


def test_fit_gradient_gives_the_same_bits_wherever_it_runs():
    params, data = linear_problem(61)
    found = {
        bits(gm.fit_gradient(linear_gradient, params, data, batch_size=8, epochs=2, engine=engine, workers=workers))
        for engine, workers in PLACES
    }
    assert len(found) == 1


def plain_descent(x, y, weights, rate, epochs, batch_size, seed, reduction):
    """Gradient descent as a textbook writes it, in float64, for a linear layer under cross entropy."""
    weight, bias = (array.astype(np.float64) for array in weights)
    trajectory = []
    for epoch in range(epochs):
        order = np.arange(len(x))
        if batch_size < len(x):
            np.random.default_rng((seed, epoch)).shuffle(order)
        total = 0.0
        for start in range(0, len(x), batch_size):
            rows = order[start : start + batch_size]
            logits = x[rows] @ weight.T + bias
            p = np.exp(logits - logits.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            total -= np.log(p[np.arange(len(rows)), y[rows]]).sum()
            p[np.arange(len(rows)), y[rows]] -= 1
            share = 1 / len(rows) if reduction == "mean" else 1.0
            weight -= rate * share * (p.T @ x[rows])
            bias -= rate * share * p.sum(axis=0)
        trajectory.append(total / len(x))
    return weight, bias, trajectory


@pytest.mark.parametrize("batch_size", [None, 16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("engine", "workers"), [("inline", 1), ("processes", 2)])
def test_it_is_gradient_descent(batch_size, reduction, engine, workers):
    x, y = blobs(90)
    model = gm.zoo.mlp([6, 3], seed=1)
    rate = 0.2 if reduction == "mean" else 0.2 / 90
    options = {"batch_size": batch_size, "reduction": reduction, "engine": engine, "workers": workers, "seed": 5, "epochs": 6}
    result = gm.fit(model, (x, y), optimizer=gm.SGD(rate), **options)
    start = [model.tensors[name].dense() for name in ("layer0.weight", "layer0.bias")]
    weight, bias, trajectory = plain_descent(x, y, start, rate, 6, batch_size or 90, 5, reduction)
    np.testing.assert_allclose(result.params["layer0.weight"], weight, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(result.params["layer0.bias"], bias, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(result.history["loss"], trajectory, rtol=1e-5)


def test_the_result_depends_on_seed_and_slices_only_within_rounding():
    data = blobs(96)
    base = gm.fit(small_model(), data, epochs=2, engine="inline", slices=4)
    other = gm.fit(small_model(), data, epochs=2, engine="inline", slices=6)
    seeded = gm.fit(small_model(), data, epochs=2, engine="inline", seed=1)
    for name, array in base.params.items():
        np.testing.assert_allclose(other.params[name], array, rtol=1e-3, atol=1e-5)
    assert not np.allclose(seeded.params["layer0.weight"], base.params["layer0.weight"], atol=1e-4)


def test_it_learns_and_reports():
    x, y = blobs(240)
    result = gm.fit(small_model(), (x[:180], y[:180]), epochs=15, workers=2, validation=(x[180:], y[180:]))
    assert result.history["accuracy"][-1] > 0.9
    assert gm.evaluate(result.model, (x[180:], y[180:])) == result.history["accuracy"][-1]
    assert set(result.history) == {"loss", "gradient_norm", "seconds", "examples_per_second", "accuracy"}
    assert {array.shape for array in result.history.values()} == {(15,)}
    assert result.stopped == "epochs"
    assert sum(result.report.leases.values()) == 15 * 6 * 4
    assert result.report.deaths == {}
    assert result.model.meta["training"]["optimizer"] == "SGD"


def test_neither_model_nor_data_are_changed():
    x, y = blobs()
    model = small_model()
    before = {name: tensor.dense().copy() for name, tensor in model.tensors.items()}
    copies = x.copy(), y.copy()
    gm.fit(model, (x, y), epochs=1, engine="inline")
    gm.fit(model, (x, y), epochs=1)
    np.testing.assert_array_equal(x, copies[0])
    np.testing.assert_array_equal(y, copies[1])
    for name, array in before.items():
        np.testing.assert_array_equal(model.tensors[name].dense(), array)


def test_only_what_is_chosen_trains():
    result = gm.fit(small_model(), blobs(), epochs=1, engine="inline", trainable=["layer1.bias"])
    assert set(result.params) == {"layer1.bias"}
    start = small_model()
    for name, tensor in result.model.tensors.items():
        assert np.array_equal(tensor.dense(), start.tensors[name].dense()) == (name != "layer1.bias")


def test_regression_and_distillation():
    x, y = blobs()
    target = np.eye(3, dtype=np.float32)[y]
    result = gm.fit(small_model(), (x, target), loss="mse", epochs=5, engine="inline", validation=(x, target))
    assert result.history["mse"][-1] < result.history["mse"][0]
    teacher = small_model(seed=9).run(x=x)["logits"]
    data = {"x": x, "teacher": teacher, "labels": y}
    distilled = gm.fit(
        small_model(), data, loss=losses.distillation(2.0, 0.5), epochs=5, workers=2, validation=data, metric="cross_entropy"
    )
    assert distilled.history["loss"][-1] < distilled.history["loss"][0]
    assert len(distilled.history["cross_entropy"]) == 5


def test_a_metric_of_ones_own():
    def share_of_first(output, labels):
        return float(np.mean(output.argmax(axis=1) == 0))

    result = gm.fit(small_model(), blobs(), epochs=2, engine="inline", validation=blobs(seed=1), metric=share_of_first)
    assert result.history["share_of_first"].shape == (2,)


def test_parameters_and_data_keep_their_form():
    data = np.arange(12.0).reshape(6, 2)

    def single(theta, batch):
        assert batch.shape[1] == 2
        return 0.5 * np.mean((theta - batch) ** 2), np.mean(theta - batch, axis=0)

    result = gm.fit_gradient(single, np.zeros(2), data, engine="inline", epochs=300, batch_size=None)
    assert result.params.dtype == np.float32
    np.testing.assert_allclose(result.params, data.mean(axis=0), rtol=1e-5)

    def pair(params, batch):
        x, y = batch
        return 0.0, {"a": np.zeros(3, np.float32) + x.shape[0] - y.shape[0]}

    gm.fit_gradient(pair, {"a": np.zeros(3)}, (data, data[:, 0]), engine="inline", epochs=1)


def test_parameters_are_read_only_to_the_gradient():
    def meddling(params, batch):
        params["weight"][:] = 0
        return linear_gradient(params, batch)

    params, data = linear_problem()
    with pytest.raises(WorkerError, match="read-only"):
        gm.fit_gradient(meddling, params, data, engine="inline", epochs=1)


def test_until_the_gradient_is_small():
    params, data = linear_problem()
    until = Until(epochs=1000, gradient_norm=1e-3)
    result = gm.fit_gradient(linear_gradient, params, data, gm.SGD(0.3), batch_size=None, until=until, engine="inline")
    assert result.stopped == "gradient_norm"
    assert result.history["gradient_norm"][-1] <= 1e-3 < result.history["gradient_norm"][-2]
    np.testing.assert_allclose(result.params["weight"], [1, 2, 3, 4], atol=0.01)


def test_until_the_loss_stalls():
    params, data = linear_problem()
    until = Until(improvement=0.01, patience=2)
    result = gm.fit_gradient(linear_gradient, params, data, gm.SGD(0.0), until=until, engine="inline")
    assert result.stopped == "improvement"
    assert len(result.history["loss"]) == 3
    assert stalled([3.0, 2.0, 1.99, 1.5, 1.5, 1.6], 0.01) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "say when training ends"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"epochs": 2, "until": Until(epochs=3)}, "not both"),
        ({"epochs": 1, "workers": 8}, "8 workers need at least 8 slices"),
        ({"epochs": 1, "workers": 0}, "workers must be a whole number"),
        ({"epochs": 1, "batch_size": 0}, "batch_size must be a whole number"),
        ({"epochs": 1, "batch_size": True}, "batch_size must be a whole number"),
        ({"epochs": 1, "seed": -1}, "seed must be a whole number"),
        ({"epochs": 1, "reduction": "median"}, "choose one of mean, sum"),
        ({"epochs": 1, "engine": "abacus"}, "unknown engine"),
        ({"epochs": 1, "loss": "hinge"}, "unknown loss"),
        ({"epochs": 1, "trainable": ["nothing"]}, "no float32 tensor"),
        ({"epochs": 1, "trainable": []}, "nothing to train"),
        ({"epochs": 1, "resume": True}, "needs checkpoint="),
        ({"epochs": 1, "threads": 0}, "threads must be"),
        ({"epochs": 1, "worker_timeout": 0}, "worker_timeout"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ModelError, match=message):
        gm.fit(small_model(), blobs(), **options)


def test_progress_is_shown_when_asked(capsys):
    gm.fit(small_model(), blobs(), epochs=2, engine="inline", progress=True, validation=blobs())
    shown = capsys.readouterr().err
    assert "epoch 2/2" in shown
    assert "accuracy" in shown
    gm.fit(small_model(), blobs(), epochs=2, engine="inline")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("slices", [1, 3, 4, 7])
@pytest.mark.parametrize(("examples", "batch_size"), [(1, 1), (10, 4), (33, 32), (5, 32)])
def test_slices_cover_each_batch_once(examples, batch_size, slices):
    seen = []
    for batch in range(shards.steps_per_epoch(examples, batch_size)):
        leases = shards.cut(examples, batch_size, batch, slices)
        assert len({lease.slot for lease in leases}) == len(leases) <= slices
        for lease in leases:
            assert lease.start < lease.stop
            seen += range(lease.start, lease.stop)
        shared = shards.share(leases, [4, 5, 9])
        assert [lease for part in shared.values() for lease in part] == leases
    assert seen == list(range(examples))


def test_losses_are_added_as_gradients_are():
    values = list(np.random.default_rng(0).standard_normal(7))
    left = (values[0] + values[1]) + (values[2] + values[3])
    assert aggregate.tree_sum(values) == left + ((values[4] + values[5]) + values[6])


@pytest.mark.parametrize(("engine", "workers"), [("inline", 2), ("processes", 1)])
def test_a_gradient_by_torch(engine, workers):
    pytest.importorskip("torch")

    def gradient(params, batch):
        import torch

        leaves = {name: torch.tensor(array, requires_grad=True) for name, array in params.items()}
        error = torch.from_numpy(batch["x"].copy()) @ leaves["weight"] + leaves["bias"] - torch.from_numpy(batch["y"].copy())
        loss = 0.5 * (error**2).mean()
        loss.backward()
        return loss.item(), {name: leaf.grad for name, leaf in leaves.items()}

    params, data = linear_problem()
    result = gm.fit_gradient(gradient, params, data, epochs=3, engine=engine, workers=workers)
    wanted = gm.fit_gradient(linear_gradient, params, data, epochs=3, engine="inline")
    for name, array in wanted.params.items():
        np.testing.assert_allclose(result.params[name], array, rtol=1e-4, atol=1e-5)


def test_settings_of_numpy_types_are_kept_as_plain_numbers(tmp_path):
    options = {"epochs": np.int64(1), "batch_size": np.int32(16), "seed": np.uint8(3), "slices": np.int64(4), "engine": "inline"}
    result = gm.fit(small_model(), blobs(), "cross_entropy", gm.SGD(0.1), checkpoint=tmp_path / "run", **options)
    gm.save(result.model, tmp_path / "model.safetensors")
    assert gm.load(tmp_path / "model.safetensors").meta["training"]["batch_size"] == 16
