"""The native file: what goes in comes out, equal models give equal bytes, and a file is whole or absent."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import gristmill as gm
from formats.models import COLUMNS, blocks, every_kind
from gristmill.errors import FormatError
from gristmill.formats import load, native, save
from gristmill.formats.atomic import replacing
from gristmill.model import Model
from gristmill.ops import TensorType
from gristmill.tensor import Dense


def assert_same(one: Model, other: Model) -> None:
    assert one.nodes == other.nodes
    assert list(one.inputs.items()) == list(other.inputs.items())
    assert one.outputs == other.outputs
    assert dict(one.meta) == dict(other.meta)
    assert list(one.tensors) == list(other.tensors)
    for name, tensor in one.tensors.items():
        twin = other.tensors[name]
        assert type(twin) is type(tensor)
        assert twin.spec() == tensor.spec()
        for suffix, part in tensor.parts().items():
            np.testing.assert_array_equal(twin.parts()[suffix], part, strict=True)


@pytest.mark.parametrize("make", [every_kind, lambda: gm.zoo.mlp([7, 5, 3], activation="gelu", layer_norm=True)])
def test_round_trip(make, tmp_path):
    model = make()
    save(model, tmp_path / "m.safetensors")
    assert_same(load(tmp_path / "m.safetensors"), model)
    assert_same(native.from_bytes(native.to_bytes(model)), model)
    assert (tmp_path / "m.safetensors").read_bytes() == native.to_bytes(model)


def test_loaded_model_computes_the_same(tmp_path):
    model = gm.zoo.mlp([6, 9, 4], seed=3)
    save(model, tmp_path / "m.safetensors")
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    np.testing.assert_array_equal(load(str(tmp_path / "m.safetensors")).run(x=x)["logits"], model.run(x=x)["logits"])


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3)])
def test_every_dtype_and_odd_shapes(dtype, shape):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    model = gm.zoo.mlp([4, 3]).replace(tensors={"extra": Dense(array)})
    back = native.from_bytes(native.to_bytes(model)).tensors["extra"].dense()
    # A Dense tensor makes scalars one-dimensional; the file must not change shapes any further.
    np.testing.assert_array_equal(back, model.tensors["extra"].dense(), strict=True)


def test_big_endian_arrays_are_converted():
    model = gm.zoo.mlp([4, 3]).replace(tensors={"extra": Dense(np.arange(3, dtype=">f4"))})
    np.testing.assert_array_equal(native.from_bytes(native.to_bytes(model)).tensors["extra"].dense(), [0, 1, 2])


def test_any_safetensors_reader_reads_it(tmp_path):
    save(every_kind(), tmp_path / "m.safetensors")
    arrays = load_file(tmp_path / "m.safetensors")
    assert {"a.weight", "a.weight_scale", "b.weight_values", "b.weight_block_index", "c.weight_bitmask"} <= arrays.keys()
    np.testing.assert_array_equal(arrays["b.weight_values"], blocks("int8").values)
    bits = np.unpackbits(arrays["c.weight_bitmask"], axis=1, bitorder="little")
    matrix = np.zeros((5, 8), np.float32)
    matrix[bits.astype(bool)] = arrays["c.weight_compressed"]
    np.testing.assert_array_equal(np.argwhere(matrix)[:, 1], COLUMNS)


def test_bytes_are_the_same_in_every_process():
    code = "import hashlib, gristmill as gm; from gristmill.formats import native; "
    code += (
        "print(hashlib.sha256(native.to_bytes(gm.zoo.mlp([5, 4, 3]).replace(meta={'b': 1, 'a': {'d': 2, 'c': 3}}))).hexdigest())"
    )
    digests = set()
    for seed in "123":
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        digests.add(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)
    assert len(digests) == 1


def test_order_of_meta_keys_does_not_matter():
    one, other = (gm.zoo.mlp([4, 3]).replace(meta=meta) for meta in ({"a": 1, "b": 2}, {"b": 2, "a": 1}))
    assert native.to_bytes(one) == native.to_bytes(other)


def test_tensors_are_views_of_the_mapped_file(tmp_path):
    save(gm.zoo.mlp([256, 256]), tmp_path / "m.safetensors")
    array = load(tmp_path / "m.safetensors").tensors["layer0.weight"].dense()
    assert not array.flags.writeable
    assert not array.flags.owndata
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("m.safetensors")]
    low, high = (int(end, 16) for end in mapped[0].split()[0].split("-"))
    assert low <= array.ctypes.data < high


def test_saving_over_a_mapped_file_leaves_the_loaded_model_alone(tmp_path):
    path = tmp_path / "m.safetensors"
    old = gm.zoo.mlp([8, 8], seed=1)
    save(old, path)
    loaded = load(path)
    save(gm.zoo.mlp([8, 8], seed=2), path)
    assert_same(loaded, old)
    save(loaded, path)
    assert_same(load(path), old)


def test_a_symbolic_link_stays_and_permissions_too(tmp_path):
    real, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    save(gm.zoo.mlp([2, 2]), real)
    assert real.stat().st_mode & 0o777 == 0o666 & ~_umask()
    real.chmod(0o640)
    link.symlink_to(real.name)
    save(gm.zoo.mlp([3, 3]), link)
    assert link.is_symlink()
    assert load(real).inputs["x"].shape == ("batch", 3)
    assert real.stat().st_mode & 0o777 == 0o640


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk_leaves_nothing_behind(tmp_path, old):
    path = tmp_path / "m.safetensors"
    if old:
        save(gm.zoo.mlp([2, 2]), path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*m\.safetensors"):
            save(gm.zoo.mlp([300, 300]), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(arrays, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(native, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(gm.zoo.mlp([2, 2]), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_dispatch_tells_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no model file .*absent\.onnx"):
        load(tmp_path / "absent.onnx")
    for name in ("m.gguf", "plain"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(FormatError, match="not yet supported"):
            load(tmp_path / name)
    with pytest.raises(FormatError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(FormatError, match="not yet supported"):
        save(gm.zoo.mlp([2, 2]), tmp_path / "m.gguf")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        save(gm.zoo.mlp([2, 2]), tmp_path / "absent" / "m.safetensors")


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match="not a regular file"):
        load(tmp_path / "m.safetensors")


def test_what_cannot_be_stored_is_refused():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    model = gm.zoo.mlp([4, 3])
    with pytest.raises(FormatError, match="not JSON"):
        native.to_bytes(model.replace(meta={"array": np.zeros(2)}))
    with pytest.raises(FormatError, match="not JSON"):
        native.to_bytes(model.replace(meta={"loss": float("nan")}))
    with pytest.raises(FormatError, match="header can hold"):
        native.to_bytes(model.replace(meta={"list": list(range(600_000))}))
    with pytest.raises(FormatError, match="complex128, which cannot be stored"):
        native.to_bytes(model.replace(tensors={"c": Dense(np.zeros(2, complex))}))
    half = TensorType(np.dtype(ml_dtypes.bfloat16), (2,))
    with pytest.raises(FormatError, match="input 'half' has dtype bfloat16, which cannot be stored"):
        native.to_bytes(model.replace(inputs={**model.inputs, "half": half}))
    with pytest.raises(FormatError, match="printable"):
        native.to_bytes(model.replace(inputs={**model.inputs, "a\nb": TensorType(np.dtype("float32"), ())}))


def test_names_that_clash_with_a_part_are_refused():
    tensors = {"b.weight_scale": Dense(np.ones(1, np.float32))}
    with pytest.raises(FormatError, match=r"'b\.weight_scale' is taken"):
        native.to_bytes(every_kind().replace(tensors=tensors))


def test_an_error_names_the_path_that_was_asked_for(tmp_path):
    target = tmp_path / "model.safetensors"
    with pytest.raises(OSError, match="No space") as caught, replacing(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(target)
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_does_not_name_the_file_gets_its_name(tmp_path):
    with pytest.raises(OSError, match=r"^cannot write .*v\.npy: 9 requested and 2 written$"), replacing(tmp_path / "v.npy"):
        raise OSError("9 requested and 2 written")
    assert not list(tmp_path.iterdir())
