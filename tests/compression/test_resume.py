"""A run of compress that is killed, interrupted or out of disk goes on where it was, to the same model."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import gristmill as gm
from gristmill.compression import layerwise, pipeline
from gristmill.compression.state import discard
from gristmill.errors import FormatError, ModelError

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((64, 32)).astype("f4"), RNG.integers(0, 4, 64)
RECIPE = [gm.Clip(percentile=99), gm.Prune(0.5), gm.Distill(epochs=1), gm.Quantize("int8")]
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

SCRIPT = """
import sys, time
import numpy as np
import gristmill as gm
from gristmill.compression import pipeline
inner = pipeline.applied
def slow(*arguments):
    time.sleep(0.15)
    return inner(*arguments)
pipeline.applied = slow
rng = np.random.default_rng(0)
data = rng.standard_normal((64, 32)).astype("f4"), rng.integers(0, 4, 64)
recipe = [gm.Clip(percentile=99), gm.Prune(0.5), gm.Distill(epochs=1), gm.Quantize("int8")]
small, report = gm.compress(gm.load("model.safetensors"), recipe, data, state="state")
gm.save(small, "small.safetensors")
print([stage.name for stage in report.stages])
"""


@pytest.fixture
def model(tmp_path):
    made = gm.zoo.mlp([32, 48, 16, 4], seed=1)
    gm.save(made, tmp_path / "model.safetensors")
    return made


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    path = tmp_path_factory.mktemp("wanted") / "small.safetensors"
    gm.save(gm.compress(gm.zoo.mlp([32, 48, 16, 4], seed=1), RECIPE, (X, Y))[0], path)
    return path.read_bytes()


def start(folder):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=folder, env=ENV, **streams)


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if condition():
            return
        time.sleep(0.002)
    raise AssertionError(f"it did not come to that: {process.communicate()}")


@pytest.mark.parametrize("moment", ["state", "model-1", "model-2", "model-3", "model-4"])
def test_a_killed_run_goes_on(model, tmp_path, moment, wanted):
    before = (tmp_path / "model.safetensors").read_bytes()
    process = start(tmp_path)
    wait_for(lambda: any(path.name.startswith(moment) for path in (tmp_path / "state").glob("*")), process)
    process.kill()
    process.communicate()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "small.safetensors").exists()
    done = json.loads((tmp_path / "state" / "state.json").read_text())["done"]
    assert done >= {"state": 0, "model-1": 0, "model-2": 1, "model-3": 2, "model-4": 3}[moment]
    process = start(tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "['original', 'Clip', 'Prune', 'Distill', 'Quantize']" in output
    assert (tmp_path / "small.safetensors").read_bytes() == wanted


def test_kills_at_any_time_leave_a_state_to_go_on_with(model, tmp_path, wanted):
    for delay in (0.6, 0.9, 1.1):
        process = start(tmp_path)
        time.sleep(delay)
        process.kill()
        process.communicate()
    process = start(tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert (tmp_path / "small.safetensors").read_bytes() == wanted
    assert not list((tmp_path / "state").glob(".*.tmp"))


def test_ctrl_c_leaves_a_state_too(model, tmp_path, wanted):
    process = start(tmp_path)
    wait_for(lambda: (tmp_path / "state" / "model-1.safetensors").exists(), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert not list((tmp_path / "state").glob(".*.tmp"))
    small, _ = gm.compress(model, RECIPE, (X, Y), state=tmp_path / "state")
    gm.save(small, tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").read_bytes() == wanted


def test_done_passes_are_not_done_again(model, tmp_path, monkeypatch):
    small, report = gm.compress(model, RECIPE, (X, Y), state=tmp_path / "state")
    monkeypatch.setattr(pipeline, "applied", lambda *arguments: pytest.fail("done already"))
    again, same = gm.compress(model, RECIPE, (X, Y), state=tmp_path / "state")
    assert [stage.error for stage in same.stages] == [stage.error for stage in report.stages]
    assert {layer.name: layer.seconds for layer in same.layers} == {layer.name: layer.seconds for layer in report.layers}
    np.testing.assert_array_equal(again.run(x=X)["logits"], small.run(x=X)["logits"])
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["model-4.safetensors", "state.json"]
    discard(tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_a_state_of_another_run_is_told_apart(model, tmp_path):
    gm.compress(model, [gm.Clip()], (X, Y), state=tmp_path / "state")
    for message, call in {
        "recipe": lambda: gm.compress(model, [gm.Clip(value=1)], (X, Y), state=tmp_path / "state"),
        "input model": lambda: gm.compress(gm.zoo.mlp([32, 8, 4]), [gm.Clip()], (X, Y), state=tmp_path / "state"),
        "data": lambda: gm.compress(model, [gm.Clip()], (X, 3 - Y), state=tmp_path / "state"),
        "seed": lambda: gm.compress(model, [gm.Clip()], (X, Y), seed=1, state=tmp_path / "state"),
    }.items():
        with pytest.raises(ModelError, match=f"another run, which differs in {message}"):
            call()


def test_damaged_states_are_refused(model, tmp_path):
    gm.compress(model, [gm.Clip()], (X, Y), state=tmp_path / "state")
    path = tmp_path / "state" / "model-1.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"damaged; remove .*state to start anew"):
        gm.compress(model, [gm.Clip()], (X, Y), state=tmp_path / "state")
    for text in ("", "[]", '{"version": 9}', "[" * 9999):
        (tmp_path / "state" / "state.json").write_text(text)
        with pytest.raises(FormatError, match="no state of compress"):
            gm.compress(model, [gm.Clip()], (X, Y), state=tmp_path / "state")


def test_a_pass_may_keep_files_of_its_own(model, tmp_path, monkeypatch):
    seen = []

    class Long(gm.compression.Clip):
        local = False

        def apply(self, model, context):
            seen.append(sorted(path.name for path in context.folder.iterdir()))
            (context.folder / "half").write_text("done")
            if len(seen) == 1:
                raise KeyboardInterrupt
            return super().apply(model, context)

    with pytest.raises(KeyboardInterrupt):
        gm.compress(model, [Long()], state=tmp_path / "state")
    gm.compress(model, [Long()], state=tmp_path / "state")
    assert seen == [[], ["half"]]
    assert not (tmp_path / "state" / "pass-1").exists()


FULL = """
import resource, sys
import numpy as np
import gristmill as gm
model = gm.load("model.safetensors")
try:
    gm.compress(model, [gm.Clip(), gm.Clip(value=0.1)], state="state")
except OSError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_earlier_state(model, tmp_path):
    """A limit on the size of files stands for the disk: the first model fits, the second has a longer recipe in its meta."""
    gm.compress(model, [gm.Clip(), gm.Clip(value=0.1)], state=tmp_path / "state")
    discard(tmp_path / "state")
    size = (tmp_path / "model.safetensors").stat().st_size
    limit = size // 2
    process = subprocess.run(
        [sys.executable, "-c", FULL], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "the earlier state is intact" in process.stdout
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["pass-1", "state.json"]
    small, report = gm.compress(model, [gm.Clip(), gm.Clip(value=0.1)], state=tmp_path / "state")
    assert len(report.stages) == 3
    assert np.abs(small.tensors["layer0.weight"].dense()).max() <= np.float32(0.1)


LOCAL = [gm.Clip(), gm.Prune(0.5), gm.Quantize("int8")]


def test_weight_by_weight_gives_the_same_file(model, tmp_path):
    source, target = tmp_path / "model.safetensors", tmp_path / "small.safetensors"
    report = gm.compress_file(source, target, LOCAL, seed=2)
    small, whole = gm.compress(gm.load(source), LOCAL, seed=2)
    gm.save(small, tmp_path / "wanted.safetensors")
    assert target.read_bytes() == (tmp_path / "wanted.safetensors").read_bytes()
    assert report.bytes_after == target.stat().st_size
    assert [layer.error for layer in report.layers] == pytest.approx([layer.error for layer in whole.layers])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "small.safetensors", "wanted.safetensors"]
    assert "weight by weight" in str(report)


@pytest.mark.parametrize("pattern", ["1x4", "2x4", "4x4", "unstructured", "2:4"])
def test_weight_by_weight_with_every_pattern(model, tmp_path, pattern):
    share = None if ":" in pattern else 0.5
    gm.compress_file(tmp_path / "model.safetensors", tmp_path / "small.safetensors", [gm.Prune(share, pattern=pattern)])
    small, _ = gm.compress(model, [gm.Prune(share, pattern=pattern)])
    got = gm.load(tmp_path / "small.safetensors")
    for name in model.weights:
        np.testing.assert_array_equal(got.tensors[name].dense(), small.tensors[name].dense())


def test_weight_by_weight_goes_on_after_a_break(model, tmp_path, monkeypatch):
    source, target = tmp_path / "model.safetensors", tmp_path / "small.safetensors"
    made, inner = [], layerwise._through

    def broken(model, steps, name, context):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(name)
        return inner(model, steps, name, context)

    monkeypatch.setattr(layerwise, "_through", broken)
    with pytest.raises(KeyboardInterrupt):
        gm.compress_file(source, target, LOCAL, state=tmp_path / "state")
    assert not target.exists()
    with pytest.raises(ModelError, match="differs in recipe"):
        gm.compress_file(source, target, LOCAL[:1], state=tmp_path / "state")
    monkeypatch.setattr(layerwise, "_through", lambda *arguments: made.append(arguments[2]) or inner(*arguments))
    gm.compress_file(source, target, LOCAL, state=tmp_path / "state")
    assert made == list(model.weights)
    assert not (tmp_path / "state").exists()
    gm.save(gm.compress(model, LOCAL)[0], tmp_path / "wanted.safetensors")
    assert target.read_bytes() == (tmp_path / "wanted.safetensors").read_bytes()


def test_what_cannot_go_weight_by_weight_is_named(model, tmp_path):
    source, target = tmp_path / "model.safetensors", tmp_path / "small.safetensors"
    for step in (gm.Prune(0.5, scope="global"), gm.Prune(0.5, method="wanda"), gm.Distill(), gm.Quantize(calibration="data")):
        with pytest.raises(ModelError, match="looks at more than one weight at a time"):
            gm.compress_file(source, target, [step])
    with pytest.raises(ModelError, match="more than one weight"):
        gm.compress_file(source, target, [*LOCAL, gm.Distill()])
    with pytest.raises(FormatError, match="safetensors"):
        gm.compress_file(source, tmp_path / "small.onnx", LOCAL)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
