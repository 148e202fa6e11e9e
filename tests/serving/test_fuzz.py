"""The parsers of bodies and messages, against anything: they refuse or they fill a call, and nothing else."""

import json

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_clients import Echo

from gristmill.serving import messages, rest_codec, rpc_codec
from gristmill.serving.core import Call
from gristmill.serving.endpoints import MALFORMED
from gristmill.serving.limits import MAX_DEPTH, Limits
from gristmill.serving.refusal import Refusal
from gristmill.serving.tensors import DTYPES

ECHO = Echo()
LIMITS = Limits(max_request_bytes=1 << 16)


def fuzz(*strategies):
    return lambda test: settings(deadline=None, max_examples=200)(given(*strategies)(test))


def rest(body, header=None):
    """Decode; None if the body was refused."""
    call = Call(ECHO, LIMITS)
    try:
        rest_codec.decode(call, body, header)
        ECHO.check(call.inputs)
    except (Refusal, *MALFORMED):
        return None
    return call


def rpc(data):
    call = Call(ECHO, LIMITS)
    try:
        rpc_codec.decode(call, rpc_codec.parse("ModelInferRequest", data))
        ECHO.check(call.inputs)
    except Refusal:
        return None
    return call


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12
)
names = st.sampled_from([*ECHO.inputs, "other"])
parameters = st.dictionaries(
    st.sampled_from(["binary_data_size", "binary_data", "timeout", "binary_data_output", "x"]), scalars, max_size=3
)
shapes = st.lists(st.integers(-1, 5) | st.integers(), max_size=4) | anything
tensors = st.fixed_dictionaries(
    {},
    optional={
        "name": names | scalars,
        "datatype": st.sampled_from([*DTYPES, "BYTES", "BF16"]) | scalars,
        "shape": shapes,
        "data": st.lists(scalars, max_size=12) | anything,
        "parameters": parameters | anything,
    },
)
requests = st.fixed_dictionaries(
    {},
    optional={
        "id": scalars,
        "inputs": st.lists(tensors, max_size=3) | anything,
        "outputs": st.lists(st.fixed_dictionaries({"name": names}, optional={"parameters": parameters}), max_size=3) | anything,
        "parameters": parameters | anything,
    },
)


@fuzz(st.binary(max_size=400), st.none() | st.integers(-5, 500).map(str) | st.text(max_size=6))
def test_rest_any_bytes(body, header):
    rest(body, header)


@fuzz(requests, st.binary(max_size=64), st.booleans())
def test_rest_any_json(request, tail, binary):
    text = json.dumps(request).encode()
    rest(text + tail, str(len(text))) if binary else rest(text)


@fuzz(requests, st.data())
def test_rest_damaged_json(request, data):
    text = bytearray(json.dumps(request).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    rest(bytes(text))


@fuzz(st.sampled_from(list(DTYPES)), st.integers(0, 4), st.sampled_from(["flat", "nested", "binary"]), st.data())
def test_rest_round_trip(name, rows, form, data):
    dtype = DTYPES[name]
    wanted = np.frombuffer(data.draw(st.binary(min_size=rows * 2 * dtype.itemsize, max_size=rows * 2 * dtype.itemsize)), dtype)
    if dtype == np.bool_:
        wanted = np.frombuffer(wanted.tobytes(), np.uint8) > 127
    if dtype.kind == "f" and form != "binary":
        wanted = np.nan_to_num(wanted)
    wanted = wanted.reshape(rows, 2)
    tensor = {"name": name.lower(), "datatype": name, "shape": [rows, 2]}
    hosted = Echo("one", (name,))
    call, tail, header = Call(hosted, LIMITS), b"", None
    if form == "binary":
        tensor["parameters"], tail = {"binary_data_size": wanted.nbytes}, wanted.tobytes()
    else:
        tensor["data"] = wanted.tolist() if form == "nested" else wanted.ravel().tolist()
    text = json.dumps({"inputs": [tensor]}).encode()
    header = str(len(text)) if form == "binary" else None
    encoding = rest_codec.decode(call, text + tail, header)
    got = call.inputs[name.lower()]
    assert (got.dtype, got.shape) == (dtype, (rows, 2))
    assert got.tobytes() == wanted.tobytes() or (form != "binary" and np.array_equal(got, wanted))
    answer, _ = rest_codec.encode(call, hosted.run(call.inputs), encoding)
    assert json.loads(answer)["outputs"][0]["shape"] == [rows, 2]


@fuzz(st.integers(0, 300), st.sampled_from([(b"[", b"]"), (b'{"a":', b"}")]), st.text(max_size=20), st.integers(0, 60))
def test_the_depth_check_is_exact(depth, pair, text, siblings):
    opening, closing = pair
    word = json.dumps(text + '"\\]]}}[[{{').encode()
    body = b'{"id": %s, "a": [%s], "b": %s1%s}' % (word, b",".join([b"[]"] * siblings), opening * depth, closing * depth)
    try:
        rest_codec._check_envelope(body)
        accepted = True
    except Refusal:
        accepted = False
    # The outer object and, beside it, a list with lists in it.
    assert accepted is (max(depth, 2 if siblings else 1) + 1 <= MAX_DEPTH)


def test_nothing_in_the_envelope_grows_far_beyond_its_bytes():
    for body in (
        b'{"inputs": [' + b"[]," * 200_000 + b"[]]}",
        b'{"id":"' + b'","' * 300_000 + b'"}' + b"[" * 200,
        b'{"a":"' + b'\\"' * 200_000 + b"[" * 200,
    ):
        assert rest(body) is None


@fuzz(st.binary(max_size=400))
def test_rpc_any_bytes(data):
    rpc(data)


def contents():
    field = st.sampled_from(
        ["bool_contents", "int_contents", "int64_contents", "uint_contents", "fp32_contents", "fp64_contents"]
    )
    return st.dictionaries(field, st.lists(st.integers(0, 1), max_size=6), max_size=2)


messages_ = st.fixed_dictionaries(
    {},
    optional={
        "model_name": st.text(max_size=4),
        "inputs": st.lists(
            st.fixed_dictionaries(
                {
                    "name": names,
                    "datatype": st.sampled_from([*DTYPES, "BYTES"]),
                    "shape": st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3), max_size=3),
                },
                optional={"contents": contents()},
            ),
            max_size=3,
        ),
        "outputs": st.lists(st.fixed_dictionaries({"name": names}), max_size=3),
        "raw_input_contents": st.lists(st.binary(max_size=16), max_size=3),
    },
)


@fuzz(messages_, st.data())
def test_rpc_any_and_damaged_messages(fields, data):
    text = bytearray(messages.make("ModelInferRequest", **fields).SerializeToString())
    rpc(bytes(text))
    for _ in range(data.draw(st.integers(0, 4)) if text else 0):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    rpc(bytes(text))


@fuzz(messages_)
def test_the_field_count_agrees_with_the_parser(fields):
    message = messages.make("ModelInferRequest", **fields)
    count = sum(
        len(value) if field.name in ("inputs", "outputs", "raw_input_contents") else 1 for field, value in message.ListFields()
    )
    data = message.SerializeToString()
    assert not messages.too_many_fields(data, count)
    assert not count or messages.too_many_fields(data, count - 1)


@fuzz(st.lists(st.integers(0, 255), max_size=12).map(bytes))
def test_what_the_parser_takes_the_count_takes(data):
    try:
        messages.make("ServerLiveRequest").ParseFromString(data)
    except Exception:
        return
    groups = any(byte & 7 in (3, 4) for byte in data)
    assert groups or not messages.too_many_fields(data)


def test_integers_beyond_the_decoder():
    with pytest.raises(msgspec.ValidationError):
        rest_codec._decoder(rest_codec._element(np.dtype(np.int8)), 1).decode(b"[128]")
    assert rest_codec._as_array([2**64], np.dtype(np.uint64)) is None
