"""A model compiled for this machine: it checks inputs, finds or builds the plan for their shapes, and runs it."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gristmill import _core
from gristmill.errors import ModelError
from gristmill.model import Model, check_model
from gristmill.ops import TensorType
from gristmill.runtime.arena import Memory
from gristmill.runtime.choice import Way
from gristmill.runtime.costs import costs
from gristmill.runtime.explanation import Explanation, explain
from gristmill.runtime.explanation import measure as time_steps
from gristmill.runtime.fuse import fuse
from gristmill.runtime.mapping import Batch, Bound, Mapped, Stacked, each, examples_per_item
from gristmill.runtime.plan import Layout, Options, Plan, Weights
from gristmill.runtime.shapes import Shapes, determine
from gristmill.runtime.staged import Run, Stage
from gristmill.runtime.threads import check_threads
from gristmill.tensor import Quantized, Tensor, has_gains, is_int8
from gristmill.tensor.parts import Array

PLANS = 16  # kept per session; the least recently used goes first
PRECISIONS = (None, "float32", "bf16", "int8")


class Session:
    """A model compiled for one thread count; plans for the shapes it has seen are kept.

    A session serialises its own runs. Threads that want to run at the same time take a `clone` each, which shares the weights.

    Args:
        model: what to run.
        threads: at most this many threads. Default: OMP_NUM_THREADS, else physical cores within affinity and cgroup quota. The
            result does not depend on it.
        precision: None (default) runs tensors as they are; "float32" too, and never rounds activations to less; "int8" quantises
            the dense weights of Linear nodes first; "bf16" rounds what they multiply to bfloat16 where the CPU is fast at it.
        trainable: arrays by tensor name, each with the shape of the tensor's `trainable` part, which the program reads in place
            of the model's own values at every run.
        in_place: keep no packed copy of float32 weights; kernels read them tile by tile. Slower, for tight memory.
        memory: the allocator that counts this session's arena and packed weights, perhaps within a budget.
        reference: run the NumPy reference of every operator instead of its kernels, to tell a wrong kernel from a wrong model.

    Raises:
        ModelError: an option is unknown, or a trainable array does not fit its tensor.

    Example:
        >>> import numpy as np, gristmill as gm
        >>> session = Session(gm.zoo.mlp([4, 3]), threads=1)
        >>> session.run(x=np.zeros((2, 4), np.float32))["logits"].shape
        (2, 3)
    """

    def __init__(
        self,
        model: Model,
        threads: int | None = None,
        precision: str | None = None,
        *,
        trainable: Mapping[str, Array] | None = None,
        in_place: bool = False,
        memory: Memory | None = None,
        reference: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise ModelError(f"unknown precision {precision!r}; choose float32, bf16 or int8")
        self.model = check_model(model)
        self.threads = check_threads(threads)
        self.trainable = dict(trainable or {})
        for name, array in self.trainable.items():
            _check_trainable(model, name, array)
        self._stored = _quantized(model, self.trainable) if precision == "int8" else model
        compiled = fuse(self._stored)
        self.memory = memory or Memory()
        self.weights = Weights(compiled, self.trainable, self.memory)
        self._graph = compiled  # or, in a later stage of a graph, a part of it over the same weights
        low = precision in ("bf16", "int8") or (precision is None and _computes_int8(compiled))
        self.options = Options(precision, low, reference, in_place, decide if self.memory.limit is None else None)
        self._runs: OrderedDict[Any, Run] = OrderedDict()
        self._arena = self.memory.allocate(0)
        self._arenas: list[Array] = []  # one for each thread of a map
        self._lock = threading.Lock()

    def clone(self) -> "Session":
        """Return a session of its own plans and memory over the same packed weights."""
        other = object.__new__(Session)
        other.__dict__.update(self.__dict__)
        other._runs, other._lock = OrderedDict(), threading.Lock()
        other._arena, other._arenas = self.memory.allocate(0), []
        return other

    def run(self, **inputs: Array) -> dict[str, Array]:
        """Compute the outputs.

        Args:
            inputs: an array for each input of the model, of its dtype and shape.

        Raises:
            ModelError: an input is missing, unknown, or does not fit.
        """
        return self.execute(inputs)

    def execute(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run with some outputs written in place.

        Args:
            inputs: as for `run`.
            outputs: C-contiguous arrays by output name that the program writes; they are returned as they are, other outputs as
                new arrays.
        """
        with self._lock:
            return self._find(inputs, outputs or {})(inputs)

    def map(self, **inputs: Array) -> dict[str, Array]:
        """Run on every element of a leading axis; elements are shared out to threads.

        Args:
            inputs: as for `run`, each with one more leading dimension, the same for all.

        Returns:
            The outputs, stacked along a leading dimension.

        Raises:
            ModelError: an input is missing, unknown, or does not fit; the leading dimensions differ.
        """
        lengths = {np.shape(array)[:1] for array in inputs.values()}
        if len(lengths) != 1 or () in lengths:
            raise ModelError(f"every input needs the same leading dimension, got {sorted(lengths)}")
        items = next(iter(lengths))[0]
        if not items:
            raise ModelError("there are no elements to run on")
        with self._lock:
            return self._find({name: array[0] for name, array in inputs.items()}, {}, stacked=True)(inputs)

    def prepare(self, inputs: Mapping[str, TensorType], outputs: Mapping[str, Array] | None = None) -> Run:
        """Plan for inputs of these concrete types and bind outputs, once for many runs that differ in values alone.

        Args:
            inputs: the type of each input, without symbolic dimensions.
            outputs: as for `execute`.

        Raises:
            ModelError: an input or an output does not fit.
        """
        blank = {name: np.broadcast_to(np.zeros((), kind.dtype), kind.extents) for name, kind in inputs.items()}
        with self._lock:
            run = self._find(blank, outputs or {})

        def locked(values: Mapping[str, Array]) -> dict[str, Array]:
            with self._lock:
                return run(values)

        return locked

    def layout(self, inputs: Mapping[str, TensorType], outputs: Mapping[str, Array] | None = None) -> Layout:
        """Plan for inputs of these concrete types without allocating; `nbytes` of the result is what a run needs."""
        shapes = determine(self._graph, inputs, self.trainable)
        if shapes.pending:
            node = shapes.pending[0]
            raise ModelError(f"{node.op} '{node.name}': its type depends on values, so that the graph cannot be planned whole")
        return self._layout(shapes, outputs or {})

    def _layout(self, shapes: Shapes, outputs: Mapping[str, Array]) -> Layout:
        return Layout(self._graph, shapes, self.threads, self.trainable, outputs, self.options)

    def explain(self, *, measure: bool | Mapping[str, Array] = False, **shapes: tuple[int, ...]) -> Explanation:
        """Say how each node runs: which kernel, why that one, and what others would cost on this machine.

        Args:
            measure: time each step too, on random inputs or on those given here. Steps run one by one, each with a barrier, and a
                batch is not cut into items.
            shapes: the concrete shape of each input; left out, symbolic dimensions are taken as 1.

        Returns:
            One row for each step, which prints as a table: see `Explanation`. `gm.kernels()` says which instruction set serves
            each kernel.

        Example:
            >>> import gristmill as gm
            >>> [row["product"] for row in Session(gm.zoo.mlp([8, 4]), threads=1).explain(x=(2, 8))]
            ['dense float32']
        """
        given = self._check(measure) if isinstance(measure, Mapping) else self._types(shapes)
        layout = self.layout(given)
        rows = explain(layout, self._stored, costs())
        if measure is not False and rows:
            from gristmill.runtime.timing import draw

            extents = {name: kind.extents for name, kind in given.items()}
            inputs = measure if isinstance(measure, Mapping) else draw(self.model, extents)
            plan = Plan(layout, np.zeros(layout.nbytes, np.uint8), self.weights, apart=True)
            for name, place in plan.inputs.items():
                np.copyto(place, inputs[name])
            time_steps(rows, plan, self.threads)
        return rows

    def _types(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorType]:
        """The types of inputs of these shapes; symbolic dimensions of the others are 1."""
        for name, given_shape in shapes.items():
            if name not in self.model.inputs or not isinstance(given_shape, (tuple, list)):
                raise ModelError(f"give a tuple for each of the inputs {list(self.model.inputs)}, got {name}={given_shape!r}")
        given = {}
        for name, kind in self.model.inputs.items():
            shape = shapes.get(name, tuple(1 if isinstance(dim, str) else dim for dim in kind.shape))
            given[name] = TensorType(kind.dtype, tuple(shape))
        return given

    def _find(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], stacked: bool = False) -> Run:
        """Return a run for arrays of these shapes, or for stacks of such. Shapes that were met before were checked before."""
        key = self._key(inputs, outputs, stacked)
        run = None if key is None else self._runs.get(key)
        if run is None:
            given = self._check(inputs)  # raises where there is no key
            run = self._plan_stack(given) if stacked else self._plan(given, outputs)
            self._runs[key] = run
            if len(self._runs) > PLANS:
                self._runs.popitem(last=False)
        else:
            self._runs.move_to_end(key)
        return run

    def _key(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], stacked: bool) -> Any:
        """What a plan depends on, or None for inputs that cannot be right. A plan keeps its bound arrays, so that no other array
        can come to lie at their addresses."""
        arrays = [inputs.get(name) for name in self.model.inputs]
        if not all(isinstance(array, np.ndarray) for array in arrays):
            return None
        shapes = tuple([(array.shape, array.dtype) for array in arrays])  # type: ignore[union-attr]
        places = tuple([(name, *_place(array)) for name, array in outputs.items()])
        return _core.isa_generation(), len(inputs), shapes, places, stacked

    def _plan(self, given: Mapping[str, TensorType], outputs: Mapping[str, Array]) -> Run:
        shapes = determine(self._graph, given, self.trainable)
        _check_bound(self._graph, shapes, outputs)
        if shapes.pending:
            return Stage(self._graph, shapes, self._over)
        if not outputs and self.memory.limit is None:
            split = self._split(given, shapes)
            if split is not None:
                return split
        return self._bind(self._layout(shapes, outputs), dict(outputs))

    def _plan_stack(self, given: Mapping[str, TensorType]) -> Run:
        mapped = self._mapped(given)
        return Stacked(mapped) if mapped is not None else each(self._plan(given, {}))

    def _split(self, given: Mapping[str, TensorType], shapes: Shapes) -> Run | None:
        """Return a run of a batch item by item, or None where that is impossible or not worth it."""

        def at(batch: int) -> Shapes:
            return determine(self._graph, _resized(given, batch), self.trainable)

        size = examples_per_item(self._graph, shapes, self.threads, at)
        if size is None:
            return None
        batch = next(iter(given.values())).extents[0]
        whole = self._mapped(_resized(given, size))
        rest = self._mapped(_resized(given, batch % size)) if batch % size else None
        if whole is None or (batch % size and rest is None):
            return None
        return Batch(whole, rest, size, {name: shapes.types[name] for name in self.model.outputs})

    def _mapped(self, given: Mapping[str, TensorType]) -> Mapped | None:
        """Plan an item for every thread; None where a part of the plan is Python."""
        shapes = determine(self._graph, given, self.trainable)
        if shapes.pending:
            return None
        layout = Layout(self._graph, shapes, 1, self.trainable, {}, self.options)
        if not layout.steps or any(step.kernel is None for step in layout.steps):
            return None
        if not self._arenas or layout.nbytes > self._arenas[0].nbytes:
            self._runs.clear()
            self.memory.release(sum(arena.nbytes for arena in self._arenas))
            self._arenas = []
            self._arenas = [self.memory.allocate(layout.nbytes) for _ in range(self.threads)]
        return Mapped([Plan(layout, arena, self.weights) for arena in self._arenas])

    def _over(self, graph: Model) -> Run:
        """Return a run of a part of the graph, all of whose inputs have concrete types."""
        part = self.clone()
        part._graph = part.model = graph
        return part._plan(graph.inputs, {})

    def _bind(self, layout: Layout, bound: dict[str, Array]) -> Run:
        if layout.nbytes > self._arena.nbytes:
            self._runs.clear()  # they hold the smaller arena, which goes before the larger one comes
            self.memory.release(self._arena.nbytes)
            self._arena = self.memory.allocate(0)
            self._arena = self.memory.allocate(layout.nbytes)
        return Bound(Plan(layout, self._arena, self.weights), bound, self.threads)

    def _check(self, inputs: Mapping[str, Array]) -> dict[str, TensorType]:
        """Return the concrete types of the inputs after holding them against the model's."""
        wanted = self.model.inputs
        if inputs.keys() != wanted.keys():
            missing, extra = sorted(wanted.keys() - inputs.keys()), sorted(inputs.keys() - wanted.keys())
            expected = ", ".join(f"{name}: {kind}" for name, kind in wanted.items())
            raise ModelError(f"inputs do not match: missing {missing}, unknown {extra}; the model takes {expected}")
        symbols: dict[str, int] = {}
        given = {}
        for name, kind in wanted.items():
            array = inputs[name]
            if not isinstance(array, np.ndarray) or array.dtype != kind.dtype:
                found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
                remedy = f"convert it with np.asarray(..., np.{kind.dtype})"
                raise ModelError(f"input '{name}' must be an array of {kind.dtype}, got {found}; {remedy}")
            if len(array.shape) != len(kind.shape) or not _matches(array.shape, kind.shape, symbols):
                known = f" (with {symbols})" if symbols else ""
                raise ModelError(f"input '{name}' has shape {array.shape}, the model takes {kind}{known}")
            given[name] = TensorType(kind.dtype, array.shape)
        return given


def _check_bound(graph: Model, shapes: Shapes, bound: Mapping[str, Array]) -> None:
    for name, array in bound.items():
        kind = shapes.types.get(name)
        fits = name in graph.outputs and name not in graph.tensors and kind is not None and kind.known and not shapes.pending
        fits = fits and array.shape == kind.shape and array.dtype == kind.dtype  # type: ignore[union-attr]
        if not fits or not array.flags.c_contiguous or not array.flags.writeable:
            raise ModelError(f"output '{name}' cannot be written to a {array.dtype} array of shape {array.shape}")


def _resized(given: Mapping[str, TensorType], batch: int) -> dict[str, TensorType]:
    """The same types with another leading dimension."""
    return {name: TensorType(kind.dtype, (batch, *kind.shape[1:])) for name, kind in given.items()}


def _place(array: Array) -> tuple[Any, ...]:
    """What a program that writes an array depends on; a view of the same address may differ in all the rest."""
    return array.ctypes.data, array.dtype.str, array.shape, array.strides, array.flags.writeable


def _matches(shape: tuple[int, ...], wanted: tuple[int | str, ...], symbols: dict[str, int]) -> bool:
    pairs = zip(shape, wanted, strict=True)
    return all(have == (symbols.setdefault(want, have) if isinstance(want, str) else want) for have, want in pairs)


def _check_trainable(model: Model, name: str, array: Array) -> None:
    if name not in model.tensors:
        raise ModelError(f"trainable '{name}' is no tensor of the model; it has {sorted(model.tensors)}")
    wanted = model.tensors[name].trainable
    fits = array.dtype == wanted.dtype == np.float32 and array.shape == wanted.shape and array.flags.c_contiguous
    if not fits:
        raise ModelError(
            f"trainable '{name}' must be a contiguous float32 array of shape {wanted.shape}, got {array.dtype} {array.shape}"
        )


def _computes_int8(model: Model) -> bool:
    """Whether products of a model have int8 activations."""
    return any(map(is_int8, model.tensors.values())) or any(has_gains(model.tensors[name]) for name in model.weights)


def _quantized(model: Model, trainable: Mapping[str, Array]) -> Model:
    tensors: dict[str, Tensor] = {}
    for name in model.weights:
        tensor = model.tensors[name]
        if tensor.kind in ("dense", "bf16") and name not in trainable:
            tensors[name] = Quantized.from_dense(tensor.dense())
    return model.replace(tensors=tensors)


def decide(ways: Sequence[Way], threads: int, resident: int) -> Way:
    """Choose by what products cost on this machine. Not within a budget, where no copies of weights are made."""
    return costs().decide(ways, threads, resident)


_sessions: "weakref.WeakKeyDictionary[Model, Session]" = weakref.WeakKeyDictionary()
_sessions_lock = threading.Lock()


def session_of(model: Model) -> Session:
    """Return the default session of a model, built on first use and kept as long as the model lives."""
    with _sessions_lock:
        session = _sessions.get(check_model(model))
        if session is None:
            # A session refers to its model: break the cycle, or the map would keep both alive.
            session = _sessions[model] = Session(model.replace())
    return session
