"""What the tests ask servers with: protocol messages, raw sockets, certificates, and models that echo or wait."""

import contextlib
import datetime
import ipaddress
import socket
import threading

import grpc
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gristmill.serving import messages
from gristmill.serving.limits import Limits
from gristmill.serving.registry import HostedModel, Port, Registry
from gristmill.serving.server import Server
from gristmill.serving.tensors import DTYPES

METHODS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")


class Rpc:
    """Calls by name; keyword arguments are the fields of the request."""

    def __init__(self, port, credentials=None, options=(), host="127.0.0.1"):
        target = f"{host}:{port}"
        options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1), *options]
        if credentials is None:
            self.channel = grpc.insecure_channel(target, options=options)
        else:
            self.channel = grpc.secure_channel(target, credentials, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()

    def method(self, name):
        return self.channel.unary_unary(
            f"/inference.GRPCInferenceService/{name}",
            request_serializer=lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
            response_deserializer=messages.CLASSES[f"{name}Response"].FromString if name in METHODS else None,
        )

    def __call__(self, name, data=None, /, metadata=None, timeout=20, compression=None, **fields):
        request = messages.make(f"{name}Request", **fields) if data is None else data
        return self.method(name)(request, metadata=metadata, timeout=timeout, compression=compression)

    def refused(self, name, data=None, /, **given):
        """Return (status code, details, trailing metadata) of a call that must fail."""
        try:
            self(name, data, **given)
        except grpc.RpcError as error:
            return error.code(), error.details(), dict(error.trailing_metadata() or ())
        raise AssertionError(f"{name} succeeded")


def tensor(array, name="x", datatype="FP32", **more):
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": array.ravel().tolist(), **more}


def raw_infer(array, model="digits", **more):
    inputs = [{"name": "x", "datatype": "FP32", "shape": array.shape}]
    return {"model_name": model, "inputs": inputs, "raw_input_contents": [array.tobytes()], **more}


def gate_request(number):
    return messages.make("ModelInferRequest", **raw_infer(np.array([number], np.float32), "gate"))


def exchange(port, data, timeout=20.0):
    """Send bytes to a port and return (status, header bytes, body) of what comes back; status 0 if the connection just ends."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as client:
        # The server may answer before it has read everything.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(data)
        return response_of(client)


def response_of(client):
    answer = b""
    while b"\r\n\r\n" not in answer:
        try:
            more = client.recv(65536)
        except ConnectionResetError:
            more = b""
        if not more:
            return 0, answer, b""
        answer += more
    head, _, body = answer.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    while len(body) < length:
        body += client.recv(65536)
    return int(head.split()[1]), head.lower(), body


def post(body, *headers, path="/v2/models/digits/infer"):
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def make_certificate(folder):
    """Write a self-signed certificate of 127.0.0.1 and localhost and its key; return both file names."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    chain, private = folder / "cert.pem", folder / "key.pem"
    chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return str(chain), str(private)


class Echo(HostedModel):
    """A model of one [n, 2] input and output of every datatype, which returns its inputs."""

    def __init__(self, name="echo", datatypes=tuple(DTYPES)):
        self.name = name
        self.inputs = {d.lower(): Port(d.lower(), d, DTYPES[d], ("n", 2)) for d in datatypes}
        self.outputs = dict(self.inputs)

    def run(self, inputs):
        return {name: np.array(array) for name, array in inputs.items()}


class Gate(HostedModel):
    """An echo of `x` float32 [n] that waits until it is opened and remembers what ran."""

    def __init__(self, name="gate"):
        self.name = name
        self.inputs = {"x": Port("x", "FP32", DTYPES["FP32"], ("n",))}
        self.outputs = {"y": Port("y", "FP32", DTYPES["FP32"], ("n",))}
        self.opened, self.ran, self.entered = threading.Event(), [], threading.Semaphore(0)

    def run(self, inputs):
        self.ran.append(float(inputs["x"][0]))
        self.entered.release()
        assert self.opened.wait(30)
        return {"y": inputs["x"]}


def start(hosted, grace=10.0, notice=0.0, http_port=0, grpc_port=0, **limits):
    """Start a server of one hosted stand-in."""
    registry = Registry({hosted.name: hosted})
    return Server(registry, Limits(**limits), "127.0.0.1", http_port, grpc_port, None, None, grace, notice).start()
