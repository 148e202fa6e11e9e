"""One server for all tests that do not need a particular one."""

import numpy as np
import pytest
from serving_clients import Rpc

import gristmill as gm
from gristmill.serving import serve


@pytest.fixture(scope="session")
def model():
    return gm.zoo.mlp([64, 32, 10], seed=3)


@pytest.fixture(scope="session")
def image():
    return np.random.default_rng(0).random((1, 64), np.float32)


@pytest.fixture(scope="session")
def server(model):
    with serve({"digits": model}, http_port=0, grpc_port=0, max_request_bytes=1 << 20, block=False) as running:
        yield running


@pytest.fixture(scope="session")
def http(server):
    import httpx

    with httpx.Client(base_url=f"http://127.0.0.1:{server.http_port}", timeout=20) as client:
        yield client


@pytest.fixture(scope="session")
def rpc(server):
    with Rpc(server.grpc_port) as client:
        yield client
