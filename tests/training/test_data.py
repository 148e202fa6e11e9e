"""Examples that can and cannot be trained on, and metrics."""

import numpy as np
import pytest

import gristmill as gm
from gristmill import losses, metrics
from gristmill.errors import BudgetError, DataError, ModelError
from gristmill.training import arena, data
from gristmill.training.spec import describe
from training.programs import blobs, linear_gradient, small_model

X, Y = blobs(20)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64, np.int64, bool])
def test_labels_of_any_integer_type(dtype):
    arrays = data.model_data(small_model(), losses.find("cross_entropy"), (X, (Y > 0).astype(dtype)))
    assert arrays["labels"].dtype == np.int64


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.uint8])
def test_inputs_become_float32(dtype):
    arrays = data.model_data(small_model(), losses.find("cross_entropy"), (np.ones((20, 6), dtype), Y))
    assert arrays["x"].dtype == np.float32


def with_value(value, place=(7, 2)):
    x = X.copy()
    x[place] = value
    return x


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((X, Y[:-1]), r"lengths differ: \{'x': 20, 'labels': 19\}"),
        ((X[:0], Y[:0]), "no examples"),
        ((with_value(np.nan), Y), r"'x' has a value that is not finite: nan at index \[7, 2\]"),
        ((with_value(-np.inf), Y), r"-inf at index \[7, 2\]"),
        ((np.full((20, 6), 1e300), Y), r"inf at index \[0, 0\]"),
        ((X, np.where(np.arange(20) == 4, 3, Y)), "label 3 at index 4 lies outside the model's classes, 0 to 2"),
        ((X, np.where(np.arange(20) == 4, -1, Y)), "label -1 at index 4"),
        ((X, Y.astype(np.float32)), "'labels' has dtype float32, which does not convert to int64"),
        ((X, Y.astype(object)), "'labels' has dtype object"),
        ((X, Y.astype(str)), "'labels' has dtype <U"),
        ((X.astype(complex), Y), "'x' has dtype complex128"),
        ((X[:, :5], Y), r"'x' has shape \(20, 5\), the model takes float32\[batch, 6\]"),
        ((X[0], Y), r"'x' has shape \(6,\)|lengths differ"),
        ((X, Y[:, None]), r"'labels' has shape \(20, 1\)"),
        ((X, 3), "first axis is the examples"),
        (X, r"data must be \(x, y\) or a mapping"),
        ((X, Y, Y), r"data must be \(x, y\) or a mapping"),
        ({"x": X}, r"training needs arrays \{x: .*labels: .*got \['x'\]"),
        ({"x": X, "labels": Y, "more": Y}, "got .*'more'"),
    ],
)
def test_data_that_do_not_fit(given, message):
    with pytest.raises(DataError, match=message):
        gm.fit(small_model(), given, epochs=1, engine="inline")


def test_validation_data_are_checked_before_training():
    with pytest.raises(DataError, match="lengths differ"):
        gm.fit(small_model(), (X, Y), epochs=1, engine="inline", validation=(X, Y[:3]))
    with pytest.raises(DataError, match="validation="):
        gm.fit(small_model(), (X, Y), epochs=1, engine="inline", metric="accuracy")
    with pytest.raises(ModelError, match="unknown metric"):
        gm.fit(small_model(), (X, Y), epochs=1, engine="inline", validation=(X, Y), metric="charm")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": np.zeros(3), "y": np.zeros(4)}, "lengths differ"),
        ({}, "first axis"),
        ((), "first axis"),
        (np.zeros((0, 2)), "no examples"),
        (np.float32(1), "first axis"),
        ({"x": np.array([object()])}, "dtype object, which workers cannot share"),
        ({"x": np.zeros(3, [("a", int)])}, "workers cannot share"),
    ],
)
def test_own_data_that_do_not_fit(given, message):
    with pytest.raises(DataError, match=message):
        gm.fit_gradient(linear_gradient, np.zeros(1), given, epochs=1, engine="inline")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "nothing to train"),
        (np.zeros(0), "nothing to train"),
        ({"w": np.zeros(2, int)}, "'w' must be a floating-point array, got int64"),
        ({"w": np.array([1, np.nan])}, "'w' has values that are not finite"),
    ],
)
def test_parameters_that_do_not_fit(params, message):
    with pytest.raises(ModelError, match=message):
        gm.fit_gradient(linear_gradient, params, X, epochs=1, engine="inline")


def test_parameters_lie_aligned_and_apart():
    spec, arrays = describe({"a": np.ones((3, 5)), "b": np.float64(2.0), "c": np.zeros((0, 4)), "d": np.full(17, 3.0)})
    flat = np.full(spec.size, np.nan, np.float32)
    spec.write(arrays, flat)
    assert flat.sum() == 15 + 2 + 51
    for name, view in spec.views(flat).items():
        assert np.shares_memory(view, flat) == (view.size > 0)
        assert spec.offsets[name] % 16 == 0
        np.testing.assert_array_equal(view, arrays[name])


def test_the_arena_keeps_its_arrays_apart():
    sizes = arena.Sizes(5, 3, 7, (("x", "<f8", (7, 2)), ("y", "|i1", (7,)), ("z", "<f4", (7, 0))))
    shared = arena.carve(sizes, bytearray(sizes.nbytes))
    arrays = [shared.params, *shared.slots, shared.order, *shared.data.values()]
    for value, array in enumerate(arrays):
        array[...] = value
    for value, array in enumerate(arrays):
        assert (array == value).all()
    assert arena.Sizes.from_dict(sizes.as_dict()) == sizes


def test_without_memfd_an_unlinked_file_serves(monkeypatch, tmp_path):
    monkeypatch.delattr("os.memfd_create")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = gm.fit(small_model(), (X, Y), epochs=2, workers=2)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    wanted = gm.fit(small_model(), (X, Y), epochs=2, engine="inline")
    for name, array in wanted.params.items():
        np.testing.assert_array_equal(result.params[name], array)


def test_no_room_is_said_before_training(monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(BudgetError, match=r"no room for [0-9,]+ bytes") as caught:
        gm.fit(small_model(), (X, Y), epochs=1)
    assert caught.value.needed_bytes > 0


def test_metrics():
    output = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 1.0, 5.0]], np.float32)
    labels = np.array([0, 1, 1])
    assert metrics.accuracy(output, labels) == pytest.approx(2 / 3)
    wide = output.astype(np.float64)
    wanted = np.mean(np.log(np.exp(wide).sum(axis=1)) - wide[np.arange(3), labels])
    assert metrics.cross_entropy(output, labels) == pytest.approx(wanted)
    assert metrics.mse(output, output + 2) == 4.0


@pytest.mark.parametrize("metric", ["accuracy", "cross_entropy", "mse"])
def test_evaluation_in_batches_is_that_of_the_whole(metric):
    model = small_model()
    target = np.eye(3, dtype=np.float32)[Y] if metric == "mse" else Y
    output = model.run(x=X)["logits"]
    wanted = metrics.METRICS[metric](output, target)
    for batch_size in (1, 7, 20, 1000):
        assert gm.evaluate(model, (X, target), metric, batch_size) == pytest.approx(wanted, rel=1e-6)
    assert gm.evaluate(model, (X.astype(np.float64), target), metric) == pytest.approx(wanted, rel=1e-6)
    name = "target" if metric == "mse" else "labels"
    assert gm.evaluate(gm.Session(model), {"x": X, name: target}, metric) == pytest.approx(wanted, rel=1e-6)
    whole = gm.evaluate(model, ({"x": X}, target), metrics.METRICS[metric], 7)
    assert whole == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ((X, Y[:5]), {}, "same number of examples"),
        ((X[:0], Y[:0]), {}, "at least one"),
        ((X, Y[:, None]), {}, r"needs a target of shape \(20,\), got \(20, 1\)"),
        ((X, Y), {"metric": "mse"}, r"needs a target of shape \(20, 3\), got \(20,\)"),
        ((X, Y), {"metric": "beauty"}, "unknown metric"),
        ((X, Y), {"batch_size": 0}, "batch_size must be at least 1"),
        ({"x": X}, {}, "'labels' or 'target'"),
    ],
)
def test_evaluation_of_what_does_not_fit(given, options, message):
    with pytest.raises((DataError, ModelError), match=message):
        gm.evaluate(small_model(), given, **options)
