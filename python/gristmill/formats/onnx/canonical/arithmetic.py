"""The values of shape arithmetic, element by element: numbers, symbols, and what is not known."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gristmill.formats.onnx.canonical.dims import Size, over, plus, times
from gristmill.formats.onnx.canonical.shapes import shape_slice
from gristmill.ops import Node

if TYPE_CHECKING:
    from gristmill.formats.onnx.canonical.facts import Facts

Contents = tuple[Any, ...]


def evaluate(facts: "Facts", node: Node) -> Contents | None:
    """Return the elements of the output of a node on integers of rank 0 or 1, or None."""
    if node.op in ELEMENTWISE:
        return _elementwise(facts, node)
    rule = MOVES.get(node.op)
    try:
        return rule(facts, node) if rule is not None else None
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def _elementwise(facts: "Facts", node: Node) -> Contents | None:
    if not all(name in facts.contents for name in node.inputs):
        return None
    if any(len(facts.shapes.get(name, ())) > 1 for name in node.inputs):
        return None
    values = [facts.contents[name] for name in node.inputs]
    length = max(map(len, values))
    if any(len(value) not in (1, length) for value in values) or not length:
        return None
    wide = [value * length if len(value) == 1 else value for value in values]
    return tuple(ELEMENTWISE[node.op](*items) for items in zip(*wide, strict=True))


def _both(rule: Callable[[Size, Size], Any]) -> Callable[[Any, Any], Any]:
    def apply(a: Any, b: Any) -> Any:
        return rule(a, b) if isinstance(a, Size) and isinstance(b, Size) else None

    return apply


def _divide(a: Size, b: Size) -> Size | None:
    if a.known and b.known and b.number:
        return Size(int(a.number / b.number)) if abs(a.number) < 2**53 else None  # integer division truncates
    return over(a, b)


def _modulo(a: Size, b: Size) -> Size | None:
    return Size(a.number % b.number) if a.known and b.known and b.number > 0 else None


def _equal(a: Any, b: Any) -> bool | None:
    """A symbol is at least 0, so it differs from a negative number; of two symbols nothing is known."""
    if isinstance(a, Size) and isinstance(b, Size):
        if a == b or (a.known and b.known):
            return a == b
        known, symbol = (a, b) if a.known else (b, a)
        natural = symbol.number > 0 and not any(factor.startswith("(") for factor in symbol.factors)
        return False if known.known and known.number < 0 and natural else None
    return None


def _where(condition: Any, a: Any, b: Any) -> Any:
    return None if condition is None else a if condition else b


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "Add": _both(plus),
    "Sub": _both(lambda a, b: plus(a, b, -1)),
    "Mul": _both(times),
    "Div": _both(_divide),
    "Mod": _both(_modulo),
    "Equal": _equal,
    "And": lambda a, b: False if a is False or b is False else a if isinstance(a, bool) and isinstance(b, bool) else None,
    "Or": lambda a, b: True if a is True or b is True else a if isinstance(a, bool) and isinstance(b, bool) else None,
    "Less": _both(lambda a, b: a.number < b.number if a.known and b.known else None),
    "Greater": _both(lambda a, b: a.number > b.number if a.known and b.known else None),
    "Max": _both(lambda a, b: a if a == b else Size(max(a.number, b.number)) if a.known and b.known else None),
    "Min": _both(lambda a, b: a if a == b else Size(min(a.number, b.number)) if a.known and b.known else None),
    "Where": _where,
    "Not": lambda a: None if not isinstance(a, bool) else not a,
}


def _same(facts: "Facts", node: Node) -> Contents:
    return facts.contents[node.inputs[0]]


def _cast(facts: "Facts", node: Node) -> Contents | None:
    whole = node.attributes["to"] in ("int64", "int32", "uint64", "uint32")
    values = facts.contents[node.inputs[0]]
    return values if whole and all(isinstance(value, Size) for value in values) else None


def _shape(facts: "Facts", node: Node) -> Contents:
    shape = facts.shapes[node.inputs[0]]
    return shape[shape_slice(node, len(shape))]


def _size(facts: "Facts", node: Node) -> Contents:
    total = Size(1)
    for dim in facts.shapes[node.inputs[0]]:
        total = times(total, dim)
    return (total,)


def _gather(facts: "Facts", node: Node) -> Contents | None:
    index = facts.ints(node.inputs[1])
    values = facts.contents[node.inputs[0]]
    return None if index is None else tuple(values[at] for at in index)


def _concat(facts: "Facts", node: Node) -> Contents:
    return tuple(value for name in node.inputs for value in facts.contents[name])


def _slice(facts: "Facts", node: Node) -> Contents | None:
    bounds = [facts.ints(name) for name in node.inputs[1:3]]
    step = facts.ints(node.input(4)) if node.input(4) else [1]
    if any(bound is None or len(bound) != 1 for bound in bounds) or step is None:
        return None
    values = facts.contents[node.inputs[0]]
    (start,), (end,) = bounds  # type: ignore[misc]
    return values[start : end : step[0]]


def _constant_of_shape(facts: "Facts", node: Node) -> Contents | None:
    length = facts.ints(node.inputs[0])
    if length is None or len(length) > 1 or (length and length[0] > 64):
        return None
    value = node.attributes.get("value", 0.0)
    value = value[0] if isinstance(value, tuple) else value
    return (Size(int(value)),) * (length[0] if length else 1) if isinstance(value, int) else None


def _reduce_prod(facts: "Facts", node: Node) -> Contents:
    total = Size(1)
    for value in facts.contents[node.inputs[0]]:
        total = times(total, value)
    return (total,)


MOVES: dict[str, Callable[["Facts", Node], Contents | None]] = {
    "Cast": _cast,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Gather": _gather,
    "Identity": _same,
    "ReduceProd": _reduce_prod,
    "Reshape": _same,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Squeeze": _same,
    "Unsqueeze": _same,
}
