"""Who may ask, where the server may listen, and TLS."""

import json
import logging
import ssl

import grpc
import httpx
import numpy as np
import pytest
from serving_clients import METHODS, Rpc, exchange, make_certificate, raw_infer, tensor

import gristmill as gm
from gristmill.serving import ServingError, serve
from gristmill.serving.app import PROBES
from gristmill.serving.endpoints import Endpoints
from gristmill.serving.security import ApiKey, is_loopback

KEY = "correct horse battery staple"
ROUTES = [
    ("GET", "/v2", 200),
    ("GET", "/v2/health/live", 200),
    ("GET", "/v2/health/ready", 200),
    ("GET", "/v2/models", 200),
    ("GET", "/v2/models/digits", 200),
    ("GET", "/v2/models/digits/versions/1", 200),
    ("GET", "/v2/models/digits/ready", 200),
    ("GET", "/v2/models/digits/versions/1/ready", 200),
    ("POST", "/v2/models/digits/infer", 200),
    ("POST", "/v2/models/digits/versions/1/infer", 200),
    ("POST", "/v2/models", 405),
    ("POST", "/v2/health", 404),
    ("GET", "/", 404),
    ("GET", "/v2/health/ready/", 404),
    ("GET", "//v2/health/ready", 404),
    ("GET", "/v2/health/../models", 404),
    ("GET", "/v2/models/none", 404),
]
GOOD = {
    "bearer": ("Authorization", f"Bearer {KEY}"),
    "bearer in another case": ("authorization", f"bEARER {KEY}"),
    "own header": ("X-API-Key", KEY),
}
WRONG = {
    "none": None,
    "wrong": ("X-API-Key", KEY[:-1]),
    "longer": ("X-API-Key", KEY + "e"),
    "empty": ("X-API-Key", ""),
    "basic": ("Authorization", f"Basic {KEY}"),
    "no scheme": ("Authorization", KEY),
    "only scheme": ("Authorization", "Bearer"),
    "empty bearer": ("Authorization", "Bearer "),
    "another header": ("Api-Key", KEY),
    "upper case": ("X-API-Key", KEY.upper()),
    "a forged host": ("Host", "127.0.0.1:1/v2/health/ready?"),
}


@pytest.fixture(scope="module")
def guarded():
    model = gm.zoo.mlp([64, 10])
    with serve({"digits": model}, http_port=0, grpc_port=0, api_key=KEY, block=False) as running:
        yield running


def request(server, method, path, header):
    lines = [f"{method} {path} HTTP/1.1", *([] if header and header[0] == "Host" else ["Host: x"])]
    body = json.dumps({"inputs": [tensor(np.zeros((1, 64)))]}) if method == "POST" else ""
    lines += [f"{header[0]}: {header[1]}"] if header else []
    text = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", body])
    return exchange(server.http_port, text.encode())


def test_the_table_has_every_route():
    listed = {(method, path) for method, path, _ in ROUTES}
    for route in Endpoints(type("Core", (), {"limits": None})()).routes():
        path = route.path.replace("{model}", "digits").replace("{version}", "1")
        assert any((method, path) in listed for method in route.methods), path


@pytest.mark.parametrize("header", GOOD.values(), ids=GOOD)
@pytest.mark.parametrize(("method", "path", "status"), ROUTES)
def test_every_route_with_the_key(guarded, method, path, status, header):
    assert request(guarded, method, path, header)[0] == status


@pytest.mark.parametrize("header", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize(("method", "path", "status"), ROUTES)
def test_every_route_without_the_key(guarded, method, path, status, header):
    got, head, body = request(guarded, method, path, header)
    if path in PROBES:
        assert got == 200
    else:
        assert got == 401
        assert b"www-authenticate: bearer" in head
        assert json.loads(body) == {"error": "a valid API key is required"}


CALLS = {
    "ServerLive": {},
    "ServerReady": {},
    "ModelReady": {"name": "digits"},
    "ServerMetadata": {},
    "ModelMetadata": {"name": "digits"},
    "ModelInfer": raw_infer(np.zeros((1, 64), np.float32)),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_call_with_and_without_the_key(guarded, name):
    with Rpc(guarded.grpc_port) as client:
        for header in GOOD.values():
            client(name, metadata=[(header[0].lower(), header[1])], **CALLS[name])
        for given in WRONG.values():
            metadata = [(given[0].lower(), given[1])] if given and given[0] != "Host" else None
            if name in ("ServerLive", "ServerReady"):
                client(name, metadata=metadata)
            else:
                assert client.refused(name, metadata=metadata, **CALLS[name])[0] is grpc.StatusCode.UNAUTHENTICATED


def test_unknown_calls_need_the_key_too(guarded):
    with Rpc(guarded.grpc_port) as client:
        assert client.refused("Nothing", b"")[0] is grpc.StatusCode.UNAUTHENTICATED
        assert client.refused("Nothing", b"", metadata=[("x-api-key", KEY)])[0] is grpc.StatusCode.UNIMPLEMENTED
        for path in ("/inference.GRPCInferenceService/serverlive", "/x/ServerLive", "/grpc.reflection.v1.ServerReflection/X"):
            with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
                client.channel.unary_unary(path)(b"", timeout=20)


def test_a_repeated_header_is_enough_if_one_is_right(guarded):
    text = f"GET /v2 HTTP/1.1\r\nHost: x\r\nX-API-Key: wrong\r\nAuthorization: Bearer {KEY}\r\n\r\n"
    assert exchange(guarded.http_port, text.encode())[0] == 200


def test_websockets_and_upgrades_are_no_way_in(guarded):
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13"
    assert exchange(guarded.http_port, f"GET /v2 HTTP/1.1\r\nHost: x\r\n{upgrade}\r\n\r\n".encode())[0] in (0, 400, 401)
    assert exchange(guarded.http_port, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")[0] in (0, 400)


@pytest.mark.parametrize("key", ["", " ", "\t\n", " padded", "padded ", "new\nline", "schl\u00fcssel", 5, b"bytes"])
def test_unusable_keys_are_refused(key):
    with pytest.raises(ServingError, match="api_key"):
        serve(gm.zoo.mlp([2, 2]), http_port=0, grpc_port=0, api_key=key, block=False)


def test_a_key_that_is_no_text_never_matches():
    key = ApiKey(KEY)
    assert not key.admits([("x-api-key", b"\xff\xfe"), ("authorization", b"Bearer \xff"), ("x-api-key", "\udcff")])
    assert KEY not in repr(key)


def test_the_key_is_never_logged(caplog):
    caplog.set_level(logging.DEBUG)
    with serve(gm.zoo.mlp([2, 2]), http_port=0, grpc_port=0, api_key=KEY, block=False) as server:
        httpx.get(f"http://127.0.0.1:{server.http_port}/v2", headers={"X-API-Key": KEY + "?"})
        httpx.post(f"http://127.0.0.1:{server.http_port}/v2/models/model/infer", headers={"X-API-Key": KEY}, content=b"?")
        assert KEY not in repr(server)
    assert KEY not in " ".join(
        record.getMessage() for record in caplog.records if record.name.startswith(("gristmill", "uvicorn"))
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "example.com", "localhost.example.com"])
@pytest.mark.parametrize("given", [{}, {"api_key": KEY}, {"tls": ("cert.pem", "key.pem")}])
def test_listening_beyond_loopback_needs_key_and_tls(host, given):
    missing = {"api_key", "tls"} - set(given)
    with pytest.raises(ServingError, match="insecure=True") as caught:
        serve(gm.zoo.mlp([2, 2]), http_port=0, grpc_port=0, host=host, block=False, **given)
    assert all(name in str(caught.value) for name in missing)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("127.0.0.1.nip.io", False),
        ("2130706433", False),
    ],
)
def test_what_counts_as_loopback(host, loopback):
    assert is_loopback(host) is loopback


def test_insecure_listens_everywhere_and_says_so(caplog):
    with serve(gm.zoo.mlp([2, 2]), http_port=0, grpc_port=0, host="0.0.0.0", insecure=True, block=False) as server:
        assert httpx.get(f"http://127.0.0.1:{server.http_port}/v2/health/ready").status_code == 200
    assert "without api_key and tls" in caplog.text


# ---- TLS ----


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("tls"))


def test_tls_on_both_protocols_beyond_loopback(certificate):
    model = gm.zoo.mlp([64, 10])
    with serve({"digits": model}, 0, 0, api_key=KEY, tls=certificate, host="0.0.0.0", block=False) as server:
        context = ssl.create_default_context(cafile=certificate[0])
        url = f"https://127.0.0.1:{server.http_port}/v2"
        assert httpx.get(url, verify=context, headers={"X-API-Key": KEY}).status_code == 200
        assert httpx.get(url, verify=context).status_code == 401
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)  # a client that does not know the certificate
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http"))
        old = ssl.create_default_context(cafile=certificate[0])
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
        assert httpx.get(url, verify=old, headers={"X-API-Key": KEY}).status_code == 200

        with open(certificate[0], "rb") as file:
            credentials = grpc.ssl_channel_credentials(file.read())
        with Rpc(server.grpc_port, credentials) as client:
            assert client("ModelReady", name="digits", metadata=[("x-api-key", KEY)]).ready
            assert client.refused("ModelReady", name="digits")[0] is grpc.StatusCode.UNAUTHENTICATED
        with Rpc(server.grpc_port) as plain:
            assert plain.refused("ServerLive")[0] is grpc.StatusCode.UNAVAILABLE


def test_unusable_certificates_are_refused_before_listening(certificate, tmp_path):
    _, other_key = make_certificate(tmp_path)
    junk = tmp_path / "junk.pem"
    junk.write_text("not a certificate")
    model = gm.zoo.mlp([2, 2])
    for tls in [(certificate[0], other_key), (str(junk), certificate[1]), ("absent.pem", "absent.key"), "cert.pem", ("a",)]:
        with pytest.raises(ServingError, match="tls"):
            serve(model, 0, 0, tls=tls, block=False)
