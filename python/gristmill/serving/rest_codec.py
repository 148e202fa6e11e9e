"""Bodies of the REST protocol: JSON with tensors inside, or JSON followed by raw tensors (the binary extension)."""

import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any

import msgspec
import numpy as np

from gristmill.serving.core import Call, Parameters, refuse_parameters
from gristmill.serving.limits import MAX_DEPTH, MAX_KEYS, MAX_OBJECTS, MAX_PARAMETERS_BYTES, MAX_RANK, MAX_TENSORS
from gristmill.serving.refusal import need
from gristmill.serving.registry import VERSION, Port
from gristmill.serving.tensors import Array, from_raw, to_raw

HEADER_LENGTH = "inference-header-content-length"
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
NESTED = re.compile(rb"\[\s*\[")
NOTHING = msgspec.Raw(b"")
NO_PARAMETERS = msgspec.Raw(b"{}")


class InputTensor(msgspec.Struct):
    name: str
    datatype: str
    shape: Annotated[list[int], msgspec.Meta(max_length=MAX_RANK)]
    parameters: msgspec.Raw = NO_PARAMETERS
    data: msgspec.Raw = NOTHING


class RequestedOutput(msgspec.Struct):
    name: str
    parameters: msgspec.Raw = NO_PARAMETERS


class Body(msgspec.Struct):
    inputs: Annotated[list[InputTensor], msgspec.Meta(max_length=MAX_TENSORS)]
    outputs: Annotated[list[RequestedOutput], msgspec.Meta(max_length=MAX_TENSORS)] | None = None
    id: str | None = None
    parameters: msgspec.Raw = NO_PARAMETERS


class Encoding:
    """How the answer is to be written: the request's id, and which outputs are wanted as raw bytes."""

    def __init__(self, id: str | None = None, binary: frozenset[str] = frozenset()) -> None:
        self.id = id
        self.binary = binary


BODY = msgspec.json.Decoder(Body)
PARAMETERS = msgspec.json.Decoder(dict[str, bool | int | float | str | None])
ENCODER = msgspec.json.Encoder()


def decode(call: Call, body: bytes, header_length: str | None) -> Encoding:
    """Fill a call from a request body.

    Args:
        call: of the model that the address names.
        body: the whole body.
        header_length: the Inference-Header-Content-Length header: bytes of JSON, or "0" where the body is one raw tensor.

    Raises:
        Refusal: anything is malformed or does not fit the model.
        msgspec.MsgspecError, UnicodeDecodeError, RecursionError: it is not JSON of the protocol's form.
    """
    if header_length is None:
        return _decode(call, body, body, None)
    plain = header_length.isascii() and header_length.isdigit() and len(header_length) <= 12
    need(plain and int(header_length) <= len(body), "Inference-Header-Content-Length does not fit the body")
    length = int(header_length)
    return _decode(call, body[:length], body, length) if length else _decode_lone(call, body)


def _decode(call: Call, text: bytes, body: bytes, offset: int | None) -> Encoding:
    _check_envelope(text)
    request = BODY.decode(text)
    parameters = _parameters(request.parameters)
    call.parameterise(parameters)
    for tensor in request.inputs:
        nbytes = _flag(_parameters(tensor.parameters), "binary_data_size", int, None)
        port = call.expect(tensor.name, tensor.datatype, tensor.shape)
        if nbytes is None:
            call.inputs[tensor.name] = _from_json(port, tensor)
            continue
        fits = offset is not None and 0 <= nbytes <= len(body) - offset and not bytes(tensor.data)
        need(fits, f"input '{tensor.name}': binary_data_size does not fit the body")
        assert offset is not None
        call.inputs[tensor.name] = from_raw(body, offset, nbytes, port.dtype, tensor.shape, tensor.name)
        offset += nbytes
    need(offset is None or offset == len(body), "the body is longer than its tensors")
    return _outputs(call, request, parameters)


def _decode_lone(call: Call, body: bytes) -> Encoding:
    """A body that is one raw tensor, for a model with one input; every dimension that may vary is taken as 1."""
    need(len(call.hosted.inputs) == 1, "a body without JSON needs a model with one input")
    (port,) = call.hosted.inputs.values()
    shape = [1 if isinstance(dim, str) else dim for dim in port.shape]
    call.expect(port.name, port.datatype, shape)
    call.inputs[port.name] = from_raw(body, 0, len(body), port.dtype, shape, port.name)
    return Encoding(None, frozenset(call.outputs))


def _outputs(call: Call, request: Body, parameters: Parameters) -> Encoding:
    default = _flag(parameters, "binary_data_output", bool, False)
    binary = set(call.outputs) if default else set()
    if request.outputs:
        call.select([output.name for output in request.outputs])
        wanted = {output.name: _parameters(output.parameters) for output in request.outputs}
        binary = {name for name, given in wanted.items() if _flag(given, "binary_data", bool, default)}
    return Encoding(request.id, frozenset(binary))


def _check_envelope(text: bytes) -> None:
    """Bound what a parser may be made to build, before it builds anything."""
    opened = text.count(b"{")
    need(opened <= MAX_OBJECTS and text.count(b":") <= MAX_KEYS, "the request has too many objects or keys")
    if opened + text.count(b"[") <= MAX_DEPTH:
        return
    need(text.count(b'"') <= 4 * MAX_KEYS, "the request has too many strings")
    unescaped = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = b"".join(unescaped.split(b'"')[::2]).translate(None, NOT_BRACKETS)
    # Bit 2 tells the closing brackets (0x5d, 0x7d) from the opening ones (0x5b, 0x7b).
    steps = 1 - (np.frombuffer(brackets, np.uint8) & 4).astype(np.int8) // 2
    need(int(np.cumsum(steps, dtype=np.int64).max(initial=0)) <= MAX_DEPTH, "the request is nested too deeply")


def _parameters(raw: msgspec.Raw) -> dict[str, bool | int | float | str | None]:
    if raw is NO_PARAMETERS:
        return {}
    text = bytes(raw)
    need(len(text) <= MAX_PARAMETERS_BYTES, "parameters are too large")
    given = PARAMETERS.decode(text)
    refuse_parameters(given)
    return given


def _flag(parameters: Parameters, name: str, kind: type, default: Any) -> Any:
    value = parameters.get(name, default)
    need(value is default or type(value) is kind, f"parameter '{name}' must be of type {kind.__name__}")
    return value


# ---- tensors in JSON ----


def _from_json(port: Port, tensor: InputTensor) -> Array:
    text, shape, dtype = bytes(tensor.data).strip(), tensor.shape, port.dtype
    need(bool(text), f"input '{port.name}' has no data")
    count = math.prod(shape)
    message = f"input '{port.name}': data does not fit shape and datatype"
    if not count:
        # Nothing but brackets may be there; to parse it would be to let it grow.
        need(not text.translate(None, b"[], \t\r\n"), message)
        return np.zeros(shape, dtype)
    # One comma fewer than elements, flat or nested: known before the elements take memory.
    need(text.count(b",") == count - 1, message)
    depth = max(1, len(shape)) if NESTED.match(text) else 1
    array = _as_array(_decoder(_element(dtype), depth).decode(text), dtype)
    need(array is not None and (list(array.shape) == shape if depth > 1 else array.size == count), message)
    assert array is not None
    return array.reshape(shape)


def _as_array(values: list[Any], dtype: np.dtype[Any]) -> Array | None:
    try:
        with np.errstate(over="ignore"):  # a number beyond the datatype's range is an infinity, which is data
            return np.array(values, dtype)
    except (ValueError, OverflowError):  # rows of unequal length, or an integer beyond 64 bits
        return None


def _element(dtype: np.dtype[Any]) -> Any:
    if dtype == np.bool_:
        return bool
    if dtype.kind == "f":
        return float
    info = np.iinfo(dtype)
    # The decoder's bounds are int64 themselves; NumPy raises OverflowError for what is left.
    top = None if info.max >= 1 << 63 else int(info.max)
    return Annotated[int, msgspec.Meta(ge=int(info.min), le=top)]


@cache
def _decoder(element: Any, depth: int) -> "msgspec.json.Decoder[Any]":
    kind = element
    for _ in range(depth):
        kind = list.__class_getitem__(kind)
    return msgspec.json.Decoder(kind)


# ---- answers ----


def encode(call: Call, outputs: Mapping[str, Array], encoding: Encoding) -> tuple[bytes, int | None]:
    """Return a response body and the length of its JSON where raw tensors follow it.

    A NaN or infinity in a JSON tensor is written as null, because JSON has no word for it; raw tensors carry it as it is.
    """
    described, raw = [], []
    for name, array in outputs.items():
        tensor: dict[str, Any] = {
            "name": name,
            "datatype": call.hosted.outputs[name].datatype,
            "shape": list(array.shape),
        }
        if name in encoding.binary:
            raw.append(to_raw(array))
            tensor["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            tensor["data"] = array.ravel().tolist()
        described.append(tensor)
    answer: dict[str, Any] = {"model_name": call.hosted.name, "model_version": VERSION}
    if encoding.id is not None:
        answer["id"] = encoding.id
    answer["outputs"] = described
    text = ENCODER.encode(answer)
    return (b"".join([text, *raw]), len(text)) if encoding.binary else (text, None)


def describe(ports: Iterable[Port]) -> list[dict[str, Any]]:
    """Inputs or outputs as metadata."""
    return [{"name": port.name, "datatype": port.datatype, "shape": port.wire_shape} for port in ports]
