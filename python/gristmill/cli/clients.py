"""Real clients of the two servers, for the demo: what a user's program would do."""

from collections.abc import Callable

import numpy as np

from gristmill.errors import MissingExtraError
from gristmill.tensor.parts import Array

Ask = Callable[[], Array]


def ask_rest(port: int, key: str, model: str, x: Array) -> Ask:
    """Return a function that sends x over one kept-alive REST connection and returns the logits, in the binary form."""
    try:
        import httpx
    except ImportError as error:
        raise MissingExtraError("httpx", "demo") from error
    import json

    shape = list(x.shape)
    described = {"name": "x", "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": x.nbytes}}
    header = json.dumps({"inputs": [described], "parameters": {"binary_data_output": True}}).encode()
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {key}"}, timeout=10)
    length = {"Inference-Header-Content-Length": str(len(header))}

    def ask() -> Array:
        response = client.post(f"/v2/models/{model}/infer", content=header + x.tobytes(), headers=length)
        response.raise_for_status()
        split = int(response.headers["Inference-Header-Content-Length"])
        output = json.loads(response.content[:split])["outputs"][0]
        return np.frombuffer(response.content[split:], np.float32).reshape(output["shape"])

    return ask


def ask_grpc(port: int, key: str, model: str, x: Array) -> Ask:
    """Return a function that sends x over one gRPC channel and returns the logits."""
    try:
        import grpc  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError("grpcio", "serve") from error
    from gristmill.serving.messages import CLASSES, make

    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    call = channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=CLASSES["ModelInferResponse"].FromString,
    )
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape)}
    request = make("ModelInferRequest", model_name=model, inputs=[tensor], raw_input_contents=[x.tobytes()])

    def ask() -> Array:
        answer = call(request, metadata=[("authorization", f"Bearer {key}")], timeout=10)
        return np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(list(answer.outputs[0].shape))

    return ask
