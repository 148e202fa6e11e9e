"""Model to ONNX: our own operators in standard ones, in the oldest opset from 23 that has all of them."""

import json
import os
from collections.abc import Sequence
from typing import Any

from gristmill.errors import FormatError, MissingExtraError
from gristmill.formats.atomic import replacing
from gristmill.formats.onnx.expand import Unknown, Writer
from gristmill.formats.onnx.foreign import DTYPES, schema_of
from gristmill.formats.onnx.tensors import CODES, to_proto
from gristmill.formats.onnx.upgrade import NEWEST
from gristmill.model import Model
from gristmill.ops import Node, TensorType

OLDEST = 23
LIMIT = 2**31 - 2**20  # bytes that protobuf can hold


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write a model as an ONNX file, whole or not at all, after the checker of the onnx package has passed it.

    Raises:
        FormatError: the model has operators or types that standard ONNX lacks: the message names all; or it takes over 2 GB.
        MissingExtraError: the packages of the extra `onnx` are not installed.
        OSError: the folder is missing or cannot be written, or the disk is full.
    """
    data = to_proto_model(model).SerializeToString()
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def to_proto_model(model: Model) -> Any:
    """Return the ModelProto of a model.

    Raises:
        FormatError: as `save`.
    """
    try:
        from onnx import checker, shape_inference
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "onnx") from error
    if model.nbytes > LIMIT:
        raise FormatError(f"its tensors take {model.nbytes} bytes, more than an ONNX file can hold; save it as .safetensors")
    written = Writer(model.types, model.tensors)
    _write(model, written)
    refusal = ""
    for opset in range(_opset(written.nodes), NEWEST + 1):  # a later one may allow more dtypes
        proto = _proto(model, written, opset)
        try:
            if not all(model.types[name].known for name in model.outputs):
                proto = _completed(proto)
            checker.check_model(proto, full_check=True)
        except (checker.ValidationError, shape_inference.InferenceError) as error:
            refusal = refusal or str(error)
        else:
            return proto
    raise FormatError(f"the onnx checker refuses the model: {refusal}")


def _proto(model: Model, written: Writer, opset: int) -> Any:
    from onnx import helper

    graph = helper.make_graph(
        [_node(node, opset, index) for index, node in enumerate(written.nodes)],
        "gristmill",
        [_value(name, kind) for name, kind in model.inputs.items()],
        [_value(name, model.types[name]) for name in model.outputs],
        [to_proto(name, array) for name, array in written.tensors.items()],
    )
    imports = [helper.make_opsetid("", opset)]
    version = helper.find_min_ir_version_for(imports)
    proto = helper.make_model(graph, producer_name="gristmill", opset_imports=imports, ir_version=version)
    if model.meta:
        helper.set_model_props(proto, {"gristmill": json.dumps(dict(model.meta), default=str)})
    return proto


def _completed(proto: Any) -> Any:
    """Give outputs whose type depends on values the type that the standard's rules infer."""
    from onnx import shape_inference

    proto = shape_inference.infer_shapes(proto)
    lacking = [value.name for value in proto.graph.output if not value.type.tensor_type.HasField("shape")]
    if lacking:
        raise FormatError(f"the rank of outputs {lacking} depends on values; ONNX files must say it")
    return proto


def _write(model: Model, written: Writer) -> None:
    lacking: dict[str, list[str]] = {}
    for node in model.nodes:
        try:
            written.write(node)
        except Unknown:
            lacking.setdefault(f"{node.domain}::{node.op}", []).append(node.name)
    if lacking:
        rows = [f"{op}: {len(names)} ({', '.join(names[:5])})" for op, names in sorted(lacking.items())]
        raise FormatError("ONNX has no form of " + "; ".join(rows))
    for name in model.outputs:
        if name in model.tensors:
            written.tensor(name)


def _opset(nodes: Sequence[Node]) -> int:
    """Return the oldest opset that knows every operator in the form that it has."""
    unknown: set[str] = set()
    for opset in range(OLDEST, NEWEST + 1):
        unknown = {node.op for node in nodes if not _fits(node, opset)}
        if not unknown:
            return opset
    raise FormatError(f"opset {NEWEST} has no {', '.join(sorted(unknown))} of this form")


def _fits(node: Node, opset: int) -> bool:
    schema = schema_of(node.op, node.domain, opset)
    return schema is not None and not schema.deprecated and all(key in schema.attributes for key in node.attributes)


def _node(node: Node, opset: int, index: int) -> Any:
    from onnx import helper

    schema = schema_of(node.op, node.domain, opset)
    proto = helper.make_node(node.op, node.inputs, node.outputs, name=f"{node.op}_{index}")
    for key, value in node.attributes.items():
        code = CODES.get(value) if key in DTYPES and isinstance(value, str) else None
        kind = schema.attributes[key].type.value
        proto.attribute.append(helper.make_attribute(key, value if code is None else code, attr_type=kind))
    return proto


def _value(name: str, kind: TensorType) -> Any:
    from onnx import helper

    if not kind.known:
        return helper.make_empty_tensor_value_info(name)
    if kind.dtype.name not in CODES:
        raise FormatError(f"'{name}' has dtype {kind.dtype}, which ONNX files do not have")
    return helper.make_tensor_value_info(name, CODES[kind.dtype.name], list(kind.shape))
