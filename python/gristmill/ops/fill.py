"""Values made up from few: Range, EyeLike and Pad; and random ones, Dropout among them."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from gristmill.ops.axes import at, axes_of, first, ints, value
from gristmill.ops.dtypes import BOOL, FLOAT, dtype_of, is_float, narrow, wide
from gristmill.ops.op import Binder, Dim, Node, Op, TensorType, Undetermined, fresh_dim, need
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array


class Range(Op):
    """Numbers from start on, in steps of delta, below the limit."""

    name = "Range"
    arity = (3, 3)
    attributes = {"stash_type": str}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        dtype = first(types).dtype
        need(all(kind is not None and kind.dtype == dtype for kind in types), node, "start, limit and delta differ in dtype")
        try:
            known = [value(index, types, constants) for index in range(3)]
        except Undetermined:
            return [TensorType(dtype, (fresh_dim(node, 0),))]
        return [TensorType(dtype, (self._count(node, known),))]

    def _count(self, node: Node, bounds: Sequence[Any]) -> int:
        start, limit, delta = (wide(bound).reshape(-1)[0].item() for bound in bounds)
        need(delta != 0, node, "delta is 0")
        return max(0, int(np.ceil((limit - start) / delta)) if isinstance(delta, float) else -((start - limit) // delta))

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        start, _, delta = (wide(bound).reshape(-1)[0] for bound in inputs)
        steps = np.arange(self._count(node, inputs))
        wider = np.float64 if is_float(inputs[0].dtype) else np.int64
        return [narrow(start.astype(wider) + steps * delta.astype(wider), inputs[0].dtype)]


class EyeLike(Op):
    """Ones on diagonal k of a matrix of the shape of x, zeros elsewhere."""

    name = "EyeLike"
    arity = (1, 1)
    attributes = {"dtype": str, "k": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = first(types)
        need(len(x.shape) == 2, node, f"takes a matrix, got {x}")
        return [TensorType(dtype_of(node.attributes["dtype"]) if "dtype" in node.attributes else x.dtype, x.shape)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dtype = dtype_of(node.attributes["dtype"]) if "dtype" in node.attributes else inputs[0].dtype
        return [narrow(np.eye(inputs[0].shape[0], inputs[0].shape[1], node.attributes.get("k", 0)), dtype)]


class Pad(Op):
    """A border around x: `mode` constant (with negative pads, a cut), reflect, edge or wrap.

    Inputs x, pads (all at the starts, then all at the ends) and, optional, the constant and the axes that pads are for.
    """

    name = "Pad"
    arity = (2, 4)
    attributes = {"mode": str}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = first(types)
        known = node.attributes.get("mode", "constant") in ("constant", "reflect", "edge", "wrap")
        need(known, node, f"unknown mode {node.attributes.get('mode')!r}")
        try:
            pads = self._pads(node, len(x.shape), value(1, types, constants), value(3, types, constants))
        except Undetermined:
            return [TensorType(x.dtype, tuple(fresh_dim(node, axis) for axis in range(len(x.shape))))]
        shape: list[Dim] = []
        for axis, (dim, (before, after)) in enumerate(zip(x.shape, pads, strict=True)):
            if isinstance(dim, str):
                shape.append(fresh_dim(node, axis) if before or after else dim)
            else:
                told = f"pads ({before}, {after}) cut more than dimension {axis} of {x} has"
                need(dim + before + after >= 0, node, told)
                shape.append(dim + before + after)
        return [TensorType(x.dtype, tuple(shape))]

    def _pads(self, node: Node, rank: int, pads: Array | None, axes: Array | None) -> list[tuple[int, int]]:
        named = range(rank) if axes is None else axes_of(node, ints(axes) or [], rank)
        flat = ints(pads) or []
        need(len(flat) == 2 * len(named), node, f"{len(flat)} pads are given for {len(named)} dimensions")
        around = dict(zip(named, zip(flat[: len(named)], flat[len(named) :], strict=True), strict=True))
        return [around.get(axis, (0, 0)) for axis in range(rank)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, mode = inputs[0], node.attributes.get("mode", "constant")
        pads = self._pads(node, x.ndim, inputs[1], at(inputs, 3))
        for axis, (before, after) in enumerate(pads):
            kept = np.arange(max(0, -before), x.shape[axis] - max(0, -after))
            x = np.take(x, kept, axis) if before < 0 or after < 0 else x
        grown = [(max(0, before), max(0, after)) for before, after in pads]
        if mode != "constant":
            return [np.pad(x, grown, mode)]
        constant = at(inputs, 2)
        y = np.full([dim + sum(pad) for dim, pad in zip(x.shape, grown, strict=True)], 0, x.dtype)
        if constant is not None and constant.size:
            y[...] = constant.reshape(-1)[0]
        y[tuple(slice(before, before + dim) for dim, (before, _) in zip(x.shape, grown, strict=True))] = x
        return [y]


def generator(node: Node) -> np.random.RandomState:
    """A generator of the node's seed, or of fresh entropy where it has none. Its stream is the one that NumPy never changes."""
    seed = node.attributes.get("seed")
    if seed is None or (isinstance(seed, int) and 0 <= seed < 2**32):
        return np.random.RandomState(seed)
    return np.random.RandomState(np.frombuffer(np.float64(seed).tobytes(), np.uint32))


class Random(Op):
    """Values that no input decides. With the attribute `seed` every run draws the same."""

    pure = False
    like: ClassVar[bool] = False

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        shape = first(types).shape if self.like else tuple(node.attributes.get("shape", ()))
        source = first(types).dtype if self.like else FLOAT
        return [TensorType(dtype_of(node.attributes["dtype"]) if "dtype" in node.attributes else source, shape)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        types = [TensorType(x.dtype, x.shape) for x in inputs]
        kind = self.infer(node, types, [None] * len(types))[0]
        return [narrow(self._draw(node, kind.extents, *inputs), kind.dtype)]

    def _draw(self, node: Node, shape: tuple[int, ...], *inputs: Array) -> Array:
        raise NotImplementedError


class RandomNormal(Random):
    name = "RandomNormal"
    arity = (0, 0)
    attributes = {"dtype": str, "mean": float, "scale": float, "seed": float, "shape": tuple}

    def _draw(self, node: Node, shape: tuple[int, ...], *inputs: Array) -> Array:
        return generator(node).normal(node.attributes.get("mean", 0.0), node.attributes.get("scale", 1.0), shape)


class RandomUniform(Random):
    name = "RandomUniform"
    arity = (0, 0)
    attributes = {"dtype": str, "high": float, "low": float, "seed": float, "shape": tuple}

    def _draw(self, node: Node, shape: tuple[int, ...], *inputs: Array) -> Array:
        return generator(node).uniform(node.attributes.get("low", 0.0), node.attributes.get("high", 1.0), shape)


class RandomNormalLike(RandomNormal):
    name, arity, like = "RandomNormalLike", (1, 1), True
    attributes = {"dtype": str, "mean": float, "scale": float, "seed": float}


class RandomUniformLike(RandomUniform):
    name, arity, like = "RandomUniformLike", (1, 1), True
    attributes = {"dtype": str, "high": float, "low": float, "seed": float}


class Bernoulli(Random):
    """1 with the probability that x says, else 0."""

    name, arity, like = "Bernoulli", (1, 1), True
    attributes = {"dtype": str, "seed": float}

    def _draw(self, node: Node, shape: tuple[int, ...], *inputs: Array) -> Array:
        return generator(node).random_sample(shape) < wide(inputs[0])


class Multinomial(Random):
    """Classes drawn by the unnormalised log probabilities in each row of x."""

    name = "Multinomial"
    arity = (1, 1)
    attributes = {"dtype": str, "sample_size": int, "seed": float}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = first(types)
        need(len(x.shape) == 2, node, f"takes a matrix, got {x}")
        count = node.attributes.get("sample_size", 1)
        return [TensorType(dtype_of(node.attributes.get("dtype", "int32")), (x.shape[0], count))]

    def _draw(self, node: Node, shape: tuple[int, ...], *inputs: Array) -> Array:
        x = wide(inputs[0]).astype(np.float64)
        # The largest of the log probabilities with Gumbel noise is a draw from them.
        noise = generator(node).gumbel(size=(*shape, x.shape[-1]))
        return (x[:, None, :] + noise).argmax(axis=-1)


class Dropout(Op):
    """x with a share `ratio` of its elements dropped and the others scaled up, where `training_mode` holds; else x itself."""

    name = "Dropout"
    arity = (1, 3)
    attributes = {"seed": int}
    pure = False

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = first(types)
        return [x, TensorType(BOOL, x.shape)][: len(node.outputs)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, ratio, training = (*inputs, None, None)[:3]
        share = 0.5 if ratio is None else float(wide(ratio).reshape(()))
        if training is None or not bool(training.reshape(())) or share == 0:
            return [x, np.ones(x.shape, BOOL)][: len(node.outputs)]
        mask = generator(node).random_sample(x.shape) >= share
        return [narrow(np.where(mask, wide(x) / (1 - share), 0), x.dtype), mask][: len(node.outputs)]

    def bind(self, node: Node, binder: Binder) -> bool:
        if len(node.outputs) > 1 or node.input(2):
            return False
        return binder.alias(node.outputs[0], binder.rows(node.inputs[0]))


OPERATORS = (
    *(Range, EyeLike, Pad),
    *(RandomNormal, RandomUniform, RandomNormalLike, RandomUniformLike, Bernoulli, Multinomial, Dropout),
)
