"""ModelProto to Model: functions and known branches inlined, older opsets upgraded, names made unique, dead nodes dropped.

Specification: docs/IR.md of the onnx project. The file is untrusted: whatever rule it breaks, the error says which.
"""

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gristmill.errors import FormatError, GristmillError, MissingExtraError
from gristmill.formats.container import parse as parse_json
from gristmill.formats.onnx.builder import Builder
from gristmill.formats.onnx.canonical import canonical
from gristmill.formats.onnx.canonical.contrib import CONTRIB, DOMAIN
from gristmill.formats.onnx.control import NAME as CONTROL
from gristmill.formats.onnx.control import chosen, progresses_by, progression
from gristmill.formats.onnx.foreign import Foreign, Unsupported, check, named_dtypes, read_attributes, schema_of
from gristmill.formats.onnx.tensors import Folder, dtype_of, to_array
from gristmill.formats.onnx.upgrade import NEWEST, RULES, upgrade
from gristmill.model import Model
from gristmill.ops import Node, TensorType

DEPTH = 64  # of functions within functions and branches within branches
LISTED = 5  # nodes named for each operator that is missing
FAULTS = (GristmillError, ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def load(path: str | os.PathLike[str]) -> Model:
    """Read an ONNX file.

    Raises:
        FormatError: the file is damaged or hostile, or has operators or types that are not supported: the message names all.
        MissingExtraError: the packages of the extra `onnx` are not installed.
        OSError: it cannot be read.
    """
    found = Path(path)
    try:
        return from_proto(parse(_bytes(found)), found.parent)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error


def _bytes(path: Path) -> bytes:
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise FormatError("not a regular file")
        return file.read()


def parse(data: bytes) -> Any:
    """Return the ModelProto that bytes hold.

    Raises:
        FormatError: they hold none.
        MissingExtraError: as `load`.
    """
    try:
        import ml_dtypes  # noqa: F401
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from onnx import ModelProto
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "onnx") from error
    try:
        return ModelProto.FromString(data)
    except (DecodeError, ValueError) as error:
        raise FormatError(f"not an ONNX file: {error}") from error


def from_proto(proto: Any, home: Path | None = None) -> Model:
    """Return the model that a ModelProto describes.

    Args:
        proto: the ModelProto.
        home: the folder that external data is read from.

    Raises:
        FormatError: as `load`.
    """
    try:
        return canonical(_Reader(proto, Folder(home)).model())
    except Unsupported as error:
        raise FormatError(f"not supported: {error}") from error
    except FAULTS as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{type(error).__name__ if not str(error) else error}") from error


@dataclass
class Scope:
    """Where names are looked up: a graph, the body of a function, or a branch, which also sees what is around it."""

    versions: Mapping[str, int]
    main: bool = False
    outer: "Scope | None" = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)  # the file's names to the builder's
    calls: tuple[Any, ...] = ()

    def find(self, name: str) -> str:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.outer
        raise FormatError(
            f"'{name}' is given by no input, tensor or earlier node: the graph is cyclic, incomplete or out of order"
        )

    def define(self, name: str, value: str) -> None:
        if name in self.values:
            raise FormatError(f"'{name}' is made twice")
        self.values[name] = value


class _Reader:
    def __init__(self, proto: Any, folder: Folder) -> None:
        self.proto = proto
        self.folder = folder
        outputs = [value.name for value in proto.graph.output]
        _check_interface(proto.graph, outputs)
        self.functions = {(_domain(f.domain), f.name, f.overload): f for f in proto.functions}
        self.graph = Builder([*outputs, *(value.name for value in proto.graph.input)], proto.ByteSize())

    def model(self) -> Model:
        graph, outputs = self.proto.graph, [value.name for value in self.proto.graph.output]
        scope = Scope(_versions(self.proto.opset_import, self.proto.ir_version), main=True)
        given = {tensor.name for tensor in graph.initializer} | {sparse.values.name for sparse in graph.sparse_initializer}
        inputs = {}
        for value in graph.input:
            if value.name not in given:
                self.graph.current = value.name
                kind = self._input_type(value)
                if kind is not None:
                    inputs[value.name] = kind
                    scope.define(value.name, self.graph.input(value.name, kind))
        if not self.graph.lacking:
            self._graph(graph, scope)
        if self.graph.lacking:
            raise FormatError(_explain(self.graph.lacking))
        return self._finish(inputs, outputs, [scope.find(name) for name in outputs])

    def _finish(self, inputs: Mapping[str, TensorType], outputs: Sequence[str], values: Sequence[str]) -> Model:
        """Give the outputs their names, and drop what none of them needs."""
        names: dict[str, str] = {}
        nodes = list(self.graph.nodes)
        fixed = {*inputs, *self.graph.tensors}
        for output, value in zip(outputs, values, strict=True):
            if value != output and (value in fixed or value in names or value in outputs):
                nodes.append(Node("Identity", (value,), (output,)))
            elif value != output:
                names[value] = output
        nodes = _needed([_renamed(node, names) for node in nodes], outputs)
        read = {name for node in nodes for name in node.inputs}.union(outputs)
        tensors = {name: tensor for name, tensor in self.graph.tensors.items() if name in read}
        return Model(tuple(nodes), tensors, inputs, tuple(outputs), _meta(self.proto))

    def _graph(self, proto: Any, scope: Scope) -> None:
        """Read the tensors and the nodes of a graph into a scope."""
        for tensor in proto.initializer:
            array = to_array(tensor, self.folder)
            scope.define(tensor.name, self.graph.constant(array, tensor.name, scope.main))
        for sparse in proto.sparse_initializer:
            self.graph.current = sparse.values.name
            self.graph.refuse("sparse tensor")
        self._nodes(proto.node, {value.name for value in proto.output}, scope)

    def _nodes(self, protos: Sequence[Any], outputs: set[str], scope: Scope) -> None:
        live, used = _live(protos, outputs)
        for proto in live:
            self.graph.current = proto.name or next(filter(None, proto.output), "") or proto.op_type
            try:
                self._node(proto, used, scope)
            except Unsupported as error:
                self.graph.refuse(f"{proto.op_type} ({error})")
                self._define(proto.output, self.graph._unknown(proto.output, False), scope)

    def _node(self, proto: Any, used: set[str], scope: Scope) -> None:
        domain = _domain(proto.domain)
        outputs = [name if name in used else "" for name in proto.output]
        inputs = tuple(scope.find(name) if name else "" for name in proto.input)
        attributes = read_attributes(proto, scope.attributes, self.folder)
        name = self.graph.current
        function = self.functions.get((domain, proto.op_type, proto.overload))
        if function is not None:
            call = Foreign(proto.op_type, domain, 0, name, inputs, tuple(outputs), attributes)
            return self._define(outputs, self._call(call, function, scope), scope)
        if domain not in scope.versions:
            raise Unsupported(f"domain '{domain}' without an opset") if domain else FormatError("no opset is imported")
        node = Foreign(proto.op_type, domain, scope.versions[domain], name, inputs, tuple(outputs), attributes)
        schema = schema_of(node.op, domain, node.version)
        if schema is not None and not schema.deprecated:
            node = Foreign(node.op, domain, node.version, name, inputs, _kept(outputs, schema), attributes)
            check(node, schema)
        self._define(outputs, self._values(node, schema, scope), scope)

    def _values(self, node: Foreign, schema: Any, scope: Scope) -> list[str]:
        """Emit what a node of the file stands for and return its outputs."""
        if node.op == "Constant" and not node.domain:
            return [self.graph.constant(_constant(node), node.outputs[0], scope.main)]
        if node.op == "If" and not node.domain:
            return self._branch(node, scope)
        if node.domain == DOMAIN and node.op in CONTRIB:
            return CONTRIB[node.op](node, self.graph)
        delta = progresses_by(node) if node.op == "Loop" and not node.domain else None
        if delta is not None:
            return progression(node, scope.find(delta), self.graph)
        if any(hasattr(value, "node") for value in node.attributes.values()):
            raise Unsupported(CONTROL)
        if schema is None or (schema.deprecated and node.op not in RULES):
            raise Unsupported(f"unknown in opset {node.version}")
        changed = upgrade(named_dtypes(node), self.graph)
        if not isinstance(changed, Foreign):
            return changed
        if not self.graph.takes(changed):
            whole = _with_defaults(node, schema)
            function = self._definition(whole, schema)
            if function is not None:
                return self._call(whole, function, scope)
        return self.graph.emit(changed.op, changed.inputs, changed.attributes, changed.outputs, changed.domain, scope.main)

    def _branch(self, node: Foreign, scope: Scope) -> list[str]:
        branch = chosen(node, self.graph)
        if len(scope.calls) == DEPTH:
            raise FormatError(f"{node}: branches and functions nest deeper than {DEPTH}")
        inner = Scope(scope.versions, outer=scope, attributes=scope.attributes, calls=(*scope.calls, None))
        if len(branch.output) != len(node.outputs):
            raise FormatError(f"{node}: the branch has {len(branch.output)} outputs, the node {len(node.outputs)}")
        self._graph(branch, inner)
        return [inner.find(value.name) for value in branch.output]

    def _call(self, node: Foreign, function: Any, scope: Scope) -> list[str]:
        """Inline the body of a function."""
        key = (function.domain, function.name, function.overload)
        if key in scope.calls or len(scope.calls) == DEPTH:
            raise FormatError(f"{node}: function {function.name} calls itself, or functions nest deeper than {DEPTH}")
        if len(node.inputs) > len(function.input) or len(node.outputs) > len(function.output):
            raise FormatError(f"{node}: takes {len(function.input)} inputs and makes {len(function.output)} outputs")
        defaults = {attribute.name: attribute for attribute in function.attribute_proto}
        known = {*function.attribute, *defaults}
        unknown = node.attributes.keys() - known
        if unknown:
            raise FormatError(f"{node}: unknown attributes {sorted(unknown)}")
        given = dict.fromkeys(known) | _defaults(function, self.folder) | node.attributes
        values = dict(zip(function.input, [*node.inputs, *[""] * len(function.input)], strict=False))
        versions = {**scope.versions, **_versions(function.opset_import, 8)}
        inner = Scope(versions, attributes=given, values=values, calls=(*scope.calls, key))
        used = {name for name, hint in zip(function.output, node.outputs, strict=False) if hint}
        outer = self.graph.current
        self._nodes(function.node, used, inner)
        self.graph.current = outer
        return [inner.find(name) if name in used else "" for name in function.output[: len(node.outputs)]]

    def _definition(self, node: Foreign, schema: Any) -> Any:
        """Return the function by which the standard defines an operator that is not among ours, or None."""
        versions = [v for v in schema.function_opset_versions if v <= node.version]
        if versions:
            return schema.function_body if len(versions) == 1 else _parsed(schema.get_function_with_opset_version(max(versions)))
        versions = [v for v in schema.context_dependent_function_opset_versions if v <= node.version]
        kinds = [self.graph.types[name] if name else None for name in node.inputs]
        if not versions or not all(kind is None or kind.known for kind in kinds):
            return None
        body = schema.get_context_dependent_function_with_opset_version(max(versions), _node_proto(node), _type_protos(kinds))
        return _parsed(body)

    def _define(self, names: Sequence[str], values: Sequence[str], scope: Scope) -> None:
        for name, value in zip(names, values, strict=False):
            if name:
                scope.define(name, value)

    def _input_type(self, value: Any) -> TensorType | None:
        """Return the type of an input, or None after recording that it is not supported."""
        which = value.type.WhichOneof("value")
        if which != "tensor_type":
            self.graph.refuse(f"input of type {str(which or 'none').removesuffix('_type')}")
            return None
        kind = value.type.tensor_type
        try:
            dtype = dtype_of(kind.elem_type)
        except FormatError as error:
            self.graph.refuse(str(error))
            return None
        if not kind.HasField("shape"):
            self.graph.refuse("input without a rank")
            return None
        if len(kind.shape.dim) > 32:
            raise FormatError(f"input '{value.name}' has {len(kind.shape.dim)} dimensions")
        return TensorType(dtype, tuple(_dimension(dim, f"{value.name}.{i}") for i, dim in enumerate(kind.shape.dim)))


def _meta(proto: Any) -> dict[str, Any]:
    """Return what `save` wrote of a model's provenance, else which program made the file."""
    kept = [entry.value for entry in proto.metadata_props if entry.key == "gristmill"]
    if kept:
        return parse_json(kept[0].encode(), "metadata")
    return {"source": "onnx", "producer": proto.producer_name} if proto.producer_name else {"source": "onnx"}


def _check_interface(graph: Any, outputs: Sequence[str]) -> None:
    if not outputs:
        raise FormatError("the graph has no outputs")
    for what, names in (("output", outputs), ("input", [value.name for value in graph.input])):
        if len(set(names)) < len(names):
            raise FormatError(f"an {what} name appears twice")
        for name in names:
            if not name or not name.isprintable():
                raise FormatError(f"{what} {name!r} is not a printable name")


def _versions(imports: Sequence[Any], ir_version: int) -> dict[str, int]:
    versions = {_domain(opset.domain): opset.version for opset in imports}
    if len(versions) < len(imports):
        raise FormatError("a domain's opset is imported twice")
    if not versions and ir_version < 3:
        versions = {"": 1}  # before IR version 3 there were no opsets
    newest = versions.get("", 1)
    if not 1 <= newest <= NEWEST:
        raise FormatError(f"opset {newest}: this gristmill reads opsets 1 to {NEWEST}")
    return versions


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _dimension(dim: Any, fresh: str) -> int | str:
    if dim.HasField("dim_value") and 0 <= dim.dim_value < 2**62:
        return int(dim.dim_value)
    return dim.dim_param if dim.dim_param and dim.dim_param.isprintable() else fresh


def _live(protos: Sequence[Any], outputs: set[str]) -> tuple[list[Any], set[str]]:
    """Return the nodes that outputs need, in order, and the names that are read."""
    used, live = set(outputs), []
    for proto in reversed(protos):
        if any(name in used for name in proto.output):
            live.append(proto)
            used.update(_reads(proto))
    return live[::-1], used


def _reads(proto: Any, depth: int = 0) -> Iterator[str]:
    """Yield the names that a node reads, those of its subgraphs included."""
    if depth > DEPTH:
        raise FormatError(f"subgraphs nest deeper than {DEPTH}")
    yield from filter(None, proto.input)
    for attribute in proto.attribute:
        for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            yield from (value.name for value in graph.output)
            for node in graph.node:
                yield from _reads(node, depth + 1)


def _kept(outputs: Sequence[str], schema: Any) -> tuple[str, ...]:
    """Return outputs without optional ones at the end that nothing reads."""
    kept = list(outputs)
    while len(kept) > 1 and not kept[-1] and len(kept) <= len(schema.outputs) and schema.outputs[len(kept) - 1].option.value == 1:
        kept.pop()
    return tuple(kept)


def _constant(node: Foreign) -> Any:
    """Return the value of a Constant in whichever form it has."""
    if len(node.attributes) != 1:
        raise FormatError(f"{node}: one value is needed, it has {sorted(node.attributes)}")
    key, value = next(iter(node.attributes.items()))
    dtypes = {"value_float": "float32", "value_floats": "float32", "value_int": "int64", "value_ints": "int64"}
    if key == "value":
        return value
    if key not in dtypes:
        raise Unsupported(f"attribute '{key}'")
    return np.asarray(value, dtypes[key])


def _defaults(function: Any, folder: Folder) -> dict[str, Any]:
    from onnx import NodeProto

    return read_attributes(NodeProto(op_type=function.name, attribute=function.attribute_proto), {}, folder)


def _with_defaults(node: Foreign, schema: Any) -> Foreign:
    from onnx import NodeProto

    absent = [a.default_value for key, a in schema.attributes.items() if key not in node.attributes and a.default_value.name]
    defaults = read_attributes(NodeProto(op_type=node.op, attribute=absent), {}, Folder(None))
    return node.having(**{**dict.fromkeys(schema.attributes), **defaults, **node.attributes})


def _node_proto(node: Foreign) -> bytes:
    from onnx import helper

    inputs = [f"x{index}" if name else "" for index, name in enumerate(node.inputs)]
    outputs = [f"y{index}" if name else "" for index, name in enumerate(node.outputs)]
    plain: dict[str, Any] = {key: value for key, value in node.attributes.items() if isinstance(value, (int, float, str, tuple))}
    if plain.keys() != node.attributes.keys():
        raise Unsupported("a tensor attribute")
    return bytes(helper.make_node(node.op, inputs, outputs, domain=node.domain, **plain).SerializeToString())


def _type_protos(kinds: Sequence[TensorType | None]) -> list[bytes]:
    from onnx import TypeProto, helper

    from gristmill.formats.onnx.tensors import CODES

    protos = [
        TypeProto() if kind is None else helper.make_tensor_type_proto(CODES[kind.dtype.name], list(kind.shape)) for kind in kinds
    ]
    return [proto.SerializeToString() for proto in protos]


def _parsed(body: Any) -> Any:
    from onnx import FunctionProto

    return FunctionProto.FromString(body) if isinstance(body, bytes) else body


def _renamed(node: Node, names: Mapping[str, str]) -> Node:
    if not any(name in names for name in (*node.inputs, *node.outputs)):
        return node
    inputs, outputs = (tuple(names.get(name, name) for name in given) for given in (node.inputs, node.outputs))
    return Node(node.op, inputs, outputs, node.attributes, node.domain)


def _needed(nodes: Sequence[Node], outputs: Sequence[str]) -> list[Node]:
    used, kept = set(outputs), []
    for node in reversed(nodes):
        if any(name in used for name in node.outputs):
            kept.append(node)
            used.update(node.inputs)
    return kept[::-1]


def _explain(lacking: Mapping[str, Sequence[str]]) -> str:
    rows = []
    for what, nodes in sorted(lacking.items()):
        more = f" and {len(nodes) - LISTED} more" if len(nodes) > LISTED else ""
        rows.append(f"{what}: {len(nodes)} ({', '.join(nodes[:LISTED])}{more})")
    return "not supported: " + "; ".join(rows)
