"""The model: an immutable graph of operators and named tensors. Every stage takes one and returns one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as dataclass_replace
from functools import cached_property
from heapq import heappop, heappush
from types import MappingProxyType
from typing import Any

import numpy as np

from gristmill.errors import ModelError
from gristmill.ops import Node, TensorType, find, types_made
from gristmill.ops.op import UNKNOWN, Undetermined, need
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array


@dataclass(frozen=True, eq=False)
class Model:
    """A validated graph.

    Args:
        nodes: operators in any order; they are kept in an order in which every value is made before it is used.
        tensors: constants by name: weights, biases, scales.
        inputs: the types of the values that `run` takes, by name. Dimensions may be symbolic: `("batch", 64)`.
        outputs: the names of the values that `run` returns.
        meta: JSON-compatible provenance, kept by every stage and saved with the model.

    Raises:
        ModelError: the graph is cyclic, a value is undefined or defined twice, an operator is unknown, or shapes do not fit.

    Example:
        >>> import gristmill as gm
        >>> gm.zoo.mlp([4, 3]).outputs
        ('logits',)
    """

    nodes: tuple[Node, ...]
    tensors: Mapping[str, Tensor]
    inputs: Mapping[str, TensorType]
    outputs: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tensors", "inputs", "meta"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        object.__setattr__(self, "outputs", tuple(self.outputs))
        object.__setattr__(self, "nodes", tuple(in_order(tuple(self.nodes), {*self.tensors, *self.inputs})))
        undefined = [name for name in self.outputs if name not in self.types]
        if undefined or not self.outputs:
            raise ModelError(f"outputs {undefined or '(none given)'} are not values of the graph")

    @cached_property
    def types(self) -> Mapping[str, TensorType]:
        """The type of every value, tensors included; UNKNOWN where it depends on values."""
        types = {name: TensorType(tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()}
        clash = types.keys() & self.inputs.keys()
        if clash:
            raise ModelError(f"names used for both an input and a tensor: {sorted(clash)}")
        types |= self.inputs
        for node in self.nodes:
            types |= zip(node.outputs, infer(node, types, self.tensors), strict=True)
        return MappingProxyType(types)

    def replace(self, **changes: Any) -> "Model":
        """Return a copy with some fields changed; `tensors` given here are merged into the present ones.

        Example:
            >>> import gristmill as gm
            >>> model = gm.zoo.mlp([4, 3])
            >>> model.replace(meta={"name": "tiny"}).meta["name"]
            'tiny'
        """
        if "tensors" in changes:
            changes["tensors"] = {**self.tensors, **changes["tensors"]}
        return dataclass_replace(self, **changes)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the matrices that Linear nodes multiply by: what compression works on, in graph order."""
        names = (node.inputs[1] for node in self.nodes if node.op == "Linear" and node.inputs[1] in self.tensors)
        return tuple(dict.fromkeys(names))

    @property
    def trainable(self) -> tuple[str, ...]:
        """The names of the float tensors that can train: all but int4 tables, of which only products have a gradient."""
        products = set(self.weights)
        floats = [name for name, tensor in self.tensors.items() if tensor.trainable.dtype == np.float32]
        return tuple(name for name in floats if self.tensors[name].kind != "int4" or name in products)

    def run(self, **inputs: Array) -> dict[str, Array]:
        """Compute the outputs. Compiles a Session on first use and keeps it as long as the model lives.

        Args:
            inputs: one array for each of `self.inputs`, of its dtype and shape.

        Raises:
            ModelError: an input is missing, unknown, or of the wrong dtype or shape.

        Example:
            >>> import numpy as np, gristmill as gm
            >>> gm.zoo.mlp([4, 3]).run(x=np.zeros((2, 4), np.float32))["logits"].shape
            (2, 3)
        """
        from gristmill.runtime.session import session_of

        return session_of(self).run(**inputs)

    def __repr__(self) -> str:
        inputs = ", ".join(f"{name}: {kind}" for name, kind in self.inputs.items())
        return f"Model({inputs} -> {', '.join(self.outputs)}; {len(self.nodes)} nodes, {self.nbytes:,} bytes)"


def infer(node: Node, types: Mapping[str, TensorType], tensors: Mapping[str, Tensor]) -> list[TensorType]:
    """Return the types of a node's outputs after checking what it is given; UNKNOWN where they depend on values.

    Raises:
        ModelError: the operator is unknown, or the node does not fit it.
    """
    op = find(node)
    given = sum(1 for name in node.inputs if name)
    fewest, most = op.arity
    need(fewest <= given and len(node.inputs) <= most, node, f"takes {fewest} to {most} inputs, got {len(node.inputs)}")
    need(all(node.inputs[:fewest]), node, "a required input is absent")
    for key, value in node.attributes.items():
        need(key in op.attributes, node, f"unknown attribute {key!r}; known: {sorted(op.attributes)}")
        wanted = op.attributes[key]
        fits = isinstance(value, wanted) and not isinstance(value, bool)
        need(fits, node, f"attribute {key} must be {wanted}, got {value!r}")
    given_types = [types[name] if name else None for name in node.inputs]
    if any(kind is not None and not kind.known for kind in given_types):
        return [UNKNOWN] * len(node.outputs)
    try:
        return types_made(node, given_types, [tensors.get(name) for name in node.inputs])
    except Undetermined:
        return [UNKNOWN] * len(node.outputs)


def check_model(value: Any) -> Model:
    """Return a model as it is.

    Raises:
        ModelError: it is something else.
    """
    if not isinstance(value, Model):
        raise ModelError(f"a Model is needed, got {type(value).__name__}; gm.load(path) reads one from a file")
    return value


def in_order(nodes: tuple[Node, ...], defined: Iterable[str]) -> list[Node]:
    """Return nodes in an order in which values are made before they are used, the given order where it serves.

    Raises:
        ModelError: a value is made twice, never made, or made from itself.
    """
    known = set(defined)
    makers: dict[str, Node] = {}
    for node in nodes:
        for name in node.outputs:
            if not name or name in makers or name in known:
                raise ModelError(f"{node.op}: value '{name}' is made twice or has no name")
            makers[name] = node
    waits = [{name for name in node.inputs if name and name not in known} for node in nodes]
    readers: dict[str, list[int]] = {}
    for position, names in enumerate(waits):
        for name in names:
            readers.setdefault(name, []).append(position)
    ready = [position for position, names in enumerate(waits) if not names]  # ascending, hence a heap
    ordered: list[Node] = []
    while ready:
        node = nodes[heappop(ready)]
        ordered.append(node)
        for name in node.outputs:
            known.add(name)
            for position in readers.pop(name, ()):
                waits[position].discard(name)
                if not waits[position]:
                    heappush(ready, position)
    if len(ordered) < len(nodes):
        blocked = [node for node, names in zip(nodes, waits, strict=True) if names]
        raise ModelError(_explain_blocked(blocked, known, makers))
    return ordered


def leading_to(nodes: Iterable[Node], values: Iterable[str]) -> list[Node]:
    """Return the nodes that some values depend on, in their order, which is that of the graph."""
    needed, kept = set(values), []
    for node in reversed(tuple(nodes)):
        if needed.intersection(node.outputs):
            kept.append(node)
            needed.update(node.inputs)
    return kept[::-1]


def _explain_blocked(blocked: list[Node], known: set[str], makers: Mapping[str, Node]) -> str:
    for node in blocked:
        missing = [name for name in node.inputs if name and name not in known and name not in makers]
        if missing:
            return f"{node.op} '{node.name}': input {missing} is no input, no tensor and no node's output"
    return f"the graph is cyclic: {', '.join(node.name for node in blocked[:5])} wait for each other"
