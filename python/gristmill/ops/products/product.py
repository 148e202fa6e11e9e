"""What a product with a weight is to the planner, and what the bindings of products share.

A product multiplies activations by one weight of a `Linear` in one way: it says which weights it takes, what it reads, what its
time grows with, and how it is bound to a kernel. Where several take a weight the plan chooses by expected time, so all that
take one must give the same numbers: the same bits, where sums are exact or one chain in ascending k.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from gristmill.ops.op import Binder, Node, as_rows
from gristmill.tensor import Sparse, Tensor


@dataclass(frozen=True)
class Size:
    """What the time of a product depends on: m rows of x [m, k] by a weight [n, k], of which `stored` elements are stored."""

    m: int
    k: int
    n: int
    stored: float


@dataclass(frozen=True)
class Product(ABC):
    """One way to multiply by a weight.

    Args:
        name: what `Session.explain` prints, and what the cost model knows the product by, such as "blocks 4x4 int8".
        layout: the activations that it reads: "rows", "lanes", or codes: "tile codes", "lanes codes" or "groups of codes".
        out: the layout of its outputs, "rows" or "lanes".
        form: the weights that it is the own product of: a pattern ("dense", "4x4") and a dtype, such as "4x4 int8".
    """

    name: str
    layout: str
    out: str = field(default="rows", kw_only=True)
    form: str = field(default="", kw_only=True)

    @abstractmethod
    def takes(self, node: Node, binder: Binder) -> bool:
        """Whether this product can serve a Linear node: its weight's form, its rows, whether it trains, static scales."""

    @abstractmethod
    def bind(self, node: Node, binder: Binder) -> None:
        """Append the steps."""

    @abstractmethod
    def nbytes(self, tensor: Tensor, m: int) -> int:
        """Bytes that a run with m rows reads at least: the weight in the form of this product, and the activations."""

    def example(self, n: int, k: int, share: float, seed: int) -> Tensor | None:
        """A weight [n, k] of this product's own form to measure with, of which about a share is stored.

        Without any the product has no price, so that it serves only where nothing else does.
        """
        return None

    def work(self, size: Size) -> tuple[float, ...]:
        """Amounts of work that a run's time is a sum over, each times a price that is measured once on a machine.

        These suit products that read a weight once for few rows; others have their own.
        """
        return 1.0, size.stored, size.stored * size.m, size.n * size.k, size.m * size.n, size.m * size.k


def size_of(tensor: Tensor, m: int) -> Size:
    """Return the size of a product of m rows with a weight."""
    n, k = tensor.shape
    return Size(m, k, n, tensor.values.size if isinstance(tensor, Sparse) else n * k)


def rows_of(node: Node, binder: Binder) -> int:
    """Return m, the number of rows that a node multiplies."""
    return as_rows(binder.shape(node.inputs[0]))[0]


def is_constant(node: Node, binder: Binder) -> bool:
    """Whether the weight may be packed into another form, once: it does not train, and memory for a copy is there."""
    return not binder.in_place and not binder.trains(node.inputs[1])


def static_scale(node: Node) -> tuple[float, int] | None:
    """The scale and zero point that the node's input is rounded with, or None."""
    if "input_scale" not in node.attributes:
        return None
    return float(node.attributes["input_scale"]), int(node.attributes.get("input_zero_point", 128))


def matrices(node: Node, binder: Binder, layout: str) -> tuple[Any, Any, Any]:
    """Return x, residual (or None) and the output as matrices in one layout."""
    x = matrix(node.inputs[0], binder, layout)
    return x, *results(node, binder, layout)


def results(node: Node, binder: Binder, layout: str) -> tuple[Any, Any]:
    """Return the residual (or None) and the output as matrices in one layout."""
    residual = matrix(node.input(3), binder, layout) if node.input(3) else None
    out = binder.output(node.outputs[0], layout)
    return residual, out if layout == "lanes" else out.reshape(*as_rows(out.shape))


def matrix(name: str, binder: Binder, layout: str) -> Any:
    """Return a value as a matrix in one layout."""
    if layout == "lanes":
        return binder.lanes(name)
    rows = binder.rows(name)
    return rows.reshape(*as_rows(rows.shape))


def epilogue(node: Node, binder: Binder, residual: Any) -> tuple[Any, Any, Any]:
    """Return what the kernels of all products take last: bias, activation, residual."""
    bias = binder.array(node.input(2)) if node.input(2) else None
    return bias, node.attributes.get("activation"), residual
