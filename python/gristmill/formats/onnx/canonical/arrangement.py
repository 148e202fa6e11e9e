"""How the elements of a value lie in the value that it is a view of: which part of which axis is where.

Chains of Reshape, Transpose, Squeeze, Unsqueeze and Flatten say little one by one; their composition says it all. An axis of a
root is cut into atoms where reshapes cut it; an arrangement lists the atoms of each axis of the view, outermost first. Axes of
extent 1 have none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gristmill.formats.onnx.canonical.dims import ONE, Size, over, product, times
from gristmill.formats.onnx.canonical.graph import Graph
from gristmill.formats.onnx.canonical.shapes import Shape, permutation
from gristmill.ops import Node

VIEWS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
SCALES = ("Mul", "Div")


@dataclass(frozen=True)
class Atom:
    """Part of an axis of the root: `size` elements, `stride` apart along that axis."""

    axis: int
    stride: Size
    size: Size


Axis = tuple[Atom, ...]


@dataclass(frozen=True)
class Arrangement:
    """A value as a view of `root` times `scale`."""

    root: str
    shape: Shape  # of the root
    axes: tuple[Axis, ...]
    scale: float = 1.0
    chain: tuple[Node, ...] = ()  # the nodes between, the last one first

    @property
    def is_root(self) -> bool:
        return self.axes == whole(self.shape)


def whole(shape: Shape) -> tuple[Axis, ...]:
    """The arrangement of a value in itself."""
    return tuple(() if dim == ONE else (Atom(at, ONE, dim),) for at, dim in enumerate(shape))


def merged(axis: Sequence[Atom]) -> Axis:
    """Join neighbours that are neighbours in the root too."""
    out: list[Atom] = []
    for atom in axis:
        if out and out[-1].axis == atom.axis and out[-1].stride == times(atom.stride, atom.size):
            atom = Atom(atom.axis, atom.stride, times(out.pop().size, atom.size))
        out.append(atom)
    return tuple(out)


def regroup(axes: Sequence[Axis], shape: Shape) -> tuple[Axis, ...] | None:
    """Cut the atoms, in order, into axes of these extents; None where they cannot be cut whatever the symbols stand for."""
    rest = [atom for axis in axes for atom in axis][::-1]
    made = []
    for extent in shape:
        group, have = [], ONE
        while have != extent:
            need = over(extent, have)
            if need is None or not rest:
                return None
            atom = rest.pop()
            if over(need, atom.size) is None:
                inner = over(atom.size, need)
                if inner is None:
                    return None
                rest.append(Atom(atom.axis, atom.stride, inner))
                atom = Atom(atom.axis, times(atom.stride, inner), need)
            group.append(atom)
            have = times(have, atom.size)
        made.append(merged(group))
    return None if rest else tuple(made)


def arrangement(graph: Graph, name: str, scaled: bool = False) -> Arrangement | None:
    """Follow a value back through views, and through multiplication by constants if `scaled`."""
    chain, scale = [], 1.0
    name = graph.resolve(name)
    while True:
        node = graph.maker(name, *VIEWS, *(SCALES if scaled else ()))
        if node is None:
            break
        if node.op in SCALES:
            found = graph.split_scalar(node)
            if found is None or (node.op == "Div" and found[0] != node.inputs[0]) or not found[1]:
                break
            scale = scale * found[1] if node.op == "Mul" else scale / found[1]
            name = found[0]
        else:
            name = node.inputs[0]
        chain.append(node)
        name = graph.resolve(name)
    shape = graph.shape(name)
    if shape is None:
        return None
    axes: tuple[Axis, ...] | None = whole(shape)
    for node in reversed(chain):
        axes = _viewed(graph, node, axes) if axes is not None else None
    return None if axes is None else Arrangement(name, shape, axes, scale, tuple(chain))


def _viewed(graph: Graph, node: Node, axes: tuple[Axis, ...]) -> tuple[Axis, ...] | None:
    if node.op in SCALES:
        return axes
    if node.op == "Transpose":
        return tuple(axes[at] for at in permutation(node, len(axes)))
    shape = graph.shape(node.name)
    return None if shape is None else regroup(axes, shape)


def target_of(shape: Shape, wanted: Shape) -> tuple[int, ...] | None:
    """The constant that reshapes a value from one shape to another: numbers, 0 to keep a dimension, -1 at most once."""
    target = []
    for at, dim in enumerate(wanted):
        if dim == Size(0):
            return None
        target.append(dim.number if dim.known else 0 if at < len(shape) and shape[at] == dim else -1)
    return tuple(target) if target.count(-1) <= 1 else None


def transposed(axes: tuple[Axis, ...], shape: Shape) -> tuple[int, ...] | None:
    """The permutation of the root that is this arrangement, or None."""
    own = whole(shape)
    if len(axes) != len(own):
        return None
    empty = iter([at for at, axis in enumerate(own) if not axis])
    order = [next(empty, -1) if not axis else own.index(axis) if axis in own else -1 for axis in axes]
    return tuple(order) if sorted(order) == list(range(len(own))) else None


def extents(axes: tuple[Axis, ...]) -> Shape:
    return tuple(product([atom.size for atom in axis]) for axis in axes)
