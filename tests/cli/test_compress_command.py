"""`gristmill compress` and `gristmill sensitivity`: options, recipes, gates, states, and what they leave behind."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import gristmill as gm
from cli.test_commands import ENV, call, fails

RNG = np.random.default_rng(0)
Y = RNG.integers(0, 3, 90)
X = (np.eye(3, 16)[Y] * 2 + RNG.standard_normal((90, 16)) * 0.3).astype("f4")


@pytest.fixture(scope="module")
def trained():
    return gm.fit(gm.zoo.mlp([16, 32, 32, 3], seed=1), (X, Y), optimizer=gm.Adam(1e-2), engine="inline", epochs=10).model


@pytest.fixture
def folder(tmp_path, trained):
    gm.save(trained, tmp_path / "m.safetensors")
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    return tmp_path


def compress(folder, *arguments):
    return call("compress", "--model", folder / "m.safetensors", "--out", folder / "o.safetensors", *arguments)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_recipe_file_does_what_the_options_do(folder):
    (folder / "r.json").write_text('["Clip", {"pass": "Prune", "sparsity": 0.5}, "Quantize"]')
    result = compress(folder, "--recipe", folder / "r.json", "--data", folder / "d.npz", "--seed", 4)
    assert result.exit_code == 0, result.output
    first = (folder / "o.safetensors").read_bytes()
    options = ["--clip", 99.9, "--prune", 0.5, "--quantize", "int8", "--data", folder / "d.npz", "--seed", 4]
    assert compress(folder, *options).exit_code == 0
    wanted, got = gm.load(folder / "o.safetensors"), gm.formats.native.from_bytes(first)
    for name in wanted.tensors:
        np.testing.assert_array_equal(got.tensors[name].dense(), wanted.tensors[name].dense())
    assert names(folder) == ["d.npz", "m.safetensors", "o.safetensors", "r.json"]


def test_the_report_and_the_plots_are_written(folder):
    pytest.importorskip("matplotlib")
    arguments = ["--prune", 0.8, "--data", folder / "d.npz", "--report", folder / "r.json", "--plots", folder / "plots"]
    result = compress(folder, *arguments)
    assert result.exit_code == 0, result.output
    assert "sparsity" in result.stdout
    report = json.loads((folder / "r.json").read_text())
    assert {layer["kind"] for layer in report["layers"]} == {"1x4 float32"}
    assert report["provenance"]["input"].startswith("sha256:")
    assert names(folder / "plots") == ["layers.png", "quality.png"]


def test_the_gate_reverts_or_refuses(folder):
    arguments = ["--prune", 0.95, "--data", folder / "d.npz", "--max-drop", 0.02]
    fails(compress(folder, *arguments, "--no-revert"), 3, "gate: accuracy dropped by")
    assert names(folder) == ["d.npz", "m.safetensors"]
    result = compress(folder, *arguments, "--report", "json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["gate"]["met"]
    assert report["gate"]["reverted"]
    assert report["total"]["drop"] <= 0.02
    assert (folder / "o.safetensors").exists()


def test_calibration_needs_no_labels(folder):
    np.savez(folder / "c.npz", x=X)
    arguments = ["--quantize", "int8", "--calibration", folder / "c.npz", "--max-drop", 0.01, "--report", "json"]
    result = compress(folder, *arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["metric"] == "cosine"
    assert report["total"]["metric_after"] > 0.99


def test_max_memory_goes_from_file_to_file_or_refuses(folder):
    result = compress(folder, "--prune", 0.5, "--quantize", "int8", "--max-memory", "64GiB")
    assert result.exit_code == 0, result.output
    assert "weight by weight" in result.stdout
    gm.save(gm.compress(gm.load(folder / "m.safetensors"), [gm.Prune(0.5), gm.Quantize()])[0], folder / "wanted.safetensors")
    assert (folder / "o.safetensors").read_bytes() == (folder / "wanted.safetensors").read_bytes()
    assert not (folder / "o.safetensors.state").exists()
    for more in ([], ["--data", folder / "d.npz"]):
        fails(compress(folder, "--prune", 0.5, "--max-memory", "1MiB", *more), 1, "max_memory is 1,048,576")
    fails(compress(folder, "--prune", 0.5, "--max-memory", "much"), 1, "must be bytes")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--recipe", "r.json", "--prune", "0.5"], 2, "--recipe holds all passes"),
        (["--prune", "0.5", "--data", "d.npz", "--calibration", "d.npz"], 2, "without labels"),
        (["--prune", "0.5", "--report", "report.txt"], 2, "ends in .json"),
        (["--prune", "0.5", "--report", "absent/report.json"], 1, "there is no folder"),
        (["--prune", "0.5", "--plots", "absent/plots"], 1, "there is no folder"),
        (["--prune", "1.5"], 1, "sparsity must lie in"),
        (["--prune", "0.5", "--pattern", "3x3"], 1, "Prune: "),
        (["--quantize", "int1"], 1, "unknown precision"),
        (["--prune", "0.5", "--calibration", "wide.npz"], 1, "'x' has shape (9, 17), the model takes"),
        (["--prune", "0.5", "--calibration", "other.npz"], 1, "none of the model's inputs x"),
        (["--prune", "0.5", "--calibration", "lines.txt"], 1, "a model with a tokenizer"),
        (["--prune", "0.5", "--calibration", "empty.txt"], 1, "holds no sentences"),
        (["--recipe", "typo.json"], 1, "did you mean 'Prune'"),
        (["--recipe", "absent.json"], 1, "absent.json"),
        (["--recipe", "broken.yaml"], 1, "not valid YAML"),
        (["--prune", "0.5", "--data", "d.npz", "--metric", "f1"], 1, "unknown metric"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(folder, monkeypatch, arguments, code, message):
    monkeypatch.chdir(folder)
    np.savez("wide.npz", x=np.ones((9, 17)))
    np.savez("other.npz", z=np.ones((9, 16)))
    (folder / "lines.txt").write_text("one\ntwo\n")
    (folder / "empty.txt").write_text("\n\n")
    (folder / "typo.json").write_text('[{"pass": "Prun"}]')
    (folder / "broken.yaml").write_text("- [")
    before = names(folder)
    result = compress(folder, *arguments)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    if code == 1:
        fails(result, code, message)
    assert names(folder) == before


def test_the_model_is_not_written_over(folder):
    result = call("compress", "--model", folder / "m.safetensors", "--out", folder / "m.safetensors", "--prune", 0.5)
    fails(result, 2, "is the model itself")


@pytest.mark.parametrize("signal_sent", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("memory", [[], ["--max-memory", "64GiB"]])
def test_a_killed_command_goes_on(folder, signal_sent, memory):
    """Killed as soon as there is a state: what stands in the folder is the model, and what it goes on with."""
    arguments = ["--clip", "99", "--prune", "0.5", "--quantize", "int8", *memory]
    files = ["--model", folder / "m.safetensors", "--out", folder / "o.safetensors"]
    command = [sys.executable, "-m", "gristmill", "compress", *map(str, files), *arguments]
    before = (folder / "m.safetensors").read_bytes()
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    state = folder / "o.safetensors.state"
    while process.poll() is None and not (state / "state.json").exists():
        time.sleep(0.001)
    process.send_signal(signal_sent)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert (folder / "m.safetensors").read_bytes() == before
    if process.returncode == 0:
        pytest.skip("it was done before the signal came")
    assert process.returncode == (-signal.SIGKILL if signal_sent == signal.SIGKILL else 130)
    assert not (folder / "o.safetensors").exists()
    assert state.is_dir()
    fails(compress(folder, "--prune", 0.7, *memory), 1, "another run, which differs in recipe")
    result = compress(folder, *arguments)
    assert result.exit_code == 0, result.output
    assert not state.exists()
    fresh = folder / "fresh.safetensors"
    gm.save(gm.compress(gm.load(folder / "m.safetensors"), [gm.Clip(percentile=99.0), gm.Prune(0.5), gm.Quantize()])[0], fresh)
    assert (folder / "o.safetensors").read_bytes() == fresh.read_bytes()


def test_restart_begins_anew(folder):
    state = folder / "state"
    assert compress(folder, "--prune", 0.5, "--state", state).exit_code == 0
    assert (state / "state.json").exists()
    fails(compress(folder, "--prune", 0.6, "--state", state), 1, "another run")
    assert compress(folder, "--prune", 0.6, "--state", state, "--restart").exit_code == 0


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(folder):
    folder.chmod(0o500)
    try:
        fails(compress(folder, "--prune", 0.5), 1, "may not be written")
    finally:
        folder.chmod(0o700)


def test_sensitivity_shows_saves_and_draws(folder):
    pytest.importorskip("matplotlib")
    outputs = ["--json", folder / "s.json", "--plot", folder / "s.png", "--state", folder / "s.state"]
    result = call("sensitivity", "--model", folder / "m.safetensors", "--data", folder / "d.npz", *outputs)
    assert result.exit_code == 0, result.output
    figures = json.loads((folder / "s.json").read_text())
    assert list(figures["ranking"]) == ["Prune 0.5 1x4", "Prune 0.8 1x4", "Quantize int8"]
    assert figures["metric"] == "accuracy"
    assert (folder / "s.png").read_bytes().startswith(b"\x89PNG")
    again = call("sensitivity", "--model", folder / "m.safetensors", "--data", folder / "d.npz", *outputs)
    assert again.stdout == result.stdout
    options = ["--prune", 0.3, "--prune", 0.6, "--pattern", "unstructured"]
    result = call("sensitivity", "--model", folder / "m.safetensors", *options)
    assert "Prune 0.3 unstructured" in result.stdout
    assert "Quantize" not in result.stdout


def test_sensitivity_refuses_what_does_not_go_together(folder):
    model = folder / "m.safetensors"
    fails(call("sensitivity", "--model", model, "--data", "d", "--calibration", "c"), 2, "without labels")
    fails(call("sensitivity", "--model", model, "--recipe", "r.json", "--prune", 0.5), 2, "--recipe holds all")
    fails(call("sensitivity", "--model", model, "--plot", folder / "absent" / "s.png"), 1, "there is no folder")
