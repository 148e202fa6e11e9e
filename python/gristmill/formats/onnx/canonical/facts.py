"""What can be said about a graph before it meets an input: shapes in symbols, and the values of shape arithmetic.

`Model.types` knows less on purpose: it need not follow Shape, Gather, Concat and Reshape, as plans are made for concrete shapes.
Here the values of small integer vectors are followed as symbols, so that a Reshape to [Shape(x)[0], Shape(x)[1], 12, 64] has a shape.
Two symbols are never taken for equal, unless they are the same.
"""

from typing import Any

import numpy as np

from gristmill.errors import ModelError
from gristmill.formats.onnx.canonical.arithmetic import evaluate
from gristmill.formats.onnx.canonical.dims import Size, size
from gristmill.formats.onnx.canonical.shapes import BOOLEAN, RULES, Shape, broadcast
from gristmill.model import Model
from gristmill.ops import Node, TensorType, find
from gristmill.ops.op import UNKNOWN, Undetermined
from gristmill.tensor import Dense, Tensor

BROADCASTS = {"BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Einsum"}  # in ways not followed
LONGEST = 64  # elements of a vector that is followed

Contents = tuple[Any, ...]  # a Size, a bool, or None where an element is not known


class Facts:
    """Shapes, dtypes and contents by name; what is not there is not known.

    Args:
        model: the graph.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, np.dtype[Any]] = {}
        self.contents: dict[str, Contents] = {}
        for name, kind in model.inputs.items():
            self.shapes[name], self.dtypes[name] = tuple(size(dim) for dim in kind.shape), kind.dtype
        for name, tensor in model.tensors.items():
            self.hold(name, tensor)
        for node in model.nodes:
            self.learn(node)

    def hold(self, name: str, tensor: Tensor) -> None:
        """Take in a constant."""
        self.shapes[name], self.dtypes[name] = tuple(map(size, tensor.shape)), tensor.dtype
        if isinstance(tensor, Dense) and tensor.array.size <= LONGEST and tensor.dtype.kind in "iub" and len(tensor.shape) < 2:
            values = tensor.array.reshape(-1).tolist()
            self.contents[name] = tuple(v if isinstance(v, bool) else Size(v) for v in values)

    def learn(self, node: Node) -> None:
        """Take in a node whose inputs have been taken in."""
        kinds = [self.model.types.get(name, UNKNOWN) for name in node.outputs]
        shapes = self._shapes_of(node, kinds)
        for name, kind, shape in zip(node.outputs, kinds, shapes, strict=False):
            if shape is not None:
                self.shapes.setdefault(name, shape)
            dtype = kind.dtype if kind.known else self._dtype_of(node)
            if dtype is not None:
                self.dtypes[name] = dtype
        made = evaluate(self, node)
        if made is not None and len(made) <= LONGEST and len(self.shapes.get(node.name, ((),))) < 2:
            self.contents[node.name] = made

    def ints(self, name: str) -> list[int] | None:
        """The value of a vector of integers that is known whole."""
        made = self.contents.get(name)
        if made is None or not all(isinstance(v, Size) and v.known for v in made):
            return None
        return [v.number for v in made]

    def rank(self, name: str) -> int | None:
        return len(self.shapes[name]) if name in self.shapes else None

    def _shapes_of(self, node: Node, kinds: list[TensorType]) -> list[Shape | None]:
        if node.op in RULES:
            try:
                return RULES[node.op](self, node)
            except KeyError:  # a shape or a value that it needs is not known
                return [self._concrete(kind) for kind in kinds]
        return self._inferred(node, kinds)

    def _concrete(self, kind: TensorType) -> Shape | None:
        """The shape that the model infers, where it is in numbers: its symbols may stand for broadcast dimensions."""
        if not kind.known or any(isinstance(dim, str) for dim in kind.shape):
            return None
        return tuple(size(dim) for dim in kind.shape)

    def _inferred(self, node: Node, kinds: list[TensorType]) -> list[Shape | None]:
        """What the operator's own rule makes of shapes that are known only here."""
        if node.op in BROADCASTS or not all(not name or (name in self.shapes and name in self.dtypes) for name in node.inputs):
            return [self._concrete(kind) for kind in kinds]
        types = [TensorType(self.dtypes[n], tuple(_dim(d) for d in self.shapes[n])) if n else None for n in node.inputs]
        try:
            made = find(node).infer(node, types, [self.model.tensors.get(name) for name in node.inputs])
        except (Undetermined, ModelError):
            return [None] * len(node.outputs)
        return [tuple(map(size, kind.shape)) if kind.known else None for kind in made]

    def _dtype_of(self, node: Node) -> np.dtype[Any] | None:
        if node.op in BOOLEAN:
            return np.dtype(bool)
        if node.op in ("Shape", "Size", "NonZero", "ArgMax", "ArgMin"):
            return np.dtype(np.int64)
        if node.op == "Cast":
            return np.dtype(node.attributes["to"]) if node.attributes["to"] in np.sctypeDict else None
        if node.op in ("ConstantOfShape", "DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"):
            return None
        at = 1 if node.op in ("Where", "CastLike") else 0
        return self.dtypes.get(node.input(at))


def _dim(dim: Size) -> int | str:
    return dim.number if dim.known else str(dim)


__all__ = ["Facts", "broadcast"]
