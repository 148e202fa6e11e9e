"""What a newcomer gets wrong: every public function names the mistake and the remedy by an error of our own."""

import threading

import numpy as np
import pytest

import gristmill as gm
from gristmill.errors import DataError, GristmillError, ModelError, ServingError
from gristmill.runtime.threads import MOST, check_threads

MODEL = gm.zoo.mlp([4, 8, 3])
X = np.linspace(-1, 1, 80, dtype=np.float32).reshape(20, 4)
Y = np.arange(20) % 3
ONE = {"epochs": 1, "engine": "inline"}

NO_MODEL = {
    "session": lambda bad: gm.Session(bad),
    "fit": lambda bad: gm.fit(bad, (X, Y), **ONE),
    "evaluate": lambda bad: gm.evaluate(bad, (X, Y)),
    "compress": lambda bad: gm.compress(bad, [gm.Clip()]),
    "distill": lambda bad: gm.Distill(teacher=bad or "teacher"),
    "edge": lambda bad: gm.EdgeTrainer(bad, memory="1MiB"),
    "save": lambda bad: gm.save(bad, "model.safetensors"),
}


@pytest.mark.parametrize("call", NO_MODEL.values(), ids=NO_MODEL)
@pytest.mark.parametrize("bad", [None, "model.safetensors"])
def test_a_path_is_no_model(call, bad):
    with pytest.raises(ModelError, match=r"a Model is needed, got .*gm\.load\(path\)"):
        call(bad)


MISTAKES = {
    "sizes None": (lambda: gm.zoo.mlp(None), "at least two sizes"),
    "sizes text": (lambda: gm.zoo.mlp("64"), "at least two sizes"),
    "sizes float": (lambda: gm.zoo.mlp([4.5, 3]), "whole numbers"),
    "sizes with None": (lambda: gm.zoo.mlp([4, None]), "whole numbers"),
    "activation": (lambda: gm.zoo.mlp([4, 3], activation=["relu"]), "choose one of relu"),
    "model seed": (lambda: gm.zoo.mlp([4, 3], seed=-1), "seed"),
    "shape": (lambda: gm.Session(MODEL).explain(x=3), "give a tuple"),
    "unknown shape": (lambda: gm.Session(MODEL).explain(z=(1, 4)), "give a tuple"),
    "precision": (lambda: gm.Session(MODEL, precision="int4"), "choose float32, bf16 or int8"),
    "ragged": (lambda: gm.fit(MODEL, ([[1, 2], [3]], [0, 1]), **ONE), "'x' is no array"),
    "overflow": (lambda: gm.fit(MODEL, (X.astype("f8") * 1e300, Y), **ONE), "not finite"),
    "epochs text": (lambda: gm.fit(MODEL, (X, Y), epochs="3"), "epochs must be at least 1 and whole"),
    "epochs and a half": (lambda: gm.fit(MODEL, (X, Y), epochs=1.5), "epochs must be at least 1 and whole"),
    "until": (lambda: gm.fit(MODEL, (X, Y), until=3), "until must be an Until"),
    "patience": (lambda: gm.Until(improvement=0.1, patience=None), "patience"),
    "loss": (lambda: gm.fit(MODEL, (X, Y), loss=["mse"], **ONE), "choose one of cross_entropy"),
    "optimizer text": (lambda: gm.fit(MODEL, (X, Y), optimizer="adam", **ONE), r"Adam\(1e-3\)"),
    "optimizer class": (lambda: gm.fit(MODEL, (X, Y), optimizer=gm.Adam, **ONE), r"Adam\(1e-3\)"),
    "clip_norm": (lambda: gm.SGD(0.1, clip_norm="1"), "clip_norm"),
    "engine": (lambda: gm.fit(MODEL, (X, Y), epochs=1, engine=None), "choose one of inline, processes"),
    "timeout": (lambda: gm.fit(MODEL, (X, Y), worker_timeout="3", **ONE), "worker_timeout"),
    "metric": (lambda: gm.fit(MODEL, (X, Y), validation=(X, Y), metric=3, **ONE), "unknown metric 3"),
    "gradient": (lambda: gm.fit_gradient(None, np.zeros(2), X, **ONE), "must be a function"),
    "own ragged data": (lambda: gm.fit_gradient(print, np.zeros(2), [[1], [2, 3]], **ONE), "is no array"),
    "no pair": (lambda: gm.evaluate(MODEL, None), r"data must be \(x, y\)"),
    "text labels": (lambda: gm.evaluate(MODEL, (X, Y.astype(str))), "needs numbers"),
    "negative labels": (lambda: gm.evaluate(MODEL, (X, Y - 1), metric="cross_entropy"), "labels must lie in"),
    "batch_size": (lambda: gm.evaluate(MODEL, (X, Y), batch_size="8"), "batch_size"),
    "one pass": (lambda: gm.compress(MODEL, gm.Clip()), "a recipe is a list"),
    "three arrays": (lambda: gm.compress(MODEL, [gm.Clip()], data=(X, Y, Y)), "tuple of 3"),
    "a file name": (lambda: gm.compress(MODEL, [gm.Clip()], data="digits.npz"), "numbers"),
    "list of two": (lambda: gm.compress(MODEL, [gm.Clip()], data=[X, Y]), "is no array"),
    "clip text": (lambda: gm.Clip("a"), "value must be positive"),
    "clip infinite": (lambda: gm.Clip(float("inf")), "value must be positive"),
    "prune text": (lambda: gm.Prune("0.8"), "sparsity must lie in"),
    "distill text": (lambda: gm.Distill(epochs="x"), "epochs must be at least 1"),
    "distill optimizer": (lambda: gm.Distill(optimizer="adam"), r"Adam\(1e-3\)"),
    "update": (lambda: gm.EdgeTrainer(MODEL, memory="1MiB", update=None), "update must be"),
    "grace": (lambda: gm.serve(MODEL, grace="a", block=False), "grace must be"),
    "key": (lambda: gm.serve(MODEL, api_key=5, block=False), "must be a text"),
    "tls": (lambda: gm.serve(MODEL, tls=(None, None), http_port=0, grpc_port=0, block=False), "pair of file names"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), MISTAKES.values(), ids=MISTAKES)
def test_the_mistake_is_named(call, message):
    with pytest.raises((ModelError, DataError, ServingError), match=message):
        call()


def test_what_cannot_travel_is_named():
    lock = threading.Lock()
    with pytest.raises(GristmillError, match="engine='inline'"):
        gm.fit_gradient(lambda params, batch: (lock, params), np.zeros(2), X, epochs=1)


def test_no_number_of_threads_or_slices_is_dangerous():
    assert check_threads(1 << 40) == MOST
    assert check_threads(np.int64(2)) == 2
    few = gm.fit(MODEL, (X, Y), slices=20, batch_size=8, **ONE)
    many = gm.fit(MODEL, (X, Y), slices=1 << 40, batch_size=8, **ONE)
    assert few.history["loss"] == many.history["loss"]


def test_the_second_number_of_an_optimizer_is_no_weight_decay():
    assert gm.Momentum(0.1, 0.8).momentum == 0.8
    assert gm.SGD(0.1, 0.9).momentum == 0.9
    assert gm.Adam(1e-3, 0.8).beta1 == 0.8
    assert gm.AdamW(1e-3).weight_decay == 0.01


def test_a_single_name_is_a_list_of_one():
    result = gm.fit(MODEL, (X, Y), trainable="layer0.weight", **ONE)
    assert list(result.params) == ["layer0.weight"]
    gm.compress(MODEL, [gm.Clip(names="layer0.weight")])


def test_settings_of_numpy_types_can_be_saved(tmp_path):
    small, _ = gm.compress(MODEL, [gm.Clip(np.float32(0.5)), gm.Prune(np.float32(0.5))])
    gm.save(small, tmp_path / "small.safetensors")
    assert gm.load(tmp_path / "small.safetensors").meta["recipe"][0]["value"] == 0.5
