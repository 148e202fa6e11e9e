"""Products with the stored blocks of a sparse weight alone, rows of activations side by side in vector lanes."""

from dataclasses import dataclass
from math import ceil, prod

import numpy as np

from gristmill import _core
from gristmill.ops.op import Binder, Node
from gristmill.ops.products.product import Product, Size, epilogue, matrices, results, static_scale
from gristmill.tensor import Sparse, Tensor

LANES, VECTOR, PANEL = 64, 16, 128  # rows of a tile and of a vector; dwords of k in a K block


@dataclass(frozen=True)
class Blocks(Product):
    """Blocks of one shape: a sparse weight's own form. Packing refers to the values: as good as in place."""

    block: tuple[int, int]
    dtype: str

    def takes(self, node: Node, binder: Binder) -> bool:
        tensor = binder.tensor(node.inputs[1])
        own = isinstance(tensor, Sparse) and tensor.block == self.block and tensor.values.dtype == self.dtype
        return own and static_scale(node) is None

    def example(self, n: int, k: int, share: float, seed: int) -> Tensor:
        rng, (rows, columns) = np.random.default_rng(seed), self.block
        mask = rng.random((n // rows, k // columns)) < share
        tensor = Sparse.from_dense(rng.standard_normal((n, k), np.float32), mask, self.block)
        return tensor.quantized() if self.dtype == "int8" else tensor

    def work(self, size: Size) -> tuple[float, ...]:
        """A call; blocks and multiplications in tiles of 64 rows, which are padded to 16 lanes; epilogues, panels, and the walk
        over row groups in each K block."""
        tiles, vectors = ceil(size.m / LANES), ceil(size.m / VECTOR)
        blocks, groups = size.stored / prod(self.block), size.n / self.block[0]
        walks = groups * ceil(size.k / (PANEL if self.dtype == "float32" else 4 * PANEL)) * tiles
        return 1.0, blocks * tiles, size.stored * vectors, size.n * vectors, size.k * vectors, walks


@dataclass(frozen=True)
class BlocksFloat(Blocks):
    """float32 blocks."""

    def bind(self, node: Node, binder: Binder) -> None:
        x, residual, out = matrices(node, binder, "lanes")
        packed = binder.packed(node.inputs[1], _core.pack_sparse)
        binder.step(_core.sparse_linear, x, packed, out, *epilogue(node, binder, residual))

    def nbytes(self, tensor: Tensor, m: int) -> int:
        return blocks_nbytes(tensor) + 4 * m * tensor.shape[1]


@dataclass(frozen=True)
class BlocksInt8(Blocks):
    """int8 blocks against a panel of codes."""

    def bind(self, node: Node, binder: Binder) -> None:
        weight = node.inputs[1]
        codes, scales, _, m = binder.codes(node.inputs[0], "lanes")
        residual, out = results(node, binder, "lanes")
        packed, scale = binder.packed(weight, _core.pack_sparse), binder.scale(weight)
        binder.step(_core.sparse_linear_int8, codes, scales, m, packed, scale, out, *epilogue(node, binder, residual))

    def nbytes(self, tensor: Tensor, m: int) -> int:
        return blocks_nbytes(tensor) + m * tensor.shape[1]


def blocks_nbytes(tensor: Tensor) -> int:
    """Return the bytes of a block weight as the kernels read it: an int32 for each block and each row of blocks."""
    assert isinstance(tensor, Sparse)
    scale = 0 if tensor.scale is None else tensor.scale.nbytes
    return tensor.values.nbytes + tensor.index.nbytes + tensor.row_offsets.nbytes + scale


PRODUCTS: tuple[Product, ...] = (
    *(
        BlocksFloat(f"blocks {r}x{c} float32", "lanes", (r, c), "float32", out="lanes", form=f"{r}x{c} float32")
        for r, c in ((1, 1), (1, 4), (2, 4), (4, 4))
    ),
    *(
        BlocksInt8(f"blocks {r}x{c} int8", "lanes codes", (r, c), "int8", out="lanes", form=f"{r}x{c} int8")
        for r, c in ((1, 4), (2, 4), (4, 4))
    ),
)
