"""Damaged and hostile ONNX files: each gives a FormatError that names the fault; none crashes, hangs or takes what it claims."""

import math
import os
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("ml_dtypes")

import contextlib

import onnx
from onnx import AttributeProto, TensorProto, helper

import gristmill as gm
from gristmill.errors import BudgetError, FormatError, GristmillError, MissingExtraError
from gristmill.formats.onnx import from_proto
from gristmill.formats.onnx.reader import parse

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
BOUND = 64 << 20  # bytes that refusing a file of some kilobytes may take


def value(name, kind=FLOAT, shape=("n", 3)):
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes, inputs=(), outputs=("y",), tensors=(), functions=(), opset=20):
    graph = helper.make_graph(list(nodes), "g", list(inputs) or [value("x")], [value(name) for name in outputs], list(tensors))
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("local", 1)])
    made.functions.extend(functions)
    return made


def tensor(name="w", dims=(3,), kind=FLOAT, **fields):
    made = TensorProto(name=name, data_type=kind, dims=dims)
    for key, values in fields.items():
        if key == "raw_data":
            made.raw_data = values
        else:
            getattr(made, key).extend(values)
    return made


def add(made):
    """x + w, over a tensor under test."""
    return model([helper.make_node("Add", ["x", "w"], ["y"])], tensors=[made])


def refuse(proto, message, home=None):
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=message):
            from_proto(proto, home)
        assert tracemalloc.get_traced_memory()[1] < BOUND
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (tensor(raw_data=b"\0" * 11), "takes 12 bytes, it has 11"),
        (tensor(float_data=[1.0, 2.0]), "takes 3 values of float_data, it has 2"),
        (tensor(float_data=[1.0] * 3, int32_data=[1]), "int32_data"),
        (tensor(dims=[2**62], raw_data=b""), "too large"),
        (tensor(dims=[2**40, 0, 2**40], raw_data=b""), "too large"),
        (tensor(dims=[-1], raw_data=b""), "shape"),
        (tensor(dims=[1] * 33, raw_data=b"\0" * 4), "shape"),
        (tensor(dims=[2**30], raw_data=b"\0" * 4), "bytes, it has 4"),
        (tensor(kind=TensorProto.STRING, string_data=[b"a"] * 3), "string is not supported"),
        (tensor(kind=TensorProto.FLOAT16, int32_data=[1, 2, 70000]), "no float16"),
        (tensor(kind=TensorProto.UINT8, int32_data=[1, 2, -1]), "no uint8"),
        (tensor(kind=TensorProto.BOOL, raw_data=b"\0\1\2"), "booleans"),
        (tensor(kind=99, raw_data=b""), "type 99"),
        (tensor(kind=TensorProto.INT4, raw_data=b"\0"), "takes 2 bytes"),
    ],
)
def test_tensors_that_lie(made, message):
    refuse(add(made), message)


def external(location, offset="0", length="12"):
    made = TensorProto(name="w", data_type=FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
    for key, text in (("location", location), ("offset", offset), ("length", length)):
        made.external_data.add(key=key, value=text)
    return made


@pytest.mark.parametrize("location", ["/etc/passwd", "../data", "a/../../data", "C:\\data", "..\\data", "", "a\0b"])
def test_external_data_may_not_leave_the_folder(tmp_path, location):
    (tmp_path / "data").write_bytes(b"\0" * 100)
    home = tmp_path / "home"
    home.mkdir()
    refuse(add(external(location)), "inside of the model's folder", home)


def test_external_data_may_not_follow_a_link_out(tmp_path):
    (tmp_path / "data.bin").write_bytes(b"\0" * 100)
    home = tmp_path / "home"
    home.mkdir()
    (home / "link").symlink_to(tmp_path / "data.bin")
    refuse(add(external("link")), "leads out", home)
    (home / "folder").symlink_to(tmp_path)
    refuse(add(external("folder/data.bin")), "leads out", home)


@pytest.mark.parametrize(
    ("location", "offset", "length", "message"),
    [
        ("data", "96", "12", "which has 100"),
        ("data", "99999999999999999999", "12", "numbers"),
        ("data", "-4", "12", "numbers"),
        ("data", "x", "12", "numbers"),
        ("data", "0", "16", "takes 12 bytes"),
        ("absent", "0", "12", "cannot be read"),
        ("pipe", "0", "12", "not a regular file"),
        ("empty", "0", "12", "which has 0"),
    ],
)
def test_external_data_stays_within_the_file(tmp_path, location, offset, length, message):
    (tmp_path / "data").write_bytes(b"\0" * 100)
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    refuse(add(external(location, offset, length)), message, tmp_path)


def test_external_data_is_mapped(tmp_path):
    values = np.arange(9, dtype=np.float32)
    (tmp_path / "data").write_bytes(values.tobytes())
    made = add(external("data", "8"))
    onnx.save(made, tmp_path / "model.onnx")
    loaded = gm.load(tmp_path / "model.onnx")
    np.testing.assert_array_equal(loaded.tensors["w"].array, values[2:5])
    assert not loaded.tensors["w"].array.flags.owndata


def call(name, inner, inputs=("a",), outputs=("b",), attributes=()):
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, list(inputs), list(outputs), inner, imports, list(attributes))


def test_functions_that_call_themselves():
    first = call("F", [helper.make_node("G", ["a"], ["b"], domain="local")])
    second = call("G", [helper.make_node("F", ["a"], ["b"], domain="local")])
    refuse(model([helper.make_node("F", ["x"], ["y"], domain="local")], functions=[first, second]), "calls itself")


def test_functions_that_grow_exponentially():
    functions = [call("F0", [helper.make_node("Relu", ["a"], ["b"])])]
    for level in range(1, 40):
        inner = [
            helper.make_node(f"F{level - 1}", ["a"], ["m"], domain="local"),
            helper.make_node(f"F{level - 1}", ["m"], ["b"], domain="local"),
        ]
        functions.append(call(f"F{level}", inner))
    with pytest.raises(FormatError, match="more than"):
        from_proto(model([helper.make_node("F39", ["x"], ["y"], domain="local")], functions=functions))


def test_cycles_and_names():
    relu = helper.make_node
    refuse(model([relu("Relu", ["b"], ["a"]), relu("Relu", ["a"], ["b"]), relu("Add", ["a", "x"], ["y"])]), "cyclic")
    refuse(model([relu("Relu", ["x"], ["y"]), relu("Relu", ["x"], ["y"])]), "made twice")
    refuse(model([relu("Relu", ["x"], ["y"])], tensors=[tensor("w", float_data=[1] * 3)] * 2), "made twice")
    refuse(model([relu("Relu", ["x"], ["y"])], inputs=[value("x"), value("x")]), "appears twice")
    refuse(model([relu("Relu", ["x"], ["y"])], outputs=("y", "y")), "appears twice")
    refuse(model([relu("Relu", ["x"], ["y"])], outputs=("z",)), "given by no input")


def with_attribute(node, **fields):
    node.attribute.append(AttributeProto(**fields))
    return node


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "axis", "type": AttributeProto.INTS, "ints": [0, 1]}, "must be of type INT"),
        ({"name": "axis", "type": AttributeProto.INT, "ints": [0, 1]}, "another type than it says"),
        ({"name": "axis", "type": AttributeProto.FLOAT, "f": 1.0}, "must be of type INT"),
        ({"name": "axis", "type": AttributeProto.STRING, "s": b"\xff"}, "not UTF-8"),
        ({"name": "axes", "type": AttributeProto.INT, "i": 0}, "unknown attribute"),
        ({"name": "axis", "ref_attr_name": "n", "type": AttributeProto.INT}, "no attribute of a function"),
    ],
)
def test_attributes_of_a_wrong_type(fields, message):
    refuse(model([with_attribute(helper.make_node("Softmax", ["x"], ["y"]), **fields)]), message)


def huge(values, name="shape"):
    return helper.make_tensor(name, INT64, [len(values)], values)


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("ConstantOfShape", ["shape"], ["y"]),
        helper.make_node("Expand", ["one", "shape"], ["y"]),
        helper.make_node("Tile", ["row", "shape"], ["y"]),
        helper.make_node("Range", ["zero", "many", "step"], ["y"]),
        helper.make_node("Pad", ["row", "pads"], ["y"]),
    ],
    ids=lambda node: node.op_type,
)
@pytest.mark.parametrize("size", [2**33, 2**62])
def test_giant_constants_are_not_computed(node, size):
    tensors = [
        huge([size]), tensor("one", [], float_data=[1]), tensor("row", [1], float_data=[1]), huge([0, size], "pads"),
        helper.make_tensor("zero", INT64, [], [0]), helper.make_tensor("many", INT64, [], [size]),
        helper.make_tensor("step", INT64, [], [1]),
    ]  # fmt: skip
    made = model([node], tensors=[t for t in tensors if t.name in node.input])
    tracemalloc.start()
    try:
        with contextlib.suppress(GristmillError):
            from_proto(made)
        assert tracemalloc.get_traced_memory()[1] < BOUND
    finally:
        tracemalloc.stop()


def test_constants_that_double_at_every_node():
    nodes = [helper.make_node("Concat", [f"v{i}", f"v{i}"], [f"v{i + 1}"], axis=0) for i in range(60)]
    nodes.append(helper.make_node("ReduceSum", ["v60"], ["y"], keepdims=0))
    tracemalloc.start()
    try:
        with contextlib.suppress(GristmillError):
            from_proto(model(nodes, tensors=[tensor("v0", [1000], float_data=[1.0] * 1000)]))
        assert tracemalloc.get_traced_memory()[1] < 2 * BOUND
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        ("Tile", {"x": [[1.0]], "n": [1 << 20, 1 << 20]}),
        ("Expand", {"x": [[1.0]], "n": [1 << 20, 1 << 20]}),
        ("ConstantOfShape", {"n": [1 << 20, 1 << 20]}),
        ("Pad", {"x": [[1.0]], "n": [1 << 30] * 4}),
        ("Resize", {"x": [[1.0]], "": None, "-": None, "n": [1 << 20, 1 << 20]}),
        ("OneHot", {"places": [0, 1], "n": 1 << 40, "values": [0.0, 1.0]}),
        ("Range", {"zero": 0, "n": 1 << 40, "step": 1}),
    ],
)
@pytest.mark.parametrize("constant", [False, True], ids=["input", "constant"])
def test_giant_results_are_refused_when_a_model_runs(op, inputs, constant):
    arrays = {name: np.array(values) for name, values in inputs.items() if values is not None}
    fed = {
        name: array.astype(np.float32) if array.dtype.kind == "f" else array
        for name, array in arrays.items()
        if not (constant and name == "n")
    }
    kinds = [value(name, FLOAT if array.dtype == np.float32 else INT64, array.shape) for name, array in fed.items()]
    tensors = [huge(arrays["n"].reshape(-1).tolist(), "n")] if constant else []
    if constant and not arrays["n"].ndim:
        tensors[0].ClearField("dims")
    unused = [] if fed else [value("x")]
    node = helper.make_node(op, [name.strip("-") for name in inputs], ["y"])
    tracemalloc.start()
    try:
        loaded = from_proto(model([node], [*kinds, *unused], tensors=tensors))
        with pytest.raises(BudgetError, match=r"'y' would make .*this machine has"):
            loaded.run(**fed, **({"x": np.ones((1, 3), np.float32)} if unused else {}))
        assert tracemalloc.get_traced_memory()[1] < BOUND
    finally:
        tracemalloc.stop()


def test_everything_missing_is_named_at_once():
    nodes = [helper.make_node("Exotic", ["x"], [f"e{i}"], name=f"odd{i}", domain="local") for i in range(7)]
    nodes.append(helper.make_node("StringNormalizer", ["x"], ["s"], name="text"))
    nodes.append(helper.make_node("Sum", [*(f"e{i}" for i in range(7)), "s"], ["y"]))
    with pytest.raises(FormatError) as caught:
        from_proto(model(nodes))
    text = str(caught.value)
    assert "Exotic" in text
    assert "7 (odd0, odd1, odd2, odd3, odd4 and 2 more)" in text
    assert "StringNormalizer" in text


def test_a_missing_operator_that_no_output_needs_is_no_fault():
    dead = helper.make_node("Exotic", ["x"], ["e"], domain="local")
    assert len(from_proto(model([dead, helper.make_node("Relu", ["x"], ["y"])])).nodes) == 1


def test_files_that_are_no_onnx(tmp_path):
    for data in (b"", b"\0", b"PK\3\4" * 10, b"\x0a\xff\xff\xff\xff\x7f" * 3, b"\x3b" * 1000):
        (tmp_path / "bad.onnx").write_bytes(data)
        with pytest.raises(FormatError, match=r"bad\.onnx"):
            gm.load(tmp_path / "bad.onnx")
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(FormatError, match="regular"):
        gm.load(tmp_path / "pipe.onnx")


@pytest.mark.parametrize("package", ["onnx", "ml_dtypes"])
def test_a_missing_package_is_told_by_its_extra(tmp_path, monkeypatch, package):
    (tmp_path / "model.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"gristmill\[onnx\]"):
        gm.load(tmp_path / "model.onnx")


def test_opsets_out_of_range():
    relu = [helper.make_node("Relu", ["x"], ["y"])]
    for opset in (0, -3, 29, 2**40):
        refuse(model(relu, opset=opset), "opset")


def network():
    """A small network that has functions, branches, older forms and constants of many kinds."""
    branch = [helper.make_graph([helper.make_node(op, ["h"], ["r"])], "b", [], [value("r")]) for op in ("Relu", "Neg")]
    nodes = [
        helper.make_node("Constant", [], ["flag"], value=helper.make_tensor("", TensorProto.BOOL, [], [True])),
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Double", ["p"], ["h"], domain="local"),
        helper.make_node("If", ["flag"], ["i"], then_branch=branch[0], else_branch=branch[1]),
        helper.make_node("Shape", ["i"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"], axis=0),
        helper.make_node("Unsqueeze", ["n"], ["n1"], axes=[0]),
        helper.make_node("Concat", ["n1", "minus"], ["to"], axis=0),
        helper.make_node("Reshape", ["i", "to"], ["z"]),
        helper.make_node("Clip", ["z"], ["c"], min=-1.0, max=1.0),
        helper.make_node("Softmax", ["c"], ["y"], axis=1),
    ]
    tensors = [
        helper.make_tensor("w", FLOAT, [3, 4], np.linspace(-1, 1, 12)),
        helper.make_tensor("zero", INT64, [], [0]),
        helper.make_tensor("minus", INT64, [1], [-1]),
    ]
    double = call("Double", [helper.make_node("Add", ["a", "a"], ["b"])])
    double.opset_import[0].version = 10
    return model(nodes, tensors=tensors, functions=[double], opset=10)


VALID = network().SerializeToString()


def test_the_network_is_sound():
    made = from_proto(parse(VALID)).run(x=np.ones((2, 3), np.float32))["y"]
    np.testing.assert_allclose(made.sum(axis=1), 1, rtol=1e-6)


def attempt(data):
    """Load and, where that works, run: whatever happens is one of our own errors, in bounded memory."""
    tracemalloc.start()
    try:
        made = from_proto(parse(data))
        assert made.outputs
        inputs = {}
        for name, kind in made.inputs.items():
            shape = [2 if isinstance(dim, str) else dim for dim in kind.shape]
            if math.prod(shape) > 1 << 16:
                return
            inputs[name] = np.ones(shape, kind.dtype)
        made.run(**inputs)
    except GristmillError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < BOUND


@settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes(changes):
    data = bytearray(VALID)
    for position, byte in changes:
        data[position] = byte
    attempt(bytes(data))


@settings(max_examples=60, deadline=5000)
@given(st.integers(0, len(VALID)), st.binary(max_size=8))
def test_cut_and_spliced_bytes(position, inserted):
    attempt(VALID[:position] + inserted)
    attempt(VALID[:position] + inserted + VALID[position:])


ODD = [0, 1, -1, 7, 2**31, 2**62, -(2**63), 2**63 - 1]


def slots(message, found):
    """Collect (message, field) pairs of every scalar and list in a message, however deep."""
    for field, content in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            repeated = not hasattr(content, "ListFields")
            for part in content if repeated else [content]:
                slots(part, found)
        found.append((message, field))
    return found


@settings(max_examples=200, deadline=5000, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_changed_fields(data):
    proto = parse(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        message, field = data.draw(st.sampled_from(slots(proto, [])))
        content = getattr(message, field.name)
        listed = isinstance(content, (list, tuple)) or hasattr(content, "append")
        if data.draw(st.booleans()):
            message.ClearField(field.name)
        elif listed and len(content):
            kind = data.draw(st.sampled_from(["again", "drop"]))
            content.append(content[0]) if kind == "again" else content.pop()
        elif field.type in (field.TYPE_INT64, field.TYPE_INT32, field.TYPE_ENUM) and not listed:
            with contextlib.suppress(ValueError):
                setattr(message, field.name, data.draw(st.sampled_from(ODD)))
        elif field.type == field.TYPE_STRING and not listed:
            setattr(message, field.name, data.draw(st.sampled_from(["", "x", "y", "h", "w", "Relu", "local", "\n", "Range"])))
        elif field.type == field.TYPE_BYTES and not listed:
            setattr(message, field.name, data.draw(st.binary(max_size=16)))
    attempt(proto.SerializeToString())
