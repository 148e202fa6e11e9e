"""The examples run, with a short setting, on a model small enough."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gristmill as gm
from formats import hf_folders

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(model, work, *options):
    command = [sys.executable, EXAMPLES / "sparse_minilm.py", model, "--work", work, "--short", "--texts", EXAMPLES, *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_encoder_is_pruned_in_stages_and_the_run_goes_on_where_it_was(tmp_path):
    pytest.importorskip("tokenizers")
    model = tmp_path / "model"
    model.mkdir()
    hf_folders.write(model, hf_folders.BERT, hf_folders.tensors_of(), hf_folders.MODULES)
    first = run(model, tmp_path / "work", "--pattern", "2x4", "--stages", "0.5:1")
    assert [row.get("pruned", row.get("stage")) for row in first] == [0.5, 0.5]
    second = run(model, tmp_path / "work", "--pattern", "2x4", "--stages", "0.5:1,0.75:2")
    assert [row.get("pruned", row.get("stage")) for row in second] == [0.75, 0.75, 0.75]
    for percent in (50, 75):
        small = gm.load(tmp_path / "work" / f"{percent}.safetensors")
        for name in (name for name in small.weights if name.startswith("encoder.")):
            weight = small.tensors[name].dense()
            blocks = weight.reshape(weight.shape[0] // 2, 2, -1, 4)
            assert (blocks == 0).all(axis=(1, 3)).mean() == pytest.approx(percent / 100, abs=0.05)
            assert np.isfinite(weight).all()
