"""The graph that is built from a file: names, types and values that are known, and what could not be taken over."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from gristmill.errors import FormatError, ModelError
from gristmill.formats.onnx.foreign import Foreign, Unsupported
from gristmill.model import infer
from gristmill.ops import OPS, Node, TensorType, find
from gristmill.ops.op import UNKNOWN
from gristmill.tensor import Dense
from gristmill.tensor.parts import Array

NODES = 200_000  # of the graph; functions that call functions grow it fast
FOLDED = 1 << 16  # elements that any value computed while loading may have
FREE_BYTES = 16 << 20  # that such values may take together, besides a multiple of what the file itself takes
# Operators whose work is bounded by the sizes of their inputs and outputs: layout, arithmetic, what makes up shapes and masks.
FOLDABLE = {
    "Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Concat", "Cos", "CumSum", "Div", "Equal", "Erf", "Exp",
    "Expand", "EyeLike", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Greater", "GreaterOrEqual",
    "IsInf", "IsNaN", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mod", "Mul", "Neg", "NonZero", "Not",
    "OneHot", "Or", "Pad", "Pow", "QuantizeLinear", "Range", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSum", "Relu", "Reshape", "Round", "ScatterElements", "ScatterND", "Shape", "Sigmoid", "Sign",
    "Sin", "Size", "Slice", "Softplus", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "Tile", "Transpose", "Trilu",
    "Unsqueeze", "Where", "Xor",
}  # fmt: skip


class Builder:
    """Nodes in the order in which they were emitted.

    Args:
        reserved: names that only the values of that name in the file's main graph may take.
        nbytes: the size of the file, which bounds what is computed while loading.
    """

    def __init__(self, reserved: Sequence[str], nbytes: int) -> None:
        self.types: dict[str, TensorType] = {}
        self.tensors: dict[str, Dense] = {}
        self.nodes: list[Node] = []
        self.lacking: dict[str, list[str]] = {}
        self.current = ""  # the file's node that is being read
        self._taken = set(reserved)
        self._reserved = set(reserved)
        self._counts: dict[str, int] = {}
        self._left = FREE_BYTES + 4 * nbytes

    def fresh(self, hint: str, main: bool = False) -> str:
        """Return a name that no value has, the hint itself where possible."""
        if main and hint in self._reserved:
            self._reserved.discard(hint)
            return hint
        stem = name = "".join(letter if letter.isprintable() else "_" for letter in hint) or "value"
        while name in self._taken:
            self._counts[stem] = self._counts.get(stem, 0) + 1
            name = f"{stem}_{self._counts[stem]}"
        self._taken.add(name)
        return name

    def input(self, name: str, kind: TensorType) -> str:
        value = self.fresh(name, main=True)
        self.types[value] = kind
        return value

    def constant(self, array: Any, hint: str = "constant", main: bool = False) -> str:
        """Add a tensor and return its name."""
        name = self.fresh(hint, main)
        self.tensors[name] = Dense(np.asarray(array))
        self.types[name] = TensorType(self.tensors[name].dtype, self.tensors[name].shape)
        return name

    def value(self, name: str) -> Array | None:
        """The value of a name where it is known."""
        tensor = self.tensors.get(name)
        return None if tensor is None else tensor.array

    def rank(self, name: str) -> int | None:
        kind = self.types[name]
        return len(kind.shape) if kind.known else None

    def refuse(self, what: str) -> None:
        """Record something that cannot be taken over; all of it is reported at once."""
        self.lacking.setdefault(what, []).append(self.current)

    def takes(self, node: Foreign) -> bool:
        """Whether there is an operator for a node in the form that it has."""
        outputs = tuple(hint or f"{index}" for index, hint in enumerate(node.outputs))
        try:
            infer(Node(node.op, tuple(_trimmed(node.inputs)), outputs, node.attributes, node.domain), self.types, self.tensors)
        except ModelError:
            return False
        return True

    def emit(
        self,
        op: str,
        inputs: Sequence[str],
        attributes: Mapping[str, Any] | None = None,
        outputs: Sequence[str] = ("",),
        domain: str = "",
        main: bool = False,
    ) -> list[str]:
        """Append a node and return its outputs; what is known already becomes a tensor instead.

        Args:
            outputs: hints for the names of the outputs.
            main: the hints are names of the main graph.
        """
        if op == "Identity" and not domain:
            return [inputs[0]]
        inputs = _trimmed(inputs)
        stem = self.current or op
        hints = [hint or (f"{stem}.{op}" if len(outputs) == 1 else f"{stem}.{op}.{index}") for index, hint in enumerate(outputs)]
        if (domain, op) not in OPS:
            self.refuse(f"{domain}::{op}" if domain else op)
            return self._unknown(hints, main)
        known = OPS[domain, op].attributes
        for key in (attributes or {}).keys() - known.keys():
            self.refuse(f"{op} with attribute '{key}'")
            return self._unknown(hints, main)
        node = Node(op, tuple(inputs), tuple(self.fresh(hint, main) for hint in hints), attributes or {}, domain)
        made = infer(node, self.types, self.tensors)
        folded = self._fold(node, made)
        if folded is not None:
            for name, array in zip(node.outputs, folded, strict=True):
                self.tensors[name] = Dense(array)
            made = [TensorType(array.dtype, array.shape) for array in folded]
        else:
            if len(self.nodes) == NODES:
                raise FormatError(f"the graph has more than {NODES} nodes")
            self.nodes.append(node)
        self.types.update(zip(node.outputs, made, strict=True))
        return list(node.outputs)

    def _unknown(self, hints: Sequence[str], main: bool) -> list[str]:
        names = [self.fresh(hint, main) for hint in hints]
        self.types.update(dict.fromkeys(names, UNKNOWN))
        return names

    def _fold(self, node: Node, made: Sequence[TensorType]) -> list[Array] | None:
        """Return the outputs where they are known, small or no larger than the inputs, and within what loading may compute."""
        if node.domain or node.op not in FOLDABLE:
            return None
        kinds = [self.types[name] if name else None for name in node.inputs]
        if not all(kind is None or _concrete(kind) for kind in kinds):
            return None
        values = [self.value(name) for name in node.inputs]
        taken = sum(value.nbytes for value in values if value is not None)
        if node.op == "NonZero" and kinds[0] is not None:
            made = [TensorType(np.dtype(np.int64), (len(kinds[0].shape), prod(kinds[0].extents)))]
        if not all(map(_concrete, made)):
            return None
        nbytes = sum(prod(kind.extents) * kind.dtype.itemsize for kind in made)
        small = all(prod(kind.extents) <= FOLDED for kind in made)
        if nbytes > self._left or not (small or nbytes <= 4 * taken):
            return None
        try:
            with np.errstate(all="ignore"):
                arrays = find(node).known(node, kinds, values)
        except (TypeError, ValueError, IndexError, ArithmeticError) as error:
            raise ModelError(f"{node.op} '{node.name}': {error}") from error
        if arrays is not None:
            self._left -= nbytes
        return arrays


def _concrete(kind: TensorType) -> bool:
    return kind.known and all(isinstance(dim, int) for dim in kind.shape)


def _trimmed(names: Sequence[str]) -> list[str]:
    """Return names without absent ones at the end."""
    kept = list(names)
    while kept and not kept[-1]:
        kept.pop()
    return kept


__all__ = ["Builder", "Foreign", "Unsupported"]
