"""Compile a model for concrete shapes: bind every node to kernels, lay out memory, and cut the steps into segments.

A plan is built in two passes. The first lets every operator append steps over buffers that have no address yet, in the layout
its kernel wants ("rows" or "lanes"), with conversions put in where layouts meet. The second places the buffers in one arena and
binds the steps to addresses. Steps between two Python references form one C segment, run without Python.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from gristmill import _core
from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.ops import Node, find
from gristmill.ops.op import as_rows, refusal
from gristmill.ops.products import Product
from gristmill.ops.products.product import static_scale
from gristmill.runtime.arena import FOREVER, Buffer, Memory, place
from gristmill.runtime.choice import Choice, Way, stored_bytes, ways_of
from gristmill.runtime.shapes import Shapes
from gristmill.tensor import BFloat16, Bitmask, Int4, Quantized, Sparse, Tensor, is_int8
from gristmill.tensor.parts import Array


@dataclass(frozen=True)
class Packed:
    """A weight to be packed for its kernel when the plan is bound, not before."""

    name: str
    pack: Callable[..., Any]


@dataclass(frozen=True)
class InPlace:
    """A weight that kernels read where it is. `trained` stands in for its values, or for the scales of int8 codes."""

    tensor: Tensor
    trained: "Array | Buffer | None"

    def view(self, arena: Array) -> _core.Weight | _core.Int4Weight:
        return weight_view(self.tensor, self.trained.view(arena) if isinstance(self.trained, Buffer) else self.trained)


class Weights:
    """What sessions of one model share: packed weights by (name, packer, instruction set)."""

    def __init__(self, model: Model, trainable: Mapping[str, Array], memory: Memory) -> None:
        self.model = model
        self.trainable = trainable
        self.memory = memory
        self._made: dict[tuple[str, str, int], Any] = {}
        self._lock = threading.Lock()  # clones run at the same time

    def make(self, packed: Packed, threads: int) -> Any:
        """Return a packed weight, made once."""
        key = (packed.name, packed.pack.__name__, _core.isa_generation())
        with self._lock:
            if key not in self._made:
                tensor = self.model.tensors[packed.name]
                view = weight_view(tensor, None if is_int8(tensor) else self.trainable.get(packed.name))
                self.memory.charge(_core.packed_nbytes(packed.pack, view))
                self._made[key] = packed.pack(view, threads)
            return self._made[key]


def weight_view(tensor: Tensor, trained: Array | None = None) -> _core.Weight | _core.Int4Weight:
    """Return the kernel's view of a matrix, its values or its scales replaced by memory that somebody else updates.

    A tensor of more dimensions is a matrix of its first and all others. What trains of int4 is no part of the view.
    """
    if isinstance(tensor, Int4):
        return tensor.view
    if isinstance(tensor, Bitmask):
        return tensor.weight(trained)
    shape = (tensor.shape[0], prod(tensor.shape[1:]))
    if tensor.kind == "dense":
        return _core.Weight((tensor.trainable if trained is None else trained).reshape(shape), shape)
    if isinstance(tensor, BFloat16):
        return _core.Weight(tensor.codes if trained is None else trained.reshape(shape), shape)
    if tensor.kind == "quantized":
        return _core.Weight(tensor.codes, shape, tensor.scale if trained is None else trained)  # type: ignore[union-attr]
    assert isinstance(tensor, Sparse)
    if tensor.scale is None:
        values = tensor.values if trained is None else trained.reshape(tensor.values.shape)
        return _core.Weight(values, shape, None, tensor.row_offsets, tensor.index)
    return _core.Weight(tensor.values, shape, tensor.scale if trained is None else trained, tensor.row_offsets, tensor.index)


@dataclass(frozen=True)
class Step:
    """One kernel call or, where `kernel` is None, one NumPy reference, for a node."""

    node: Node
    kernel: Callable[..., None] | None
    args: tuple[Any, ...]
    outputs: tuple[Buffer, ...] = ()
    moves: bool = False  # converts a value for the node, rather than being the node's own

    def buffers(self) -> list[Buffer]:
        within = (arg.trained if isinstance(arg, InPlace) else arg for arg in (*self.args, *self.outputs))
        return [arg for arg in within if isinstance(arg, Buffer)]


@dataclass(frozen=True)
class Options:
    """How a session wants its plans: see `Session` and `ops.op.Binder`."""

    precision: str | None = None
    low_precision: bool = False
    reference: bool = False
    in_place: bool = False
    decide: Callable[[Sequence[Way], int], Way] | None = None  # of ways, given the bytes of all weights; None: own forms


class Layout:
    """The first pass: steps over unplaced buffers. Implements `ops.op.Binder`.

    `like` is a layout of the same model for another batch, whose choice of products is taken over.
    """

    def __init__(
        self,
        model: Model,
        shapes: Shapes,
        threads: int,
        trainable: Mapping[str, Array],
        outputs: Mapping[str, Array],
        options: "Options",
        like: "Layout | None" = None,
    ) -> None:
        self.model, self.types, self.values, self.threads = model, shapes.types, shapes.values, threads
        self.trainable, self.bound, self.in_place = trainable, outputs, options.in_place
        self.precision, self.low_precision = options.precision, options.low_precision
        self.steps: list[Step] = []
        self.choices: dict[str, Choice] = {}  # by node
        self.decide, self.like = options.decide, like
        self.scales: dict[str, Buffer] = {}
        self.panels: dict[tuple[str, str, tuple[float, int] | None], tuple[Buffer, Buffer, Buffer]] = {}
        self.grouped: dict[tuple[str, int], tuple[Buffer, Buffer, Buffer]] = {}
        self.inputs = {name: self._fresh(name, "rows") for name in model.inputs}
        self.forms: dict[str, dict[str, Buffer]] = {name: {"rows": buffer} for name, buffer in self.inputs.items()}
        for node in model.nodes:
            self.node = node
            if node.name not in self.values and (options.reference or not self._bind(node)):
                self._refer(node)
        self.outputs = {name: self.rows(name) for name in model.outputs}
        self.nbytes = self._place()

    # ---- what operators ask for (ops.op.Binder) ----

    def shape(self, name: str) -> tuple[int, ...]:
        return self.types[name].extents

    def rows(self, name: str) -> Buffer:
        """A value in its own shape, C order."""
        if name not in self.forms:
            return self._constant(name)
        forms = self.forms[name]
        if "rows" not in forms:
            lanes = forms["lanes"]
            forms["rows"] = self._fresh(name, "rows")
            self._move(_core.transpose, lanes, forms["rows"].reshape(*lanes.shape[::-1]))
        return forms["rows"]

    def lanes(self, name: str) -> Buffer:
        """A value as a matrix [columns, rows]."""
        forms = self.forms.setdefault(name, {})
        if "lanes" not in forms:
            rows = forms["rows"] if "rows" in forms else self._constant(name)
            forms["lanes"] = self._fresh(name, "lanes")
            self._move(_core.transpose, rows.reshape(*as_rows(rows.shape)), forms["lanes"])
        return forms["lanes"]

    def stored(self, name: str) -> tuple[Buffer, str]:
        """A value in whichever layout it has."""
        layout = next(iter(self.forms.get(name, {})), "rows")
        return (self.lanes(name) if layout == "lanes" else self.rows(name)), layout

    def codes(self, name: str, layout: str, static: tuple[float, int] | None = None) -> tuple[Buffer, Buffer, Buffer, int]:
        """A value quantised into a panel, per row or with a static scale and zero point: codes, scales, zero points and the
        number of rows.

        Made once and shared.
        """
        m, k = as_rows(self.shape(name))
        if (name, layout, static) not in self.panels:
            x, form = self.stored(name)
            x = x if form == "lanes" else x.reshape(m, k)
            panel = self.panel(name, layout, static)
            self._move(_core.quantize_activations, x, form == "lanes", layout, *panel, *(static or ()))
        return (*self.panels[name, layout, static], m)

    def panel(self, name: str, layout: str, static: tuple[float, int] | None) -> tuple[Buffer, Buffer, Buffer]:
        """New buffers for the codes, scales and zero points of a value, for the present node to fill."""
        m, k = as_rows(self.shape(name))
        codes = self.scratch(_core.codes_nbytes(m, k, layout))
        self.panels[name, layout, static] = codes, Buffer((m,), np.float32), Buffer((m,), np.int32)
        return self.panels[name, layout, static]

    def grouped_codes(self, name: str, group: int) -> tuple[Buffer, Buffer, Buffer, int]:
        """A value quantised to int8 with a scale for each group of a row: codes, scales, offsets and the number of rows.

        Made once and shared.
        """
        m, k = as_rows(self.shape(name))
        if (name, group) not in self.grouped:
            count = m * -(-k // group)
            made = Buffer((m * -(-k // 8) * 8,), np.int8), Buffer((count,), np.float32), Buffer((count,), np.int32)
            self._move(_core.quantize_groups, self.rows(name).reshape(m, k), group, *made)
            self.grouped[name, group] = made
        return (*self.grouped[name, group], m)

    def output(self, name: str, layout: str = "rows") -> Buffer:
        """A new buffer for a value that the present node makes."""
        self.forms[name] = {layout: self._fresh(name, layout)}
        return self.forms[name][layout]

    def wanted(self, name: str) -> str:
        """The layout to make a value in where a kernel can write either: lanes if that saves a reader a conversion."""
        forms = (find(node).reads(node, index, self) for node, index in self.readers.get(name, ()))
        return "lanes" if name not in self.bound and any(form.startswith("lanes") for form in forms) else "rows"

    def codes_alone(self, name: str) -> tuple[str, tuple[float, int] | None] | None:
        """Layout and static scale of the codes that all readers of a value take; None if anything else is read of it."""
        readers = [] if name in self.model.outputs else self.readers.get(name, [])
        forms = {(find(node).reads(node, index, self), static_scale(node)) for node, index in readers}
        if len(forms) != 1:
            return None
        ((form, static),) = forms
        layout, *codes = form.split()
        return (layout, static) if codes else None

    def alias(self, name: str, buffer: Buffer) -> bool:
        """Let a value that the present node makes be another buffer under its own shape: no step, no copy.

        Where the value is bound to memory of its own it gets a copy; False if it cannot get one here.
        """
        if prod(buffer.shape) != prod(self.shape(name)):
            raise ValueError(f"{buffer.shape} cannot be seen as {self.shape(name)}")
        if name not in self.bound:
            self.forms[name] = {"rows": buffer.reshape(*self.shape(name))}
        elif buffer.dtype == np.float32:
            self.step(_core.scale, buffer, 1.0, self.output(name).reshape(*buffer.shape))
        else:
            return False
        return True

    def scratch(self, count: int, dtype: Any = np.uint8) -> Buffer:
        return Buffer((count,), dtype)

    def tensor(self, name: str) -> Tensor:
        return self.model.tensors[name]

    def kind(self, name: str) -> str | None:
        """The kind of a tensor of the model; None for any other value."""
        return self.model.tensors[name].kind if name in self.model.tensors else None

    def trains(self, name: str) -> bool:
        return name in self.trainable

    def array(self, name: str) -> Array | Buffer:
        """A vector of the model: the arena's slice where it trains, else the constant."""
        if name in self.trainable:
            return self.trainable[name]
        return self.model.tensors[name].dense() if name in self.model.tensors else self.rows(name)

    def scale(self, name: str) -> Array | Buffer:
        """The scales of an int8 weight: where their gains train, the product of both, made anew at every run."""
        tensor = self.model.tensors[name]
        assert isinstance(tensor, (Quantized, Sparse, Bitmask))
        assert tensor.scale is not None
        if name not in self.trainable:
            return tensor.scale
        if name not in self.scales:
            self.scales[name] = Buffer(tensor.scale.shape, np.float32)
            self.step(_core.multiply, self.trainable[name], tensor.scale, self.scales[name])
        return self.scales[name]

    def weight(self, name: str) -> InPlace:
        tensor = self.model.tensors[name]
        return InPlace(tensor, self.scale(name) if is_int8(tensor) else self.trainable.get(name))

    def packed(self, name: str, pack: Callable[..., Any]) -> Packed:
        return Packed(name, pack)

    def choose(self, node: Node, products: Sequence[Product]) -> Product:
        """The product that a Linear is bound to, of those that can serve it: its weight's own, or the fastest expected.

        The same whenever it is asked for.
        """
        if node.name not in self.choices:
            ways = ways_of(node, products, self)
            self.choices[node.name] = Choice(self._way(node, ways), ways)
        return self.choices[node.name].way.product

    def step(self, kernel: Callable[..., None], *args: Any) -> None:
        self.steps.append(Step(self.node, kernel, args))

    @cached_property
    def readers(self) -> dict[str, list[tuple[Node, int]]]:
        """By value: the nodes that read it, and as which input."""
        readers: dict[str, list[tuple[Node, int]]] = {}
        for node in self.model.nodes:
            for index, name in enumerate(node.inputs):
                readers.setdefault(name, []).append((node, index))
        return readers

    @cached_property
    def resident(self) -> int:
        """Bytes of the model's weights."""
        return stored_bytes(self.model)

    # ---- inner ----

    def _way(self, node: Node, ways: Sequence[Way]) -> Way:
        alike = None if self.like is None else self.like.choices[node.name].way.product
        found = next((way for way in ways if way.product == alike), None)
        if found is None and self.decide is not None and len(ways) > 1:
            return self.decide(ways, self.resident)
        return found or ways[0]

    def _move(self, kernel: Callable[..., None], *args: Any) -> None:
        self.steps.append(Step(self.node, kernel, args, moves=True))

    def _fresh(self, name: str, layout: str) -> Buffer:
        shape, dtype = self.shape(name), self.types[name].dtype
        if layout == "lanes":
            return Buffer(as_rows(shape)[::-1], dtype)
        return Buffer(shape, dtype, self.bound.get(name))

    def _constant(self, name: str) -> Buffer:
        if name in self.values:
            array = np.asarray(self.values[name], order="C")
            return Buffer(array.shape, array.dtype, array)
        tensor, trained = self.model.tensors[name], self.trainable.get(name)
        if trained is not None and tensor.kind not in ("dense", "bf16"):
            raise ModelError(f"'{name}' trains in {tensor.kind} form, which nothing but a Linear can read")
        array = np.asarray(tensor.dense(), order="C") if trained is None else trained
        return Buffer(array.shape, array.dtype, array)

    def _bind(self, node: Node) -> bool:
        """Append a node's kernel steps if it has any. Kernels are float32; only losses read anything else, their labels."""
        op = find(node)
        if not op.every_dtype and any(self.types[name].dtype != np.float32 for name in node.outputs):
            return False
        try:
            return op.bind(node, self)
        except (TypeError, ValueError) as error:
            raise refusal(node, error) from error

    def _refer(self, node: Node) -> None:
        """Leave a node to NumPy: its inputs as arrays, a weight whose kind matters as a tensor."""
        args: list[Any] = []
        tensors_at = find(node).tensor_inputs
        for index, name in enumerate(node.inputs):
            if name in self.model.tensors:
                args.append(self._evaluator(name, whole=index not in tensors_at))
            else:
                args.append(self.rows(name) if name else None)
        outputs = tuple(self.output(name) for name in node.outputs)
        self.steps.append(Step(node, None, tuple(args), outputs))

    def _evaluator(self, name: str, whole: bool) -> Callable[[], Any]:
        tensor, trained = self.model.tensors[name], self.trainable.get(name)

        def evaluate() -> Any:
            current = tensor if trained is None else tensor.with_trainable(trained)
            return current.dense() if whole else current

        return evaluate

    def _place(self) -> int:
        for buffer in self.inputs.values():
            buffer.touch(-1)
        alone = self.threads == 1 or self.in_place  # overlapping saves barriers and costs memory
        self.groups = list(range(len(self.steps))) if alone else _groups(self.steps, self.inputs.values())
        for group, step in zip(self.groups, self.steps, strict=True):
            for buffer in step.buffers():
                buffer.touch(group)
        for buffer in self.outputs.values():
            buffer.touch(FOREVER)
        used = [b for step in self.steps for b in step.buffers()] + [*self.inputs.values(), *self.outputs.values()]
        self.packs = {arg for step in self.steps for arg in step.args if isinstance(arg, Packed)}
        return place(list({id(b.root): b.root for b in used if not b.external}.values()))


def _groups(steps: list[Step], inputs: Iterable[Buffer]) -> list[int]:
    """Number the steps so that steps of one number need no barrier between them: none touches what another of them makes.

    A buffer is made by the step that touches it first. Steps of one node may work in place, so that they are kept apart.
    """
    groups: list[int] = []
    seen = {id(buffer) for buffer in inputs}
    made: set[int] = set()  # by the present group
    group, before = 0, None
    for step in steps:
        touched = {id(buffer.root) for buffer in step.buffers()}
        apart = before is None or before.kernel is None or step.kernel is None or step.node is before.node
        if apart or touched & made:
            group, made = group + 1, set()
        made |= touched - seen
        seen |= touched
        before = step
        groups.append(group)
    return groups


class Plan:
    """The second pass: steps bound to addresses in an arena; each `apart`, in a program of its own, where they are timed."""

    def __init__(self, layout: Layout, arena: Array, weights: Weights, apart: bool = False) -> None:
        self.apart = apart
        self.inputs = {name: buffer.view(arena) for name, buffer in layout.inputs.items()}
        self.outputs = {name: buffer.view(arena) for name, buffer in layout.outputs.items()}
        self.steps = layout.steps
        self.segments: list[_core.Program | Callable[[], None]] = []
        before = None
        for group, step in zip(layout.groups, layout.steps, strict=True):
            if group == before and not apart:
                self.segments[-1].overlap()  # type: ignore[union-attr]
            self._bind(step, arena, weights, layout.threads)
            before = group
        self._arena = arena  # programs hold addresses in it

    @property
    def program(self) -> _core.Program:
        """The one program of a plan without Python steps."""
        (segment,) = self.segments
        assert isinstance(segment, _core.Program)
        return segment

    def _bind(self, step: Step, arena: Array, weights: Weights, threads: int) -> None:
        args = [arg.view(arena) if isinstance(arg, Buffer) else arg for arg in step.args]
        if step.kernel is None:
            self.segments.append(_reference(step.node, args, [out.view(arena) for out in step.outputs]))
            return
        if self.apart or not self.segments or not isinstance(self.segments[-1], _core.Program):
            self.segments.append(_core.Program())
        try:
            args = [arg.view(arena) if isinstance(arg, InPlace) else arg for arg in args]
            args = [weights.make(arg, threads) if isinstance(arg, Packed) else arg for arg in args]
            step.kernel(self.segments[-1], *args)
        except (TypeError, ValueError) as error:
            raise refusal(step.node, error) from error

    def run(self, threads: int) -> None:
        for segment in self.segments:
            if isinstance(segment, _core.Program):
                segment.run(threads)
            else:
                segment()


def _reference(node: Node, args: list[Any], outputs: list[Array]) -> Callable[[], None]:
    op = find(node)

    def run() -> None:
        values = [arg() if callable(arg) else arg for arg in args]
        try:
            made = op.reference(node, *values)
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise refusal(node, error) from error
        for out, value in zip(outputs, made, strict=True):
            if np.shape(value) != out.shape:
                raise ModelError(f"{node.op} '{node.name}': made {np.shape(value)}, planned {out.shape}")
            out[...] = value

    return run
