"""The gRPC messages, described at run time: no generated files, and no clash with another library's copy of the protocol.

Source: the Open Inference Protocol, version 2, `grpc_predict_v2.proto`, package `inference`.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]

PACKAGE = "inference"
SERVICE = "GRPCInferenceService"
MAX_FIELDS = 8192  # of one request, at its top level

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bool": _Field.TYPE_BOOL,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "uint32": _Field.TYPE_UINT32,
    "uint64": _Field.TYPE_UINT64,
    "float": _Field.TYPE_FLOAT,
    "double": _Field.TYPE_DOUBLE,
    "string": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
}
_TENSOR_METADATA = "name=1:string datatype=2:string shape=3:int64*"
_TENSOR = "name=1:string datatype=2:string shape=3:int64* parameters=4:map contents=5:InferTensorContents"
# Fields are name=number:type; * repeats, and `map` maps a string to an InferParameter.
_MESSAGES = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live=1:bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready=1:bool",
    "ModelReadyRequest": "name=1:string version=2:string",
    "ModelReadyResponse": "ready=1:bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name=1:string version=2:string extensions=3:string*",
    "ModelMetadataRequest": "name=1:string version=2:string",
    "ModelMetadataResponse.TensorMetadata": _TENSOR_METADATA,
    "ModelMetadataResponse": "name=1:string versions=2:string* platform=3:string"
    " inputs=4:ModelMetadataResponse.TensorMetadata* outputs=5:ModelMetadataResponse.TensorMetadata*",
    "InferParameter": "bool_param=1:bool int64_param=2:int64 string_param=3:string double_param=4:double uint64_param=5:uint64",
    "InferTensorContents": "bool_contents=1:bool* int_contents=2:int32* int64_contents=3:int64* uint_contents=4:uint32*"
    " uint64_contents=5:uint64* fp32_contents=6:float* fp64_contents=7:double* bytes_contents=8:bytes*",
    "ModelInferRequest.InferInputTensor": _TENSOR,
    "ModelInferRequest.InferRequestedOutputTensor": "name=1:string parameters=2:map",
    "ModelInferRequest": "model_name=1:string model_version=2:string id=3:string parameters=4:map"
    " inputs=5:ModelInferRequest.InferInputTensor* outputs=6:ModelInferRequest.InferRequestedOutputTensor*"
    " raw_input_contents=7:bytes*",
    "ModelInferResponse.InferOutputTensor": _TENSOR,
    "ModelInferResponse": "model_name=1:string model_version=2:string id=3:string parameters=4:map"
    " outputs=5:ModelInferResponse.InferOutputTensor* raw_output_contents=6:bytes*",
}


def _message(parent: Any, name: str, fields: str) -> Any:
    """Append a message to a file or to another message."""
    message = (parent.message_type if isinstance(parent, descriptor_pb2.FileDescriptorProto) else parent.nested_type).add(
        name=name
    )
    if name == "InferParameter":
        message.oneof_decl.add(name="parameter_choice")
    for text in fields.split():
        label, _, kind = text.partition(":")
        key, _, number = label.partition("=")
        repeated = kind.endswith("*") or kind == "map"
        field = message.field.add(
            name=key, number=int(number), label=_Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
        )
        _type(message, field, kind.rstrip("*"))
    return message


def _type(message: Any, field: Any, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
        if message.name == "InferParameter":
            field.oneof_index = 0
        return
    field.type = _Field.TYPE_MESSAGE
    field.type_name = f".{PACKAGE}.{kind}"
    if kind == "map":
        entry = _message(message, "ParametersEntry", "key=1:string value=2:InferParameter")
        entry.options.map_entry = True
        # The full name is only known to the descriptor pool, which looks outwards from the field's own scope.
        field.type_name = "ParametersEntry"


def _build() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="gristmill/grpc_predict_v2.proto", package=PACKAGE, syntax="proto3")
    made: dict[str, Any] = {}
    for name in sorted(_MESSAGES, key=lambda key: key.count(".")):
        outer, _, inner = name.rpartition(".")
        made[name] = _message(made[outer] if outer else file, inner, _MESSAGES[name])
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file) if hasattr(pool, "Add") else pool.AddSerializedFile(file.SerializeToString())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in _MESSAGES}


CLASSES = _build()  # message classes by name


def make(name: str, /, **fields: Any) -> Any:
    """Return a new message of the protocol.

    Example:
        >>> make("ModelReadyRequest", name="digits").SerializeToString()
        b'\\n\\x06digits'
    """
    return CLASSES[name](**fields)


def too_many_fields(data: bytes, most: int = MAX_FIELDS) -> bool:
    """Say whether a serialised message has more than `most` fields at its top level, or is not a message at all.

    Two bytes on the wire can stand for an empty message that takes a hundred in memory, so they are counted before parsing.
    """
    place = 0
    for _ in range(most + 1):
        if place == len(data):
            return False
        tag, place = _varint(data, place)
        wire = tag & 7
        if wire == 0:
            _, place = _varint(data, place)
        elif wire == 2:
            size, place = _varint(data, place)
            place += size
        elif wire in (1, 5):
            place += 8 if wire == 1 else 4
        else:
            return True  # groups are not part of the protocol
        if place > len(data):
            return True
    return True


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Return a number and the place after it; a place past the end if it is cut short or too long."""
    value = shift = 0
    while place < len(data) and shift < 70:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80:
            return value, place
        shift += 7
    return 0, len(data) + 1
