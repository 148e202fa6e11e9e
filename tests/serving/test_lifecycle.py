"""Starting, stopping and failing to start."""

import asyncio
import concurrent.futures
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import httpx
import numpy as np
import pytest
from serving_clients import Gate, Rpc, exchange, gate_request, post, start
from test_overload import PATH, ask, body, until

import gristmill as gm
from gristmill.errors import MissingExtraError
from gristmill.serving import Server, ServingError, serve, server


@pytest.fixture
def tiny():
    return gm.zoo.mlp([2, 2])


def listening(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def ours():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("gristmill") and thread.is_alive()]


def test_ports_and_context(tiny):
    with serve(tiny, http_port=0, grpc_port=0, block=False) as running:
        assert isinstance(running, Server)
        assert running.http_port != running.grpc_port
        assert httpx.get(f"http://127.0.0.1:{running.http_port}/v2/models").json() == {"models": ["model"]}
        assert str(running.http_port) in repr(running)
    assert not listening(running.http_port)
    assert not listening(running.grpc_port)
    running.stop()
    running.stop(0)


@pytest.mark.parametrize("absent", ["http_port", "grpc_port"])
def test_either_protocol_alone(tiny, absent):
    with serve(tiny, **{"http_port": 0, "grpc_port": 0, absent: None}, block=False) as running:
        assert getattr(running, absent) is None
        if absent == "http_port":
            with Rpc(running.grpc_port) as client:
                assert client("ServerReady").ready
        else:
            assert httpx.get(f"http://127.0.0.1:{running.http_port}/v2/health/ready").status_code == 200


@pytest.mark.parametrize(("http", "grpc"), [(None, None), (-1, 0), (0, 65536), ("80", 0), (True, 0), (9000, 9000), (0, 1.0)])
def test_bad_ports(tiny, http, grpc):
    with pytest.raises(ServingError, match="port"):
        serve(tiny, http_port=http, grpc_port=grpc, block=False)


def test_ipv6(tiny):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with serve(tiny, 0, 0, host="::1", block=False) as running:
        assert httpx.get(f"http://[::1]:{running.http_port}/v2/health/ready").status_code == 200
        with Rpc(running.grpc_port, host="[::1]") as client:
            assert client("ServerReady").ready


def test_a_host_of_another_machine(tiny):
    with pytest.raises(ServingError, match="cannot be"):
        serve(tiny, 0, 0, host="host.invalid", insecure=True, block=False)
    with pytest.raises(ServingError, match=r"cannot be bound on 192\.0\.2\.1"):
        serve(tiny, 0, 0, host="192.0.2.1", insecure=True, block=False)


def test_a_port_in_use_is_named_and_nothing_stays_open(tiny):
    before = ours()
    with serve(tiny, 0, 0, block=False) as first:
        with pytest.raises(ServingError, match=f"HTTP port {first.http_port} cannot be bound"):
            serve(tiny, first.http_port, 0, block=False)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            free = probe.getsockname()[1]
        # Also when the other is a gRPC server: they must not share the port.
        with pytest.raises(ServingError, match=f"gRPC port {first.grpc_port} cannot be bound"):
            serve(tiny, free, first.grpc_port, block=False)
        assert not listening(free)
    assert ours() == before


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a b", "-a", ".a", "a\n", "\u00e4", "a" * 129, 5])
def test_model_names_are_strict_tokens(tiny, name):
    with pytest.raises(ServingError, match="model name"):
        serve({name: tiny}, 0, 0, block=False)


@pytest.mark.parametrize("models", [{}, None, [1], "model.safetensors"])
def test_no_models(models):
    with pytest.raises(ServingError, match="models must be"):
        serve(models, 0, 0, block=False)


def test_models_from_files_and_several_at_once(tiny, tmp_path, image):
    other = gm.zoo.mlp([64, 10], seed=5)
    gm.save(other, tmp_path / "other.safetensors")
    with serve({"tiny-1.0": tiny, "other": tmp_path / "other.safetensors"}, 0, None, block=False) as running:
        assert httpx.get(f"http://127.0.0.1:{running.http_port}/v2/models").json() == {"models": ["other", "tiny-1.0"]}
        request = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": image.tolist()}]}
        answer = httpx.post(f"http://127.0.0.1:{running.http_port}/v2/models/other/infer", json=request).json()
        assert np.array_equal(np.array(answer["outputs"][0]["data"], np.float32), other.run(x=image)["logits"][0])


def test_absent_packages_are_named(tiny, monkeypatch):
    monkeypatch.setitem(server.HTTP_PACKAGES, "no_such_package.inner", "no-such-package")
    with pytest.raises(MissingExtraError, match=r"no-such-package.*gristmill\[serve\]"):
        serve(tiny, 0, None, block=False)
    serve(tiny, None, 0, block=False).stop()


def test_importing_the_package_needs_no_extra():
    names = "starlette", "uvicorn", "grpc", "msgspec", "google.protobuf"
    code = f"import sys; import gristmill.serving; print([n for n in {names} if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---- stopping ----


def test_requests_in_flight_finish_and_new_ones_are_not_taken():
    before = ours()
    gate = Gate()
    running = start(gate, grace=20, max_queued=4)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        rest = pool.submit(ask, running.http_port, 1)
        assert gate.entered.acquire(timeout=20)
        queued = pool.submit(ask, running.http_port, 2)
        with Rpc(running.grpc_port) as client:
            remote = client.method("ModelInfer").future(gate_request(3), timeout=20)
            until(lambda: running._core.dispatcher.queued == 2)
            stopping = pool.submit(running.stop)
            until(lambda: not listening(running.http_port))
            assert not stopping.done()
            gate.opened.set()
            assert rest.result(20)[0] == 200
            assert b"connection: close" in rest.result()[1]
            assert queued.result(20)[0] == 200
            assert remote.result(20).model_name == "gate"
        stopping.result(20)
    assert sorted(gate.ran) == [1, 2, 3]
    assert ours() == before


def test_what_outlasts_the_grace_period_is_cancelled(caplog):
    gate = Gate()
    running = start(gate, grace=0.2)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        rest = pool.submit(ask, running.http_port, 1)
        assert gate.entered.acquire(timeout=20)
        queued = pool.submit(ask, running.http_port, 2)
        until(lambda: running._core.dispatcher.queued == 1)
        running.stop()
        assert "1 runs outlast the grace period" in caplog.text
        assert rest.result(20)[0] in (0, 500)
        assert queued.result(20)[0] in (0, 500)
    gate.opened.set()
    until(lambda: not ours())
    assert gate.ran == [1]


def test_readiness_turns_false_before_the_ports_close():
    gate = Gate()
    with start(gate, notice=1.0) as running, concurrent.futures.ThreadPoolExecutor(1) as pool:
        ready = f"http://127.0.0.1:{running.http_port}/v2/health/ready"
        assert httpx.get(ready).status_code == 200
        stopping = pool.submit(running.stop)
        until(lambda: httpx.get(ready).status_code == 503)
        assert httpx.get(ready).json() == {"ready": False, "live": True}
        assert httpx.get(ready.replace("ready", "live")).status_code == 200
        assert httpx.get(f"http://127.0.0.1:{running.http_port}/v2/models/gate/ready").status_code == 503
        with Rpc(running.grpc_port) as client:
            assert not client("ServerReady").ready
            assert not client("ModelReady", name="gate").ready
            assert client("ServerLive").live
        gate.opened.set()
        assert exchange(running.http_port, post(body(7), path=PATH))[0] == 200
        stopping.result(20)


def test_stop_during_load(model, image):
    with serve({"digits": model}, 0, 0, block=False) as running:
        url = f"http://127.0.0.1:{running.http_port}/v2/models/digits/infer"
        content = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": image.tolist()}]}
        done, started = [], threading.Semaphore(0)

        def load():
            with httpx.Client() as client:
                while True:
                    try:
                        done.append(client.post(url, json=content).status_code)
                        started.release()
                    except httpx.TransportError:
                        return

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(40):
            assert started.acquire(timeout=20)
        running.stop()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
    assert set(done) == {200}


def test_many_servers_one_after_another_leave_nothing(tiny):
    def count():
        return len(ours()), len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    serve(tiny, 0, 0, block=False).stop()
    threads, files = count()
    for _ in range(5):
        serve(tiny, 0, 0, block=False).stop()
    assert count()[0] == threads
    assert count()[1] <= files + 2


def test_two_servers_at_once_and_from_a_running_loop(tiny):
    async def main():
        with serve(tiny, 0, 0, block=False) as first, serve(tiny, 0, 0, block=False) as second:
            async with httpx.AsyncClient() as client:
                for running in (first, second):
                    assert (await client.get(f"http://127.0.0.1:{running.http_port}/v2/health/ready")).status_code == 200

    asyncio.run(main())


SCRIPT = """
import sys, threading
import gristmill as gm
from gristmill.serving import serve, server
original = server.Server.start
def start(self):
    original(self)
    print(self.http_port, self.grpc_port, flush=True)
    return self
server.Server.start = start
serve(gm.zoo.mlp([2, 2]), 0, 0, grace=float(sys.argv[1]))
print("stopped", flush=True)
"""


def launch(grace):
    source = str(pathlib.Path(gm.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(grace)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    http, _ = map(int, process.stdout.readline().split())
    assert httpx.get(f"http://127.0.0.1:{http}/v2/health/ready").status_code == 200
    return process, http


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_drain_and_return(number):
    process, _ = launch(10)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "stopped\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_second_signal_waits_no_longer():
    process, http = launch(300)
    with socket.create_connection(("127.0.0.1", http)) as client:
        client.sendall(b"POST /v2/models/model/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n{")
        client.recv(100)  # the invitation to go on: the request is under way
        process.send_signal(signal.SIGINT)
        until(lambda: not listening(http))
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert out == "stopped\n"


def test_blocking_off_the_main_thread_ends_with_stop(tiny, monkeypatch):
    made = []
    original = Server.start
    monkeypatch.setattr(Server, "start", lambda self: made.append(original(self)) or self)
    thread = threading.Thread(target=serve, args=(tiny, 0, 0))
    thread.start()
    until(lambda: made)
    made[0].stop()
    thread.join(20)
    assert not thread.is_alive()
