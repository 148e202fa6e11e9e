"""Messages of the gRPC protocol: typed contents or raw contents, never both in one message."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from gristmill.serving import messages
from gristmill.serving.core import Call, Parameters, refuse_parameters
from gristmill.serving.limits import MAX_RANK, MAX_TENSORS
from gristmill.serving.refusal import Reason, Refusal, need
from gristmill.serving.registry import VERSION, Port
from gristmill.serving.tensors import Array, from_raw, to_raw

# The field of InferTensorContents that carries a datatype; FP16 has none and travels raw.
CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


def parse(name: str, data: bytes) -> Any:
    """Return a message of the named kind.

    Raises:
        Refusal: the bytes are no such message, or have more fields than a request can need.
    """
    need(not messages.too_many_fields(data), "malformed message, or too many fields")
    message = messages.make(name)
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise Refusal(Reason.INVALID, "malformed message") from None
    return message


def decode(call: Call, request: Any) -> None:
    """Fill a call from a ModelInferRequest.

    Raises:
        Refusal: anything is malformed or does not fit the model.
    """
    need(len(request.inputs) <= MAX_TENSORS, "too many inputs")
    call.parameterise(_parameters(request.parameters))
    raw = request.raw_input_contents
    need(not raw or len(raw) == len(request.inputs), "raw_input_contents must have one entry for each input")
    for index, tensor in enumerate(request.inputs):
        refuse_parameters(_parameters(tensor.parameters))
        need(len(tensor.shape) <= MAX_RANK, f"more than {MAX_RANK} dimensions")
        shape = list(tensor.shape)
        port = call.expect(tensor.name, tensor.datatype, shape)
        if raw:
            need(not tensor.HasField("contents"), "contents and raw_input_contents must not be mixed")
            data = raw[index]
            call.inputs[port.name] = from_raw(data, 0, len(data), port.dtype, shape, port.name)
        else:
            call.inputs[port.name] = _typed(port, tensor.contents, shape)
    for output in request.outputs:
        refuse_parameters(_parameters(output.parameters))
    call.select([output.name for output in request.outputs])


def _typed(port: Port, contents: Any, shape: list[int]) -> Array:
    wanted = CONTENTS.get(port.datatype)
    need(wanted is not None, f"input '{port.name}': {port.datatype} must be sent in raw_input_contents")
    assert wanted is not None
    others = [field.name for field, _ in contents.ListFields() if field.name != wanted]
    need(not others, f"input '{port.name}': {port.datatype} must be sent in {wanted}")
    values = getattr(contents, wanted)
    count = int(np.prod(shape, dtype=object))
    need(len(values) == count, f"input '{port.name}': {len(values)} elements, its shape has {count}")
    if port.dtype.kind not in "iu" or port.dtype.itemsize >= 4:
        return np.array(values, port.dtype).reshape(shape)
    wide, info = np.array(values, np.int64), np.iinfo(port.dtype)
    fits = not count or (info.min <= wide.min() and wide.max() <= info.max)
    need(bool(fits), f"input '{port.name}': a value is out of range for {port.datatype}")
    return wide.astype(port.dtype).reshape(shape)


def _parameters(given: Any) -> Parameters:
    if not given:
        return {}
    chosen = {key: value.WhichOneof("parameter_choice") for key, value in given.items()}
    return {key: getattr(given[key], choice) if choice else None for key, choice in chosen.items()}


def encode(call: Call, outputs: Mapping[str, Array], request: Any) -> bytes:
    """Return a serialised ModelInferResponse: raw where the request was raw, or where a datatype has no typed field."""
    datatypes = {name: call.hosted.outputs[name].datatype for name in outputs}
    raw = bool(request.raw_input_contents) or any(datatype not in CONTENTS for datatype in datatypes.values())
    response = messages.make("ModelInferResponse", model_name=call.hosted.name, model_version=VERSION, id=request.id)
    for name, array in outputs.items():
        tensor = response.outputs.add(name=name, datatype=datatypes[name], shape=array.shape)
        if raw:
            response.raw_output_contents.append(to_raw(array))
        else:
            getattr(tensor.contents, CONTENTS[datatypes[name]]).extend(array.ravel().tolist())
    data: bytes = response.SerializeToString()
    return data
