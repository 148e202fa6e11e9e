"""The ways to multiply by the weight of a `Linear`. A module lists its products in PRODUCTS; a new family is its name here.

Of the products that take a weight, those of its own form come first: the plan chooses among all of them.
"""

from gristmill.ops.op import Binder, Node
from gristmill.ops.products import bitmask, blocks, dense, int4
from gristmill.ops.products.product import Product

FAMILIES = (bitmask, blocks, dense, int4)
PRODUCTS: tuple[Product, ...] = tuple(product for family in FAMILIES for product in family.PRODUCTS)


def candidates(node: Node, binder: Binder) -> tuple[Product, ...]:
    """Return the products that can serve a Linear node in a plan; none leaves it to its reference."""
    return tuple(product for product in PRODUCTS if product.takes(node, binder))


__all__ = ["PRODUCTS", "Product", "candidates"]
