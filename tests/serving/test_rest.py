"""The REST protocol against a running server."""

import json

import httpx
import numpy as np
import pytest
from serving_clients import Echo, exchange, post, start, tensor

import gristmill as gm
from gristmill.errors import ServingError
from gristmill.ops import Node, TensorType
from gristmill.serving import serve
from gristmill.serving.tensors import DTYPES
from gristmill.tensor import Dense

INFER = "/v2/models/digits/infer"


@pytest.fixture(scope="module")
def echo():
    with start(Echo()) as running, httpx.Client(base_url=f"http://127.0.0.1:{running.http_port}", timeout=20) as client:
        yield client


def test_health_and_metadata(http):
    assert http.get("/v2/health/live").json()["live"] is True
    assert http.get("/v2/health/ready").json() == {"ready": True, "live": True}
    about = http.get("/v2").json()
    assert about["name"] == "gristmill"
    assert about["extensions"] == ["binary_tensor_data"]
    assert isinstance(about["version"], str)
    assert http.get("/v2/models").json() == {"models": ["digits"]}


@pytest.mark.parametrize("path", ["/v2/models/digits", "/v2/models/digits/versions/1"])
def test_model_metadata_marks_the_batch_dimension(http, path):
    assert http.get(path).json() == {
        "name": "digits",
        "versions": ["1"],
        "platform": "gristmill",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 64]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}],
    }
    assert http.get(f"{path}/ready").json() == {"name": "digits", "ready": True}


@pytest.mark.parametrize("rows", [0, 1, 3, 17])
@pytest.mark.parametrize("nested", [False, True])
def test_infer_json(http, model, rows, nested):
    x = np.random.default_rng(rows).standard_normal((rows, 64)).astype(np.float32)
    sent = tensor(x) | ({"data": x.tolist()} if nested else {})
    answer = http.post(INFER, json={"id": "request 7", "inputs": [sent]})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["model_name"], body["model_version"], body["id"]) == ("digits", "1", "request 7")
    (output,) = body["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [rows, 10])
    assert np.array_equal(np.array(output["data"], np.float32).reshape(rows, 10), model.run(x=x)["logits"])


def test_no_id_comes_back_if_none_went_in(http, image):
    assert "id" not in http.post(INFER, json={"inputs": [tensor(image)]}).json()


def test_version_in_the_path_and_parameters(http, image):
    body = {"inputs": [tensor(image, parameters={"note": "x"})], "parameters": {"priority": 1, "timeout": 10_000_000, "a": None}}
    assert http.post("/v2/models/digits/versions/1/infer", json=body).status_code == 200
    assert http.post("/v2/models/digits/versions/2/infer", json=body).status_code == 404


def test_outputs_are_chosen_and_ordered(echo):
    x = np.array([[1, 2]])
    inputs = [tensor(x, d.lower(), d) for d in DTYPES if d != "BOOL"] + [tensor(x > 1, "bool", "BOOL")]
    answer = echo.post("/v2/models/echo/infer", json={"inputs": inputs, "outputs": [{"name": "int8"}, {"name": "fp64"}]}).json()
    assert [output["name"] for output in answer["outputs"]] == ["int8", "fp64"]
    everything = echo.post("/v2/models/echo/infer", json={"inputs": inputs, "outputs": []}).json()
    assert len(everything["outputs"]) == len(DTYPES)


def extremes(dtype):
    if dtype == np.bool_:
        return np.array([[True, False], [False, True]])
    info = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    return np.array([[info.min, info.max], [0, 1]], dtype)


def test_every_datatype_in_json(echo):
    inputs = [tensor(extremes(dtype), name.lower(), name) for name, dtype in DTYPES.items()]
    answer = echo.post("/v2/models/echo/infer", json={"inputs": inputs})
    assert answer.status_code == 200, answer.text
    for output, dtype in zip(answer.json()["outputs"], DTYPES.values(), strict=True):
        assert np.array_equal(np.array(output["data"], dtype).reshape(2, 2), extremes(dtype))


def test_every_datatype_in_binary(echo):
    arrays = {name: extremes(dtype) for name, dtype in DTYPES.items()}
    inputs = [
        {"name": n.lower(), "datatype": n, "shape": [2, 2], "parameters": {"binary_data_size": a.nbytes}}
        for n, a in arrays.items()
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    body = head + b"".join(array.tobytes() for array in arrays.values())
    answer = echo.post("/v2/models/echo/infer", content=body, headers={"Inference-Header-Content-Length": str(len(head))})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers["inference-header-content-length"])
    rest = answer.content[length:]
    for output in json.loads(answer.content[:length])["outputs"]:
        assert "data" not in output
        size = output["parameters"]["binary_data_size"]
        got, rest = np.frombuffer(rest[:size], DTYPES[output["datatype"]]).reshape(2, 2), rest[size:]
        assert np.array_equal(got, arrays[output["datatype"]])
    assert not rest


def binary(x, outputs=None, **parameters):
    described = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [described], "parameters": parameters, **({"outputs": outputs} if outputs else {})}).encode()
    return {"content": head + x.tobytes(), "headers": {"Inference-Header-Content-Length": str(len(head))}}


def test_binary_in_json_out(http, model, image):
    answer = http.post(INFER, **binary(image))
    assert "inference-header-content-length" not in answer.headers
    assert np.array_equal(np.array(answer.json()["outputs"][0]["data"], np.float32), model.run(x=image)["logits"][0])


def test_json_in_binary_out_per_output(http, model, image):
    body = {"inputs": [tensor(image)], "outputs": [{"name": "logits", "parameters": {"binary_data": True}}]}
    answer = http.post(INFER, json=body)
    assert np.array_equal(np.frombuffer(answer.content[-40:], np.float32), model.run(x=image)["logits"][0])


def test_an_output_may_decline_the_binary_default(http, image):
    answer = http.post(
        INFER, **binary(image, [{"name": "logits", "parameters": {"binary_data": False}}], binary_data_output=True)
    )
    assert len(answer.json()["outputs"][0]["data"]) == 10


def test_a_body_that_is_one_raw_tensor(http, model, image):
    answer = http.post(INFER, content=image.tobytes(), headers={"Inference-Header-Content-Length": "0"})
    assert np.array_equal(np.frombuffer(answer.content[-40:], np.float32), model.run(x=image)["logits"][0])


def test_values_that_are_not_finite_are_data(http):
    x = np.full((1, 64), np.nan, np.float32)
    x[0, 1:3] = np.inf, -np.inf
    answer = http.post(INFER, **binary(x))
    assert answer.status_code == 200
    assert None in answer.json()["outputs"][0]["data"]
    beyond = http.post(INFER, json={"inputs": [tensor(np.full((1, 64), 1e300))]})
    assert beyond.status_code == 200


@pytest.mark.parametrize(
    "path", ["/", "/v2/", "/v3", "/v2/models/digits/", "/v2/models/none", "/v2/models/..%2F..", "/v2/models/a%00b"]
)
def test_unknown_paths(http, path):
    answer = http.get(path)
    assert answer.status_code == 404
    assert set(answer.json()) == {"error"}
    assert "location" not in answer.headers


def test_wrong_methods(http):
    assert http.get(INFER).status_code == 405
    answer = http.delete("/v2")
    assert answer.status_code == 405
    assert "GET" in answer.headers["allow"]
    assert set(answer.json()) == {"error"}


def good(**changes):
    return {"inputs": [tensor(np.zeros((1, 64))) | changes]}


DEEP = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": %s1%s}]}' % (b"[" * 5000, b"]" * 5000)
TWICE = {"inputs": [tensor(np.zeros((1, 64)))] * 2}
BAD = {
    "empty": b"",
    "not json": b"hello",
    "cut": json.dumps(good()).encode()[:-3],
    "not utf-8": b'{"inputs": [], "id": "\xff"}',
    "a list": b"[]",
    "no inputs key": b"{}",
    "no inputs": {"inputs": []},
    "nan literal": b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,1],"data":[NaN]}]}',
    "deep data": DEEP,
    "deep unknown": b'{"a": ' + b'{"a":' * 3000 + b"1" + b"}" * 3001,
    "many objects": b'{"outputs": [' + b"{}," * 5000 + b"{}]}",
    "many keys": b'{"parameters": {' + b'"a":1,' * 70000 + b'"a":1}}',
    "twice": TWICE,
    "unknown input": good(name="y"),
    "long unknown input": good(name="y" * 10000),
    "name is a number": good(name=3),
    "wrong datatype": good(datatype="FP64"),
    "no such datatype": good(datatype="FP33"),
    "bytes": good(datatype="BYTES"),
    "no data": {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 64]}]},
    "null data": good(data=None),
    "text data": good(data="0"),
    "strings in data": good(data=["0"] * 64),
    "bools in data": good(data=[True] * 64),
    "too little data": good(data=[0] * 63),
    "too much data": good(data=[0] * 65),
    "ragged data": good(shape=[2, 64], data=[[0] * 63, [0] * 65]),
    "nested otherwise": good(data=[[[0] * 64]]),
    "wrong width": good(shape=[1, 63]),
    "wrong rank": good(shape=[64]),
    "negative shape": good(shape=[-1, 64]),
    "two negatives": good(shape=[-1, -64]),
    "fraction in shape": good(shape=[1.5, 64]),
    "bool in shape": good(shape=[True, 64]),
    "overflowing shape": good(shape=[2**58, 64]),
    "beyond 64 bits": good(shape=[2**80, 64]),
    "number beyond float": b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,64],"data":[' + b"1e999," * 63 + b"1]}]}",
    "unknown output": good() | {"outputs": [{"name": "y"}]},
    "output twice": good() | {"outputs": [{"name": "logits"}] * 2},
    "outputs not a list": good() | {"outputs": {"name": "logits"}},
    "classification": good() | {"outputs": [{"name": "logits", "parameters": {"classification": 3}}]},
    "shared memory": good(parameters={"shared_memory_region": "a"}),
    "binary size without header": good(parameters={"binary_data_size": 256}),
    "id is a number": good() | {"id": 3},
    "negative timeout": good() | {"parameters": {"timeout": -1}},
    "timeout is a bool": good() | {"parameters": {"timeout": True}},
    "nested parameter": good() | {"parameters": {"a": {"b": 1}}},
    "huge parameters": good() | {"parameters": {"a": "b" * 70000}},
    "binary_data_output is a number": good() | {"parameters": {"binary_data_output": 1}},
    "data in an empty tensor": good(shape=[0, 64], data=[0] * 64),
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_malformed_requests_are_refused_briefly(http, body):
    answer = http.post(INFER, content=body if isinstance(body, bytes) else json.dumps(body).encode())
    assert answer.status_code in (400, 413), answer.text
    message = answer.json()["error"]
    assert set(answer.json()) == {"error"}
    assert 0 < len(message) < 200
    assert "Traceback" not in message
    assert "/" not in message
    assert http.post(INFER, json=good()).status_code == 200


@pytest.mark.parametrize(
    "length", ["-1", "1e3", "abc", "", "0x10", "999999999999999999999", "100000", "\u00b2".encode("latin-1")]
)
def test_a_header_length_that_does_not_fit(http, length):
    answer = http.post(
        INFER, content=binary(np.zeros((1, 64), np.float32))["content"], headers={"Inference-Header-Content-Length": length}
    )
    assert answer.status_code == 400


@pytest.mark.parametrize(
    ("size", "tail"), [(255, 0), (257, 0), (256, 1), (256, -1), (-1, 0), (2**70, 0), ("256", 0), (True, 0), (256.0, 0)]
)
def test_a_binary_size_that_does_not_fit(http, size, tail):
    described = {"name": "x", "datatype": "FP32", "shape": [1, 64], "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [described]}).encode()
    answer = http.post(INFER, content=head + bytes(256 + tail), headers={"Inference-Header-Content-Length": str(len(head))})
    assert answer.status_code == 400


def test_both_data_and_binary_data(http):
    head = json.dumps(good(parameters={"binary_data_size": 256})).encode()
    answer = http.post(INFER, content=head + bytes(256), headers={"Inference-Header-Content-Length": str(len(head))})
    assert answer.status_code == 400


def test_a_bool_byte_of_two(echo):
    described = [{"name": "bool", "datatype": "BOOL", "shape": [1, 2], "parameters": {"binary_data_size": 2}}]
    head = json.dumps({"inputs": described}).encode()
    answer = echo.post(
        "/v2/models/echo/infer", content=head + b"\x02\x00", headers={"Inference-Header-Content-Length": str(len(head))}
    )
    assert (answer.status_code, answer.json()["error"]) == (400, "input 'bool': a BOOL is one byte, 0 or 1")


@pytest.mark.parametrize(
    ("datatype", "value"), [("INT8", 128), ("INT8", -129), ("UINT8", -1), ("INT64", 2**63), ("UINT64", 2**64), ("INT32", 1.5)]
)
def test_integers_out_of_range(echo, datatype, value):
    sent = {"name": datatype.lower(), "datatype": datatype, "shape": [1, 2], "data": [0, value]}
    assert echo.post("/v2/models/echo/infer", json={"inputs": [sent]}).status_code == 400


def test_dimensions_of_one_name_must_agree(echo):
    inputs = [tensor(np.zeros((2 if name == "FP16" else 1, 2), bool), name.lower(), name) for name in DTYPES]
    for sent in inputs:
        sent["data"] = [False if sent["datatype"] == "BOOL" else 0 for _ in sent["data"]]
    answer = echo.post("/v2/models/echo/infer", json={"inputs": inputs})
    assert answer.status_code == 400
    assert "dimension 'n'" in answer.json()["error"]


def test_compressed_bodies_are_refused(http):
    assert http.post(INFER, json=good(), headers={"Content-Encoding": "gzip"}).status_code == 415


def test_unexpected_errors_stay_inside(caplog, image):
    class Broken(Echo):
        def run(self, inputs):
            raise RuntimeError("secret at 0xdeadbeef in /etc")

    with start(Broken("broken", ("FP32",))) as running:
        body = json.dumps({"inputs": [tensor(np.zeros((1, 2)), "fp32")]}).encode()
        status, _, text = exchange(running.http_port, post(body, path="/v2/models/broken/infer"))
    assert (status, json.loads(text)) == (500, {"error": "internal error"})
    assert "0xdeadbeef" in caplog.text


def test_errors_of_the_encoder_stay_inside(caplog):
    class Wrong(Echo):
        def run(self, inputs):
            return {"fp32": object()}

    with start(Wrong("wrong", ("FP32",))) as running:
        body = json.dumps({"inputs": [tensor(np.zeros((1, 2)), "fp32")]}).encode()
        status, _, text = exchange(running.http_port, post(body, path="/v2/models/wrong/infer"))
    assert (status, json.loads(text)) == (500, {"error": "internal error"})


def test_shapes_that_the_model_does_not_take_are_the_clients_fault():
    encoder = gm.zoo.bert(layers=1, hidden=8, heads=2, vocabulary=9, positions=4)
    with serve({"encoder": encoder}, http_port=0, grpc_port=0, block=False) as running:
        for length, status in ((4, 200), (5, 400)):
            inputs = [tensor(np.ones((1, length)), name) | {"datatype": "INT64"} for name in encoder.inputs]
            body = json.dumps({"inputs": [{**i, "data": [1] * length} for i in inputs]}).encode()
            got, _, text = exchange(running.http_port, post(body, path="/v2/models/encoder/infer"))
            assert got == status, text
    assert "shapes (1, 5)" in json.loads(text)["error"]


def test_a_model_that_cannot_be_planned_whole_is_refused_by_name():
    kind = TensorType(np.dtype(np.int64), (2,))
    nodes = (Node("Expand", ("one", "shape"), ("big",)), Node("ReduceSum", ("big",), ("y",), {"keepdims": 0}))
    model = gm.Model(nodes, {"one": Dense(np.ones((), np.float32))}, {"shape": kind}, ("y",))
    with pytest.raises(ServingError, match=r"model 'grown' cannot be served"):
        serve({"grown": model}, http_port=0, grpc_port=0, block=False)
