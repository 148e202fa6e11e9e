"""Too much, too large, too slow, and gone: against running servers."""

import concurrent.futures
import contextlib
import json
import socket
import threading
import time

import grpc
import httpx
import numpy as np
import pytest
from serving_clients import Gate, Rpc, exchange, gate_request, post, raw_infer, response_of, start, tensor

import gristmill as gm
from gristmill.serving import ServingError, serve
from gristmill.serving.limits import HEADER_BYTES, Limits

PATH = "/v2/models/gate/infer"


def body(number, **more):
    return json.dumps({"inputs": [tensor(np.array([number]))], **more}).encode()


def ask(port, number, **more):
    return exchange(port, post(body(number, **more), path=PATH))


@contextlib.contextmanager
def gated(**limits):
    gate = Gate()
    limits = {"max_concurrent": 1, "max_queued": 1} | limits
    with start(gate, **limits) as server, concurrent.futures.ThreadPoolExecutor(8) as pool:
        try:
            yield gate, server, pool
        finally:
            gate.opened.set()


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def queued(server, count):
    until(lambda: server._core.dispatcher.queued == count)


def test_beyond_the_queue_requests_are_refused_at_once():
    with gated() as (gate, server, pool):
        running = pool.submit(ask, server.http_port, 1)
        assert gate.entered.acquire(timeout=20)
        waiting = pool.submit(ask, server.http_port, 2)
        queued(server, 1)
        status, head, text = ask(server.http_port, 3)
        assert (status, json.loads(text)) == (503, {"error": "the server is busy"})
        assert b"retry-after: 1" in head
        with Rpc(server.grpc_port) as client:
            x = np.zeros(1, np.float32)
            code, details, trailing = client.refused("ModelInfer", **raw_infer(x, "gate"))
            assert (code, details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "the server is busy")
            assert trailing["grpc-retry-pushback-ms"] == "1000"
            assert client("ServerReady").ready
        assert exchange(server.http_port, b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200
        gate.opened.set()
        assert (running.result()[0], waiting.result()[0]) == (200, 200)
        assert gate.ran == [1, 2]


def test_the_event_loop_is_free_while_models_run():
    with gated() as (gate, server, pool):
        running = pool.submit(ask, server.http_port, 1)
        assert gate.entered.acquire(timeout=20)
        for _ in range(20):
            assert exchange(server.http_port, b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200
        gate.opened.set()
        assert running.result()[0] == 200


def test_deadlines_are_honoured_before_dispatch():
    with gated(max_queued=8) as (gate, server, pool):
        running = pool.submit(ask, server.http_port, 1)
        assert gate.entered.acquire(timeout=20)
        status, _, text = ask(server.http_port, 2, parameters={"timeout": 20_000})
        assert (status, json.loads(text)["error"]) == (504, "the deadline passed before the request could be run")
        with Rpc(server.grpc_port) as client:
            request = raw_infer(np.array([3], np.float32), "gate")
            assert client.refused("ModelInfer", timeout=0.1, **request)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
            request["parameters"] = {"timeout": {"int64_param": 20_000}}
            assert client.refused("ModelInfer", **request)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        gate.opened.set()
        assert running.result()[0] == 200
        assert ask(server.http_port, 4)[0] == 200
        assert gate.ran == [1, 4]


def test_nobody_waits_longer_than_max_wait():
    with gated(max_wait=0.05) as (gate, server, pool):
        running = pool.submit(ask, server.http_port, 1)
        assert gate.entered.acquire(timeout=20)
        assert ask(server.http_port, 2)[0] == 504
        gate.opened.set()
        assert running.result()[0] == 200


def test_clients_that_leave_while_waiting_are_not_run():
    with gated(max_queued=2) as (gate, server, pool):
        running = pool.submit(ask, server.http_port, 1)
        assert gate.entered.acquire(timeout=20)
        leaver = socket.create_connection(("127.0.0.1", server.http_port))
        leaver.sendall(post(body(2), path=PATH))
        with Rpc(server.grpc_port) as client:
            queued(server, 1)
            call = client.method("ModelInfer").future(gate_request(3), timeout=20)
            queued(server, 2)
            leaver.close()
            queued(server, 1)
            call.cancel()
            queued(server, 0)
        gate.opened.set()
        assert running.result()[0] == 200
        assert ask(server.http_port, 4)[0] == 200
        assert gate.ran == [1, 4]


def test_clients_that_leave_while_running_do_not_wedge_the_server():
    with gated(max_queued=4) as (gate, server, _):
        for number in range(3):
            with socket.create_connection(("127.0.0.1", server.http_port)) as leaver:
                leaver.sendall(post(body(number), path=PATH))
                if not number:
                    assert gate.entered.acquire(timeout=20)
        with Rpc(server.grpc_port) as client:
            call = client.method("ModelInfer").future(gate_request(9), timeout=20)
            call.cancel()
        gate.opened.set()
        assert ask(server.http_port, 5)[0] == 200


def test_oversize_by_declared_length(server):
    big = b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % ((1 << 20) + 1)
    status, _, text = exchange(server.http_port, big)
    assert (status, json.loads(text)) == (413, {"error": "the request is larger than 1048576 bytes"})
    huge = big.replace(b"1048577", b"9" * 19)
    assert exchange(server.http_port, huge)[0] in (400, 413)
    for length in (b"9" * 40, b"-1", b"1, 2", b"0x10", b"\xb2"):
        assert exchange(server.http_port, big.replace(b"1048577", length))[0] in (0, 400, 413)


def test_oversize_by_chunks(server):
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=20) as client:
        client.sendall(b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(17):
                client.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
        assert response_of(client)[0] == 413


def test_chunked_bodies_are_read(server, image):
    data = json.dumps({"inputs": [tensor(image)]}).encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (data[:10], data[10:100], data[100:]))
    head = b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert exchange(server.http_port, head + chunks + b"0\r\n\r\n")[0] == 200


@pytest.mark.parametrize("part", [b"1\r\n \r\n", b"000000000000000000000000000001\r\n \r\n", b"1;extension=abcdefgh\r\n \r\n"])
def test_a_flood_of_tiny_chunks_is_cut_off(server, part):
    head = b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert exchange(server.http_port, head + part * 300_000)[0] in (0, 400)


@pytest.mark.parametrize("flood", [b"a: b\r\n", b"x", b"a: "], ids=["many headers", "long name", "long value"])
@pytest.mark.parametrize(
    "where", [b"GET /v2 HTTP/1.1\r\n", b"GET /", b"POST /v2 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"]
)
def test_headers_urls_and_trailers_are_bounded(server, where, flood):
    status, _, _ = exchange(server.http_port, where + flood * (16 * HEADER_BYTES // len(flood)))
    assert status in (0, 400, 404, 405)
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=20) as client, contextlib.suppress(ConnectionError):
        client.sendall(where)
        sent = 0
        while sent < 64 * HEADER_BYTES:
            client.sendall(flood * (HEADER_BYTES // len(flood)))
            sent += HEADER_BYTES
            time.sleep(0.002)
        raise AssertionError("the server took it all")


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 100,
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /%ff%00 HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_malformed_http(server, data):
    assert exchange(server.http_port, data)[0] in (0, 400, 404)
    assert exchange(server.http_port, b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200


@pytest.mark.parametrize("second", ["Transfer-Encoding: chunked", "Content-Length: 3", "Transfer-Encoding: x, chunked"])
def test_two_opinions_on_the_length_are_refused(server, second):
    data = f"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n{second}\r\n\r\n0\r\n\r\n"
    smuggled = "GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    assert exchange(server.http_port, (data + smuggled).encode())[0] in (0, 400)


def test_slow_headers_and_slow_bodies_end():
    with start(Gate(), read_seconds=0.2) as server:
        for beginning in (b"", b"GET /v2 HTTP/1.1\r\nHost:"):
            assert exchange(server.http_port, beginning)[0] == 0
        begun = b"POST /v2/models/gate/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{"
        status, _, text = exchange(server.http_port, begun)
        assert (status, json.loads(text)) == (408, {"error": "the request body took too long to arrive"})


def test_connections_are_bounded():
    with start(Gate(), max_connections=3) as server:
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(socket.create_connection(("127.0.0.1", server.http_port), timeout=20)) for _ in range(3)]
            for client in held:
                client.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
                assert response_of(client)[0] == 200
            assert exchange(server.http_port, b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 0
        until(lambda: exchange(server.http_port, b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200)


def test_bodies_in_flight_are_bounded_together():
    with start(Gate(), max_buffered_bytes=150_000) as server, contextlib.ExitStack() as stack:
        begun = b"POST /v2/models/gate/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n" + b" " * 100_000
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", server.http_port), timeout=20)) for _ in range(2)]
        for client in clients:
            client.sendall(begun)
        refused = []

        def listen(client):
            with contextlib.suppress(OSError):
                refused.append(response_of(client)[0])

        threads = [threading.Thread(target=listen, args=[client]) for client in clients]
        for thread in threads:
            thread.start()
        until(lambda: refused)
        assert refused[0] == 503
        for client in clients:
            client.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        small = post(b"{}", path=PATH)
        until(lambda: exchange(server.http_port, small)[0] == 400)


def test_grpc_messages_are_bounded_and_compression_is_off(rpc, server):
    oversize = bytes(2 << 20)
    assert rpc.refused("ModelInfer", oversize)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    code, _, _ = rpc.refused("ModelInfer", oversize, compression=grpc.Compression.Gzip)
    assert code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNIMPLEMENTED)
    code, _, _ = rpc.refused("ModelInfer", bytes(1000), compression=grpc.Compression.Gzip)
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert rpc("ServerReady").ready


def test_a_small_request_may_not_need_much_memory():
    wide = gm.zoo.mlp([1, 4096, 1])
    with serve(wide, 0, 0, max_working_bytes=32 << 20, block=False) as server:
        url = f"http://127.0.0.1:{server.http_port}/v2/models/model/infer"
        small = httpx.post(url, json={"inputs": [tensor(np.zeros((10, 1)))]})
        assert small.status_code == 200
        large = httpx.post(url, json={"inputs": [tensor(np.zeros((50_000, 1)))]}, timeout=20)
        assert large.status_code == 413
        assert "the server allows 33554432" in large.json()["error"]
        with Rpc(server.grpc_port) as client:
            request = raw_infer(np.zeros((50_000, 1), np.float32), "model")
            assert client.refused("ModelInfer", **request)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(ServingError, match="model 'model' cannot be served: a run of these shapes needs"):
        serve(wide, 0, 0, max_working_bytes=1000, block=False)


@pytest.mark.parametrize(
    "limit",
    [
        {"max_queued": -1},
        {"max_concurrent": 0},
        {"max_request_bytes": 1.5},
        {"max_wait": 0},
        {"max_wait": float("nan")},
        {"max_wait": True},
        {"max_queued": None},
    ],
)
def test_limits_must_be_sane(limit):
    with pytest.raises(ServingError, match=next(iter(limit))):
        Limits(**limit)
