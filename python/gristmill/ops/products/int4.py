"""Products with int4 weights: read once and in order, against int8 activations with a scale for each group."""

from dataclasses import dataclass

from gristmill import _core
from gristmill.ops.op import Binder, Node
from gristmill.ops.products.product import Product, epilogue, results, static_scale
from gristmill.tensor import Int4, Tensor


@dataclass(frozen=True)
class GroupsInt4(Product):
    """Codes in groups: an int4 weight's own form. It is packed even where it trains, for only a gain on its rows does."""

    def takes(self, node: Node, binder: Binder) -> bool:
        return binder.tensor(node.inputs[1]).kind == "int4" and static_scale(node) is None

    def bind(self, node: Node, binder: Binder) -> None:
        weight = node.inputs[1]
        tensor = binder.tensor(weight)
        assert isinstance(tensor, Int4)
        codes, scales, offsets, m = binder.groups(node.inputs[0], tensor.group)
        residual, out = results(node, binder, "rows")
        packed, gain = binder.packed(weight, _core.pack_int4), binder.array(weight) if binder.trains(weight) else None
        binder.step(_core.linear_int4, codes, scales, offsets, m, packed, gain, out, *epilogue(node, binder, residual))

    def nbytes(self, tensor: Tensor, m: int) -> int:
        return tensor.nbytes + m * tensor.shape[1]


PRODUCTS: tuple[Product, ...] = (GroupsInt4("dense int4", "groups of codes"),)
