"""LSTM, GRU and RNN: one walk over time for all three, and a cell of their own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gristmill.ops.activation import sigmoid
from gristmill.ops.axes import at, first
from gristmill.ops.dtypes import narrow, wide
from gristmill.ops.elementwise import softplus
from gristmill.ops.op import Dim, Node, Op, TensorType, need, same_dim
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

Function = Callable[[Array], Array]

# Each activation with how many of `activation_alpha` and `activation_beta` it takes, and what they are by default.
ACTIVATIONS: dict[str, tuple[Callable[..., Array], tuple[float, ...]]] = {
    "Affine": (lambda x, alpha, beta: alpha * x + beta, (1.0, 0.0)),
    "Elu": (lambda x, alpha: np.where(x < 0, alpha * np.expm1(np.minimum(x, 0)), x), (1.0,)),
    "HardSigmoid": (lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1), (0.2, 0.5)),
    "LeakyRelu": (lambda x, alpha: np.where(x < 0, alpha * x, x), (0.01,)),
    "Relu": (lambda x: np.maximum(x, 0), ()),
    "ScaledTanh": (lambda x, alpha, beta: alpha * np.tanh(beta * x), (1.0, 1.0)),
    "Sigmoid": (sigmoid, ()),
    "Softplus": (softplus, ()),
    "Softsign": (lambda x: x / (1 + np.abs(x)), ()),
    "Tanh": (np.tanh, ()),
    "ThresholdedRelu": (lambda x, alpha: np.where(x > alpha, x, 0), (1.0,)),
}
BY_LOWER = {name.lower(): name for name in ACTIVATIONS}


def functions(node: Node, default: tuple[str, ...], directions: int) -> list[list[Function]]:
    """The activations of each direction, bound to the parameters that the node lists for them in order."""
    names = node.attributes.get("activations", default * directions)
    need(len(names) == len(default) * directions, node, f"takes {len(default)} activations for each direction, got {names}")
    unknown = [name for name in names if name.lower() not in BY_LOWER]
    need(not unknown, node, f"unknown activations {unknown}; known: {list(ACTIVATIONS)}")
    alphas, betas = (list(node.attributes.get(key, ())) for key in ("activation_alpha", "activation_beta"))
    bound: list[Function] = []
    for name in names:
        function, defaults = ACTIVATIONS[BY_LOWER[name.lower()]]
        given = (alphas, betas)[: len(defaults)]
        parameters = [listed.pop(0) if listed else usual for listed, usual in zip(given, defaults, strict=True)]
        bound.append(lambda x, function=function, parameters=parameters: function(x, *parameters))  # type: ignore[misc]
    return [bound[i : i + len(default)] for i in range(0, len(bound), len(default))]


@dataclass(frozen=True)
class Cell:
    """The parameters of one direction: weights of the input and of the state, by gate, and their biases."""

    node: Node
    w: Array  # [gates, hidden, input]
    r: Array  # [gates, hidden, hidden]
    wb: Array  # [gates, hidden]
    rb: Array
    peepholes: Array  # [3, hidden]
    functions: list[Function]

    def clipped(self, x: Array) -> Array:
        clip = self.node.attributes.get("clip")
        return x if clip is None else np.clip(x, -clip, clip)

    def gate(self, index: int, x: Array, hidden: Array) -> Array:
        return x @ self.w[index].T + hidden @ self.r[index].T + self.wb[index] + self.rb[index]


States = tuple[Array, ...]


class Recurrent(Op):
    """Inputs X [time, batch, input], W, R, B, sequence_lens and the initial states; outputs Y and the last states.

    With `layout` 1 the batch comes first everywhere. Steps past the length of a sequence give 0 and leave the states.
    """

    gates: ClassVar[int]
    states: ClassVar[int] = 1
    usual: ClassVar[tuple[str, ...]]
    attributes = {
        "activation_alpha": tuple, "activation_beta": tuple, "activations": tuple, "clip": float, "direction": str,
        "hidden_size": int, "layout": int,
    }  # fmt: skip

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, w, r, b = first(types), types[1], types[2], at(types, 3)
        assert w is not None
        assert r is not None
        need(len(x.shape) == len(w.shape) == len(r.shape) == 3, node, f"X is {x}, W is {w}, R is {r}")
        hidden = r.shape[2]
        directions = 2 if node.attributes.get("direction", "forward") == "bidirectional" else 1
        wanted = (directions, self.gates * hidden if isinstance(hidden, int) else w.shape[1])
        fits = all(map(same_dim, w.shape, (*wanted, x.shape[2]))) and all(map(same_dim, r.shape, (*wanted, hidden)))
        need(fits, node, f"X is {x}, W is {w}, R is {r}: they do not fit")
        fits = b is None or len(b.shape) == 2
        need(fits, node, f"B is {b}")
        functions(node, self.usual, directions)
        batch_first = node.attributes.get("layout", 0)
        batch, time = x.shape[:2] if batch_first else x.shape[1::-1]
        every: tuple[Dim, ...] = (batch, time, directions, hidden) if batch_first else (time, directions, batch, hidden)
        final: tuple[Dim, ...] = (batch, directions, hidden) if batch_first else (directions, batch, hidden)
        made = [TensorType(x.dtype, every), *[TensorType(x.dtype, final)] * self.states]
        return made[: len(node.outputs)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, w, r = map(wide, inputs[:3])
        batch_first = node.attributes.get("layout", 0)
        x = x.swapaxes(0, 1) if batch_first else x
        directions, hidden = w.shape[0], r.shape[2]
        given = at(inputs, 4)
        lengths = np.full(x.shape[1], x.shape[0]) if given is None else given
        starts = [self._start(at(inputs, 5 + i), (directions, x.shape[1], hidden), batch_first) for i in range(self.states)]
        made, ends = [], []
        for index, chosen in enumerate(functions(node, self.usual, directions)):
            cell = self._cell(node, index, w, r, at(inputs, 3), at(inputs, 7), chosen)
            backward = index == 1 or node.attributes.get("direction", "forward") == "reverse"
            y, end = self._walk(cell, x, lengths, tuple(start[index] for start in starts), backward)
            made.append(y)
            ends.append(end)
        every = np.stack(made, axis=1)  # [time, directions, batch, hidden]
        finals = [np.stack(parts) for parts in zip(*ends, strict=True)]
        if batch_first:
            every, finals = every.transpose(2, 0, 1, 3), [final.swapaxes(0, 1) for final in finals]
        return [narrow(y, inputs[0].dtype) for y in (every, *finals)][: len(node.outputs)]

    def _start(self, given: Array | None, shape: tuple[int, ...], batch_first: int) -> Array:
        if given is None:
            return np.zeros(shape, np.float32)
        return wide(given).swapaxes(0, 1) if batch_first else wide(given)

    def _cell(self, node: Node, index: int, w: Array, r: Array, b: Any, p: Any, chosen: list[Function]) -> Cell:
        gates, hidden = self.gates, r.shape[2]
        bias = np.zeros((2 * gates, hidden), w.dtype) if b is None else wide(b)[index].reshape(2 * gates, hidden)
        peepholes = np.zeros((3, hidden), w.dtype) if p is None else wide(p)[index].reshape(3, hidden)
        weights = w[index].reshape(gates, hidden, -1), r[index].reshape(gates, hidden, hidden)
        return Cell(node, *weights, bias[:gates], bias[gates:], peepholes, chosen)

    def _walk(self, cell: Cell, x: Array, lengths: Array, state: States, backward: bool) -> tuple[Array, States]:
        time, batch = x.shape[:2]
        y = np.zeros((time, batch, state[0].shape[-1]), x.dtype)
        entries = np.arange(batch)
        for step in range(time):
            live = step < lengths
            position = np.where(live, lengths - 1 - step, 0) if backward else np.full(batch, step)
            after = self.advance(cell, x[position, entries], state)
            state = tuple(np.where(live[:, None], new, old) for new, old in zip(after, state, strict=True))
            y[position[live], entries[live]] = state[0][live]
        return y, state

    def advance(self, cell: Cell, x: Array, state: States) -> States:
        """The states after one step."""
        raise NotImplementedError


class RNN(Recurrent):
    name, arity, gates, usual = "RNN", (3, 6), 1, ("Tanh",)

    def advance(self, cell: Cell, x: Array, state: States) -> States:
        return (cell.functions[0](cell.clipped(cell.gate(0, x, state[0]))),)


class GRU(Recurrent):
    """Gates z, r, h; with `linear_before_reset` the state is multiplied by R before r gates it."""

    name, arity, gates, usual = "GRU", (3, 6), 3, ("Sigmoid", "Tanh")
    attributes = {**Recurrent.attributes, "linear_before_reset": int}

    def advance(self, cell: Cell, x: Array, state: States) -> States:
        f, g = cell.functions
        hidden = state[0]
        z, r = (f(cell.clipped(cell.gate(index, x, hidden))) for index in (0, 1))
        if cell.node.attributes.get("linear_before_reset", 0):
            new = x @ cell.w[2].T + cell.wb[2] + r * (hidden @ cell.r[2].T + cell.rb[2])
        else:
            new = cell.gate(2, x, r * hidden)
        return ((1 - z) * g(cell.clipped(new)) + z * hidden,)


class LSTM(Recurrent):
    """Gates i, o, f, c, with peepholes for the first three; with `input_forget` the forget gate is 1 - i."""

    name, arity, gates, states, usual = "LSTM", (3, 8), 4, 2, ("Sigmoid", "Tanh", "Tanh")
    attributes = {**Recurrent.attributes, "input_forget": int}

    def advance(self, cell: Cell, x: Array, state: States) -> States:
        f, g, h = cell.functions
        hidden, memory = state
        peep_i, peep_o, peep_f = cell.peepholes
        i = f(cell.clipped(cell.gate(0, x, hidden) + peep_i * memory))
        coupled = cell.node.attributes.get("input_forget", 0)
        forget = 1 - i if coupled else f(cell.clipped(cell.gate(2, x, hidden) + peep_f * memory))
        memory = forget * memory + i * g(cell.clipped(cell.gate(3, x, hidden)))
        o = f(cell.clipped(cell.gate(1, x, hidden) + peep_o * memory))
        return o * h(memory), memory


OPERATORS = (RNN, GRU, LSTM)
