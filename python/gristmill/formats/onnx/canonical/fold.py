"""Constants, what does nothing, and what is computed twice."""

from dataclasses import replace

import numpy as np

from gristmill.errors import GristmillError
from gristmill.formats.onnx.canonical.arrangement import target_of
from gristmill.formats.onnx.canonical.dims import Size, product
from gristmill.formats.onnx.canonical.facts import broadcast
from gristmill.formats.onnx.canonical.graph import Graph
from gristmill.formats.onnx.canonical.shapes import BINARY, permutation
from gristmill.model import Model
from gristmill.ops import Node, find
from gristmill.tensor import Dense
from gristmill.tensor.parts import Array

SMALL = 64  # elements of a constant that is compared with others
FOLDED = 1 << 16  # elements that a result may have beyond those of what it is computed from
FREE_BYTES = 16 << 20  # that results may take together, besides twice what the model's tensors take
KEPT = {"DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"}  # what the pass `quantized` reads


NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1, "And": True}


def fold(model: Model) -> Model:
    """Compute what depends on constants alone, extents of dimensions among them; drop what does nothing."""
    graph = Graph(model)
    left = FREE_BYTES + 2 * model.nbytes  # lest constants that double at every node fill the memory
    for node in graph.walk():
        if _known(graph, node):
            continue
        made = _computed(graph, node) if left > 0 else None
        if made is None:
            _dropped(graph, node)
        else:
            left -= made.nbytes
            graph.alias(node.name, graph.tensor(made, f"{node.name}.value"))
    return graph.done()


def _known(graph: Graph, node: Node) -> bool:
    """Replace shape arithmetic whose outcome is known."""
    values, shape = graph.facts.contents.get(node.name), graph.facts.shapes.get(node.name)
    if values is None or shape is None or len(node.outputs) > 1:
        return False
    flags = all(isinstance(value, bool) for value in values)
    if not flags and not all(isinstance(value, Size) and value.known for value in values):
        return False
    dtype = np.dtype(bool) if flags else graph.facts.dtypes.get(node.name)
    if dtype is None or len(values) != (shape[0].number if shape else 1):
        return False
    array = np.array([value if flags else value.number for value in values], dtype).reshape([dim.number for dim in shape])
    graph.alias(node.name, graph.tensor(array, f"{node.name}.value"))
    return True


def _computed(graph: Graph, node: Node) -> Array | None:
    """The output of a node whose inputs are constants, unless it is much larger than they are."""
    op = find(node)
    if node.op in KEPT or not op.pure or op.tensor_inputs or len(node.outputs) != 1 or not any(node.inputs):
        return None
    values = [graph.constant(name) if name else None for name in node.inputs]
    if any(value is None for name, value in zip(node.inputs, values, strict=True) if name):
        return None
    shape = graph.facts.shapes.get(node.name)
    largest = FOLDED + sum(value.size for value in dict(zip(node.inputs, values, strict=True)).values() if value is not None)
    if shape is None or not all(dim.known for dim in shape) or np.prod([float(dim.number) for dim in shape]) > largest:
        return None
    try:
        with np.errstate(all="ignore"):
            made = op.reference(node, *values)
    except (TypeError, ValueError, IndexError, ArithmeticError, GristmillError):
        return None  # it fails when it runs, if ever
    return np.asarray(made[0])


def _dropped(graph: Graph, node: Node) -> None:
    """Let readers of a node that changes nothing read its input; make the shape of a Reshape a constant."""
    if node.op in NOTHING and NOTHING[node.op](graph, node) and not any(map(graph.is_read, node.outputs[1:])):
        graph.alias(node.name, node.inputs[0])
    elif (kept := _kept(graph, node)) is not None:
        graph.alias(node.name, kept)
    elif node.op == "CastLike":
        _fix_dtype(graph, node)
    elif node.op == "Reshape" and graph.ints(node.inputs[1]) is None:
        _fix_target(graph, node)
    elif node.op in BINARY:
        _broadcast_late(graph, node)


def _same_shape(graph: Graph, node: Node) -> bool:
    """Whether what changes shapes leaves this one."""
    before, after = graph.shape(node.inputs[0]), graph.facts.shapes.get(node.name)
    return before is not None and before == after


def _same_dtype(graph: Graph, node: Node) -> bool:
    dtype = graph.dtype(node.inputs[0])
    return dtype is not None and dtype.name == node.attributes["to"]


def _in_order(graph: Graph, node: Node) -> bool:
    shape = graph.shape(node.inputs[0])
    return shape is not None and permutation(node, len(shape)) == tuple(range(len(shape)))


def _full_slice(graph: Graph, node: Node) -> bool:
    steps = graph.ints(node.input(4)) if node.input(4) else ()
    return _same_shape(graph, node) and steps is not None and all(step == 1 for step in steps)


NOTHING = {
    "Cast": _same_dtype,
    "Concat": lambda graph, node: len(node.inputs) == 1,
    "Dropout": lambda graph, node: not node.input(2) or graph.scalar(node.inputs[2]) == 0,
    "Expand": _same_shape,
    "Flatten": _same_shape,
    "Identity": lambda graph, node: True,
    "Reshape": _same_shape,
    "Slice": _full_slice,
    "Squeeze": _same_shape,
    "Transpose": _in_order,
}


def _kept(graph: Graph, node: Node) -> str | None:
    """The operand that a node passes on, where a constant makes it do no more."""
    if node.op == "Where":
        return _chosen(graph, node)
    return _neutral(graph, node) if node.op in NEUTRAL else None


def _neutral(graph: Graph, node: Node) -> str | None:
    """The other operand of x + 0, x - 0, x * 1, x / 1 and true & x."""
    wanted = NEUTRAL[node.op]
    made = graph.facts.shapes.get(node.name)
    for name, other in (node.inputs[::-1], node.inputs) if node.op in ("Add", "Mul", "And") else (node.inputs[::-1],):
        value = graph.constant(name)
        if value is not None and made is not None and graph.shape(other) == made and value.size and (value == wanted).all():
            return other
    return None


def _chosen(graph: Graph, node: Node) -> str | None:
    """What a Where with a constant condition chooses."""
    value, made = graph.constant(node.inputs[0]), graph.facts.shapes.get(node.name)
    if value is None or made is None or not value.size or not (value == value.reshape(-1)[0]).all():
        return None
    name = node.inputs[1 if value.reshape(-1)[0] else 2]
    return name if graph.shape(name) == made else None


def _fix_dtype(graph: Graph, node: Node) -> None:
    dtype, value = graph.dtype(node.inputs[1]), graph.constant(node.inputs[0])
    if dtype is None or dtype.kind not in "fiub":
        return
    if value is not None and value.size == 1 and not node.attributes:
        graph.alias(node.name, graph.tensor(value.astype(dtype), f"{node.name}.value"))
    else:
        graph.put(Node("Cast", node.inputs[:1], node.outputs, {**node.attributes, "to": dtype.name}))


def _fix_target(graph: Graph, node: Node) -> None:
    before, after = graph.shape(node.inputs[0]), graph.facts.shapes.get(node.name)
    target = target_of(before, after) if before is not None and after is not None else None
    # What -1 stands for must be what the node was told, lest a reshape that must fail succeeds.
    if target is not None and (-1 not in target or product(before or ()) == product(after or ())):
        shape = graph.tensor(np.array(target, np.int64), f"{node.name}.shape")
        graph.put(Node("Reshape", (node.inputs[0], shape), node.outputs))


def _broadcast_late(graph: Graph, node: Node) -> None:
    """Read what an Expand reads where the operator itself broadcasts as far."""
    made = graph.facts.shapes.get(node.name)
    for at, name in enumerate(node.inputs):
        expand = graph.maker(name, "Expand") if name else None
        if expand is None or made is None:
            continue
        inputs = (*node.inputs[:at], expand.inputs[0], *node.inputs[at + 1 :])
        shapes = [graph.shape(value) for value in inputs if value]
        if all(shape is not None for shape in shapes) and broadcast([shape for shape in shapes if shape is not None]) == made:
            node = replace(node, inputs=inputs)
            graph.put(node)


def share(model: Model) -> Model:
    """Compute once what is computed twice; keep small constants once."""
    graph = Graph(model)
    constants: dict[tuple[object, ...], str] = {}
    for name, tensor in model.tensors.items():
        if isinstance(tensor, Dense) and tensor.array.size <= SMALL and name not in model.outputs:
            first = constants.setdefault((tensor.dtype.str, tensor.shape, tensor.array.tobytes()), name)
            graph.alias(name, first)
    seen: dict[tuple[object, ...], Node] = {}
    for node in graph.walk():
        if not find(node).pure:
            continue
        key = (node.domain, node.op, node.inputs, tuple(sorted(node.attributes.items())), len(node.outputs))
        same = seen.setdefault(key, node)
        if same is not node:
            for name, other in zip(node.outputs, same.outputs, strict=True):
                graph.alias(name, other)
    return graph.done()
