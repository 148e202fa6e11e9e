"""The command line itself: help, options, errors, and the commands that need no training."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import gristmill as gm
from formats.models import every_kind
from gristmill.cli import app
from gristmill.errors import DataError

COMMANDS = ("train", "compress", "sensitivity", "adapt", "serve", "run", "inspect", "kernels", "demo", "bench")
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"}


def call(*arguments, env=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=env)


def fails(result, code, message):
    """The message is on stderr, on one line, without a traceback."""
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    if code == 1:
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.safetensors"
    gm.save(gm.zoo.mlp([4, 8, 3], seed=1).replace(meta={"name": "[red]tiny[/red] :smile:"}), path)
    return path


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "data.npz"
    np.savez(path, x=rng.standard_normal((12, 4)), y=rng.integers(0, 3, 12))
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "Example: " in result.output
    assert f"gristmill {command}" in result.output


def test_help_lists_the_commands_and_imports_no_numpy():
    code = "import sys; from gristmill.cli import app; app(['--help'], standalone_mode=False); print('numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"
    assert all(command in result.stdout for command in COMMANDS)


def test_version_by_both_ways_to_start():
    result = subprocess.run([sys.executable, "-m", "gristmill", "--version"], env=ENV, capture_output=True, text=True, check=True)
    assert result.stdout == f"gristmill {gm.__version__}\n" == call("--version").stdout


@pytest.mark.parametrize("arguments", [["fly"], ["run"], ["inspect", "a", "b"], ["run", "m", "--data", "d", "--repeat", "0"]])
def test_bad_options_exit_with_2(arguments):
    fails(call(*arguments), 2, "Usage")


def test_a_missing_file_is_one_line(tmp_path):
    fails(call("inspect", tmp_path / "absent.safetensors"), 1, "there is no model file")


def test_debug_shows_the_traceback(tmp_path):
    for result in (
        call("--debug", "inspect", tmp_path / "absent.safetensors"),
        call("inspect", tmp_path / "absent.safetensors", env={"GRISTMILL_DEBUG": "1"}),
    ):
        assert isinstance(result.exception, FileNotFoundError)


def test_a_damaged_file_is_one_line(model):
    model.write_bytes(model.read_bytes()[:-7])
    fails(call("inspect", model), 1, "truncated")


def test_inspect(model):
    result = call("inspect", model)
    assert result.exit_code == 0, result.output
    for text in ("float32[batch, 4]", "gristmill::Linear", "layer1.weight", "[8, 4]".strip("[]"), "dense", "kernel"):
        assert text in result.output
    assert "[red]tiny[/red] :smile:" in result.output


def test_inspect_explains(tmp_path):
    gm.save(every_kind(), tmp_path / "all.safetensors")
    result = call("inspect", tmp_path / "all.safetensors", "--explain", "--batch", 3, "--threads", 1)
    assert result.exit_code == 0, result.output
    for text in ("measured_ms", "alternatives", "blocks 2x4 int8", "dense int8", "total"):
        assert text in result.output


def test_inspect_as_json(tmp_path):
    gm.save(every_kind(), tmp_path / "all.safetensors")
    result = call("inspect", tmp_path / "all.safetensors", "--json", "--batch", 3)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    kinds = {row["tensor"]: row["kind"] for row in facts["tensors"]}
    assert kinds["a.weight"] == "quantized"
    assert kinds["b.weight"] == "sparse int8 2x4"
    assert kinds["c.weight"] == "bitmask float32"
    assert {row["tensor"]: row["sparsity"] for row in facts["tensors"]}["c.weight"] == 0.85
    assert [row["op"] for row in facts["nodes"]][:2] == ["gristmill::Linear", "Relu"]
    assert all(row["kernel"] for row in facts["kernels"])
    assert facts["meta"]["name"] == "everything"


def test_kernels():
    result = call("kernels")
    assert result.exit_code == 0
    assert all(slot in result.output for slot in gm.kernels())


def test_run_prints(model, data):
    result = call("run", model, "--data", data, "--repeat", 1)
    assert result.exit_code == 0, result.output
    assert "logits float32 (12, 3)" in result.stdout
    assert "latency" in result.stderr


def test_run_writes_what_the_model_gives(model, data, tmp_path):
    result = call("run", model, "--data", data, "--out", tmp_path / "out.npz", "--threads", 1)
    assert result.exit_code == 0, result.output
    x = np.load(data)["x"].astype(np.float32)
    np.testing.assert_allclose(np.load(tmp_path / "out.npz")["logits"], gm.load(model).run(x=x)["logits"], rtol=1e-5, atol=1e-6)


def test_run_refuses_what_does_not_fit(model, tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, z=np.ones(3))
    fails(call("run", model, "--data", path), 1, "the model takes x: float32[batch, 4]")
    np.savez(path, x=np.ones((2, 4), complex))
    fails(call("run", model, "--data", path), 1, "cannot become float32")
    np.savez(path, x=np.ones((2, 5)))
    fails(call("run", model, "--data", path), 1, "has shape (2, 5)")


def test_data_is_never_unpickled(model, tmp_path):
    path = tmp_path / "evil.npz"
    np.savez(path, x=np.array([print], object))
    fails(call("run", model, "--data", path), 1, "not an .npz file of plain arrays")


@pytest.mark.parametrize("content", [b"", b"PK\3\4 broken", b"\x93NUMPY\1\0"])
def test_damaged_data_is_one_line(model, tmp_path, content):
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    fails(call("run", model, "--data", path), 1, "not an .npz file")


def test_messages_become_one_line(model, data, monkeypatch):
    def broken(*arguments, **options):
        raise DataError("first\n  second")

    monkeypatch.setitem(gm.__dict__, "Session", broken)
    fails(call("run", model, "--data", data), 1, "error: first second")


def test_interrupt_exits_with_130(model, data, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setitem(gm.__dict__, "Session", interrupted)
    result = call("run", model, "--data", data)
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


def test_a_real_interrupt_exits_with_130(model, data):
    command = [sys.executable, "-m", "gristmill", "run", model, "--data", data, "--repeat", "100000000"]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("logits")  # now it is timing its runs
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors == "interrupted\n"


def test_a_reader_that_leaves_is_no_error(model):
    command = f"{sys.executable} -m gristmill inspect {model} | head -n 1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], env=ENV, capture_output=True, text=True, check=True)
    assert "Traceback" not in result.stderr


def test_too_little_memory_is_one_line(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.ones((2, 3), np.float32), y=np.array([0, 10**12]))  # a million million classes
    result = call("train", "--data", tmp_path / "x.npz", "--layers", "8", "--out", tmp_path / "m.safetensors")
    fails(result, 1, "error: not enough memory")


@pytest.mark.parametrize("command", ["run", "demo"])
def test_outputs_are_checked_before_the_work(model, data, tmp_path, command):
    missing = tmp_path / "no" / "file"
    given = ["run", model, "--data", data, "--out", missing] if command == "run" else ["demo", "--json", missing]
    result = call(*given)
    fails(result, 1, "there is no folder")
    assert result.stdout == ""
