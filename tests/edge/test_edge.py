"""Edge training: right gradients, the byte budget kept, every kind of model."""

import subprocess
import sys

import numpy as np
import pytest

import gristmill as gm
from gristmill.edge.trainer import parse_bytes
from gristmill.errors import BudgetError, DataError, DivergedError, ModelError


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((4, 32)).astype(np.float32)
    labels = rng.integers(0, 4, 300)
    return (centres[labels] + 0.4 * rng.standard_normal((300, 32))).astype(np.float32), labels


@pytest.fixture(scope="module")
def models(data):
    dense = gm.fit(gm.zoo.mlp([32, 64, 48, 4], seed=1), data, optimizer=gm.Adam(3e-3), engine="inline", epochs=4).model
    return {
        "dense": dense,
        "sparse": gm.compress(dense, [gm.Prune(0.75)])[0],
        "int8": gm.compress(dense, [gm.Quantize()])[0],
        "sparse int8": gm.compress(dense, [gm.Prune(0.75), gm.Quantize()])[0],
        "int4": gm.compress(dense, [gm.Quantize("int4")])[0],
    }


@pytest.mark.parametrize("kind", ["dense", "sparse", "int8", "sparse int8", "int4"])
@pytest.mark.parametrize("update", ["all", "bias", "last:1"])
@pytest.mark.parametrize("method", ["gradient-descent", "mini-batch"])
def test_the_loss_falls_within_the_plan(models, data, kind, update, method):
    x, y = data[0] * 0.5 + 0.3, data[1]
    trainer = gm.EdgeTrainer(models[kind], memory="1MiB", update=update, optimizer=gm.SGD(0.05))
    result = trainer.fit(x, y, method=method, epochs=8)
    assert result.history["loss"][-1] < result.history["loss"][0]
    assert 0 < result.peak_bytes <= result.planned_bytes <= trainer.budget
    for name, tensor in result.model.tensors.items():
        assert tensor.kind == models[kind].tensors[name].kind


def test_full_batch_descent_is_gradient_descent(models, data):
    """Accumulated in micro-batches, the step equals the one on the gradient of the whole set."""
    x, y = data
    model = models["dense"]
    roomy = gm.EdgeTrainer(model, memory="16MiB", optimizer=gm.SGD(0.1)).fit(x, y, method="gradient-descent", epochs=2)
    tight = gm.EdgeTrainer(model, memory=roomy.plan.parameters * 5, optimizer=gm.SGD(0.1))
    small = tight.fit(x, y, method="gradient-descent", epochs=2)
    assert roomy.plan.micro_batch == len(x)
    assert small.plan.micro_batch < len(x)
    by_fit = gm.fit(model, data, optimizer=gm.SGD(0.1), batch_size=len(x), epochs=2, engine="inline", slices=1).model
    for name, tensor in roomy.model.tensors.items():
        np.testing.assert_allclose(small.model.tensors[name].dense(), tensor.dense(), rtol=1e-4, atol=2e-6)
        np.testing.assert_allclose(by_fit.tensors[name].dense(), tensor.dense(), rtol=1e-4, atol=2e-6)


def test_bias_updates_leave_weights_alone(models, data):
    result = gm.EdgeTrainer(models["sparse int8"], memory="1MiB", update="bias").fit(*data, epochs=1)
    before, after = models["sparse int8"].tensors, result.model.tensors
    np.testing.assert_array_equal(after["layer0.weight"].values, before["layer0.weight"].values)
    assert not np.array_equal(after["layer0.weight"].scale, before["layer0.weight"].scale)
    assert not np.array_equal(after["layer0.bias"].array, before["layer0.bias"].array)


def test_last_layer_updates_leave_the_rest_alone(models, data):
    result = gm.EdgeTrainer(models["int8"], memory="1MiB", update="last:1", optimizer=gm.SGD(0.5)).fit(*data, epochs=2)
    before, after = models["int8"].tensors, result.model.tensors
    np.testing.assert_array_equal(after["layer1.weight"].codes, before["layer1.weight"].codes)
    assert not np.array_equal(after["layer2.weight"].codes, before["layer2.weight"].codes)
    assert result.plan.parameters == 4 * (4 * 48 + 16)  # the master, and the bias on a cache line of its own


def test_a_smaller_update_plans_fewer_bytes(models):
    x, y = np.zeros((64, 32), np.float32), np.zeros(64, np.int64)
    planned = {
        update: gm.EdgeTrainer(models["dense"], memory="4MiB", update=update).fit(x, y, epochs=1).planned_bytes
        for update in ("all", "last:1", "bias")
    }
    assert planned["bias"] < planned["all"]
    assert planned["last:1"] < planned["all"]


def test_too_small_a_budget_is_refused_with_the_figure_that_would_do(models, data):
    with pytest.raises(BudgetError, match="needs at least") as caught:
        gm.EdgeTrainer(models["dense"], memory="8KiB").fit(*data)
    needed = caught.value.needed_bytes
    gm.EdgeTrainer(models["dense"], memory=needed).fit(*data, epochs=1)
    with pytest.raises(BudgetError):
        gm.EdgeTrainer(models["dense"], memory=needed - 1).fit(*data, epochs=1)


def test_the_same_seed_gives_the_same_bits(models, data):
    results = [gm.EdgeTrainer(models["sparse"], memory="1MiB", threads=n).fit(*data, epochs=2, seed=3).model for n in (1, 2)]
    for name, tensor in results[0].tensors.items():
        np.testing.assert_array_equal(tensor.dense(), results[1].tensors[name].dense())


def test_divergence_is_an_error_and_the_model_stays(models, data):
    before = {name: tensor.dense().copy() for name, tensor in models["dense"].tensors.items()}
    with pytest.raises(DivergedError, match="learning rate"):
        gm.EdgeTrainer(models["dense"], memory="4MiB", optimizer=gm.SGD(1e20)).fit(*data, epochs=5)
    for name, tensor in models["dense"].tensors.items():
        np.testing.assert_array_equal(tensor.dense(), before[name])


def test_bad_data_is_named(models):
    trainer = gm.EdgeTrainer(models["dense"], memory="1MiB")
    x, y = np.zeros((4, 32), np.float32), np.zeros(4, np.int64)
    with pytest.raises(DataError, match=r"lengths differ: \{'x': 4, 'labels': 3\}"):
        trainer.fit(x, y[:3])
    with pytest.raises(DataError, match="no examples"):
        trainer.fit(x[:0], y[:0])
    with pytest.raises(DataError, match="'x' has shape"):
        trainer.fit(x[:, :5], y)
    with pytest.raises(DataError, match="'labels' has shape"):
        trainer.fit(x, y[:, None])
    with pytest.raises(DataError, match="does not convert"):
        trainer.fit(x, y + 0.5)
    with pytest.raises(DataError, match="does not convert"):
        trainer.fit(x.astype(str), y)
    x[2, 5] = np.inf
    with pytest.raises(DataError, match="\\[2, 5\\]"):
        trainer.fit(x, y)
    with pytest.raises(DataError, match="outside"):
        trainer.fit(np.zeros((4, 32), np.float32), y + 9)


def test_options_are_checked(models):
    with pytest.raises(ModelError, match="update"):
        gm.EdgeTrainer(models["dense"], memory="1MiB", update="first")
    with pytest.raises(ModelError, match="method"):
        gm.EdgeTrainer(models["dense"], memory="1MiB").fit(np.zeros((1, 32)), np.zeros(1), method="genetic")
    for bad in ("much", "-1", 0, "3 parsecs"):
        with pytest.raises(ModelError, match="memory"):
            gm.EdgeTrainer(models["dense"], memory=bad)
    assert parse_bytes("1.5 KiB") == 1536
    for name, bad in (("epochs", 1.5), ("epochs", 0), ("batch_size", None), ("seed", -1)):
        with pytest.raises(ModelError, match=name):
            gm.EdgeTrainer(models["dense"], memory="1MiB").fit(np.zeros((1, 32)), np.zeros(1, int), **{name: bad})
    with pytest.raises(ModelError, match="optimizer"):
        gm.EdgeTrainer(models["dense"], memory="1MiB", optimizer="sgd")


RESIDENT = """
import sys
import numpy as np
import gristmill as gm

kind, update, method = sys.argv[1:]
rng = np.random.default_rng(0)
x, y = rng.standard_normal((600, 256)).astype(np.float32), rng.integers(0, 10, 600)
model = gm.zoo.mlp([256, 1024, 512, 10])
if "sparse" in kind:
    model = gm.compress(model, [gm.Prune(0.8)])[0]
if "int8" in kind:
    model = gm.compress(model, [gm.Quantize()])[0]
small = gm.zoo.mlp([8, 8])  # loads every module that training needs
gm.EdgeTrainer(small, memory="1MiB").fit(rng.standard_normal((8, 8)).astype(np.float32), rng.integers(0, 8, 8), epochs=1)


def resident(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


open("/proc/self/clear_refs", "w").write("5")  # start the high-water mark anew
before = resident("VmRSS")
result = gm.EdgeTrainer(model, memory="64MiB", update=update, optimizer=gm.Momentum(0.01)).fit(x, y, method=method, epochs=2)
print(resident("VmHWM") - before, result.planned_bytes, result.peak_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["dense", "sparse", "int8", "sparse int8"])
@pytest.mark.parametrize(
    ("update", "method"), [("all", "mini-batch"), ("bias", "gradient-descent"), ("last:1", "gradient-descent")]
)
def test_the_process_grows_no_more_than_planned(kind, update, method):
    done = subprocess.run([sys.executable, "-c", RESIDENT, kind, update, method], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    grown, planned, peak = map(int, done.stdout.split())
    assert peak <= planned
    assert grown <= planned + (2 << 20), f"grew {grown:,} bytes, planned {planned:,}"
