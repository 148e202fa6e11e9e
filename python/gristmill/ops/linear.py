"""Linear: y = activation(x @ W.T + bias) + residual, and the two products of its gradient.

Our fused form of ONNX Gemm and MatMul + Add. W is [n, k] as torch stores it. `products` has the kernels for a weight's kind.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gristmill import _core
from gristmill.ops.activation import FUNCTIONS, evaluate
from gristmill.ops.op import GRAD, OWN, Binder, Node, Op, Tape, TensorType, as_rows, need, same_dim, same_type
from gristmill.ops.products import candidates
from gristmill.ops.products.dense import is_float_in_memory, multiplies_bf16, operand_panels
from gristmill.ops.products.product import static_scale
from gristmill.tensor import Bitmask, Int4, Sparse, Tensor, has_gains, is_int8
from gristmill.tensor.parts import Array


class Linear(Op):
    """Inputs x [..., k], weight [n, k], optional bias [n], optional residual [..., n]; output [..., n].

    With `input_scale` and `input_zero_point`, x is first rounded to (q - zero_point) * scale, where
    q = clip(round half even(x / scale) + zero_point, 0, 255), as ONNX QuantizeLinear and DequantizeLinear do.
    """

    name = "Linear"
    domain = OWN
    arity = (2, 4)
    attributes = {
        "activation": str,  # set by fusion only
        "input_scale": (int, float),
        "input_zero_point": int,  # 128 where it is absent
    }
    differentiable = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, weight = types[0], types[1]
        assert x is not None
        assert weight is not None
        need(constants[1] is not None, node, f"its weight '{node.inputs[1]}' must be a tensor of the model")
        need(len(weight.shape) == 2 and len(x.shape) >= 1, node, f"cannot multiply {x} by a weight {weight}")
        n, k = weight.shape
        need(x.dtype == weight.dtype, node, f"x is {x} but weight '{node.inputs[1]}' is {weight}: the dtypes must be equal")
        need(
            same_dim(x.shape[-1], k),
            node,
            f"x '{node.inputs[0]}' is {x} but weight '{node.inputs[1]}' is {weight}: the last dimensions must be equal",
        )
        out = TensorType(x.dtype, (*x.shape[:-1], n))
        bias = types[2] if len(types) > 2 else None
        fits = bias is None or bias == TensorType(x.dtype, (n,))
        need(fits, node, f"bias '{node.input(2)}' is {bias} but the weight gives {n} outputs")
        residual = types[3] if len(types) > 3 else None
        need(residual is None or same_type(residual, out), node, f"residual {residual} does not fit the output {out}")
        activation = node.attributes.get("activation")
        need(activation is None or activation in FUNCTIONS, node, f"unknown activation {activation!r}; known: {list(FUNCTIONS)}")
        if "input_scale" in node.attributes or "input_zero_point" in node.attributes:
            scale, zero_point = static_scale(node) or (0.0, 0)
            fits = 2.0**-100 <= scale <= 2.0**100 and 0 <= zero_point <= 255
            need(
                fits,
                node,
                f"input_scale {scale} must lie within 2**-100 and 2**100, input_zero_point {zero_point} within 0 and 255",
            )
        return [out]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, weight, bias, residual = (*inputs, None, None)[:4]
        static = static_scale(node)
        y = (x if static is None else rounded(x, *static)) @ weight.T
        if bias is not None:
            y = y + bias
        y = evaluate(node.attributes.get("activation"), y)
        return [y if residual is None else y + residual]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        x, weight, bias = node.input(0), node.input(1), node.input(2)
        need("activation" not in node.attributes and not node.input(3), node, "differentiate before fusing")
        if tape.wants(x):
            tape.add(x, tape.emit("LinearGradInput", [dy, weight]))
        if tape.wants(weight):
            tape.add(weight, tape.emit("LinearGradWeight", [dy, x, weight]))
        if bias and tape.wants(bias):
            tape.add(bias, tape.emit("SumRows", [dy]))

    def separable(
        self, node: Node, split: Sequence[bool], types: Sequence[TensorType | None], made: Sequence[TensorType]
    ) -> bool:
        residual = len(split) < 4 or not node.input(3) or split[3]
        return split[0] and residual and len(made[0].shape) > 1

    def bind(self, node: Node, binder: Binder) -> bool:
        products = candidates(node, binder)
        if products:
            binder.choose(node, products).bind(node, binder)
        return bool(products)


def rounded(x: Array, scale: float, zero_point: int) -> Array:
    """Return what the codes of x with a static scale stand for."""
    codes = np.clip(np.rint(np.nan_to_num(x / np.float32(scale), nan=0.0)) + np.float32(zero_point), 0, 255)
    return (codes - np.float32(zero_point)) * np.float32(scale)


def matrix_shape(node: Node, weight: Tensor | None) -> tuple[int, int]:
    """Return the [n, k] of a weight that must be a matrix of the model."""
    need(weight is not None and len(weight.shape) == 2, node, "its weight must be a matrix and a tensor of the model")
    assert weight is not None
    return weight.shape[0], weight.shape[1]


class LinearGradInput(Op):
    """dx [..., k] = dy [..., n] @ W [n, k]."""

    name = "LinearGradInput"
    domain = GRAD
    arity = (2, 2)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        dy, weight = types
        assert dy is not None
        n, k = matrix_shape(node, constants[1])
        fits = weight is not None and dy.dtype == weight.dtype and len(dy.shape) >= 1 and same_dim(dy.shape[-1], n)
        need(fits, node, f"dy is {dy} but the weight is {weight}")
        return [TensorType(dy.dtype, (*dy.shape[:-1], k))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dy, weight = inputs
        return [dy @ weight]

    def bind(self, node: Node, binder: Binder) -> bool:
        if binder.kind(node.inputs[1]) == "int4":
            return False
        dy, dx = binder.rows(node.inputs[0]), binder.output(node.outputs[0])
        dy, dx = dy.reshape(*as_rows(dy.shape)), dx.reshape(*as_rows(dx.shape))
        n, k = binder.tensor(node.inputs[1]).shape
        scratch = binder.scratch(_core.linear_scratch(dy.shape[0], n, k, binder.threads))
        weight = node.inputs[1]
        bf16 = multiplies_bf16(weight, binder) and is_float_in_memory(weight, binder)
        kernel = _core.linear_grad_input_bf16 if bf16 else _core.linear_grad_input
        panels = operand_panels(binder, weight, dy.shape[0], n, k, bf16)
        binder.step(kernel, dy, binder.weight(weight), dx, scratch, panels)
        return True


class LinearGradWeight(Op):
    """The gradient of what trains in W: dW = dy.T @ x for a dense weight, its stored positions for a sparse one, or the
    gradient of the gains on the scales for an int8 or int4 one (straight through the rounding)."""

    name = "LinearGradWeight"
    domain = GRAD
    arity = (3, 3)
    tensor_inputs = (2,)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        dy, x, weight = types
        assert dy is not None
        assert x is not None
        n, k = matrix_shape(node, constants[2])
        assert constants[2] is not None
        fits = (
            x.dtype == np.float32
            and len(x.shape) >= 1
            and same_type(dy, TensorType(x.dtype, (*x.shape[:-1], n)))
            and same_dim(x.shape[-1], k)
        )
        need(fits, node, f"dy is {dy} and x is {x} but the weight is {weight}")
        return [TensorType(np.dtype(np.float32), constants[2].trainable.shape)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dy, x, weight = inputs
        return [project(weight, dy.reshape(as_rows(dy.shape)).T @ x.reshape(as_rows(x.shape)))]

    def bind(self, node: Node, binder: Binder) -> bool:
        dy, x, grad = binder.rows(node.inputs[0]), binder.rows(node.inputs[1]), binder.output(node.outputs[0])
        dy, x = dy.reshape(*as_rows(dy.shape)), x.reshape(*as_rows(x.shape))
        tensor = binder.tensor(node.inputs[2])
        if isinstance(tensor, Int4):
            bind_gain_gradient(node, binder, tensor, dy, grad)
            return True
        n, k = tensor.shape
        scratch = binder.scratch(_core.linear_scratch(dy.shape[0], n, k, binder.threads))
        weight = node.inputs[2]
        bf16 = multiplies_bf16(weight, binder) and is_float_in_memory(weight, binder)
        kernel = _core.linear_grad_weight_bf16 if bf16 else _core.linear_grad_weight
        panels = operand_panels(binder, weight, min(n, dy.shape[0]), dy.shape[0], k, bf16)
        binder.step(kernel, dy, x, binder.weight(weight), grad, scratch, panels)
        if is_int8(tensor):  # the kernel gives the gradient of the scales; a gain multiplies them
            binder.step(_core.multiply, grad, tensor.scale, grad)  # type: ignore[union-attr]
        return True


def bind_gain_gradient(node: Node, binder: Binder, tensor: Int4, dy: Any, grad: Any) -> None:
    """Append the gradient of gains on the rows of W: the sum over m of dy * (x @ W.T without gains). No matrix dW is made."""
    codes, scales, offsets, m = binder.groups(node.inputs[1], tensor.group)
    product = binder.scratch(m * tensor.shape[0], np.float32).reshape(*dy.shape)
    packed = binder.packed(node.inputs[2], _core.pack_int4)
    binder.step(_core.linear_int4, codes, scales, offsets, m, packed, None, product, None, None, None)
    binder.step(_core.multiply, dy, product, product)
    binder.step(_core.column_sum, product, grad)


def project(weight: Tensor, gradient: Array) -> Array:
    """Return the gradient of a weight's trainable part from the gradient [n, k] of the dense matrix."""
    if has_gains(weight):
        return np.einsum("nk,nk->n", gradient, weight.dense())
    if isinstance(weight, Bitmask):
        return gradient[weight.mask]
    if not isinstance(weight, Sparse):
        return gradient
    columns = weight.block[1]
    elements = weight.index[:, None, None] * columns + np.arange(columns)
    return gradient[weight.rows_of_values, elements]


class SumRows(Op):
    """The sum over all leading dimensions: the gradient of a bias."""

    name = "SumRows"
    domain = GRAD
    arity = (1, 1)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = types[0]
        assert x is not None
        need(len(x.shape) >= 1, node, f"{x} has no last dimension")
        return [TensorType(x.dtype, x.shape[-1:])]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [inputs[0].reshape(as_rows(inputs[0].shape)).sum(axis=0)]

    def bind(self, node: Node, binder: Binder) -> bool:
        x = binder.rows(node.inputs[0])
        binder.step(_core.column_sum, x.reshape(*as_rows(x.shape)), binder.output(node.outputs[0]))
        return True


OPERATORS = (Linear, LinearGradInput, LinearGradWeight, SumRows)
