"""The gRPC protocol against a running server."""

import struct

import grpc
import numpy as np
import pytest
from serving_clients import METHODS, Echo, Rpc, raw_infer, start

from gristmill.serving import messages
from gristmill.serving.rpc_codec import CONTENTS
from gristmill.serving.tensors import DTYPES

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def echo():
    with start(Echo()) as running, Rpc(running.grpc_port) as client:
        yield client


def typed(array, name="x", datatype="FP32", shape=None):
    shape = array.shape if shape is None else shape
    return {"name": name, "datatype": datatype, "shape": shape, "contents": {CONTENTS[datatype]: array.ravel().tolist()}}


def test_the_five_small_calls(rpc):
    assert rpc("ServerLive").live
    assert rpc("ServerReady").ready
    assert rpc("ModelReady", name="digits", version="1").ready
    about = rpc("ServerMetadata")
    assert (about.name, list(about.extensions)) == ("gristmill", ["binary_tensor_data"])
    model = rpc("ModelMetadata", name="digits")
    assert (model.name, list(model.versions), model.platform) == ("digits", ["1"], "gristmill")
    assert [(t.name, t.datatype, list(t.shape)) for t in model.inputs] == [("x", "FP32", [-1, 64])]
    assert [(t.name, t.datatype, list(t.shape)) for t in model.outputs] == [("logits", "FP32", [-1, 10])]


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_raw_in_raw_out(rpc, model, rows):
    x = np.random.default_rng(rows).standard_normal((rows, 64)).astype(np.float32)
    answer = rpc("ModelInfer", id="a", **raw_infer(x))
    assert (answer.model_name, answer.model_version, answer.id) == ("digits", "1", "a")
    (output,) = answer.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("logits", "FP32", [rows, 10])
    assert not output.HasField("contents")
    assert np.array_equal(np.frombuffer(answer.raw_output_contents[0], np.float32), model.run(x=x)["logits"].ravel())


def test_typed_in_typed_out(rpc, model, image):
    answer = rpc("ModelInfer", model_name="digits", inputs=[typed(image)], outputs=[{"name": "logits"}])
    assert not answer.raw_output_contents
    assert np.array_equal(np.array(answer.outputs[0].contents.fp32_contents, np.float32), model.run(x=image)["logits"][0])


def test_every_datatype(echo):
    arrays = {n: np.array([[0, 1]]).astype(d) for n, d in DTYPES.items()}
    inputs = [typed(a, n.lower(), n) for n, a in arrays.items() if n != "FP16"]
    wanted = [{"name": tensor["name"]} for tensor in inputs]
    assert echo.refused("ModelInfer", model_name="echo", inputs=inputs, outputs=wanted)[:2] == (
        INVALID,
        "input 'fp16' is missing",
    )
    bare = [{"name": n.lower(), "datatype": n, "shape": [1, 2]} for n in arrays]
    raw = [a.tobytes() for a in arrays.values()]
    answer = echo("ModelInfer", model_name="echo", inputs=bare, raw_input_contents=raw)
    assert list(answer.raw_output_contents) == raw
    assert [o.datatype for o in answer.outputs] == list(DTYPES)


@pytest.mark.parametrize("name", [n for n in DTYPES if n != "FP16"])
def test_typed_contents_of_every_datatype(name):
    dtype = DTYPES[name]
    array = np.array([[0, 1] if name == "BOOL" else limits(dtype)], dtype)
    with start(Echo("one", (name,)), http_port=None) as running, Rpc(running.grpc_port) as client:
        answer = client("ModelInfer", model_name="one", inputs=[typed(array, name.lower(), name)])
        assert np.array_equal(np.array(getattr(answer.outputs[0].contents, CONTENTS[name]), dtype), array[0])


def limits(dtype):
    info = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    return [info.min, info.max]


def test_half_precision_must_be_raw_and_comes_back_raw():
    with start(Echo("half", ("FP16",)), http_port=None) as running, Rpc(running.grpc_port) as client:
        sent = {"name": "fp16", "datatype": "FP16", "shape": [1, 2], "contents": {"fp32_contents": [0, 1]}}
        assert client.refused("ModelInfer", model_name="half", inputs=[sent])[0] is INVALID
        empty = {"name": "fp16", "datatype": "FP16", "shape": [0, 2]}
        raw = client("ModelInfer", model_name="half", inputs=[empty], raw_input_contents=[b""])
        assert list(raw.raw_output_contents) == [b""]


def test_values_that_are_not_finite_are_data(rpc):
    answer = rpc("ModelInfer", **raw_infer(np.full((1, 64), np.nan, np.float32)))
    assert np.isnan(np.frombuffer(answer.raw_output_contents[0], np.float32)).all()


# ---- the descriptor, held against bytes written by hand from the specification ----


def field(number, payload):
    """A length-delimited protobuf field; all lengths here are below 128 or written as two bytes."""
    size = len(payload)
    length = bytes([size]) if size < 128 else bytes([size & 0x7F | 0x80, size >> 7])
    return bytes([number << 3 | 2]) + length + payload


def varint(number, value):
    return bytes([number << 3, value])


def test_a_raw_request_and_its_answer_byte_for_byte(rpc, model, image):
    tensor = field(1, b"x") + field(2, b"FP32") + field(3, bytes([1, 64]))
    data = (
        field(1, b"digits")
        + field(2, b"1")
        + field(3, b"id")
        + field(5, tensor)
        + field(6, field(1, b"logits"))
        + field(7, image.tobytes())
    )
    ask = rpc.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    logits = model.run(x=image)["logits"]
    output = field(1, b"logits") + field(2, b"FP32") + field(3, bytes([1, 10]))
    assert ask(data, timeout=20) == field(1, b"digits") + field(2, b"1") + field(3, b"id") + field(5, output) + field(
        6, logits.tobytes()
    )


CONTENT_FIELDS = {
    "BOOL": (1, bytes([1, 0])),
    "INT32": (2, bytes([3, 4])),
    "INT64": (3, bytes([5, 6])),
    "UINT32": (4, bytes([7, 8])),
    "UINT64": (5, bytes([9, 10])),
    "FP32": (6, struct.pack("<2f", 0.5, 1)),
    "FP64": (7, struct.pack("<2d", 0.25, 2)),
}


@pytest.mark.parametrize("name", CONTENT_FIELDS)
def test_typed_contents_byte_for_byte(name):
    number, packed = CONTENT_FIELDS[name]
    tensor = field(1, name.lower().encode()) + field(2, name.encode()) + field(3, bytes([1, 2])) + field(5, field(number, packed))
    with start(Echo("one", (name,)), http_port=None) as running, Rpc(running.grpc_port) as client:
        ask = client.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        assert ask(field(1, b"one") + field(5, tensor), timeout=20) == field(1, b"one") + field(2, b"1") + field(5, tensor)


def test_small_messages_byte_for_byte(rpc):
    def ask(name, data=b""):
        return rpc.channel.unary_unary(f"/inference.GRPCInferenceService/{name}")(data, timeout=20)

    assert ask("ServerLive") == varint(1, 1)
    assert ask("ServerReady") == varint(1, 1)
    assert ask("ModelReady", field(1, b"digits") + field(2, b"1")) == varint(1, 1)
    assert ask("ServerMetadata").startswith(field(1, b"gristmill"))
    assert ask("ServerMetadata").endswith(field(3, b"binary_tensor_data"))
    minus_one = b"\xff" * 9 + b"\x01"
    x = field(1, b"x") + field(2, b"FP32") + field(3, minus_one + bytes([64]))
    y = field(1, b"logits") + field(2, b"FP32") + field(3, minus_one + bytes([10]))
    expected = field(1, b"digits") + field(2, b"1") + field(3, b"gristmill") + field(4, x) + field(5, y)
    assert ask("ModelMetadata", field(1, b"digits")) == expected


@pytest.mark.parametrize(
    ("name", "value", "encoded"),
    [
        ("bool_param", True, b"\x08\x01"),
        ("int64_param", 3, b"\x10\x03"),
        ("string_param", "a", b"\x1a\x01a"),
        ("double_param", 0.5, b"\x21" + struct.pack("<d", 0.5)),
        ("uint64_param", 4, b"\x28\x04"),
    ],
)
def test_parameters_byte_for_byte(name, value, encoded):
    request = messages.make("ModelInferRequest")
    setattr(request.parameters["k"], name, value)
    assert request.SerializeToString() == field(4, field(1, b"k") + field(2, encoded))


# ---- refusals ----


def wrong(**changes):
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 64]} | changes
    return {"model_name": "digits", "inputs": [tensor], "raw_input_contents": [bytes(256)]}


def unraw(**changes):
    return wrong(**changes) | {"raw_input_contents": []}


BAD = {
    "unknown input": wrong(name="y"),
    "twice": {"model_name": "digits", "inputs": wrong()["inputs"] * 2, "raw_input_contents": [bytes(256)] * 2},
    "missing": {"model_name": "digits"},
    "wrong datatype": wrong(datatype="FP64"),
    "bytes": wrong(datatype="BYTES"),
    "negative": wrong(shape=[-1, 64]),
    "negatives": wrong(shape=[-1, -64]),
    "overflow": wrong(shape=[1 << 62, 64]),
    "rank": wrong(shape=[64]),
    "many dimensions": wrong(shape=[1] * 40),
    "too little raw": wrong() | {"raw_input_contents": [bytes(255)]},
    "too much raw": wrong() | {"raw_input_contents": [bytes(260)]},
    "one raw too many": wrong() | {"raw_input_contents": [bytes(256)] * 2},
    "mixed": wrong(contents={"fp32_contents": [0.0] * 64}),
    "mixed with empty contents": wrong(contents={}),
    "no contents": unraw(),
    "too little typed": unraw(contents={"fp32_contents": [0.0] * 63}),
    "other field": unraw(contents={"fp64_contents": [0.0] * 64}),
    "two fields": unraw(contents={"fp32_contents": [0.0] * 64, "int_contents": [1]}),
    "unknown output": wrong() | {"outputs": [{"name": "y"}]},
    "output twice": wrong() | {"outputs": [{"name": "logits"}] * 2},
    "classification": wrong() | {"outputs": [{"name": "logits", "parameters": {"classification": {"int64_param": 1}}}]},
    "shared memory": wrong(parameters={"shared_memory_region": {"string_param": "a"}}),
    "timeout": wrong() | {"parameters": {"timeout": {"int64_param": -1}}},
}


@pytest.mark.parametrize("fields", BAD.values(), ids=BAD)
def test_malformed_requests_are_refused(rpc, fields):
    code, details, _ = rpc.refused("ModelInfer", **fields)
    assert code in (INVALID, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert 0 < len(details) < 200
    assert "/" not in details


@pytest.mark.parametrize("name", ["ModelInfer", "ModelReady", "ModelMetadata"])
@pytest.mark.parametrize(
    "data", [b"\xff", b"\x0a\x05abc", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x0b\x0c", b"\x0a\x02\xff\xfe"]
)
def test_bytes_that_are_no_message(rpc, name, data):
    assert rpc.refused(name, data)[0] is INVALID


@pytest.mark.parametrize("number", [5, 6, 7])
def test_a_bomb_of_empty_fields_is_not_parsed(rpc, number):
    code, details, _ = rpc.refused("ModelInfer", field(number, b"") * 100_000)
    assert (code, details) == (INVALID, "malformed message, or too many fields")


def test_unknown_models_versions_and_methods(rpc):
    missing = grpc.StatusCode.NOT_FOUND
    assert rpc.refused("ModelReady", name="none")[0] is missing
    assert rpc.refused("ModelMetadata", name="digits", version="9")[0] is missing
    assert rpc.refused("ModelInfer", model_name="../../etc/passwd")[0] is missing
    assert rpc.refused("RepositoryModelLoad", b"")[0] is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("name", "value"), [("INT8", 128), ("INT8", -129), ("INT16", 1 << 15), ("UINT8", 256), ("UINT16", 1 << 16)]
)
def test_typed_integers_out_of_range(name, value):
    with start(Echo("one", (name,)), http_port=None) as running, Rpc(running.grpc_port) as client:
        sent = {"name": name.lower(), "datatype": name, "shape": [1, 2], "contents": {CONTENTS[name]: [0, value]}}
        assert client.refused("ModelInfer", model_name="one", inputs=[sent])[0] is INVALID


def test_unexpected_errors_stay_inside(caplog):
    class Broken(Echo):
        def run(self, inputs):
            raise RuntimeError("secret at 0xdeadbeef")

    with start(Broken("broken", ("FP32",)), http_port=None) as running, Rpc(running.grpc_port) as client:
        code, details, _ = client.refused("ModelInfer", model_name="broken", inputs=[typed(np.zeros((1, 2)), "fp32")])
    assert (code, details) == (grpc.StatusCode.INTERNAL, "internal error")
    assert "0xdeadbeef" in caplog.text


def test_the_descriptor_leaves_the_default_pool_alone():
    from google.protobuf import descriptor_pool

    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")
    assert {f"{name}Request" for name in METHODS} <= messages.CLASSES.keys()
