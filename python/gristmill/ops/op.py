"""What an operator is, and the small contracts that its file fulfils."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from gristmill.errors import ModelError
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

if TYPE_CHECKING:
    from gristmill.ops.products import Product

Dim = int | str  # a symbolic dimension has a name, such as "batch"
GRAD = "gristmill.grad"  # the domain of operators that only gradients use
OWN = "gristmill"  # the domain of operators that ONNX does not have


@dataclass(frozen=True)
class TensorType:
    """The dtype and the possibly symbolic shape of a value."""

    dtype: np.dtype[Any]
    shape: tuple[Dim, ...]

    @property
    def extents(self) -> tuple[int, ...]:
        """The shape where no dimension is symbolic."""
        return tuple(int(dim) for dim in self.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.extents) * self.dtype.itemsize

    @property
    def known(self) -> bool:
        """False for a value whose dtype and rank depend on what the graph computes."""
        return self.dtype != object

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]" if self.known else "of a type that depends on values"


UNKNOWN = TensorType(np.dtype(object), ())


class Undetermined(Exception):
    """Raised by a shape rule where the types of the outputs depend on values that are not known."""


@dataclass(frozen=True)
class Node:
    """One operator applied to named values. An empty name marks an absent optional input."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    domain: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(self.inputs))
        object.__setattr__(self, "outputs", tuple(self.outputs))
        object.__setattr__(self, "attributes", MappingProxyType(dict(self.attributes)))

    @property
    def name(self) -> str:
        """A node is known by the first value that it makes."""
        return self.outputs[0]

    def input(self, index: int) -> str:
        """The name of an input, or "" if it is absent."""
        return self.inputs[index] if index < len(self.inputs) else ""


class Tape(Protocol):
    """What a gradient rule may do; `autodiff` implements it."""

    def emit(self, op: str, inputs: Sequence[str], attributes: Mapping[str, Any] | None = None, domain: str = GRAD) -> str:
        """Append a node with one output and return the output's name."""

    def emit_all(self, op: str, inputs: Sequence[str], attributes: Mapping[str, Any], outputs: int) -> tuple[str, ...]:
        """Append a gradient node with several outputs and return their names."""

    def wants(self, name: str) -> bool:
        """Whether the gradient of this value is needed."""

    def add(self, name: str, gradient: str) -> None:
        """Add a contribution to the gradient of a value."""

    def type(self, name: str) -> TensorType:
        """The type of a value."""


class Buffer(Protocol):
    """A value's place in memory, known by address only when the plan is complete."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def reshape(self, *shape: int) -> "Buffer": ...


class Binder(Protocol):
    """What an operator may ask of the plan that binds it; `runtime.plan` implements it."""

    threads: int
    in_place: bool  # read weights where they are rather than keep packed copies
    precision: str | None  # what the session was asked for: "float32", "bf16", "int8", or None
    low_precision: bool  # whether products of activations may round to bf16, as those with weights round already

    def shape(self, name: str) -> tuple[int, ...]: ...
    def rows(self, name: str) -> Buffer: ...
    def lanes(self, name: str) -> Buffer: ...
    def stored(self, name: str) -> tuple[Buffer, str]: ...
    def codes(
        self, name: str, layout: str, static: tuple[float, int] | None = None, symmetric: bool = False
    ) -> tuple[Buffer, Buffer, Buffer | None, int]: ...
    def groups(self, name: str, group: int) -> tuple[Buffer, Buffer, Buffer, int]: ...
    def output(self, name: str, layout: str = "rows") -> Buffer: ...
    def alias(self, name: str, buffer: Any) -> bool: ...
    def scratch(self, count: int, dtype: Any = np.uint8) -> Buffer: ...
    def tensor(self, name: str) -> Tensor: ...
    def kind(self, name: str) -> str | None: ...
    def trains(self, name: str) -> bool: ...
    def array(self, name: str) -> Array | Buffer | None: ...
    def scale(self, name: str) -> Array | Buffer: ...
    def weight(self, name: str) -> Any: ...
    def packed(self, name: str, pack: Callable[..., Any]) -> Any: ...
    def choose(self, node: Node, products: "Sequence[Product]") -> "Product": ...
    def step(self, kernel: Callable[..., None], *args: Any) -> None: ...


class Op:
    """An operator: its shape rule, its NumPy reference, and, where there are any, its gradient rule and its kernels."""

    name: ClassVar[str]
    domain: ClassVar[str] = ""
    arity: ClassVar[tuple[int, int]]  # fewest and most inputs
    attributes: ClassVar[Mapping[str, type | tuple[type, ...]]] = {}  # allowed attributes and their types
    differentiable: ClassVar[bool] = False
    pure: ClassVar[bool] = True  # equal inputs give equal outputs, so that the node may be folded
    every_dtype: ClassVar[bool] = False  # `bind` serves outputs of any dtype, not of float32 alone
    tensor_inputs: ClassVar[tuple[int, ...]] = ()  # constants that `reference` takes as tensors, for their kind matters

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        """Return the types of the outputs.

        Args:
            node: the node.
            types: the type of each input, None where it is absent. Dimensions may be symbolic.
            constants: each input whose value is known: tensors of the model, and what follows from concrete shapes.

        Raises:
            ModelError: the inputs do not fit; the message names both shapes.
            Undetermined: the types depend on values that are not known. The node then runs its reference when they are.
        """
        raise Undetermined

    def known(self, node: Node, types: Sequence[TensorType | None], values: Sequence[Array | None]) -> list[Array] | None:
        """Return the outputs where they follow from concrete types and the known values, so that no step computes them."""
        present = [value for name, value in zip(node.inputs, values, strict=True) if name]
        if not self.pure or not present or any(value is None for value in present) or self.tensor_inputs:
            return None
        return [np.asarray(output) for output in self.reference(node, *values)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        """Compute the outputs with NumPy. Inputs are arrays, but for those that `tensor_inputs` lists."""
        raise NotImplementedError

    def separable(
        self, node: Node, split: Sequence[bool], types: Sequence[TensorType | None], made: Sequence[TensorType]
    ) -> bool:
        """Whether row i along axis 0 of every output depends only on row i of the inputs that are split.

        Args:
            node: the node.
            split: which inputs carry the examples of the batch along axis 0; the others are the same for all.
            types: concrete types of the inputs, None where one is absent.
            made: concrete types of the outputs; their leading dimension is the batch.
        """
        return False

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        """Add the gradients of the inputs that the tape wants, given the gradient of the output."""
        raise ModelError(f"{node.op} has no gradient")

    def bind(self, node: Node, binder: Binder) -> bool:
        """Append kernel steps; False leaves the node to its NumPy reference."""
        return False


def need(condition: bool, node: Node, message: str) -> None:
    """Raise a ModelError about a node unless the condition holds."""
    if not condition:
        raise ModelError(f"{node.op} '{node.name}': {message}")


def refusal(node: Node, error: Exception) -> ModelError:
    """What to raise where NumPy or the border refuses what an operator hands it, or where its own rule does."""
    return ModelError(str(error) if isinstance(error, ModelError) else f"{node.op} '{node.name}': {error}")


def fresh_dim(node: Node, axis: int) -> str:
    """Return a symbol for a dimension that follows from symbolic ones by arithmetic."""
    return f"{node.name}.{axis}"


def aligned(split: Sequence[bool], types: Sequence[TensorType | None], made: TensorType) -> bool:
    """Whether broadcasting keeps the examples of split inputs apart: a rule for `separable`."""
    rank = len(made.shape)
    for along, kind in zip(split, types, strict=True):
        if kind is None:
            continue
        if along and (len(kind.shape) != rank or kind.shape[0] != made.shape[0]):
            return False
        if not along and len(kind.shape) == rank and kind.shape[0] != 1:
            return False
    return True


def same_dim(a: Dim, b: Dim) -> bool:
    """Whether two dimensions can be equal: two different symbols may be, a symbol and a number may be."""
    return a == b or isinstance(a, str) or isinstance(b, str)


def same_type(a: TensorType | None, b: TensorType | None) -> bool:
    """Whether two values have one dtype and shapes that can be equal."""
    if a is None or b is None or len(a.shape) != len(b.shape):
        return False
    return a.dtype == b.dtype and all(map(same_dim, a.shape, b.shape))


def as_rows(shape: Sequence[int]) -> tuple[int, int]:
    """Return (rows, columns) of a value whose leading dimensions are all rows."""
    rows = 1
    for dim in shape[:-1]:
        rows *= dim
    return rows, shape[-1]
