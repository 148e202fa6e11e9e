"""How much memory compress takes, measured from outside: the most that a process of its own had resident."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import gristmill as gm
from gristmill.errors import BudgetError
from gristmill.formats import native, streaming
from gristmill.formats.container import release
from gristmill.tensor import Dense

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
WIDTH, LAYERS = 1536, 28  # 252 MiB in weights of 9 MiB

SCRIPT = """
import json, sys
import gristmill as gm
from gristmill.compression.measure import memory
from gristmill.errors import BudgetError
recipe = [gm.Clip(), gm.Prune(0.7, pattern=sys.argv[2]), gm.Quantize("int8")]
begin = memory("VmHWM")
try:
    report = gm.compress_file("model.safetensors", "small.safetensors", recipe, max_memory=sys.argv[1])
    told = report.stages[-1].peak_bytes
except BudgetError as error:
    print(json.dumps({"needed": error.needed_bytes, "message": str(error)}))
else:
    print(json.dumps({"begin": begin, "peak": memory("VmHWM"), "told": told}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    model = gm.zoo.mlp([WIDTH] * (LAYERS + 1))
    weight = rng.standard_normal((WIDTH, WIDTH), dtype=np.float32)
    model = model.replace(tensors={name: Dense(np.roll(weight, i)) for i, name in enumerate(model.weights)})
    streaming.save(model, path / "model.safetensors")
    return path


def run(folder, *arguments):
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("pattern", ["1x4", "unstructured"])
def test_memory_is_bounded_whatever_the_size_of_the_model(folder, pattern):
    refused = run(folder, "1MiB", pattern)
    assert f"{refused['needed']:,} bytes" in refused["message"]
    assert not (folder / "small.safetensors").exists()
    budget = int(1.02 * refused["needed"])  # what the interpreter itself takes varies a little from run to run
    found = run(folder, budget, pattern)
    assert found["begin"] < found["peak"] < budget
    assert found["peak"] < (folder / "model.safetensors").stat().st_size * 0.75
    assert found["told"] <= found["peak"]
    small = gm.load(folder / "small.safetensors")
    assert {tensor.kind for name, tensor in small.tensors.items() if name in small.weights} == {
        "bitmask" if pattern == "unstructured" else "sparse"
    }
    (folder / "small.safetensors").unlink()


def test_in_memory_a_budget_is_checked_beforehand(folder):
    model = gm.load(folder / "model.safetensors")
    with pytest.raises(BudgetError, match=r"about .* bytes of memory.*max_memory is 104,857,600.*compress_file") as refusal:
        gm.compress(model, [gm.Clip()], max_memory="100MiB")
    assert refusal.value.needed_bytes > 3 * model.nbytes
    small, _ = gm.compress(gm.zoo.mlp([8, 4]), [gm.Clip()], max_memory="64GiB")
    assert small.weights == ("layer0.weight",)


def test_streamed_files_are_those_of_the_library(tmp_path):
    model = gm.zoo.bert(layers=1, hidden=32, heads=2, vocabulary=50, positions=64).replace(meta={"name": 'ü\u2028\n"\\\x7f'})
    for each in (model, gm.compress(model, [gm.Prune(0.5, pattern="unstructured"), gm.Quantize()])[0]):
        native.save(each, tmp_path / "saved.safetensors")
        streaming.save(each, tmp_path / "streamed.safetensors")
        assert (tmp_path / "streamed.safetensors").read_bytes() == (tmp_path / "saved.safetensors").read_bytes()
        assert streaming.file_bytes(each) == (tmp_path / "saved.safetensors").stat().st_size


def test_released_pages_are_read_again(tmp_path):
    model = gm.zoo.mlp([64, 64])
    gm.save(model, tmp_path / "model.safetensors")
    array = gm.load(tmp_path / "model.safetensors").tensors["layer0.weight"].dense()
    before = array.copy()
    release([array, before, before[::2], np.zeros(0)])
    np.testing.assert_array_equal(array, before)
