"""Plans that are ready to run, alone or each on a thread of its own for many items.

A batch of independent items runs faster item by item than all at once: a thread keeps the activations of its item in its own
cache and waits for nobody. An item is a few examples, enough rows for the matrix products to be at their best.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gristmill import _core
from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.ops import TensorType, find
from gristmill.ops.op import as_rows
from gristmill.ops.shape import View
from gristmill.runtime.plan import Layout, Plan
from gristmill.runtime.shapes import Shapes
from gristmill.runtime.staged import Run
from gristmill.tensor.parts import Array

ROWS = 128  # of the tallest matrix that an item multiplies


class Bound:
    """A plan with its memory: inputs to outputs, for shapes that are known."""

    def __init__(self, plan: Plan, bound: Mapping[str, Array], threads: int) -> None:
        self.plan, self.bound, self.threads = plan, bound, threads

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        for name, array in self.plan.inputs.items():
            np.copyto(array, inputs[name])
        self.plan.run(self.threads)
        return {name: self.bound[name] if name in self.bound else array.copy() for name, array in self.plan.outputs.items()}


class Mapped:
    """The same plan on several threads, each with memory of its own.

    Args:
        plans: equal plans, one for each thread, each a single program.
        layout: what they were made from.
    """

    def __init__(self, plans: Sequence[Plan], layout: Layout) -> None:
        self.plans, self.layout = plans, layout
        self.programs = [plan.program for plan in plans]

    @property
    def kinds(self) -> dict[str, TensorType]:
        """The types of an item's outputs."""
        return {name: TensorType(array.dtype, array.shape) for name, array in self.plans[0].outputs.items()}

    def __call__(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], items: int) -> None:
        """Run for each item along the leading axis; an item's outputs go to its slice of `outputs`."""
        given = [
            (np.ascontiguousarray(inputs[name]), [plan.inputs[name] for plan in self.plans]) for name in self.plans[0].inputs
        ]
        made = [(outputs[name], [plan.outputs[name] for plan in self.plans]) for name in self.plans[0].outputs]
        _core.run_map(self.programs, given, made, items)


class Stacked:
    """A run of many items that lie along a leading axis."""

    def __init__(self, mapped: Mapped) -> None:
        self.mapped = mapped

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        items = len(next(iter(inputs.values())))
        made = {name: np.empty((items, *kind.extents), kind.dtype) for name, kind in self.mapped.kinds.items()}
        self.mapped(inputs, made, items)
        return made


def each(run: Run) -> Run:
    """Return a run of many items one after the other."""

    def run_each(inputs: Mapping[str, Array]) -> dict[str, Array]:
        made = [run({name: array[item] for name, array in inputs.items()}) for item in range(len(next(iter(inputs.values()))))]
        return {name: np.stack([outputs[name] for outputs in made]) for name in made[0]}

    return run_each


class Batch:
    """A batch cut into items of `size` examples, and one of what is left."""

    def __init__(self, whole: Mapped, rest: Mapped | None, size: int, outputs: Mapping[str, TensorType]) -> None:
        self.whole, self.rest, self.size, self.kinds = whole, rest, size, outputs

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        made = {name: np.empty(kind.extents, kind.dtype) for name, kind in self.kinds.items()}
        batch = len(next(iter(made.values())))
        items = batch // self.size
        cut = items * self.size
        self.whole(_stacked(inputs, 0, cut, items), _stacked(made, 0, cut, items), items)
        if self.rest is not None:
            self.rest(_stacked(inputs, cut, batch, 1), _stacked(made, cut, batch, 1), 1)
        return made


def _stacked(arrays: Mapping[str, Array], start: int, stop: int, items: int) -> dict[str, Array]:
    """Part of a batch with an axis for the items in front."""
    return {name: array[start:stop].reshape(items, -1, *array.shape[1:]) for name, array in arrays.items()}


def examples_per_item(graph: Model, shapes: Shapes, threads: int, at: Callable[[int], Shapes]) -> int | None:
    """Return how many examples of a batch make an item, or None where the batch is to run at once.

    Every input must share its leading dimension, and every output row depend on the same rows of the inputs alone. `at` tells
    what is known of the graph at another batch size.
    """
    batch = _batch(graph, shapes)
    if batch is None or batch < max(2, threads) or shapes.pending:
        return None
    try:
        elsewhere = at(batch + 1).values
    except ModelError:  # the graph admits this batch alone
        return None
    tallest = _tallest(graph, shapes, batch, elsewhere)
    if not tallest:
        return None
    size = max(1, round(ROWS * batch / tallest))
    items = -(-batch // size)
    if items % threads and items < 4 * threads:  # a short last round would leave threads idle
        items = -(-items // threads) * threads
        size = -(-batch // items)
    return size if -(-batch // size) > 1 and batch // size >= threads else None


def _batch(graph: Model, shapes: Shapes) -> int | None:
    leading = {kind.shape[0] if kind.shape else None for kind in graph.inputs.values()}
    symbol = leading.pop() if len(leading) == 1 else None
    return shapes.types[next(iter(graph.inputs))].extents[0] if isinstance(symbol, str) else None


def _tallest(graph: Model, shapes: Shapes, batch: int, elsewhere: Mapping[str, Array]) -> int | None:
    """The rows of the tallest matrix of the graph, None if some row depends on another example's.

    Values that planning knows are constants, but for those that differ `elsewhere`, at another batch size: only a view may read
    those, for the shape that it is to have.
    """
    split, varying = set(graph.inputs), set[str]()
    tallest = batch
    for node in graph.nodes:
        if all(_same(shapes.values.get(name), elsewhere.get(name)) for name in node.outputs):
            continue
        flags = [name in split for name in node.inputs]
        kinds = [shapes.types[name] if name else None for name in node.inputs]
        made = [shapes.types[name] for name in node.outputs]
        apart = any(flags) and _leads(made, batch) and find(node).separable(node, flags, kinds, made)
        if not apart and node.name in shapes.values:
            varying.update(node.outputs)
            continue
        shaped = varying.intersection(node.inputs)
        if shaped and not isinstance(find(node), View):
            return None
        if not any(flags):
            varying.update(node.outputs if shaped else ())
            continue
        if not apart:
            return None
        split.update(node.outputs)
        tallest = max(tallest, *(as_rows(kind.extents)[0] for kind in made if kind.shape))
    return tallest if all(name in split for name in graph.outputs) else None


def _same(here: Array | None, there: Array | None) -> bool:
    return here is not None and there is not None and np.array_equal(here, there)


def _leads(made: Sequence[TensorType], batch: int) -> bool:
    return all(kind.shape and kind.shape[0] == batch for kind in made)
