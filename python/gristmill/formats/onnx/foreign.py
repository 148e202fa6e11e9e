"""A node as a file has it: attributes as Python values, held against the operator's schema of the file's opset."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from gristmill.errors import FormatError
from gristmill.formats.onnx.tensors import Folder, dtype_name, to_array
from gristmill.tensor.parts import Array

ITEMS = 1 << 20  # of one list attribute
FLOAT, INT, STRING, TENSOR, GRAPH, FLOATS, INTS, STRINGS = 1, 2, 3, 4, 5, 6, 7, 8
FIELDS = {FLOAT: "f", INT: "i", STRING: "s", TENSOR: "t", GRAPH: "g", FLOATS: "floats", INTS: "ints", STRINGS: "strings"}
LISTS = {9: "tensors", 10: "graphs", 11: "sparse_tensor", 12: "sparse_tensors", 13: "tp", 14: "type_protos"}
# Attributes that hold a TensorProto.DataType; a model has the dtype's name.
DTYPES = {"to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision", "precision"}


class Unsupported(Exception):
    """A node that cannot be taken over; the text says what it lacks."""


@dataclass(frozen=True)
class Foreign:
    """A node of a file. Inputs are names of values of the graph that is built; outputs are names of the file, as hints."""

    op: str
    domain: str
    version: int  # of the opset that gives it meaning
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)

    def input(self, index: int) -> str:
        return self.inputs[index] if index < len(self.inputs) else ""

    def get(self, key: str, default: Any = None) -> Any:
        return self.attributes.get(key, default)

    def having(self, **attributes: Any) -> "Foreign":
        """Return a copy with some attributes set, or dropped where None."""
        merged = {key: value for key, value in {**self.attributes, **attributes}.items() if value is not None}
        return Foreign(self.op, self.domain, self.version, self.name, self.inputs, self.outputs, merged)

    def taking(self, *inputs: str) -> "Foreign":
        """Return a copy with other inputs."""
        return Foreign(self.op, self.domain, self.version, self.name, inputs, self.outputs, self.attributes)

    def renamed(self, op: str) -> "Foreign":
        """Return a copy of another operator."""
        return Foreign(op, self.domain, self.version, self.name, self.inputs, self.outputs, self.attributes)

    def __str__(self) -> str:
        return f"{self.op} '{self.name}'"


@lru_cache(maxsize=4096)
def schema_of(op: str, domain: str, version: int) -> Any:
    """Return the schema that gives an operator its meaning in an opset, or None."""
    from onnx import defs

    try:
        return defs.get_schema(op, version, domain)
    except defs.SchemaError:
        return None


def read_attributes(proto: Any, outer: Mapping[str, Any], folder: Folder) -> dict[str, Any]:
    """Return a node's attributes by name.

    Args:
        proto: a NodeProto.
        outer: the attributes of the function call that the node is inlined for; None marks a declared one that is absent.
        folder: where external data lies.

    Raises:
        FormatError: an attribute is not what it says.
        Unsupported: it has a type that models do not have.
    """
    attributes: dict[str, Any] = {}
    for attribute in proto.attribute:
        name = attribute.name
        if not name or name in attributes:
            raise FormatError(f"{proto.op_type} '{proto.name}': attribute {name!r} is unnamed or appears twice")
        if attribute.ref_attr_name:
            if attribute.ref_attr_name not in outer:
                raise FormatError(f"{proto.op_type} '{proto.name}': attribute '{name}' refers to no attribute of a function")
            value = outer[attribute.ref_attr_name]
            if value is None:
                continue
        else:
            value = _value(attribute, proto, folder)
        attributes[name] = value
    return attributes


def _value(attribute: Any, proto: Any, folder: Folder) -> Any:
    where = f"{proto.op_type} '{proto.name}': attribute '{attribute.name}'"
    filled = [kind for kind in (TENSOR, GRAPH) if attribute.HasField(FIELDS[kind])]
    filled += [kind for kind in (FLOATS, INTS, STRINGS) if len(getattr(attribute, FIELDS[kind]))]
    kind = attribute.type
    if kind == 0:  # files before IR version 2 leave it out
        filled += [kind for kind in (FLOAT, INT, STRING) if attribute.HasField(FIELDS[kind])]
        if len(filled) != 1:
            raise FormatError(f"{where} has no type")
        kind = filled[0]
    if kind in LISTS:
        raise Unsupported(f"attribute '{attribute.name}' of type {LISTS[kind]}")
    if kind not in FIELDS or any(other != kind for other in filled):
        raise FormatError(f"{where} holds another type than it says")
    value = getattr(attribute, FIELDS[kind])
    if kind in (FLOATS, INTS, STRINGS) and len(value) > ITEMS:
        raise FormatError(f"{where} has more than {ITEMS} items")
    if kind == TENSOR:
        return to_array(value, folder)
    if kind == GRAPH:
        return value
    if kind in (STRING, STRINGS):
        texts = [_text(item, where) for item in ([value] if kind == STRING else value)]
        return texts[0] if kind == STRING else tuple(texts)
    return tuple(value) if kind in (FLOATS, INTS) else value


def _text(value: bytes, where: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{where} is not UTF-8") from error


def kind_of(value: Any) -> set[int]:
    """Return the AttributeProto types that a Python value can be."""
    if isinstance(value, tuple):
        return {INTS} if value and isinstance(value[0], int) else {FLOATS} if value and isinstance(value[0], float) else (
            {STRINGS} if value else {INTS, FLOATS, STRINGS}
        )  # fmt: skip
    return (
        {INT}
        if isinstance(value, int)
        else {FLOAT}
        if isinstance(value, float)
        else {STRING}
        if isinstance(value, str)
        else (
            {TENSOR} if isinstance(value, Array.__origin__) else {GRAPH}  # type: ignore[attr-defined]
        )
    )


def check(node: Foreign, schema: Any) -> None:
    """Hold a node against its operator's schema.

    Raises:
        FormatError: it has too few or too many inputs or outputs, or an attribute of another name or type.
    """
    given = len(node.inputs)
    if not schema.min_input <= given <= schema.max_input:
        raise FormatError(f"{node}: takes {schema.min_input} to {schema.max_input} inputs, got {given}")
    if not schema.min_output <= len(node.outputs) <= schema.max_output:
        raise FormatError(f"{node}: makes {schema.min_output} to {schema.max_output} outputs, {len(node.outputs)} are named")
    for index, parameter in enumerate(schema.inputs[:given]):
        if parameter.option.value == 0 and not node.inputs[index]:
            raise FormatError(f"{node}: input '{parameter.name}' is absent")
    for key, value in node.attributes.items():
        if key not in schema.attributes:
            raise FormatError(f"{node}: unknown attribute '{key}'; opset {node.version} has {sorted(schema.attributes)}")
        if schema.attributes[key].type.value not in kind_of(value):
            raise FormatError(f"{node}: attribute '{key}' must be of type {schema.attributes[key].type.name}")
    for key, wanted in schema.attributes.items():
        if wanted.required and key not in node.attributes:
            raise FormatError(f"{node}: attribute '{key}' is missing")


def named_dtypes(node: Foreign) -> Foreign:
    """Return a node with dtype attributes as names; 0, which stands for none, is left out."""
    codes = {key: value for key, value in node.attributes.items() if key in DTYPES and isinstance(value, int)}
    try:
        return node.having(**{key: dtype_name(code) if code else None for key, code in codes.items()})
    except FormatError as error:
        raise Unsupported(str(error)) from error
