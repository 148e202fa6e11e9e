"""Control flow that comes to values: a branch whose condition is known, and the loop that the standard defines Range by."""

from typing import Any

import numpy as np

from gristmill.formats.onnx.builder import Builder
from gristmill.formats.onnx.foreign import Foreign, Unsupported

NAME = "control flow"


def chosen(node: Foreign, graph: Builder) -> Any:
    """Return the branch that an If takes.

    Raises:
        Unsupported: it depends on what is computed.
    """
    condition = graph.value(node.inputs[0])
    if condition is None or condition.size != 1:
        raise Unsupported("a condition that is not constant")
    return node.get("then_branch" if condition.reshape(()) else "else_branch")


def progression(node: Foreign, delta: str, graph: Builder) -> list[str]:
    """Return the outputs of a loop that adds `delta` to its state and lists the states: start + delta * (0, 1, 2, ...)."""
    trips, condition, start = node.inputs
    zero, one = (graph.constant(np.asarray(number, np.int64), f"{node.name}.{number}") for number in (0, 1))
    if condition:
        trips = graph.emit("Where", [condition, trips, zero])[0]
    scalar = graph.constant(np.zeros(0, np.int64), f"{node.name}.scalar")
    trips = graph.emit("Reshape", [trips, scalar])[0]

    def after(steps: str, hint: str) -> str:
        run = graph.emit("Mul", [*graph.emit("CastLike", [steps, start]), delta])
        return graph.emit("Add", [start, *run], None, [hint])[0]

    listed = after(graph.emit("Range", [zero, trips, one])[0], node.outputs[1])
    return [after(trips, node.outputs[0]) if node.outputs[0] else "", listed]


def progresses_by(node: Foreign) -> str | None:
    """Return the name that the body of a Loop adds to its state at every step, if that is all that it does."""
    body = node.get("body")
    if len(node.inputs) != 3 or not node.inputs[0] or len(node.outputs) != 2 or len(body.initializer) or len(body.output) != 3:
        return None
    nodes = {proto.output[0]: proto for proto in body.node if len(proto.output) == 1}
    if len(body.input) != 3 or len(nodes) != len(body.node) or len(nodes) != 3:
        return None
    _, going, state = (value.name for value in body.input)
    still, added, listed = (nodes.get(value.name) for value in body.output)
    same = [("Identity", [going]), ("Identity", [state])]
    if [(proto.op_type, list(proto.input)) if proto is not None else None for proto in (still, listed)] != same:
        return None
    if added is None or added.op_type != "Add" or len(added.input) != 2 or added.input[0] != state:
        return None
    inner = {going, state, body.input[0].name, *nodes}
    return None if added.input[1] in inner else str(added.input[1])
