"""QuantizeLinear, DequantizeLinear and the integer matrix products.

Integer products run on float BLAS where every sum is exact: NumPy's own integer products do not use BLAS.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gristmill.ops.dtypes import dtype_of
from gristmill.ops.op import Dim, Node, Op, TensorType, need, same_dim
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

INTEGERS = {
    "uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535), "int16": (-32768, 32767),
    "uint4": (0, 15), "int4": (-8, 7), "uint2": (0, 3), "int2": (-2, 1),
}  # fmt: skip
FLOATS = {  # the largest finite value
    "float8_e4m3fn": 448.0, "float8_e4m3fnuz": 240.0, "float8_e5m2": 57344.0, "float8_e5m2fnuz": 57344.0,
    "float4_e2m1fn": 6.0, "float6_e2m3fn": 7.5, "float6_e3m2fn": 28.0,
}  # fmt: skip


def exact_float(a: np.dtype[Any], b: np.dtype[Any], depth: int) -> Any:
    """Return the float dtype that sums `depth` products of two integer dtypes, less their zero points, exactly."""
    largest = depth * (2 ** (8 * a.itemsize) - 1) * (2 ** (8 * b.itemsize) - 1)
    return np.float32 if largest < 2**24 else np.float64


def zero_pointed(x: Array, zero: Array | None, dtype: Any, axis: int | None = None) -> Array:
    """Return x - zero in a float dtype; a vector of zero points lies along `axis`."""
    wide = x.astype(dtype)
    if zero is None or not np.any(zero):
        return wide
    if zero.size == 1:
        return wide - zero.reshape(()).astype(dtype)
    if zero.ndim == 1 and axis is not None:
        zero = zero.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])
    return wide - zero.astype(dtype)


def saturated(rounded: Array, dtype: np.dtype[Any]) -> Array:
    """Clip integers in a float dtype to the range of an integer dtype."""
    low, high = INTEGERS[dtype.name]
    with np.errstate(invalid="ignore"):
        clipped = np.clip(rounded, low, high)
        return clipped.astype(dtype) if hasattr(np, dtype.name) else clipped.astype(np.int8).astype(dtype)


def requantize(acc: Array, scale: Array, zero: Array) -> Array:
    """Return saturate(round half even(acc * scale) + zero) in the dtype of `zero`, the product in float32."""
    return saturated(np.rint(acc.astype(np.float32) * scale) + zero.astype(np.float32), zero.dtype)


def spread(value: Array, node: Node, shape: tuple[int, ...]) -> Array:
    """Return scales or zero points so that they broadcast over `shape`: one for all, one per index of the axis, or per block."""
    if value.size == 1:
        return value.reshape(())
    axis = node.attributes.get("axis", 1)
    need(-len(shape) <= axis < len(shape), node, f"axis {axis} of a value of shape {shape}")
    axis %= len(shape)
    block = node.attributes.get("block_size", 0)
    if not block:
        need(value.shape == (shape[axis],), node, f"scales {value.shape} along axis {axis} of {shape}")
        return value.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    blocks = (*shape[:axis], -(-shape[axis] // block), *shape[axis + 1 :])
    need(block > 0 and value.shape == blocks, node, f"scales {value.shape} of blocks of {block} along axis {axis} of {shape}")
    return np.repeat(value, block, axis)[(*(slice(None),) * axis, slice(shape[axis]))]


class QuantizeLinear(Op):
    """ONNX QuantizeLinear (opset 28): saturate(round(x / scale) + zero point), per tensor, per axis or per block.

    Attributes `output_dtype` and `precision` are names of dtypes; without a zero point and `output_dtype` codes are uint8.
    """

    name = "QuantizeLinear"
    arity = (2, 3)
    attributes = {"axis": int, "block_size": int, "output_dtype": str, "precision": str, "saturate": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, scale, zero = (*types, None)[:3]
        assert x is not None
        assert scale is not None
        said = node.attributes.get("output_dtype")
        dtype = zero.dtype if zero is not None else dtype_of(said or "uint8")
        need(not said or dtype.name == said, node, f"output_dtype {said} but the zero point is {zero}")
        need(dtype.name in INTEGERS or dtype.name in FLOATS, node, f"cannot quantise to {dtype}")
        return [TensorType(dtype, x.shape)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, scale, zero = (*inputs, None)[:3]
        dtype = zero.dtype if zero is not None else dtype_of(node.attributes.get("output_dtype") or "uint8")
        precision = dtype_of(node.attributes.get("precision") or scale.dtype.name)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio = x.astype(precision) / spread(scale, node, x.shape).astype(precision)
        if dtype.name in INTEGERS:
            rounded = np.rint(ratio.astype(np.float32))
            if zero is not None:
                rounded = rounded + spread(zero, node, x.shape).astype(np.float32)
            return [saturated(rounded, dtype)]
        ratio = ratio.astype(np.float32)
        if zero is not None:
            ratio = ratio + spread(zero, node, x.shape).astype(np.float32)
        if node.attributes.get("saturate", 1):
            ratio = np.clip(ratio, -FLOATS[dtype.name], FLOATS[dtype.name])
        return [ratio.astype(dtype)]


class DequantizeLinear(Op):
    """ONNX DequantizeLinear (opset 28): (x - zero point) * scale, per tensor, per axis or per block."""

    name = "DequantizeLinear"
    arity = (2, 3)
    attributes = {"axis": int, "block_size": int, "output_dtype": str}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, scale, zero = (*types, None)[:3]
        assert x is not None
        assert scale is not None
        need(zero is None or zero.dtype == x.dtype, node, f"x is {x} but the zero point is {zero}")
        return [TensorType(dtype_of(node.attributes.get("output_dtype") or scale.dtype.name), x.shape)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, scale, zero = (*inputs, None)[:3]
        dtype = dtype_of(node.attributes.get("output_dtype") or scale.dtype.name)
        wide = np.float32 if x.dtype.itemsize < 4 else np.float64  # which holds every difference
        y = x.astype(wide)
        if zero is not None and np.any(zero.astype(wide)):
            y = y - spread(zero, node, x.shape).astype(wide)
        with np.errstate(over="ignore", invalid="ignore"):
            return [(y.astype(np.float32) * spread(scale, node, x.shape).astype(np.float32)).astype(dtype)]


class DynamicQuantizeLinear(Op):
    """ONNX DynamicQuantizeLinear (opset 11): uint8 codes, scale and zero point of the range of x and 0."""

    name = "DynamicQuantizeLinear"
    arity = (1, 1)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = types[0]
        assert x is not None
        need(x.dtype == np.float32, node, f"float32 is needed, got {x}")
        return [TensorType(np.dtype(np.uint8), x.shape), TensorType(x.dtype, ()), TensorType(np.dtype(np.uint8), ())]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x = inputs[0]
        low, high = x.min(initial=np.float32(0)), x.max(initial=np.float32(0))
        scale = (high - low) / np.float32(255) if high > low else np.float32(1 / 255)
        zero = np.rint(np.clip(-low / scale, 0, 255)).astype(np.float32)
        codes = saturated(np.rint(x / scale) + zero, np.dtype(np.uint8))
        return [codes, np.asarray(scale, np.float32), np.asarray(zero).astype(np.uint8)]


def product_type(node: Node, a: TensorType | None, b: TensorType | None, dtype: Any) -> TensorType:
    """Return the type of a matrix product with NumPy's rules for vectors and leading dimensions."""
    assert a is not None
    assert b is not None
    need(len(a.shape) >= 1 and len(b.shape) >= 1, node, f"a is {a} and b is {b}: matrices are needed")
    left, right = (a.shape if len(a.shape) > 1 else (1, *a.shape)), (b.shape if len(b.shape) > 1 else (*b.shape, 1))
    need(same_dim(left[-1], right[-2]), node, f"a is {a} but b is {b}")
    rank = max(len(left), len(right)) - 2
    lead = zip((1,) * (rank - len(left) + 2) + left[:-2], (1,) * (rank - len(right) + 2) + right[:-2], strict=True)
    shape: list[Dim] = []
    for x, y in lead:
        need(x == 1 or y == 1 or same_dim(x, y), node, f"a is {a} but b is {b}")
        shape.append(y if x == 1 or (isinstance(x, str) and y != 1) else x)
    shape += [left[-2]] * (len(a.shape) > 1) + [right[-1]] * (len(b.shape) > 1)
    return TensorType(np.dtype(dtype), tuple(shape))


def integer_product(a: Array, b: Array, a_zero: Array | None, b_zero: Array | None) -> Array:
    """Return (a - a_zero) @ (b - b_zero) exactly, in a float dtype; vectors of zero points go with rows of a, columns of b."""
    dtype = exact_float(a.dtype, b.dtype, a.shape[-1])
    rows = -2 if a.ndim > 1 else None
    return zero_pointed(a, a_zero, dtype, rows) @ zero_pointed(b, b_zero, dtype, -1)


class MatMulInteger(Op):
    """ONNX MatMulInteger (opset 10): the exact int32 product of 8-bit matrices less their zero points."""

    name = "MatMulInteger"
    arity = (2, 4)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        return [product_type(node, types[0], types[1], np.int32)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        a, b, a_zero, b_zero = (*inputs, None, None)[:4]
        return [np.asarray(integer_product(a, b, a_zero, b_zero)).astype(np.int32)]


class QLinearMatMul(Op):
    """ONNX QLinearMatMul (opset 21): a MatMulInteger whose result is quantised to y's scale and zero point."""

    name = "QLinearMatMul"
    arity = (8, 8)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        zero = types[7]
        assert zero is not None
        need(zero.dtype.name in INTEGERS, node, f"cannot quantise to {zero.dtype}")
        return [product_type(node, types[0], types[3], zero.dtype)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = inputs
        acc = np.asarray(integer_product(a, b, a_zero, b_zero))
        rows = [v.astype(np.float32)[:, None] if v.ndim == 1 and v.size > 1 else v.astype(np.float32) for v in (a_scale, y_scale)]
        zero = y_zero[:, None] if y_zero.ndim == 1 and y_zero.size > 1 else y_zero
        scale = rows[0] * b_scale.astype(np.float32) / rows[1]
        return [requantize(acc, scale, zero).reshape(acc.shape)]


OPERATORS = (QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear, MatMulInteger, QLinearMatMul)
