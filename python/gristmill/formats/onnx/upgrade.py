"""Older forms of operators rewritten to the newest: a table of rules, each for the opsets before one.

A rule takes a node and returns it changed, or the values that stand for its outputs where it took other operators.
Facts: https://onnx.ai/onnx/operators/ (the changes between versions of each operator).
"""

from collections.abc import Callable, Sequence

import numpy as np

from gristmill.formats.onnx.builder import Builder
from gristmill.formats.onnx.foreign import Foreign, Unsupported
from gristmill.formats.onnx.tensors import NAMES

Rule = Callable[[Foreign, Builder], Foreign | list[str]]
NEWEST = 28  # the opset whose meaning the rules lead to


def upgrade(node: Foreign, graph: Builder) -> Foreign | list[str]:
    """Return a node of the newest opset, or the values that stand for its outputs.

    Raises:
        Unsupported: its old form has no equal.
    """
    for before, rule in RULES.get(node.op, ()) if not node.domain else ():
        if node.version < before:
            changed = rule(node, graph)
            if not isinstance(changed, Foreign):
                return changed
            node = changed
    return node


def _integers(graph: Builder, values: Sequence[int], hint: str) -> str:
    return graph.constant(np.asarray(values, np.int64), hint)


def _rank(node: Foreign, graph: Builder, value: str) -> int:
    rank = graph.rank(value)
    if rank is None:
        raise Unsupported(f"opset {node.version}: the rank of '{value}' depends on values")
    return rank


def _float_dtype(node: Foreign, graph: Builder) -> np.dtype[np.generic]:
    kind = graph.types[node.inputs[0]]
    if not kind.known:
        raise Unsupported(f"opset {node.version}: the dtype of '{node.inputs[0]}' depends on values")
    return kind.dtype


def drop(*names: str) -> Rule:
    """A rule for attributes that meant nothing."""
    return lambda node, graph: node.having(**dict.fromkeys(names))


def default(name: str, value: object) -> Rule:
    """A rule for a default that changed."""
    return lambda node, graph: node if name in node.attributes else node.having(**{name: value})


def attribute_to_input(name: str, position: int, scalar: bool = False) -> Rule:
    """A rule for a list of integers that became an input."""

    def rule(node: Foreign, graph: Builder) -> Foreign:
        if node.get(name) is None:
            return node
        values = node.get(name)
        constant = graph.constant(np.asarray(values, np.int64).reshape(() if scalar else (-1,)), f"{node.name}.{name}")
        inputs = [*node.inputs[:position], *[""] * (position - len(node.inputs)), constant, *node.inputs[position + 1 :]]
        return node.having(**{name: None}).taking(*inputs)

    return rule


def rename(op: str) -> Rule:
    """A rule for an operator that got another name."""
    return lambda node, graph: node.renamed(op)


def broadcast_6(node: Foreign, graph: Builder) -> Foreign:
    """Before opset 7 the second input was broadcast only on demand, from an axis on."""
    axis = node.get("axis")
    changed = node.having(broadcast=None, axis=None, consumed_inputs=None)
    if not node.get("broadcast", 0) or axis is None:
        return changed
    a, b = node.inputs
    trailing = _rank(node, graph, a) - axis % max(_rank(node, graph, a), 1) - _rank(node, graph, b)
    if trailing <= 0:
        return changed
    axes = _integers(graph, range(-trailing, 0), f"{node.name}.axes")
    return changed.taking(a, graph.emit("Unsqueeze", [b, axes])[0])


def flattened(node: Foreign, graph: Builder) -> Foreign | list[str]:
    """Before opset 13 Softmax, LogSoftmax and Hardmax worked on all dimensions from an axis on, 1 by default."""
    x, axis = node.inputs[0], node.get("axis", 1)
    rank = graph.rank(x)
    if rank is not None and axis in (rank - 1, -1):
        return node.having(axis=-1)
    flat = graph.emit("Flatten", [x], {"axis": axis})
    made = graph.emit(node.op, flat, {"axis": 1})
    return graph.emit("Reshape", [*made, *graph.emit("Shape", [x])], None, node.outputs)


def batch_normalization(node: Foreign, graph: Builder) -> Foreign:
    """Inference only: before opset 14 that is said by the outputs, before 7 by is_test."""
    spatial, is_test = node.get("spatial", 1), node.get("is_test", 0)
    if not spatial:
        raise Unsupported("attribute spatial=0")
    training = node.version < 7 and not is_test and sum(map(bool, node.outputs)) > 1
    if training or sum(map(bool, node.outputs)) > 1:
        raise Unsupported("outputs that only training makes")
    changed = node.having(spatial=None, is_test=None, consumed_inputs=None, momentum=None)
    return Foreign(changed.op, "", changed.version, changed.name, changed.inputs, changed.outputs[:1], changed.attributes)


def clip(node: Foreign, graph: Builder) -> Foreign:
    dtype = _float_dtype(node, graph)
    bounds = [graph.constant(np.asarray(node.get(key), dtype), f"{node.name}.{key}") if key in node.attributes else ""
              for key in ("min", "max")]  # fmt: skip
    return node.having(min=None, max=None, consumed_inputs=None).taking(node.inputs[0], *bounds)


def dropout(node: Foreign, graph: Builder) -> Foreign | list[str]:
    """At inference dropout does nothing, and its mask keeps all."""
    if node.version < 7 and not node.get("is_test", 0) and node.get("ratio", 0.5) and len(node.outputs) > 1 and node.outputs[1]:
        raise Unsupported("training (is_test=0)")
    training = node.input(2)
    if training:
        known = graph.value(training)
        if known is None or known.any():
            return node
    x = node.inputs[0]
    if len(node.outputs) == 1 or not node.outputs[1]:
        return [x]
    dtype = np.bool_ if node.version >= 10 else _float_dtype(node, graph)
    kept = graph.constant(np.ones((), dtype), f"{node.name}.kept")
    return [x, *graph.emit("Expand", [kept, *graph.emit("Shape", [x])], None, [node.outputs[1]])]


def cast_5(node: Foreign, graph: Builder) -> Foreign:
    """Before opset 6 `to` was the name of a TensorProto.DataType."""
    aliases = {"float": "float32", "double": "float64"}
    name = node.get("to", "").lower()
    if aliases.get(name, name) not in NAMES.values():
        raise Unsupported(f"to={name}")
    return node.having(to=aliases.get(name, name))


def pad_1(node: Foreign, graph: Builder) -> Foreign:
    return node.having(paddings=None, pads=node.get("paddings"))


def pad_10(node: Foreign, graph: Builder) -> Foreign:
    """Before opset 11 pads and value were attributes."""
    inputs = [node.inputs[0], _integers(graph, node.get("pads", ()), f"{node.name}.pads")]
    if node.get("value", 0.0):
        inputs.append(graph.constant(np.asarray(node.get("value"), _float_dtype(node, graph)), f"{node.name}.value"))
    return node.having(pads=None, value=None).taking(*inputs)


def slice_9(node: Foreign, graph: Builder) -> Foreign:
    names = ("starts", "ends", "axes")
    inputs = [_integers(graph, node.get(key), f"{node.name}.{key}") for key in names if key in node.attributes]
    return node.having(**dict.fromkeys(names)).taking(node.inputs[0], *inputs)


def split_17(node: Foreign, graph: Builder) -> Foreign:
    """Before opset 18 the number of equal parts was that of the outputs."""
    return node if node.input(1) else node.having(num_outputs=len(node.outputs))


def resize_10(node: Foreign, graph: Builder) -> Foreign:
    """Before opset 11 coordinates were asymmetric, and the nearest sample was the one before."""
    changed = node.having(coordinate_transformation_mode="asymmetric", nearest_mode="floor").renamed("Resize")
    mode = node.get("mode", "nearest")
    return changed.having(mode="linear" if mode in ("linear", "bilinear") else mode).taking(node.inputs[0], "", node.inputs[1])


def upsample_1(node: Foreign, graph: Builder) -> Foreign:
    if "height_scale" not in node.attributes:
        return node
    scales = (1.0, 1.0, node.get("height_scale"), node.get("width_scale"))
    return node.having(height_scale=None, width_scale=None, scales=scales)


def upsample_8(node: Foreign, graph: Builder) -> Foreign:
    scales = graph.constant(np.asarray(node.get("scales"), np.float32), f"{node.name}.scales")
    return node.having(scales=None).taking(node.inputs[0], scales)


def resize_inputs(node: Foreign, graph: Builder) -> Foreign:
    """Exporters give an empty tensor for scales or roi where sizes decide."""
    if node.get("coordinate_transformation_mode") == "tf_half_pixel_for_nn":
        raise Unsupported("coordinate_transformation_mode=tf_half_pixel_for_nn")
    inputs = list(node.inputs)
    for index in range(1, len(inputs)):
        kind = graph.types[inputs[index]] if inputs[index] else None
        if kind is not None and kind.known and kind.shape == (0,):
            inputs[index] = ""
    return node.taking(*inputs)


def roi_align_15(node: Foreign, graph: Builder) -> Foreign:
    return default("coordinate_transformation_mode", "output_half_pixel")(node, graph)  # type: ignore[return-value]


def group_normalization_20(node: Foreign, graph: Builder) -> Foreign:
    """Before opset 21 there was a scale and a bias for each group, not for each channel."""
    x, scale, bias = node.inputs
    groups = node.get("num_groups")
    channels = graph.emit("Shape", [x], {"start": 1, "end": 2})
    each = graph.emit("Div", [*channels, _integers(graph, [groups], f"{node.name}.groups")])
    table = graph.emit("Concat", [_integers(graph, [groups], f"{node.name}.groups"), *each], {"axis": 0})
    column, flat = _integers(graph, [-1, 1], f"{node.name}.column"), _integers(graph, [-1], f"{node.name}.flat")

    def spread(value: str) -> str:
        wide = graph.emit("Expand", [*graph.emit("Reshape", [value, column]), *table])
        return graph.emit("Reshape", [*wide, flat])[0]

    return node.taking(x, spread(scale), spread(bias))


def prelu_6(node: Foreign, graph: Builder) -> Foreign:
    """Before opset 7 a slope was one for all or one for each channel."""
    x, slope = node.inputs
    trailing = _rank(node, graph, x) - 2
    changed = node.having(consumed_inputs=None)
    if graph.types[slope].shape in ((), (1,)) or trailing <= 0:
        return changed
    axes = _integers(graph, range(1, trailing + 1), f"{node.name}.axes")
    return changed.taking(x, graph.emit("Unsqueeze", [slope, axes])[0])


def gemm_6(node: Foreign, graph: Builder) -> Foreign:
    return node.having(broadcast=None)


def tile_5(node: Foreign, graph: Builder) -> Foreign:
    raise Unsupported("tiles along one axis, as before opset 6")


def concat_3(node: Foreign, graph: Builder) -> Foreign:
    return default("axis", 1)(node, graph)  # type: ignore[return-value]


def integer_p(node: Foreign, graph: Builder) -> Foreign:
    """LpPool and GlobalLpPool took p as a float in their first version."""
    return node.having(p=int(node.get("p", 2.0)))


def grid_sample_19(node: Foreign, graph: Builder) -> Foreign:
    names = {"bilinear": "linear", "bicubic": "cubic"}
    mode = node.get("mode", "bilinear")
    return node.having(mode=names.get(mode, mode))


def dft_19(node: Foreign, graph: Builder) -> Foreign:
    """Before opset 20 the axis was an attribute, 1 by default."""
    axis = graph.constant(np.asarray(node.get("axis", 1), np.int64), f"{node.name}.axis")
    return node.having(axis=None).taking(node.inputs[0], node.input(1), axis)


def constant_of_shape(node: Foreign, graph: Builder) -> list[str]:
    """An Expand of one value."""
    value = node.get("value", np.zeros(1, np.float32))
    if value.size != 1:
        raise Unsupported("a value of several elements")
    return graph.emit("Expand", [graph.constant(value.reshape(()), f"{node.name}.value"), node.inputs[0]], None, node.outputs)


def reshape_4(node: Foreign, graph: Builder) -> Foreign:
    return attribute_to_input("shape", 1)(node.having(consumed_inputs=None), graph)  # type: ignore[return-value]


def recurrent_6(node: Foreign, graph: Builder) -> Foreign:
    return node.having(output_sequence=None)


_AXES = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSumSquare",
)  # fmt: skip
_CONSUMED = (
    "Abs", "Ceil", "Elu", "Exp", "Floor", "HardSigmoid", "InstanceNormalization", "LeakyRelu", "Log", "Max", "Mean", "Min", "Neg",
    "Reciprocal", "Relu", "Selu", "Sigmoid", "Sqrt", "Sum", "Tanh",
)  # fmt: skip
_BROADCAST = ("Add", "And", "Div", "Equal", "Greater", "Less", "Mul", "Or", "Pow", "Sub", "Xor")

# (before this opset, rule), in rising order
RULES: dict[str, tuple[tuple[int, Rule], ...]] = {
    **{op: ((6, drop("consumed_inputs")),) for op in _CONSUMED},
    **dict.fromkeys(_BROADCAST, ((7, broadcast_6),)),
    **{op: ((18, attribute_to_input("axes", 1)),) for op in _AXES},
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), ((13, flattened),)),
    "ReduceSum": ((13, attribute_to_input("axes", 1)),),
    "Squeeze": ((13, attribute_to_input("axes", 1)),),
    "Unsqueeze": ((13, attribute_to_input("axes", 1)),),
    "BatchNormalization": ((14, batch_normalization),),
    "Cast": ((6, cast_5),),
    "Clip": ((11, clip),),
    "Concat": ((4, concat_3),),
    "ConstantOfShape": ((NEWEST + 1, constant_of_shape),),
    "DFT": ((20, dft_19),),
    "Dropout": ((NEWEST + 1, dropout),),
    "Gemm": ((7, gemm_6),),
    "GlobalLpPool": ((2, integer_p),),
    "GridSample": ((20, grid_sample_19),),
    "GroupNormalization": ((21, group_normalization_20),),
    "LpPool": ((2, integer_p),),
    "PRelu": ((7, prelu_6),),
    "Pad": ((2, pad_1), (11, pad_10)),
    "RNN": ((7, recurrent_6),),
    "GRU": ((7, recurrent_6),),
    "LSTM": ((7, recurrent_6),),
    "Reshape": ((5, reshape_4),),
    "Resize": ((11, resize_10), (NEWEST + 1, resize_inputs)),
    "RoiAlign": ((16, roi_align_15),),
    "Scatter": ((NEWEST + 1, rename("ScatterElements")),),
    "Selu": ((6, drop("consumed_inputs")), (6, default("alpha", 1.6732)), (6, default("gamma", 1.0507))),
    "Slice": ((10, slice_9),),
    "Split": ((13, attribute_to_input("split", 1)), (18, split_17)),
    "Tile": ((6, tile_5),),
    "TopK": ((10, attribute_to_input("k", 1)),),
    "Upsample": ((7, upsample_1), (9, upsample_8), (NEWEST + 1, resize_10)),
}
