"""Changes of dtype: Cast, CastLike and BitCast."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gristmill.ops.axes import first
from gristmill.ops.dtypes import dtype_of, is_float, is_foreign
from gristmill.ops.op import Node, Op, Tape, TensorType, need
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

OPTIONS = {"saturate": int, "round_mode": str}  # both of float8 alone


def convert(x: Array, dtype: np.dtype[Any], saturate: bool = True, round_mode: str = "nearest") -> Array:
    """Return x in a dtype: floats truncated to integers, and, with `saturate`, clipped to the range of a float8 or float4."""
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore", invalid="ignore"):
        if is_foreign(dtype) and is_float(dtype) and dtype.itemsize == 1:
            return _to_float8(x.astype(np.float32), dtype, saturate, round_mode)
        if is_foreign(dtype) and not is_float(dtype):
            return _to_small_int(x, dtype)
        if is_foreign(x.dtype):
            x = x.astype(np.float32 if is_float(x.dtype) else np.int32)
        if x.dtype.kind == "f" and dtype.kind in "iu":
            return np.trunc(x).astype(np.int64 if dtype != np.uint64 else dtype).astype(dtype)
        return x.astype(dtype)


def _to_float8(x: Array, dtype: np.dtype[Any], saturate: bool, round_mode: str) -> Array:
    import ml_dtypes

    if "e8m0" in dtype.name:
        return _to_exponent(x, dtype, saturate, round_mode)
    limit = float(ml_dtypes.finfo(dtype).max)
    if saturate or "float8" not in dtype.name:
        return np.clip(x, -limit, limit).astype(dtype)
    return x.astype(dtype)  # beyond the largest value: infinity where the dtype has one, else NaN


def _to_exponent(x: Array, dtype: np.dtype[Any], saturate: bool, round_mode: str) -> Array:
    """Round to powers of two, of which e8m0 has those from 2^-127 to 2^127 and NaN: "up", "down", or "nearest" with ties up."""
    bits = np.abs(x).view(np.uint32)
    exponent, mantissa = (bits >> 23).astype(np.int32), bits & 0x7FFFFF
    below = exponent == 0  # subnormal: at most 2^-126
    if round_mode == "up":
        step = (mantissa > 0) & ~(below & (mantissa <= 0x400000))
    elif round_mode == "down":
        step = np.zeros(bits.shape, np.bool_)
    else:
        step = (mantissa >= 0x400000) & ~(below & (mantissa == 0x400000))
    code = exponent + step
    special = ~np.isfinite(x)
    code = np.where(special & ~np.isnan(x) & saturate, 254, code)
    code = np.minimum(code, 254) if saturate else code
    return np.where(np.isnan(x), 255, code).astype(np.uint8).view(dtype)


def _to_small_int(x: Array, dtype: np.dtype[Any]) -> Array:
    """int4 and int2 keep the low bits of what was truncated."""
    bits = int("".join(filter(str.isdigit, dtype.name)))
    whole = np.trunc(x.astype(np.float64)).astype(np.int64) if is_float(x.dtype) else x.astype(np.int64)
    kept = whole & ((1 << bits) - 1)
    if not dtype.name.startswith("u"):
        kept = np.where(kept >= 1 << (bits - 1), kept - (1 << bits), kept)
    return kept.astype(np.int8).astype(dtype)


def _options(node: Node) -> dict[str, Any]:
    mode = node.attributes.get("round_mode", "up")
    return {"saturate": bool(node.attributes.get("saturate", 1)), "round_mode": mode}


class Cast(Op):
    """Convert to the dtype that `to` names."""

    name = "Cast"
    arity = (1, 1)
    attributes = {"to": str, **OPTIONS}
    differentiable = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        need("to" in node.attributes, node, "attribute to is missing")
        return [TensorType(dtype_of(node.attributes["to"]), first(types).shape)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [convert(inputs[0], dtype_of(node.attributes["to"]), **_options(node))]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        source = tape.type(node.inputs[0]).dtype
        if tape.wants(node.inputs[0]) and is_float(source):
            tape.add(node.inputs[0], tape.emit("Cast", [dy], {"to": source.name}, domain=""))


class CastLike(Op):
    """Convert to the dtype of the second input."""

    name = "CastLike"
    arity = (2, 2)
    attributes = OPTIONS

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        assert types[1] is not None
        return [TensorType(types[1].dtype, first(types).shape)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [convert(inputs[0], inputs[1].dtype, **_options(node))]


class BitCast(Op):
    """The same bits as another dtype of the same width."""

    name = "BitCast"
    arity = (1, 1)
    attributes = {"to": str}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, dtype = first(types), dtype_of(node.attributes["to"])
        need(dtype.itemsize == x.dtype.itemsize, node, f"x is {x}, whose elements are not as wide as those of {dtype}")
        return [TensorType(dtype, x.shape)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [np.ascontiguousarray(inputs[0]).view(dtype_of(node.attributes["to"])).reshape(inputs[0].shape)]


OPERATORS = (Cast, CastLike, BitCast)
