"""The shapes of the operators that occur between the layers of networks, in symbols.

A rule takes what is known (`facts.Facts`) and a node. It raises KeyError where something that it needs is not known.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from gristmill.formats.onnx.canonical.dims import ONE, Size, over, plus, product, size
from gristmill.ops import Node

if TYPE_CHECKING:
    from gristmill.formats.onnx.canonical.facts import Facts

Shape = tuple[Size, ...]
Rule = Callable[["Facts", Node], "list[Shape | None]"]

BOOLEAN = {
    "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Xor", "Not", "IsNaN", "IsInf",
}  # fmt: skip
BINARY = {"Add", "Sub", "Mul", "Div", "Pow", "Mod", "Min", "Max", "Where", "PRelu", "Sum", "Mean"} | BOOLEAN
SAME = {
    "Abs", "Cast", "CastLike", "Celu", "Ceil", "Clip", "Cos", "Dropout", "Elu", "Erf",
    "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity",
    "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax",
    "LpNormalization", "Mish", "Neg", "RMSNormalization", "Reciprocal", "Relu",
    "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softmax", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "QuantizeLinear",
    "DequantizeLinear", "BatchNormalization", "InstanceNormalization",
}  # fmt: skip
REDUCTIONS = {
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd",
    "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp",
}  # fmt: skip


def broadcast(shapes: list[Shape]) -> Shape:
    """The shape of an elementwise result. Different symbols may stand for 1: their broadcast is an expression of its own."""
    rank = max(map(len, shapes))
    padded = [(ONE,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(_wider(dims) for dims in zip(*padded, strict=True))


def _wider(dims: tuple[Size, ...]) -> Size:
    distinct = list(dict.fromkeys(dim for dim in dims if dim != ONE))
    if len(distinct) < 2:
        return distinct[0] if distinct else ONE
    for dim in distinct:
        if dim.known:
            return dim
    kept = [dim for dim in distinct if not any(_is_least(dim, other) for other in distinct)]
    return kept[0] if len(kept) == 1 else Size(1, (f"broadcast({', '.join(sorted(map(str, kept)))})",))


def least(bound: int, dim: Size) -> Size:
    """The lesser of a number and a dimension: what a slice from the front of an axis leaves."""
    return Size(1, (f"min({bound}, {dim})",))


def _is_least(dim: Size, other: Size) -> bool:
    """Whether a dimension is the lesser of a number above 1 and another: the two fit only if they are equal."""
    match = re.fullmatch(r"min\((\d+), (.*)\)", str(dim))
    return match is not None and int(match[1]) > 1 and match[2] == str(other)


def _binary(facts: "Facts", node: Node) -> list[Shape | None]:
    return [broadcast([facts.shapes[name] for name in node.inputs if name])]


def _same(facts: "Facts", node: Node) -> list[Shape | None]:
    return [facts.shapes[node.inputs[0]]]


def _shape(facts: "Facts", node: Node) -> list[Shape | None]:
    rank = len(facts.shapes[node.inputs[0]])
    return [(Size(len(range(rank)[shape_slice(node, rank)])),)]


def shape_slice(node: Node, rank: int) -> slice:
    """The part of a shape that a Shape node gives."""
    return slice(node.attributes.get("start", 0), node.attributes.get("end", rank))


def _reshape(facts: "Facts", node: Node) -> list[Shape | None]:
    return [reshaped(facts.shapes[node.inputs[0]], facts.contents[node.inputs[1]], node.attributes.get("allowzero", 0))]


def reshaped(shape: Shape, target: tuple[Size | None, ...], allowzero: int = 0) -> Shape:
    """The shape that a Reshape to a target makes.

    Raises:
        KeyError: it depends on what is not known.
    """
    dims: list[Size | None] = []
    for at, wanted in enumerate(target):
        if not isinstance(wanted, Size):
            raise KeyError("target")
        copied = wanted == Size(0) and not allowzero
        if copied and at >= len(shape):
            raise KeyError("target")
        dims.append(shape[at] if copied else None if wanted == Size(-1) else wanted)
    if None in dims:
        rest = over(product(shape), product([dim for dim in dims if dim is not None]))
        dims = [rest if dim is None else dim for dim in dims]
    if any(dim is None for dim in dims):
        raise KeyError("rest")
    return tuple(dim for dim in dims if dim is not None)


def _transpose(facts: "Facts", node: Node) -> list[Shape | None]:
    shape = facts.shapes[node.inputs[0]]
    return [tuple(shape[at] for at in permutation(node, len(shape)))]


def permutation(node: Node, rank: int) -> tuple[int, ...]:
    return tuple(node.attributes.get("perm", tuple(range(rank))[::-1]))


def axes_of(facts: "Facts", node: Node, rank: int) -> list[int] | None:
    """The axes that the second input gives, counted from the front; None where it is absent."""
    if not node.input(1):
        return None
    axes = facts.ints(node.inputs[1])
    if axes is None:
        raise KeyError("axes")
    return sorted(axis % rank for axis in axes)


def _unsqueeze(facts: "Facts", node: Node) -> list[Shape | None]:
    shape = facts.shapes[node.inputs[0]]
    axes = facts.ints(node.inputs[1])
    if axes is None:
        raise KeyError("axes")
    rank = len(shape) + len(axes)
    places = {axis % rank for axis in axes}
    rest = iter(shape)
    return [tuple(ONE if at in places else next(rest) for at in range(rank))]


def _squeeze(facts: "Facts", node: Node) -> list[Shape | None]:
    shape = facts.shapes[node.inputs[0]]
    axes = axes_of(facts, node, len(shape))
    if axes is None:
        if not all(dim.known for dim in shape):
            raise KeyError("axes")
        axes = [at for at, dim in enumerate(shape) if dim == ONE]
    return [tuple(dim for at, dim in enumerate(shape) if at not in axes)]


def _flatten(facts: "Facts", node: Node) -> list[Shape | None]:
    shape, axis = facts.shapes[node.inputs[0]], node.attributes.get("axis", 1)
    axis = axis if axis >= 0 else axis + len(shape)
    return [(product(shape[:axis]), product(shape[axis:]))]


def _gather(facts: "Facts", node: Node) -> list[Shape | None]:
    shape, index = facts.shapes[node.inputs[0]], facts.shapes[node.inputs[1]]
    axis = node.attributes.get("axis", 0) % len(shape)
    return [(*shape[:axis], *index, *shape[axis + 1 :])]


def _concat(facts: "Facts", node: Node) -> list[Shape | None]:
    shapes = [facts.shapes[name] for name in node.inputs]
    axis = node.attributes["axis"] % len(shapes[0])
    total = Size(0)
    for shape in shapes:
        total = plus(shape[axis], total) if total == Size(0) else plus(total, shape[axis])
    merged = [next((shape[at] for shape in shapes if shape[at].known), shapes[0][at]) for at in range(len(shapes[0]))]
    merged[axis] = total
    return [tuple(merged)]


def _slice(facts: "Facts", node: Node) -> list[Shape | None]:
    shape = list(facts.shapes[node.inputs[0]])
    if not all(facts.ints(name) is not None for name in (node.inputs[1], *node.inputs[3:]) if name):
        raise KeyError("slice")
    starts, ends = facts.ints(node.inputs[1]) or [], facts.contents[node.inputs[2]]
    axes = facts.ints(node.input(3)) if node.input(3) else None
    steps = (facts.ints(node.input(4)) if node.input(4) else None) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes or range(len(starts)), steps, strict=True):
        axis %= len(shape)
        dim = shape[axis]
        if isinstance(end, Size) and start == 0 and step == 1 and (end == dim or (end.known and end.number >= 2**31 - 1)):
            continue
        if dim.known and isinstance(end, Size) and end.known:
            shape[axis] = Size(len(range(dim.number)[start : end.number : step]))
        else:
            front = start == 0 and step == 1 and dim.known and isinstance(end, Size)
            natural = isinstance(end, Size) and end.number > 0 and not any(factor.startswith("(") for factor in end.factors)
            shape[axis] = least(dim.number, end) if front and natural else Size(1, (f"<{node.name}.{axis}>",))
    return [tuple(shape)]


def _expand(facts: "Facts", node: Node) -> list[Shape | None]:
    target = facts.contents[node.inputs[1]]
    if not all(isinstance(dim, Size) for dim in target):
        raise KeyError("target")
    return [broadcast([facts.shapes[node.inputs[0]], target])]


def _constant_of_shape(facts: "Facts", node: Node) -> list[Shape | None]:
    target = facts.contents[node.inputs[0]]
    if not all(isinstance(dim, Size) for dim in target):
        raise KeyError("target")
    return [target]


def _range(facts: "Facts", node: Node) -> list[Shape | None]:
    start, limit, delta = (facts.contents[name] for name in node.inputs)
    if start != (Size(0),) or delta != (Size(1),) or not isinstance(limit[0], Size):
        raise KeyError("range")
    return [(limit[0],)]


def _matmul(facts: "Facts", node: Node) -> list[Shape | None]:
    a, b = facts.shapes[node.inputs[0]], facts.shapes[node.inputs[1]]
    if len(a) < 2 or len(b) < 2:
        raise KeyError("vectors")
    return [(*broadcast([a[:-2], b[:-2]]), a[-2], b[-1])]


def _qlinear_matmul(facts: "Facts", node: Node) -> list[Shape | None]:
    a, b = facts.shapes[node.inputs[0]], facts.shapes[node.inputs[3]]
    if len(a) < 2 or len(b) < 2:
        raise KeyError("vectors")
    return [(*broadcast([a[:-2], b[:-2]]), a[-2], b[-1])]


def _gemm(facts: "Facts", node: Node) -> list[Shape | None]:
    a, b = facts.shapes[node.inputs[0]], facts.shapes[node.inputs[1]]
    return [(a[1 if node.attributes.get("transA") else 0], b[0 if node.attributes.get("transB") else 1])]


def _linear(facts: "Facts", node: Node) -> list[Shape | None]:
    return [(*facts.shapes[node.inputs[0]][:-1], facts.shapes[node.inputs[1]][0])]


def _reduce(facts: "Facts", node: Node) -> list[Shape | None]:
    shape = facts.shapes[node.inputs[0]]
    axes = axes_of(facts, node, len(shape))
    if not axes:
        if node.attributes.get("noop_with_empty_axes"):
            return [shape]
        axes = list(range(len(shape)))
    if node.attributes.get("keepdims", 1):
        return [tuple(ONE if at in axes else dim for at, dim in enumerate(shape))]
    return [tuple(dim for at, dim in enumerate(shape) if at not in axes)]


def _split(facts: "Facts", node: Node) -> list[Shape | None]:
    shape = facts.shapes[node.inputs[0]]
    axis, parts = node.attributes.get("axis", 0) % len(shape), len(node.outputs)
    given = facts.ints(node.inputs[1]) if node.input(1) else None
    if given is None and (node.input(1) or not shape[axis].known):
        raise KeyError("split")
    if given is None:
        each = -(-shape[axis].number // parts)
        given = [each] * (parts - 1) + [shape[axis].number - each * (parts - 1)]
    return [(*shape[:axis], size(extent), *shape[axis + 1 :]) for extent in given]


def _attention(facts: "Facts", node: Node) -> list[Shape | None]:
    q, v = facts.shapes[node.inputs[0]], facts.shapes[node.inputs[2]]
    if node.op == "Attention" and len(q) != 4:
        raise KeyError("heads")
    return [(*q[:-1], v[-1]), *[None] * (len(node.outputs) - 1)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(sorted(BINARY), _binary),
    **dict.fromkeys(sorted(SAME), _same),
    **dict.fromkeys(sorted(REDUCTIONS), _reduce),
    "Attention": _attention,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "Linear": _linear,
    "MaskedAttention": _attention,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearMatMul": _qlinear_matmul,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
