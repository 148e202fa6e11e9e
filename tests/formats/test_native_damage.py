"""Damaged and hostile files: each gives a FormatError that names the fault; none crashes, hangs or allocates what it claims."""

import copy
import json
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gristmill as gm
from formats.models import blocks, every_kind
from gristmill.errors import FormatError
from gristmill.formats import load, native
from gristmill.model import Model
from gristmill.tensor import Dense

VALID = native.to_bytes(every_kind())


class File:
    """A file taken apart: `header`, `model` (the description in its metadata) and `data`, each free to be changed."""

    def __init__(self, raw: bytes = VALID) -> None:
        length = struct.unpack("<Q", raw[:8])[0]
        self.header: dict[str, Any] = json.loads(raw[8 : 8 + length])
        self.model: dict[str, Any] = json.loads(self.header["__metadata__"]["gristmill"])
        self.data = bytearray(raw[8 + length :])

    def array(self, name: str) -> np.ndarray:
        entry = self.header[name]
        dtype = {"I8": "i1", "U8": "u1", "I32": "<i4", "F32": "<f4"}[entry["dtype"]]
        begin, end = entry["data_offsets"]
        return np.frombuffer(memoryview(self.data)[begin:end], dtype).reshape(entry["shape"])

    def spec(self, name: str) -> dict[str, Any]:
        return next(entry for entry in self.model["tensors"] if entry["name"] == name)["spec"]

    def join(self) -> bytes:
        if "gristmill" in self.header.get("__metadata__", {}):
            self.header["__metadata__"]["gristmill"] = json.dumps(self.model)
        return pack(json.dumps(self.header).encode(), self.data)


def pack(header: bytes, data: bytes | bytearray = b"") -> bytes:
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def refuse(raw: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        native.from_bytes(raw)


def test_taking_apart_and_joining_changes_nothing():
    assert native.to_bytes(native.from_bytes(File().join())) == VALID


RAW: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "too few"),
    "no header": (lambda: b"\1\0\0", "too few"),
    "truncated header": (lambda: VALID[:50], "header claims"),
    "truncated data": (lambda: VALID[:-1], "truncated or has a tail"),
    "tail": (lambda: VALID + b"x", "truncated or has a tail"),
    "huge header length": (lambda: struct.pack("<Q", 2**63) + VALID[8:], "header claims 9223372036854775808 bytes"),
    "header is no JSON": (lambda: pack(b'{"a":'), "not valid JSON"),
    "header is no UTF-8": (lambda: pack(b'{"\xff":1}'), "not valid JSON"),
    "header is a list": (lambda: pack(b"[]"), "not a JSON object"),
    "deep nesting": (lambda: pack(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "a million items": (lambda: pack(b'{"a":[' + b"[]," * 1_000_000), "more than 1000000 items"),
    "a huge number": (lambda: pack(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "an infinite number": (lambda: pack(b'{"a":1e999}'), "not finite"),
    "NaN": (lambda: pack(b'{"a":NaN}'), "not finite"),
    "duplicate names": (lambda: pack(b'{"a":1,"b":2,"a":3}'), "'a' appears twice"),
    "metadata is no object": (lambda: pack(b'{"__metadata__":[]}'), "object of strings"),
    "metadata holds a number": (lambda: pack(b'{"__metadata__":{"gristmill":1}}'), "object of strings"),
    "no graph": (lambda: pack(b'{"__metadata__":{"format":"pt"}}'), "without a graph"),
}


@pytest.mark.parametrize("case", RAW)
def test_raw_damage(case):
    make, message = RAW[case]
    refuse(make(), message)


def entry(name: str, **changes: Any) -> Callable[[File], None]:
    return lambda file: file.header[name].update(changes)


def element(name: str, position: Any, value: Any) -> Callable[[File], None]:
    return lambda file: file.array(name).__setitem__(position, value)


def described(path: str, value: Any) -> Callable[[File], None]:
    """Set an item of the model description by a path such as `nodes.0.op`."""

    def change(file: File) -> None:
        *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
        place: Any = file.model
        for step in steps:
            place = place[step]
        place[last] = value

    return change


def shift(name: str, by: int) -> Callable[[File], None]:
    return lambda file: entry(name, data_offsets=[end + by for end in file.header[name]["data_offsets"]])(file)


def extra_tensor(file: File) -> None:
    file.header["stray"] = {"dtype": "U8", "shape": [1], "data_offsets": [len(file.data), len(file.data) + 1]}
    file.data += b"x"


def huge_product(file: File) -> None:
    file.header["norm"]["shape"] = [2**40, 2**40, 0]


def misaligned(file: File) -> None:
    """Put one byte before all tensors and name it, so that only the alignment is wrong."""
    for name, item in file.header.items():
        if name != "__metadata__":
            item["data_offsets"] = [end + 1 for end in item["data_offsets"]]
    file.header["first"] = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    file.data = bytearray(b"x") + file.data


def input_named_as_a_tensor(file: File) -> None:
    file.model["inputs"].append({"name": "norm", "dtype": "float32", "shape": [5]})


def missing_part(file: File) -> None:
    spec = next(item for item in file.model["tensors"] if item["name"] == "norm")
    spec["parts"] = ["_missing"]


def repeat(what: str) -> Callable[[File], None]:
    return lambda file: file.model[what].append(copy.deepcopy(file.model[what][0]))


CHANGES: dict[str, tuple[Callable[[File], None], str]] = {
    "overlapping offsets": (shift("norm", -4), "overlaps"),
    "a gap": (shift("a.bias", 4), "unused"),
    "offsets beyond the file": (entry("c.weight_bitmask", data_offsets=[10**6, 10**6 + 5]), "unused"),
    "offsets of 2**64": (entry("norm", data_offsets=[2**64, 2**64 + 20]), "not two rising offsets"),
    "falling offsets": (entry("norm", data_offsets=[20, 0]), "not two rising offsets"),
    "offsets are text": (entry("norm", data_offsets="ab"), "not two rising offsets"),
    "entry has a stranger": (entry("norm", stride=4), "must have dtype, shape and data_offsets"),
    "entry is a number": (lambda f: f.header.update(norm=3), "must have dtype, shape and data_offsets"),
    "negative dimension": (entry("norm", shape=[-5]), "sizes from 0"),
    "dimension is a float": (entry("norm", shape=[5.0]), "sizes from 0"),
    "dimension is true": (entry("norm", shape=[True]), "sizes from 0"),
    "too many dimensions": (entry("norm", shape=[1] * 64), "at most 32"),
    "product overflows": (huge_product, "too large"),
    "shape and offsets disagree": (entry("norm", shape=[4]), "another number"),
    "unknown dtype": (entry("norm", dtype="F33"), "dtype 'F33'; supported"),
    "bfloat16": (entry("norm", dtype="BF16"), "'BF16'; supported: .* Convert it to F32"),
    "dtype is a list": (entry("norm", dtype=["F32"]), "supported"),
    "wrong dtype of a part": (entry("a.weight_scale", dtype="I32"), "part '_scale' has dtype int32"),
    "misaligned": (misaligned, "not aligned"),
    "extra tensor": (extra_tensor, r"does not know: \['stray'\]"),
    "missing part": (missing_part, "'_missing' is missing"),
    "part of another tensor": (described("tensors.1.parts", [".weight"]), "belongs to another"),
    "repeated part": (described("tensors.0.parts", ["", "", "_scale"]), "belongs to another"),
    "too few parts": (described("tensors.0.parts", [""]), "part '_scale' is missing"),
    "unknown kind": (lambda f: f.spec("norm").update(kind="dens"), "unknown tensor kind"),
    "kind is a list": (lambda f: f.spec("norm").update(kind=[]), "unknown tensor kind"),
    "matrix shape": (lambda f: f.spec("a.weight").update(shape=[6, 12]), "has shape"),
    "block does not tile": (lambda f: f.spec("b.weight").update(block=[3, 4]), "cannot make a matrix"),
    "block of nothing": (lambda f: f.spec("b.weight").update(block=[0, 4]), "small positive"),
    "NaN scale": (element("a.weight_scale", 0, np.nan), "finite and positive"),
    "negative scale": (element("b.weight_scale", 3, -1.0), "finite and positive"),
    "index out of range": (element("b.weight_block_index", 1, 200), "sparse index"),
    "index not rising": (element("b.weight_block_index", 0, 2), "sparse index"),
    "row_offsets fall": (element("b.weight_row_offsets", 1, 4), "sparse index"),
    "row_offsets start late": (element("b.weight_row_offsets", 0, 1), "sparse index"),
    "row_offsets end beyond": (element("b.weight_row_offsets", 4, 6), "sparse index"),
    "row_offsets negative": (element("b.weight_row_offsets", 2, -1), "sparse index"),
    "bitmask marks too many": (element("c.weight_bitmask", 0, 255), "the bitmask marks 13 elements"),
    "cyclic graph": (described("nodes.0.inputs", ["b", "a.weight"]), "cyclic"),
    "unknown operator": (described("nodes.1.op", "Relux"), "unknown operator"),
    "unknown domain": (described("nodes.1.domain", "evil"), "unknown operator"),
    "unknown attribute": (described("nodes.1.attributes", {"slope": 1}), "unknown attribute"),
    "attribute of the wrong type": (described("nodes.4.attributes", {"epsilon": "x"}), "must be"),
    "undefined value": (described("nodes.0.inputs", ["z", "a.weight"]), "takes 'z'"),
    "undefined output": (described("outputs", ["z"]), "outputs"),
    "no outputs": (described("outputs", []), "outputs"),
    "value made twice": (repeat("nodes"), "made twice"),
    "node without outputs": (described("nodes.0.outputs", []), "no outputs"),
    "node is a number": (described("nodes.0", 3), "lacks"),
    "shape mismatch with the graph": (described("inputs.0.shape", ["batch", 7]), "last dimensions must be equal"),
    "negative input dimension": (described("inputs.0.shape", [-1, 6]), "not a printable name"),
    "input dtype": (described("inputs.0.dtype", "object"), "unknown dtype"),
    "input twice": (repeat("inputs"), "appears twice"),
    "input has a tensor's name": (input_named_as_a_tensor, "both an input and a tensor"),
    "control characters in a name": (described("inputs.0.name", "\x1b[2J"), "not a printable name"),
    "lone surrogate in a name": (described("inputs.0.name", "\ud800"), "not a printable name"),
    "meta is a list": (described("meta", []), "'meta' .* must be a dict"),
    "no meta": (lambda f: f.model.pop("meta"), "lacks 'meta'"),
    "newer version": (described("version", 2), "version 2, this gristmill reads up to 1; upgrade"),
    "version is text": (described("version", "1"), "not a positive integer"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_damage(case, tmp_path):
    change, message = CHANGES[case]
    file = File()
    change(file)
    raw = file.join()
    refuse(raw, message)
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=r"m\.safetensors: "):
        load(path)


def test_booleans_are_0_or_1():
    model = gm.zoo.mlp([2, 2])
    raw = native.to_bytes(model.replace(tensors={"flag": Dense(np.ones(4, bool))}))
    refuse(raw[:-1] + b"\2", "booleans other than 0 and 1")


def test_float_blocks_are_validated_too():
    model = gm.zoo.mlp([12, 8]).replace(tensors={"layer0.weight": blocks()})
    file = File(native.to_bytes(model))
    file.array("layer0.weight_block_index")[0] = 7
    refuse(file.join(), "sparse index")


def test_a_claimed_size_is_not_allocated():
    claims = [
        pack(b'{"__metadata__":{"gristmill":"{}"},"a":{"dtype":"F64","shape":[1000000000000],"data_offsets":[0,8000000000000]}}'),
        struct.pack("<Q", 99_999_999) + b"{}",
        pack(b'{"a":[' + b"1," * 900_000),
    ]
    tracemalloc.start()
    for raw in claims:
        refuse(raw, "claims|offsets|more than|not valid|entry|truncated")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6


def test_a_reversed_graph_of_many_nodes_is_refused_at_once():
    file = File(native.to_bytes(gm.zoo.mlp([2, 2])))
    count = 20_000
    chain = [{"op": "Relu", "domain": "", "attributes": {}, "inputs": [f"v{i}"], "outputs": [f"v{i + 1}"]} for i in range(count)]
    file.model["nodes"] = chain[::-1]
    refuse(file.join(), "cyclic, incomplete or out of order")


def loads_or_refuses(raw: bytes) -> None:
    """A mutated file is refused, or is a sound model that can be saved again."""
    try:
        model = native.from_bytes(raw)
    except FormatError:
        return
    assert isinstance(model, Model)
    assert native.from_bytes(native.to_bytes(model)).outputs == model.outputs


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_mutated_bytes(data):
    raw = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        # Half of the mutations hit the header, which is where the structure is.
        high = data.draw(st.sampled_from([len(raw) - 1, min(len(raw) - 1, 2000), 16]))
        position = data.draw(st.integers(0, high))
        kind = data.draw(st.sampled_from(["set", "delete", "insert", "copy"]))
        if kind == "set":
            raw[position] = data.draw(st.integers(0, 255))
        elif kind == "delete":
            del raw[position : position + data.draw(st.integers(1, 20))]
        elif kind == "insert":
            raw[position:position] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            raw[position:position] = raw[position : position + 30]
    loads_or_refuses(bytes(raw))


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every item inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(*path, key) for key, _ in items] + [deep for key, item in items for deep in places(item, (*path, key))]


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_mutated_structure(data):
    file = File()
    for _ in range(data.draw(st.integers(1, 2))):
        tree = data.draw(st.sampled_from([file.model, file.model, file.header]))
        paths = [path for path in places(tree) if path != ("__metadata__",)]
        *steps, last = data.draw(st.sampled_from(paths))
        other = data.draw(st.sampled_from(paths))
        place, source = tree, tree
        for step in steps:
            place = place[step]
        for step in other:
            source = source[step]
        kind = data.draw(st.sampled_from(["junk", "swap", "delete"]))
        if kind == "delete":
            del place[last]
        else:
            place[last] = data.draw(JUNK) if kind == "junk" else copy.deepcopy(source)
    loads_or_refuses(file.join())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_noise(raw):
    loads_or_refuses(raw)
    loads_or_refuses(pack(raw))
