"""Products with the stored elements of a weight under a bitmask: for few rows, whose time is that of reading the weight."""

from dataclasses import dataclass
from math import ceil

import numpy as np

from gristmill import _core
from gristmill.ops.op import Binder, Node
from gristmill.ops.products.blocks import BlocksFloat
from gristmill.ops.products.product import Product, Size, epilogue, matrices, results, static_scale
from gristmill.tensor import Bitmask, Tensor

FLOAT_ROWS, CODE_ROWS = 4, 12  # of activations that share one expansion of the weight


def drawn(n: int, k: int, share: float, seed: int, precision: str) -> Bitmask:
    """Return a weight to measure with."""
    rng = np.random.default_rng(seed)
    return Bitmask.from_dense(rng.standard_normal((n, k), np.float32), rng.random((n, k)) < share, precision)


def expansions(size: Size, rows: int) -> tuple[float, ...]:
    """Work of a product that expands the weight once for each `rows` rows: a call, expansions, multiplications by zeros too, and
    results."""
    weights = size.n * size.k
    return 1.0, weights * ceil(size.m / rows), weights * size.m, size.m * size.n


def holds(node: Node, binder: Binder, precision: str) -> bool:
    """Whether the weight of a node is a bitmask of values of this precision."""
    tensor = binder.tensor(node.inputs[1])
    return isinstance(tensor, Bitmask) and tensor.precision == precision


@dataclass(frozen=True)
class BitmaskFloat(Product):
    """float32 values where they lie, four rows of activations at a time. Sums are in lanes, not one chain in ascending k."""

    def takes(self, node: Node, binder: Binder) -> bool:
        return holds(node, binder, "float32") and static_scale(node) is None

    def bind(self, node: Node, binder: Binder) -> None:
        x, residual, out = matrices(node, binder, "rows")
        binder.step(_core.bitmask_linear, x, binder.weight(node.inputs[1]), out, *epilogue(node, binder, residual))

    def nbytes(self, tensor: Tensor, m: int) -> int:
        return tensor.nbytes + 4 * m * tensor.shape[1]

    def example(self, n: int, k: int, share: float, seed: int) -> Bitmask:
        return drawn(n, k, share, seed, "float32")

    def work(self, size: Size) -> tuple[float, ...]:
        return expansions(size, FLOAT_ROWS)


@dataclass(frozen=True)
class ElementsFloat(Product):
    """float32 values where they lie, as blocks of 1 x 1 with an index for each, rows of activations in lanes."""

    def takes(self, node: Node, binder: Binder) -> bool:
        return holds(node, binder, "float32") and static_scale(node) is None

    def bind(self, node: Node, binder: Binder) -> None:
        x, residual, out = matrices(node, binder, "lanes")
        packed = binder.packed(node.inputs[1], _core.pack_elements)
        binder.step(_core.sparse_linear, x, packed, out, *epilogue(node, binder, residual))

    def nbytes(self, tensor: Tensor, m: int) -> int:
        assert isinstance(tensor, Bitmask)
        return 8 * tensor.count + 4 * len(tensor.row_offsets) + 4 * m * tensor.shape[1]

    def example(self, n: int, k: int, share: float, seed: int) -> Bitmask:
        return drawn(n, k, share, seed, "float32")

    def work(self, size: Size) -> tuple[float, ...]:
        return BlocksFloat("", "", (1, 1), "float32").work(size)


@dataclass(frozen=True)
class BitmaskCodes(Product):
    """int8 or int4 codes in panels of 16 rows, expanded once for up to twelve rows of codes of the activations.

    They are packed even where they train, for only a factor on their rows does.
    """

    precision: str

    def takes(self, node: Node, binder: Binder) -> bool:
        return holds(node, binder, self.precision)

    def bind(self, node: Node, binder: Binder) -> None:
        weight = node.inputs[1]
        codes, scales, zeros, m = binder.codes(node.inputs[0], "tile", static_scale(node))
        residual, out = results(node, binder, "rows")
        packed, scale = binder.packed(weight, _core.pack_bitmask), row_factors(weight, binder, self.precision)
        binder.step(_core.bitmask_linear_int, codes, scales, zeros, m, packed, scale, out, *epilogue(node, binder, residual))

    def nbytes(self, tensor: Tensor, m: int) -> int:
        return tensor.nbytes + m * tensor.shape[1]

    def example(self, n: int, k: int, share: float, seed: int) -> Bitmask:
        return drawn(n, k, share, seed, self.precision)

    def work(self, size: Size) -> tuple[float, ...]:
        return expansions(size, CODE_ROWS)


def row_factors(weight: str, binder: Binder, precision: str) -> object:
    """Return what the rows of codes are multiplied by: scales of int8, with their gains; of int4 gains alone, if they train."""
    if precision == "int8":
        return binder.scale(weight)
    return binder.array(weight) if binder.trains(weight) else None


PRODUCTS: tuple[Product, ...] = (
    BitmaskFloat("bitmask float32", "rows", form="bitmask float32"),
    ElementsFloat("bitmask float32 in lanes", "lanes", out="lanes", form="bitmask float32"),
    BitmaskCodes("bitmask int8", "tile codes", "int8", form="bitmask int8"),
    BitmaskCodes("bitmask int4", "tile codes", "int4", form="bitmask int4"),
)
