"""The commands that train, compress, adapt and serve: their options, and one real run of each."""

import json
import signal
import subprocess
import sys
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import typer

import gristmill as gm
from cli.test_commands import ENV, call, fails
from gristmill.cli.dataset import read_examples, split
from gristmill.cli.train import parse_layers
from gristmill.errors import DataError


@pytest.fixture
def data(tmp_path):
    """Three classes, each around a corner of its own."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    path = tmp_path / "data.npz"
    np.savez(path, x=np.eye(3, 16)[y] * 3 + rng.standard_normal((60, 16)) * 0.1, y=y)
    return path


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.safetensors"
    gm.save(gm.zoo.mlp([16, 8, 3], seed=1), path)
    return path


@pytest.fixture
def recorded(monkeypatch):
    """Replace the public functions; what they are called with is kept."""
    calls = {}

    def fit(model, data, **options):
        calls["fit"] = (model, data, options)
        return SimpleNamespace(model=model, history={"loss": np.array([2.0, 1.0]), "accuracy": np.array([0.5, 0.75])})

    def compress(model, recipe, data=None, **options):
        calls["compress"] = (model, recipe, data, options)
        total = {"latency_ms_before": {1: 0.1}}
        report = {"metric": "accuracy", "total": total, "stages": [], "layers": [], "recipe": [], "remarks": []}
        return model, SimpleNamespace(drop=0.05, metric="accuracy", as_dict=lambda: report)

    class Trainer:
        def __init__(self, model, **options):
            calls["trainer"] = options
            self.model = model

        def fit(self, x, y, **options):
            calls["edge"] = (x, y, options)
            return SimpleNamespace(model=self.model, peak_bytes=900, planned_bytes=1000, history={"loss": np.array([2.0, 1.0])})

    def serve(models, **options):
        calls["serve"] = (models, options)
        return SimpleNamespace(http_port=1234, grpc_port=5678, wait=lambda: None)

    for name, stand_in in {"fit": fit, "compress": compress, "EdgeTrainer": Trainer, "serve": serve}.items():
        monkeypatch.setitem(gm.__dict__, name, stand_in)
    return calls


def test_train_passes_its_options_on(recorded, data, tmp_path):
    out = tmp_path / "out.safetensors"
    options = "--layers 16,8 --optimizer momentum --learning-rate 0.2 --momentum 0.5 --weight-decay 0.01 --workers 2 --slices 8"
    result = call("train", "--data", data, "--out", out, *options.split(), "--epochs", 3, "--validation", 0.25, "--seed", 5)
    assert result.exit_code == 0, result.output
    model, (x, y), given = recorded["fit"]
    assert [model.tensors[name].shape for name in model.weights] == [(16, 16), (8, 16), (3, 8)]
    assert x.dtype == np.float32
    assert y.dtype == np.int64
    assert (len(x), len(given["validation"][0])) == (45, 15)
    assert given["optimizer"] == gm.Momentum(0.2, momentum=0.5, weight_decay=0.01)
    wanted = {"workers": 2, "slices": 8, "epochs": 3, "seed": 5, "batch_size": 32, "resume": False, "loss": "cross_entropy"}
    assert {name: given[name] for name in wanted} == wanted
    assert "0.75" in result.stdout
    assert gm.load(out).weights == model.weights


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("sgd", gm.SGD(0.05)), ("momentum", gm.Momentum(0.05)), ("adam", gm.Adam()), ("adamw", gm.AdamW())],
)
def test_optimizers_keep_their_defaults(recorded, data, tmp_path, name, optimizer):
    result = call("train", "--data", data, "--out", tmp_path / "o.safetensors", "--layers", "", "--optimizer", name)
    assert result.exit_code == 0, result.output
    assert recorded["fit"][2]["optimizer"] == optimizer


def test_train_goes_on_with_a_model(recorded, data, model, tmp_path):
    arguments = ["--checkpoint", tmp_path / "c.safetensors", "--resume"]
    result = call("train", "--data", data, "--out", model, "--model", model, *arguments)
    assert result.exit_code == 0, result.output
    start, _, given = recorded["fit"]
    np.testing.assert_array_equal(
        start.tensors["layer0.weight"].dense(), gm.zoo.mlp([16, 8, 3], seed=1).tensors["layer0.weight"].dense()
    )
    assert given["resume"] is True
    assert given["checkpoint"] == tmp_path / "c.safetensors"


def test_regression_has_float_targets(recorded, tmp_path):
    np.savez(tmp_path / "r.npz", x=np.ones((4, 2)), y=np.ones((4, 5)))
    result = call("train", "--data", tmp_path / "r.npz", "--out", tmp_path / "o.safetensors", "--layers", "3", "--loss", "mse")
    assert result.exit_code == 0, result.output
    model, (_, y), _ = recorded["fit"]
    assert y.dtype == np.float32
    assert model.types["logits"].shape == ("batch", 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --layers"),
        (["--layers", "8", "--model", "m"], "either --layers"),
        (["--layers", "8,x"], "whole numbers"),
        (["--layers", "8,0"], "whole numbers"),
        (["--layers", "8", "--resume"], "--checkpoint"),
        (["--layers", "8", "--momentum", "0.9"], "has no momentum"),
        (["--layers", "8", "--validation", "1.5"], "fraction"),
        (["--layers", "8", "--optimizer", "rmsprop"], "rmsprop"),
    ],
)
def test_train_refuses_bad_options(recorded, data, tmp_path, arguments, message):
    fails(call("train", "--data", data, "--out", tmp_path / "o.safetensors", *arguments), 2, message)
    assert "fit" not in recorded


def test_a_place_that_cannot_be_written_is_found_before_the_work(recorded, data, model, tmp_path):
    for command in (["train", "--layers", "8"], ["compress", "--model", model, "--prune", "0.5"], ["adapt", "--model", model]):
        fails(call(*command, "--data", data, "--out", tmp_path / "absent" / "o.safetensors"), 1, "there is no folder")
        fails(call(*command, "--data", data, "--out", tmp_path / "o.gguf"), 1, "not yet supported")
    assert not recorded


def test_unusable_data_is_named(recorded, tmp_path):
    path = tmp_path / "d.npz"
    good = np.ones((4, 2))
    cases = [
        ({"x": good}, "must hold arrays x and y"),
        ({"x": good, "y": np.zeros(3, int)}, "same number of examples"),
        ({"x": np.ones((0, 2)), "y": np.zeros(0, int)}, "at least one"),
        ({"x": good, "y": np.zeros(4)}, "one whole number from 0"),
        ({"x": good, "y": np.array([0, 1, -1, 0])}, "one whole number from 0"),
        ({"x": np.array(["a"] * 4), "y": np.zeros(4, int)}, "array of numbers"),
        ({"x": np.ones((4, 2, 2)), "y": np.zeros(4, int)}, "[examples, features]"),
    ]
    for arrays, message in cases:
        np.savez(path, **arrays)
        fails(call("train", "--data", path, "--out", tmp_path / "o.safetensors", "--layers", "8"), 1, message)
    np.save(path.with_suffix(".npy"), good)
    with pytest.raises(DataError, match="single array"):
        read_examples(path.with_suffix(".npy"))


def test_split_is_drawn_from_the_seed(data):
    examples = read_examples(data)
    (x1, _), checked = split(examples, "0.2", seed=1)
    (x2, _), again = split(examples, "0.2", seed=1)
    np.testing.assert_array_equal(x1, x2)
    assert checked is not None
    assert again is not None
    np.testing.assert_array_equal(np.sort(np.concatenate([x1, checked[0]]), axis=0), np.sort(examples[0], axis=0))
    assert split(examples, str(data), seed=1)[1] is not None
    assert split(examples, None, seed=1) == (examples, None)
    with pytest.raises(DataError, match="leaves one side empty"):
        split(examples, "0.001", seed=1)
    with pytest.raises(typer.BadParameter):
        split(examples, "0", seed=1)
    assert parse_layers("512, 256") == [512, 256]


def test_compress_builds_the_recipe(recorded, data, model, tmp_path):
    out = tmp_path / "small.safetensors"
    options = "--clip 99.5 --prune 0.7 --pattern unstructured --distill 3 --quantize int8 --max-drop 0.05 --seed 2 --threads 1"
    result = call("compress", "--model", model, "--data", data, "--out", out, "--validation", "0.5", *options.split())
    assert result.exit_code == 0, result.output
    _, recipe, given, rest = recorded["compress"]
    assert [type(step).__name__ for step in recipe] == ["Clip", "Prune", "Distill", "Quantize"]
    clip, prune, distill, _ = recipe
    assert (clip.percentile, prune.sparsity, prune.pattern, distill.epochs) == (99.5, 0.7, "unstructured", 3)
    assert (len(given[0]), len(rest["validation"][0]), rest["seed"], rest["threads"]) == (30, 30, 2, 1)
    assert out.exists()


def test_compress_gate(recorded, data, model, tmp_path):
    out = tmp_path / "small.safetensors"
    arguments = ["--model", model, "--data", data, "--out", out, "--prune", 0.5, "--max-drop", 0.04, "--report", "json"]
    result = call("compress", *arguments)
    fails(result, 3, "accuracy dropped by 0.0500, more than 0.04")
    assert json.loads(result.stdout)["metric"] == "accuracy"
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "at least one"),
        (["--distill", "3"], "--distill needs --data"),
        (["--prune", "0.5", "--max-drop", "0"], "needs --data"),
    ],
)
def test_compress_refuses_bad_options(recorded, model, tmp_path, arguments, message):
    fails(call("compress", "--model", model, "--out", tmp_path / "o.safetensors", *arguments), 2, message)


def test_adapt_passes_its_options_on(recorded, data, model, tmp_path):
    out = tmp_path / "adapted.safetensors"
    options = "--memory 64KiB --update last:1 --method gradient-descent --epochs 4 --batch-size 8 --learning-rate 0.1"
    result = call("adapt", "--model", model, "--data", data, "--out", out, *options.split())
    assert result.exit_code == 0, result.output
    given = recorded["trainer"]
    assert (given["memory"], given["update"], given["loss"], given["optimizer"]) == (
        "64KiB",
        "last:1",
        "cross_entropy",
        gm.SGD(0.1),
    )
    assert recorded["edge"][2] == {"method": "gradient-descent", "epochs": 4, "batch_size": 8, "seed": 0}
    assert "900 bytes used, 1,000 planned, budget 64KiB" in result.stdout
    assert out.exists()


def test_serve_passes_its_options_on(recorded, model, tmp_path, monkeypatch):
    monkeypatch.delenv("GRISTMILL_API_KEY", raising=False)
    key = tmp_path / "key"
    key.write_text("secret\n")
    options = ["--host", "0.0.0.0", "--http-port", 0, "--grpc-port", 9, "--tls-cert", "c.pem", "--tls-key", "k.pem", "--insecure"]
    result = call("serve", f"digits={model}", model, "--api-key-file", key, *options)
    assert result.exit_code == 0, result.output
    models, given = recorded["serve"]
    assert list(models) == ["digits", "m"]
    assert (given["host"], given["http_port"], given["grpc_port"], given["api_key"]) == ("0.0.0.0", 0, 9, "secret")
    assert [str(path) for path in given["tls"]] == ["c.pem", "k.pem"]
    assert given["insecure"] is True
    assert result.stdout == "serving digits, m at https://0.0.0.0:1234 and grpc://0.0.0.0:5678\n"
    assert call("serve", model, env={"GRISTMILL_API_KEY": "other"}).exit_code == 0
    assert recorded["serve"][1]["api_key"] == "other"
    assert call("serve", model).exit_code == 0
    assert recorded["serve"][1]["api_key"] is None


def test_serve_refuses_bad_options(recorded, model, tmp_path):
    fails(call("serve", f"a={model}", f"a={model}"), 2, "a name of its own")
    fails(call("serve", f"={model}"), 2, "a name of its own")
    fails(call("serve", model, "--tls-cert", "c.pem"), 2, "go together")
    fails(call("serve", model, "--api-key-file", tmp_path / "absent"), 1, "absent")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    fails(call("serve", model, "--api-key-file", tmp_path / "binary"), 1, "not a text file")
    assert "serve" not in recorded


def gristmill(*arguments):
    command = [sys.executable, "-m", "gristmill", *map(str, arguments)]
    return subprocess.run(command, env={**ENV, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)


def test_train_compress_adapt_run_for_real(data, tmp_path):
    trained, small, adapted = (tmp_path / f"{name}.safetensors" for name in ("trained", "small", "adapted"))
    options = "--layers 32 --workers 2 --batch-size 8 --epochs 20 --learning-rate 0.01 --validation 0.2"
    result = gristmill("train", "--data", data, "--out", trained, *options.split())
    assert result.returncode == 0, result.stderr
    assert "accuracy" in result.stdout
    x, y = read_examples(data)
    assert gm.evaluate(gm.load(trained), (x, y)) == 1.0

    stages = ["--clip", 99.9, "--prune", 0.5, "--distill", 120, "--quantize", "int8", "--max-drop", 0.02]
    result = gristmill("compress", "--model", trained, "--data", data, "--out", small, *stages, "--report", "json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert [stage["name"] for stage in report["stages"]] == ["original", "Clip", "Prune", "Distill", "Quantize"]
    assert gm.load(small).nbytes < gm.load(trained).nbytes

    result = gristmill("adapt", "--model", small, "--data", data, "--update", "bias", "--epochs", 3, "--out", adapted)
    assert result.returncode == 0, result.stderr
    assert "budget 4MiB" in result.stdout
    result = gristmill("adapt", "--model", small, "--data", data, "--memory", "1KiB", "--out", adapted)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)

    result = gristmill("run", adapted, "--data", data, "--out", tmp_path / "y.npz")
    assert result.returncode == 0, result.stderr
    assert (np.load(tmp_path / "y.npz")["logits"].argmax(axis=1) == y).mean() > 0.9
    result = gristmill("inspect", adapted)
    assert result.returncode == 0, result.stderr
    assert "Prune" in result.stdout


def test_serve_for_real(model):
    command = [sys.executable, "-u", "-m", "gristmill", "serve", f"digits={model}", "--http-port", "0", "--grpc-port", "0"]
    environment = {name: value for name, value in ENV.items() if name != "GRISTMILL_API_KEY"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("serving digits at http://"))
        url = next(word.rstrip("/,;") for word in line.split() if word.startswith("http://"))
        with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=30) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
