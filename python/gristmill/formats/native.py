"""The native file: one safetensors file with the graph in its metadata. docs/formats.md specifies it."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save as serialize
from safetensors.numpy import save_file

from gristmill.errors import FormatError, GristmillError
from gristmill.formats.atomic import replacing
from gristmill.formats.container import DTYPES, HEADER_BYTES, JSON_ITEMS, Buffer, little_endian, map_file, parse, read
from gristmill.model import Model
from gristmill.ops import Node, TensorType
from gristmill.tensor import Tensor, from_parts
from gristmill.tensor.parts import Array

VERSION = 1
# One key, because the safetensors library writes several in an order that changes from run to run.
KEY = "gristmill"
DTYPE_NAMES = {dtype.name: dtype.newbyteorder("=") for dtype in DTYPES.values()}

T = TypeVar("T")


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write a model to one safetensors file, whole or not at all; equal models give equal bytes.

    Raises:
        FormatError: the model has something that JSON or safetensors cannot hold.
        OSError: the folder is missing or cannot be written, or the disk is full.

    Example:
        >>> import tempfile, gristmill as gm
        >>> path = tempfile.mkdtemp() + "/tiny.safetensors"
        >>> save(gm.zoo.mlp([4, 3]), path)
        >>> load(path).weights
        ('layer0.weight',)
    """
    arrays, metadata = encode(model)
    with replacing(path) as temporary:
        try:
            save_file(arrays, temporary, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load(path: str | os.PathLike[str]) -> Model:
    """Read a native model file. Its tensors are read-only views of the memory-mapped file, which must not be changed in place.

    Raises:
        FormatError: the file is damaged, hostile, or not a native model file.
        OSError: it cannot be read.
    """
    try:
        return _decode(map_file(Path(path)))
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error


def to_bytes(model: Model) -> bytes:
    """Return the bytes that `save` writes.

    Raises:
        FormatError: as `save`.
    """
    arrays, metadata = encode(model)
    return serialize(arrays, metadata)


def from_bytes(data: bytes | bytearray | memoryview) -> Model:
    """Return the model that `to_bytes` was given.

    Raises:
        FormatError: as `load`.

    Example:
        >>> import gristmill as gm
        >>> from_bytes(to_bytes(gm.zoo.mlp([4, 3]))).outputs
        ('logits',)
    """
    return _decode(bytes(data))


def encode(model: Model) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the arrays and the metadata of a model's file.

    Raises:
        FormatError: as `save`.
    """
    arrays: dict[str, Array] = {}
    tensors = []
    for name, tensor in model.tensors.items():
        parts = tensor.parts()
        for suffix, array in parts.items():
            if name + suffix in arrays or name + suffix == "__metadata__":
                raise FormatError(f"tensor '{name}': the name of its part '{name + suffix}' is taken; rename the tensor")
            arrays[name + suffix] = array
        tensors.append({"name": name, "parts": sorted(parts), "spec": tensor.spec()})
    for name, kind in model.inputs.items():
        if kind.dtype.name not in DTYPE_NAMES:
            raise FormatError(f"input '{name}' has dtype {kind.dtype}, which cannot be stored")
    description = {
        "version": VERSION,
        "nodes": [_encode_node(node) for node in model.nodes],
        "inputs": [{"name": name, "dtype": kind.dtype.name, "shape": kind.shape} for name, kind in model.inputs.items()],
        "outputs": model.outputs,
        "tensors": tensors,
        "meta": dict(model.meta),
    }
    for name in _names(model):
        _text(name, "name")
    try:
        text = json.dumps(description, allow_nan=False, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"meta or an attribute is not JSON: {error}") from error
    # Half of each limit is left to the second escaping of quotes and to the header's own entries.
    if len(text) > HEADER_BYTES // 4 or sum(map(text.count, ",[{")) > JSON_ITEMS // 2:
        raise FormatError(f"graph and meta take {len(text)} bytes, more than a header can hold; make meta smaller")
    return little_endian(arrays), {KEY: text}


def _names(model: Model) -> set[str]:
    symbols = (dim for kind in model.inputs.values() for dim in kind.shape if isinstance(dim, str))
    return {*model.types, *symbols}


def _encode_node(node: Node) -> dict[str, Any]:
    encoded = {"op": node.op, "domain": node.domain, "inputs": node.inputs, "outputs": node.outputs}
    return {**encoded, "attributes": dict(node.attributes)}


def _decode(data: Buffer) -> Model:
    arrays, metadata = read(data)
    if KEY not in metadata:
        raise FormatError(f"no '{KEY}' in the metadata: tensors without a graph are not a native model file")
    description = parse(metadata[KEY].encode(errors="replace"), "model description")
    version = description.get("version")
    if type(version) is not int or version < 1:
        raise FormatError(f"format version {version!r} is not a positive integer")
    if version > VERSION:
        raise FormatError(f"the file has format version {version}, this gristmill reads up to {VERSION}; upgrade gristmill")
    tensors = dict(_decode_tensors(_field(description, "tensors", list), arrays))
    inputs = dict(_decode_inputs(_field(description, "inputs", list)))
    nodes = tuple(_decode_node(node) for node in _field(description, "nodes", list))
    outputs = _texts(_field(description, "outputs", list), "output")
    _check_order(nodes, {*tensors, *inputs})
    meta = _field(description, "meta", dict)
    return _guard("the graph", lambda: Model(nodes, tensors, inputs, outputs, meta))


def _guard(what: str, build: Callable[[], T]) -> T:
    """Build from untrusted values: whatever rule of a tensor kind or an operator they break, the file is at fault."""
    try:
        return build()
    except (GristmillError, ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise FormatError(f"{what}: {error}") from error


def _decode_tensors(entries: list[Any], arrays: dict[str, Array]) -> list[tuple[str, Tensor]]:
    unclaimed = dict(arrays)
    tensors: list[tuple[str, Tensor]] = []
    for entry in entries:
        name = _text(_field(entry, "name"), "tensor name")
        suffixes = _field(entry, "parts", list)
        spec = _field(entry, "spec", dict)
        parts: dict[str, Array] = {}
        for suffix in suffixes:
            if not isinstance(suffix, str) or name + suffix not in unclaimed:
                raise FormatError(f"tensor '{name}': its part {suffix!r} is missing or belongs to another tensor")
            parts[suffix] = unclaimed.pop(name + suffix)
        tensor = _guard(f"tensor '{name}'", lambda spec=spec, parts=parts: from_parts(spec, parts))  # type: ignore[misc]
        if set(tensor.parts()) != parts.keys():
            raise FormatError(f"tensor '{name}': a {tensor.kind} tensor has parts {sorted(tensor.parts())}, found {suffixes}")
        tensors.append((name, tensor))
    if unclaimed:
        raise FormatError(f"the file has tensors that the model does not know: {sorted(unclaimed)[:5]}")
    _check_unique([name for name, _ in tensors], "tensor")
    return tensors


def _decode_inputs(entries: list[Any]) -> list[tuple[str, TensorType]]:
    inputs = []
    for entry in entries:
        name = _text(_field(entry, "name"), "input name")
        dtype = _field(entry, "dtype", str)
        if dtype not in DTYPE_NAMES:
            raise FormatError(f"input '{name}' has unknown dtype {dtype!r}; known: {', '.join(DTYPE_NAMES)}")
        shape = tuple(_dimension(dim, name) for dim in _field(entry, "shape", list))
        inputs.append((name, TensorType(np.dtype(DTYPE_NAMES[dtype]), shape)))
    _check_unique([name for name, _ in inputs], "input")
    return inputs


def _dimension(dim: Any, name: str) -> int | str:
    if type(dim) is int and 0 <= dim < 2**62:
        return dim
    return _text(dim, f"dimension of input '{name}'")


def _decode_node(entry: Any) -> Node:
    inputs = _field(entry, "inputs", list)
    if not all(name == "" or _text(name, "node input") for name in inputs):
        raise FormatError("a node has an input without a name")
    return Node(
        _text(_field(entry, "op"), "operator"),
        tuple(inputs),
        _texts(_field(entry, "outputs", list), "node output"),
        _field(entry, "attributes", dict),
        _field(entry, "domain", str),
    )


def _check_order(nodes: tuple[Node, ...], known: set[str]) -> None:
    """Demand the order that `save` writes, so that no hostile order makes the sort of a large graph slow."""
    for node in nodes:
        if not node.outputs:
            raise FormatError(f"a {node.op} node has no outputs")
        for name in node.inputs:
            if name and name not in known:
                raise FormatError(
                    f"{node.op} '{node.name}' takes '{name}', which no input, tensor or earlier node gives: "
                    "the graph is cyclic, incomplete or out of order"
                )
        known.update(node.outputs)


def _check_unique(names: list[str], what: str) -> None:
    if len(set(names)) != len(names):
        raise FormatError(f"an {what} name appears twice")


def _field(entry: Any, key: str, kind: type | None = None) -> Any:
    if not isinstance(entry, Mapping) or key not in entry:
        raise FormatError(f"the model description lacks '{key}' where it is due")
    if kind is not None and not isinstance(entry[key], kind):
        raise FormatError(f"'{key}' in the model description must be a {kind.__name__}")
    return entry[key]


def _text(value: Any, what: str) -> str:
    """Return a name; control characters could confuse a terminal, and lone surrogates cannot be written."""
    if not isinstance(value, str) or not value or not value.isprintable():
        raise FormatError(f"{what} {value!r} is not a printable name")
    return value


def _texts(values: list[Any], what: str) -> tuple[str, ...]:
    return tuple(_text(value, what) for value in values)
