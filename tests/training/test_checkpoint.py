"""Stop anywhere and go on to the same bits; refuse what does not belong."""

import os
import resource
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from safetensors.numpy import load_file

import gristmill as gm
from gristmill.errors import FormatError, ModelError
from training.programs import PACKAGE, bits, blobs, linear_gradient, linear_problem, small_model

OPTIMIZERS = {
    "sgd": gm.SGD(0.1),
    "momentum": gm.Momentum(0.05),
    "adam": gm.Adam(1e-2),
    "schedule": gm.AdamW(lambda step: 0.01 / step),
}


@pytest.mark.parametrize(("optimizer", "engine"), [*((name, "inline") for name in OPTIMIZERS), ("adam", "processes")])
def test_resuming_between_epochs_is_exact(tmp_path, optimizer, engine):
    data = blobs(50)
    path = tmp_path / "run.safetensors"
    options = {"optimizer": OPTIMIZERS[optimizer], "engine": engine, "batch_size": 16, "validation": blobs(30, seed=1)}
    whole = gm.fit(small_model(), data, epochs=4, **options)
    gm.fit(small_model(), data, epochs=2, checkpoint=path, **options)
    resumed = gm.fit(small_model(), data, epochs=4, checkpoint=path, resume=True, **options)
    assert bits(resumed) == bits(whole)
    for name in ("loss", "gradient_norm", "accuracy"):
        np.testing.assert_array_equal(resumed.history[name], whole.history[name])
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]


@pytest.mark.parametrize("stop_at", [1, 3, 4, 7])
def test_resuming_after_an_interrupt_is_exact(tmp_path, stop_at):
    params, data = linear_problem(40)
    path = tmp_path / "run"
    calls = []

    def interrupted(params, batch):
        calls.append(1)
        if len(calls) == stop_at * 4 - 2:  # in the midst of a step
            os.kill(os.getpid(), signal.SIGINT)
        return linear_gradient(params, batch)

    options = {"optimizer": gm.Momentum(0.05), "batch_size": 8, "epochs": 3, "engine": "inline"}
    whole = gm.fit_gradient(linear_gradient, params, data, **options)
    with pytest.raises(KeyboardInterrupt):
        gm.fit_gradient(interrupted, params, data, checkpoint=path, **options)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = gm.fit_gradient(linear_gradient, params, data, checkpoint=path, resume=True, **options)
    assert bits(resumed) == bits(whole)
    np.testing.assert_array_equal(resumed.history["loss"], whole.history["loss"])
    np.testing.assert_array_equal(resumed.history["gradient_norm"], whole.history["gradient_norm"])


def test_workers_and_engine_may_change_on_the_way(tmp_path):
    params, data = linear_problem()
    path = tmp_path / "run"
    whole = gm.fit_gradient(linear_gradient, params, data, epochs=4, engine="inline")
    gm.fit_gradient(linear_gradient, params, data, epochs=1, workers=2, checkpoint=path)
    resumed = gm.fit_gradient(linear_gradient, params, data, epochs=4, engine="inline", checkpoint=path, resume=True)
    assert bits(resumed) == bits(whole)


def test_a_run_that_was_over_is_over(tmp_path):
    params, data = linear_problem()
    path = tmp_path / "run"
    first = gm.fit_gradient(linear_gradient, params, data, epochs=2, engine="inline", checkpoint=path)
    again = gm.fit_gradient(linear_gradient, params, data, epochs=2, engine="inline", checkpoint=path, resume=True)
    assert bits(again) == bits(first)
    assert again.report.leases == {0: 0}


def test_without_a_file_resume_starts_afresh(tmp_path):
    params, data = linear_problem()
    path = tmp_path / "run"
    gm.fit_gradient(linear_gradient, params, data, epochs=1, engine="inline", checkpoint=path, resume=True)
    assert path.exists()


def test_a_checkpoint_is_plain_safetensors(tmp_path):
    params, data = linear_problem()
    result = gm.fit_gradient(
        linear_gradient, params, data, gm.Momentum(0.1), epochs=2, engine="inline", checkpoint=tmp_path / "run"
    )
    arrays = load_file(tmp_path / "run")
    np.testing.assert_array_equal(arrays["params.weight"], result.params["weight"])
    np.testing.assert_array_equal(arrays["history.loss"], result.history["loss"])
    assert "optimizer.velocity" in arrays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 8}, "batch_size was 32 and is now 8"),
        ({"seed": 3}, "seed was 0 and is now 3"),
        ({"slices": 5}, "slices was 4 and is now 5"),
        ({"reduction": "sum"}, "reduction was 'mean' and is now 'sum'"),
        ({"optimizer": gm.SGD(0.2)}, "learning_rate was 0.1 and is now 0.2"),
        ({"optimizer": gm.Adam(0.1)}, "optimizer was 'SGD' and is now 'Adam'"),
        ({"loss": "mse"}, "loss was"),
        ({"trainable": ["layer0.weight"]}, "parameters was"),
        ({"validation": blobs()}, "metric was None and is now 'accuracy'"),
    ],
)
def test_another_run_is_refused_by_what_differs(tmp_path, change, message):
    path = tmp_path / "run"
    gm.fit(small_model(), blobs(), epochs=1, engine="inline", checkpoint=path)
    x, y = blobs()
    data = (x, np.eye(3, dtype=np.float32)[y]) if change.get("loss") == "mse" else (x, y)
    with pytest.raises(ModelError, match=message):
        gm.fit(small_model(), data, epochs=2, engine="inline", checkpoint=path, resume=True, **change)


def test_other_data_or_another_model_are_refused(tmp_path):
    path = tmp_path / "run"
    gm.fit(small_model(), blobs(), epochs=1, engine="inline", checkpoint=path)
    with pytest.raises(ModelError, match=r"data was .*100.* and is now .*99"):
        gm.fit(small_model(), blobs(99), epochs=2, engine="inline", checkpoint=path, resume=True)
    other = gm.zoo.mlp([6, 16, 3], activation="tanh")
    with pytest.raises(ModelError, match="model was"):
        gm.fit(other, blobs(), epochs=2, engine="inline", checkpoint=path, resume=True)


def test_damage_is_found(tmp_path):
    path = tmp_path / "run"
    gm.fit(small_model(), blobs(), "cross_entropy", gm.Adam(0.01), epochs=1, engine="inline", checkpoint=path)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [good[:cut] for cut in (0, 4, 100, len(good) // 2, len(good) - 1)] + [b"\xff" * 64, good + b"\0"]
    for place in rng.integers(0, len(good), 60):
        flipped = bytearray(good)
        flipped[place] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises((FormatError, ModelError)):
            gm.fit(
                small_model(), blobs(), "cross_entropy", gm.Adam(0.01), epochs=2, engine="inline", checkpoint=path, resume=True
            )
    gm.save(small_model(), tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="not a training checkpoint"):
        gm.fit(small_model(), blobs(), epochs=1, engine="inline", checkpoint=tmp_path / "model.safetensors", resume=True)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    path = tmp_path / "run"
    gm.fit(small_model(), blobs(), epochs=1, engine="inline", checkpoint=path)
    good = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write checkpoint .*the earlier checkpoint is intact"):
            gm.fit(small_model(), blobs(), epochs=3, engine="inline", checkpoint=path, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == good
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(OSError, match="there is no folder"):  # before the first step
        gm.fit(small_model(), blobs(), epochs=1 << 40, engine="inline", checkpoint=tmp_path / "no" / "run")


def test_a_folder_instead_of_a_file(tmp_path):
    with pytest.raises(OSError, match="is a folder"):
        gm.fit(small_model(), blobs(), epochs=1 << 40, engine="inline", checkpoint=tmp_path)


def test_a_resumed_history_keeps_its_order(tmp_path):
    options = {"engine": "inline", "checkpoint": tmp_path / "run"}
    first = gm.fit(small_model(), blobs(), epochs=1, **options)
    second = gm.fit(small_model(), blobs(), epochs=2, resume=True, **options)
    assert list(first.history) == list(second.history)


@pytest.mark.parametrize("moment", [0.1, 0.4])
def test_killed_at_any_moment_it_resumes_to_the_same_bits(tmp_path, moment):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import sys
            import numpy as np
            import gristmill as gm
            from training.programs import bits, blobs, small_model
            path, resume = sys.argv[1], sys.argv[2] == "resume"
            print("begun", flush=True)
            options = {"optimizer": gm.Adam(0.01), "epochs": 60, "batch_size": 4, "engine": "inline"}
            result = gm.fit(small_model(), blobs(), checkpoint=path, resume=resume, **options)
            sys.stdout.write(bits(result).hex())
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": f"{PACKAGE}{os.pathsep}{os.path.dirname(os.path.dirname(__file__))}"}

    def start(path, how):
        return subprocess.Popen([sys.executable, program, path, how], stdout=subprocess.PIPE, text=True, env=environment)

    whole = start(tmp_path / "whole", "afresh")
    killed = start(tmp_path / "killed", "afresh")
    assert killed.stdout.readline() == "begun\n"
    try:
        killed.wait(moment)
    except subprocess.TimeoutExpired:
        killed.kill()
    killed.communicate()
    resumed = start(tmp_path / "killed", "resume")
    assert resumed.communicate()[0] == whole.communicate()[0] != ""
