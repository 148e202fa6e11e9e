"""Products with every element of the weight: float32, bf16, and int8 in register tiles.

A sparse weight may run so too, its zeros filled in when it is packed: at few rows, or with few zeros, that is faster. It gives
the bits of its own form: int32 sums are exact, over the same codes; a float32 sum is one chain of fused multiply-adds in
ascending k in both, to which a zero adds nothing (unless what it is multiplied with is not finite).
"""

from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any

import numpy as np

from gristmill import _core
from gristmill.ops.op import Binder, Node
from gristmill.ops.products.product import Product, Size, epilogue, is_constant, matrices, results, static_scale
from gristmill.tensor import BFloat16, Bitmask, Dense, Quantized, Sparse, Tensor
from gristmill.tensor.parts import Array

PACKED_FROM = 256  # results along the other side that make a run's own packing of an operand worth its time
TILE_DEPTH = 66311  # the longest sum of products of a byte and an int8 that an int32 holds


@dataclass(frozen=True)
class DenseFloat(Product):
    """Panels of a float32 weight, or of one rounded to bf16, against packed rows."""

    bf16: bool

    def takes(self, node: Node, binder: Binder) -> bool:
        weight = node.inputs[1]
        if static_scale(node):
            return False
        if binder.tensor(weight).kind not in ("dense", "bf16"):
            return not self.bf16 and is_constant(node, binder) and expands(binder.tensor(weight), "float32")
        bf16 = multiplies_bf16(weight, binder) and (is_constant(node, binder) or is_float_in_memory(weight, binder))
        return bf16 == self.bf16

    def bind(self, node: Node, binder: Binder) -> None:
        x, residual, out = matrices(node, binder, "rows")
        weight, m = node.inputs[1], x.shape[0]
        n, k = binder.tensor(weight).shape
        kernel, pack = (_core.linear_bf16, _core.pack_bf16) if self.bf16 else (_core.linear, _core.pack_dense)
        constant = is_constant(node, binder)
        source = binder.packed(weight, pack) if constant else binder.weight(weight)
        scratch = binder.scratch(_core.linear_scratch(m, n, k, binder.threads))
        panels = None if constant else operand_panels(binder, weight, m, k, n, self.bf16)
        binder.step(kernel, x, source, out, *epilogue(node, binder, residual), scratch, panels)

    def nbytes(self, tensor: Tensor, m: int) -> int:
        n, k = tensor.shape
        return n * k * (2 if self.bf16 else 4) + 4 * m * k

    def example(self, n: int, k: int, share: float, seed: int) -> Tensor:
        return BFloat16.from_dense(normal(n, k, seed)) if self.bf16 else Dense(normal(n, k, seed))

    def work(self, size: Size) -> tuple[float, ...]:
        return tiles(size)


@dataclass(frozen=True)
class DenseInt8(Product):
    """Panels of int8 codes against groups of 12 rows of codes."""

    def takes(self, node: Node, binder: Binder) -> bool:
        tensor = binder.tensor(node.inputs[1])
        return tensor.kind == "quantized" or (is_constant(node, binder) and expands(tensor, "int8"))

    def bind(self, node: Node, binder: Binder) -> None:
        weight = node.inputs[1]
        symmetric = binder.tensor(weight).kind == "sparse"  # as the products with its blocks quantise
        codes, scales, zeros, m = binder.codes(node.inputs[0], "tile", static_scale(node), symmetric)
        residual, out = results(node, binder, "rows")
        packed, scale = binder.packed(weight, _core.pack_int8), binder.scale(weight)
        binder.step(_core.linear_int8, codes, scales, zeros, m, packed, scale, out, *epilogue(node, binder, residual))

    def nbytes(self, tensor: Tensor, m: int) -> int:
        n, k = tensor.shape
        return n * k + 4 * n + m * k

    def example(self, n: int, k: int, share: float, seed: int) -> Tensor:
        return Quantized.from_dense(normal(n, k, seed))

    def work(self, size: Size) -> tuple[float, ...]:
        return tiles(size)


def tiles(size: Size) -> tuple[float, ...]:
    """Work of register tiles of 12 rows: a call, multiplications, loads of the weight, results, packing of the rows."""
    weights = size.n * size.k
    return 1.0, weights * size.m, weights * ceil(size.m / 12), size.m * size.n, size.m * size.k


def normal(n: int, k: int, seed: int) -> Array:
    """Return a matrix of random values to measure with."""
    return np.random.default_rng(seed).standard_normal((n, k), np.float32)


def expands(tensor: Tensor, dtype: str) -> bool:
    """Whether a sparse weight of this dtype gives the same bits with its zeros filled in."""
    if not isinstance(tensor, (Sparse, Bitmask)) or tensor.values.dtype != dtype:
        return False
    return sums_in_chains(_core.isa_generation()) if dtype == "float32" else tensor.shape[1] <= TILE_DEPTH


@cache
def sums_in_chains(generation: int) -> bool:
    """Whether dense and sparse float32 sums are the same chains: the portable dense kernel does not fuse."""
    return all(_core.slots()[slot][0] != "scalar" for slot in ("gemm_f32", "multiply_blocks_f32"))


def operand_panels(binder: Binder, weight: str, others: int, depth: int, cols: int, bf16: bool) -> Any:
    """Return where a product packs its second operand [depth, cols] at every run, or None where it reads it in place."""
    if binder.in_place or others < PACKED_FROM or not is_float_in_memory(weight, binder):
        return None
    return binder.scratch(_core.panels_nbytes(depth, cols, bf16))


def multiplies_bf16(weight: str, binder: Binder) -> bool:
    """Whether products with a dense weight round both operands to bf16: it is stored so, or the session was asked to."""
    precision = getattr(binder, "precision", None)
    stored = binder.tensor(weight).kind
    asked = precision == "bf16" or (precision is None and stored == "bf16")
    return asked and stored in ("dense", "bf16") and _core.has_bf16()


def is_float_in_memory(weight: str, binder: Binder) -> bool:
    """Whether kernels that read the weight in place find float32: bf16 trains as that."""
    return binder.tensor(weight).kind == "dense" or binder.trains(weight)


PRODUCTS: tuple[Product, ...] = (
    DenseFloat("dense float32", "rows", bf16=False, form="dense float32"),
    DenseFloat("dense bf16", "rows", bf16=True, form="dense bf16"),
    DenseInt8("dense int8", "tile codes", form="dense int8"),
)
