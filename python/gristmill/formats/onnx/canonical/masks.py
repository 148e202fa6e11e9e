"""Where an attention mask comes from: a proof that a value depends on one [batch, keys] mask of zeros and ones alone.

A value is followed as a table of two entries, what it is where the mask is 0 and where it is 1, and the arrangement of the mask's
two axes in it. Elementwise operators are applied to the entries; views, Expand and the gathers of index grids move the axes. What is
constant is a table without a source. Whatever else happens to a value, nothing is claimed of it.

An integer input that is used as such a mask is taken to hold zeros and ones; where a graph compares it, the outcome is exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gristmill.formats.onnx.canonical.arrangement import VIEWS, Atom, Axis, regroup, whole
from gristmill.formats.onnx.canonical.dims import ONE, Size, product, times
from gristmill.formats.onnx.canonical.graph import Graph
from gristmill.formats.onnx.canonical.shapes import BOOLEAN, Shape, broadcast, permutation
from gristmill.ops import Node, find

CONSTANT = -1  # the axis of atoms along which a value does not change
ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Where", "Cast", "Not", "Identity", "Neg", "Min", "Max", "Clip"} | BOOLEAN


@dataclass(frozen=True)
class Table:
    """What is known of a value: `zero` and `one` by its source, its axes in those of the source (CONSTANT: all the same)."""

    source: str | None
    axes: tuple[Axis, ...]
    zero: Any
    one: Any

    @property
    def raw(self) -> bool:
        """Whether the value is its integer source itself."""
        return self.source is not None and self.zero.dtype.kind in "iu" and (self.zero, self.one) == (0, 1)


@dataclass(frozen=True)
class Grid:
    """Indices: the sum over axes of a step times the place along the axis, none of them negative."""

    steps: tuple[Size | None, ...]  # None for an axis along which they do not change
    shape: Shape


@dataclass(frozen=True)
class Grids:
    """Indices of several axes, side by side in the last axis."""

    grids: tuple[Grid, ...]


Known = Table | Grid | Grids


class Masks:
    """Tables of the values of one graph, each found once."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._found: dict[str, Known | None] = {}

    def table(self, name: str) -> Table | None:
        found = self.find(name)
        return found if isinstance(found, Table) else None

    def find(self, name: str) -> Known | None:
        """Follow a value back as far as its source."""
        stack = [self.graph.resolve(name)]
        while stack:
            at = stack[-1]
            node = self.graph.maker(at)
            waiting = [n for n in self._parents(node) if n not in self._found] if node is not None else []
            if waiting and at not in self._found:
                self._found[at] = None  # a guard: graphs have no cycles, but a value may wait twice
                stack += waiting
                continue
            self._found[at] = self._look(at, node)
            stack.pop()
        return self._found[self.graph.resolve(name)]

    def _parents(self, node: Node) -> list[str]:
        if node.op in ELEMENTWISE:
            names = [name for name in node.inputs if name]
        elif node.op in VIEWS or node.op == "Expand":
            names = [node.inputs[0]]
        elif node.op in ("Gather", "GatherND", "Concat"):
            names = list(node.inputs)
        else:
            names = []
        return [self.graph.resolve(name) for name in names]

    def _look(self, name: str, node: Node | None) -> Known | None:
        constant = self.graph.constant(name)
        if constant is not None:
            return _uniform(constant)
        made = self._made(node) if node is not None else None
        return made if made is not None else self._source(name)

    def _source(self, name: str) -> Table | None:
        """A [batch, keys] value of integers or truth values, about which nothing more is known."""
        shape, dtype = self.graph.shape(name), self.graph.dtype(name)
        if shape is None or len(shape) != 2 or dtype is None or dtype.kind not in "iub":
            return None
        return Table(name, whole(shape), dtype.type(0), dtype.type(1))

    def _made(self, node: Node) -> Known | None:
        if node.op == "Range":
            return self._range(node)
        if node.op == "ConstantOfShape":
            return self._filled(node)
        parents = [self._found.get(name) for name in self._parents(node)]
        if node.op in ELEMENTWISE and any(isinstance(parent, Grid) for parent in parents):
            return self._on_grids(node, parents)
        if not parents or any(parent is None for parent in parents):
            return None
        if node.op in ELEMENTWISE:
            return self._apply(node, [parent for parent in parents if isinstance(parent, Table)])
        if node.op == "Concat":
            return _beside(node, parents)
        if node.op in ("Gather", "GatherND"):
            return (_gathered if node.op == "Gather" else _gathered_nd)(node, parents[0], parents[1])
        parent = parents[0]
        return self._moved(node, parent) if isinstance(parent, Table) else self._grid_moved(node, parent)

    def _apply(self, node: Node, tables: list[Table]) -> Table | None:
        """Apply an elementwise operator to the entries of tables of one source."""
        sources = {table.source for table in tables} - {None}
        if len(sources) > 1 or (node.op in BOOLEAN and not _exact(tables)):
            return None
        axes = _joined([table.axes for table in tables])
        if axes is None:
            return None
        args = iter(tables)
        given = [next(args) if name else None for name in node.inputs]
        entries = []
        for which in ("zero", "one"):
            values = [None if table is None else np.asarray([getattr(table, which)]) for table in given]
            with np.errstate(all="ignore"):
                entries.append(np.asarray(find(node).reference(node, *values)[0]).reshape(-1)[0])
        same = entries[0] == entries[1]
        source = None if same or not sources else sources.pop()
        return Table(source, _constant(axes) if source is None else axes, *entries)

    def _on_grids(self, node: Node, parents: Sequence[Known | None]) -> Known | None:
        """Shift-free arithmetic of indices, and the comparison that holds for all of them."""
        if node.op == "Cast":
            return parents[0] if node.attributes["to"] in ("int64", "int32") else None
        if len(parents) != 2:
            return None
        for at in (0, 1):
            grid, other = parents[at], parents[1 - at]
            if not isinstance(grid, Grid):
                continue
            if node.op == "Mul":
                factor = self.graph.facts.contents.get(node.inputs[1 - at], ())
                return _scaled(grid, factor[0]) if len(factor) == 1 and isinstance(factor[0], Size) else None
            if node.op == "Add" and isinstance(other, Grid):
                return _added(grid, other)
            if not isinstance(other, Table) or other.source is not None:
                continue
            if node.op == "Add" and other.zero == 0:
                return grid
            if node.op == ("GreaterOrEqual", "LessOrEqual")[at] and other.zero <= 0:
                return Table(None, _filling(grid.shape), np.bool_(True), np.bool_(True))
        return None

    def _moved(self, node: Node, table: Table) -> Table | None:
        shape = self.graph.shape(node.name)
        if shape is None:
            return None
        if node.op == "Transpose":
            return replace(table, axes=tuple(table.axes[at] for at in permutation(node, len(table.axes))))
        axes = _joined([table.axes, _filling(shape)]) if node.op == "Expand" else regroup(table.axes, shape)
        return None if axes is None or len(axes) != len(shape) else replace(table, axes=axes)

    def _grid_moved(self, node: Node, grid: Known | None) -> Grid | None:
        shape = self.graph.shape(node.name)
        if not isinstance(grid, Grid) or shape is None or node.op == "Transpose":
            return None
        if node.op == "Expand":
            return Grid((None,) * (len(shape) - len(grid.steps)) + grid.steps, shape)
        if [dim for dim in shape if dim != ONE] != [dim for dim in grid.shape if dim != ONE]:
            return None
        steps = iter([step for step, dim in zip(grid.steps, grid.shape, strict=True) if dim != ONE])
        return Grid(tuple(None if dim == ONE else next(steps) for dim in shape), shape)

    def _range(self, node: Node) -> Grid | None:
        shape = self.graph.shape(node.name)
        return None if shape is None else Grid((ONE,), shape)

    def _filled(self, node: Node) -> Table | None:
        value, shape = node.attributes.get("value", 0.0), self.graph.shape(node.name)
        value = value[0] if isinstance(value, tuple) else value
        if shape is None:
            return None
        dtype = self.graph.model.types[node.name].dtype
        entry = np.asarray(value).astype(dtype if dtype != np.object_ else None)[()]
        return Table(None, _filling(shape), entry, entry)


def _exact(tables: list[Table]) -> bool:
    """Whether a comparison of an integer source says no more than whether it is 0."""
    return all(not table.raw for table in tables) or all(table.raw or table.zero == 0 for table in tables)


def _uniform(array: Any) -> Table | None:
    if not array.size or not (array == array.reshape(-1)[0]).all():
        return None
    value = array.reshape(-1)[0]
    return Table(None, _filling(tuple(Size(dim) for dim in array.shape)), value, value)


def _filling(shape: Shape) -> tuple[Axis, ...]:
    """The axes of a value that is the same everywhere."""
    return tuple(() if dim == ONE else (Atom(CONSTANT, ONE, dim),) for dim in shape)


def _constant(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    return _filling(tuple(product([atom.size for atom in axis]) for axis in axes))


def _joined(parts: list[tuple[Axis, ...]]) -> tuple[Axis, ...] | None:
    """The axes of values that are broadcast together."""
    rank = max(map(len, parts))
    padded = [((),) * (rank - len(axes)) + axes for axes in parts]
    out = []
    for column in zip(*padded, strict=True):
        varying = list(dict.fromkeys(axis for axis in column if any(atom.axis != CONSTANT for atom in axis)))
        filling = [axis for axis in column if axis and axis not in varying]
        if len(varying) > 1:
            return None
        out.append(varying[0] if varying else filling[0] if filling else ())
    return tuple(out)


def _added(a: Grid, b: Grid) -> Grid | None:
    rank = max(len(a.shape), len(b.shape))
    steps: list[Size | None] = []
    for at in range(-rank, 0):
        here = [grid.steps[at] for grid in (a, b) if -at <= len(grid.shape) and grid.steps[at] is not None]
        if len(here) > 1:
            return None
        steps.append(here[0] if here else None)
    return Grid(tuple(steps), broadcast([a.shape, b.shape]))


def _scaled(grid: Grid, step: Size) -> Grid:
    return replace(grid, steps=tuple(None if s is None else times(s, step) for s in grid.steps))


def _gathered(node: Node, data: Known | None, index: Known | None) -> Table | None:
    """Gather by a grid of indices that names every element of a flattened axis once, in order."""
    if not isinstance(data, Table) or not isinstance(index, Grid) or node.attributes.get("axis", 0) != 0:
        return None
    stride, wanted = ONE, {}
    for atom in reversed(data.axes[0]):
        wanted[stride, atom.size] = atom
        stride = times(stride, atom.size)
    axes = _indexed(index, wanted)
    return None if axes is None else replace(data, axes=(*axes, *data.axes[1:]))


def _gathered_nd(node: Node, data: Known | None, index: Known | None) -> Table | None:
    """Gather by grids of which each runs along one axis of the data."""
    if not isinstance(data, Table) or not isinstance(index, Grids) or node.attributes.get("batch_dims", 0) != 0:
        return None
    if len(index.grids) > len(data.axes):
        return None
    parts = []
    for grid, axis in zip(index.grids, data.axes, strict=False):
        axes = _indexed(
            Grid(grid.steps[:-1], grid.shape[:-1]), {(ONE, product([atom.size for atom in axis])): axis} if axis else {}
        )
        if axes is None:
            return None
        parts.append(axes)
    joined = _joined(parts)
    return None if joined is None else replace(data, axes=(*joined, *data.axes[len(index.grids) :]))


def _indexed(grid: Grid, wanted: dict[tuple[Size, Size], Any]) -> tuple[Axis, ...] | None:
    """The axes of what indices choose, each step and extent of which must be one of those wanted, and each wanted one there."""
    made: list[Axis] = []
    wanted = dict(wanted)
    for step, dim in zip(grid.steps, grid.shape, strict=True):
        found = wanted.pop((step, dim), None) if step is not None else None
        if step is not None and found is None:
            return None
        made.append(_filling((dim,))[0] if found is None else found if isinstance(found, tuple) else (found,))
    return None if wanted else tuple(made)


def _beside(node: Node, parents: Sequence[Known | None]) -> Grids | None:
    grids = [parent for parent in parents if isinstance(parent, Grid)]
    rank = len(grids[0].shape) if grids else 0
    last = node.attributes["axis"] in (-1, rank - 1) and all(grid.shape[-1:] == (ONE,) for grid in grids)
    return Grids(tuple(grids)) if len(grids) == len(parents) and last else None
