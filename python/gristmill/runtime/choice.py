"""What a plan chooses from: the products that can serve a Linear, and what each needs converted around it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gristmill.ops import Node, find
from gristmill.ops.activation import Activation
from gristmill.ops.linear import Linear
from gristmill.ops.products import Product
from gristmill.ops.products.product import Size, rows_of, size_of
from gristmill.tensor import Sparse

if TYPE_CHECKING:
    from gristmill.model import Model
    from gristmill.runtime.plan import Layout

CODES = " codes"  # how the layouts of quantised panels end


@dataclass(frozen=True)
class Move:
    """A conversion of a matrix from one layout to another: "rows to lanes", "lanes to tile codes"."""

    source: str
    target: str

    @property
    def name(self) -> str:
        return f"{self.source} to {self.target}"

    def work(self, size: Size) -> tuple[float, ...]:
        """A call, and elements."""
        return 1.0, size.m * size.k


@dataclass(frozen=True)
class Way:
    """One product for one Linear: its size, the bytes that it reads, and conversions with the part of each that it causes."""

    product: Product
    size: Size
    nbytes: int
    moves: tuple[tuple[Move, Size, float], ...] = ()


@dataclass(frozen=True)
class Choice:
    """The way that a Linear is bound, and all that could serve it, its weight's own form first."""

    way: Way
    ways: tuple[Way, ...]


def ways_of(node: Node, products: Sequence[Product], layout: "Layout") -> tuple[Way, ...]:
    """Return a way for each product."""
    tensor = layout.tensor(node.inputs[1])
    m = rows_of(node, layout)
    size = size_of(tensor, m)
    return tuple(Way(p, size, p.nbytes(tensor, m), tuple(_moves(node, p, size, layout))) for p in products)


def _moves(node: Node, product: Product, size: Size, layout: "Layout") -> list[tuple[Move, Size, float]]:
    """What a product needs converted: its input, shared with others that read it so; its residual; its output."""
    x, residual, out = node.inputs[0], node.input(3), node.outputs[0]
    made = Size(size.m, size.n, 0, 0)
    moves = []
    if not _is_there(x, product.layout, layout):
        readers = sum(isinstance(find(reader), Linear) for reader in layout.readers[x])
        moves.append((Move(_form(x, layout), product.layout), size, 1 / readers))
    if residual and not _is_there(residual, product.out, layout):
        moves.append((Move(_form(residual, layout), product.out), made, 1.0))
    if product.out == "lanes" and wants_rows(out, layout):
        moves.append((Move("lanes", "rows"), made, 1.0))
    return moves


def _is_there(name: str, form: str, layout: "Layout") -> bool:
    if form.endswith(CODES):
        return any(key[0] == name and key[1] + CODES == form for key in layout.panels)
    return form in layout.forms.get(name, ("rows",))


def _form(name: str, layout: "Layout") -> str:
    """The layout that a value was made in."""
    return next(iter(layout.forms.get(name, ())), "rows")


def wants_rows(name: str, layout: "Layout") -> bool:
    """Whether something reads a value that reads rows alone. Products and activations take either."""
    either = (Linear, Activation)
    return name in layout.model.outputs or any(not isinstance(find(reader), either) for reader in layout.readers[name])


def readers_of(model: "Model") -> dict[str, list[Node]]:
    """Return the nodes that read each value."""
    readers: dict[str, list[Node]] = {}
    for node in model.nodes:
        for name in {*node.inputs, *node.outputs}:
            readers.setdefault(name, [])
        for name in set(node.inputs):
            readers[name].append(node)
    return readers


def stored_bytes(model: "Model") -> int:
    """Bytes of all weights, without what a file adds: whether they stay in the last level of cache from run to run."""
    return sum(t.values.nbytes + t.index.nbytes if isinstance(t, Sparse) else t.nbytes for t in model.tensors.values())
