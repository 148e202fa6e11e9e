"""MatMul, Gemm and Einsum: products of two activations. Products with a constant weight become Linear where they can."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from gristmill.ops.arithmetic import broadcast_shapes
from gristmill.ops.op import Dim, Node, Op, Tape, TensorType, need, same_dim
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

EQUATION = re.compile(r"[A-Za-z.]*(,[A-Za-z.]*)*(->[A-Za-z.]*)?")


def widened(x: Array) -> Array:
    """Return an array in a dtype in which sums of products are accurate and BLAS is fast: small floats as float32."""
    return x if x.dtype.kind in "iub" or x.dtype in (np.float32, np.float64) else x.astype(np.float32)


class MatMul(Op):
    """ONNX MatMul: numpy.matmul."""

    name = "MatMul"
    arity = (2, 2)
    differentiable = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        a, b = types
        assert a is not None
        assert b is not None
        fits = len(a.shape) > 0 and len(b.shape) > 0 and a.dtype == b.dtype
        left = a.shape if len(a.shape) > 1 else (1, *a.shape)
        right = b.shape if len(b.shape) > 1 else (*b.shape, 1)
        fits = fits and same_dim(left[-1], right[-2])
        need(fits, node, f"'{node.inputs[0]}' is {a} and '{node.inputs[1]}' is {b}: they do not multiply")
        shape = broadcast_shapes(node, left[:-2], right[:-2], f"{a} and {b}")
        return [TensorType(a.dtype, (*shape, *left[-2 : -1 if len(a.shape) > 1 else -2], *right[-1:][: len(b.shape) - 1]))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        a, b = inputs
        return [np.asarray(np.matmul(widened(a), widened(b)), a.dtype)]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        a, b = node.inputs
        ranks = len(tape.type(a).shape), len(tape.type(b).shape)
        need(min(ranks) > 1, node, "has a gradient for inputs of two dimensions or more")
        if tape.wants(a):
            tape.add(a, fold_batch(tape, tape.emit("MatMul", [dy, transposed(tape, b)], domain=""), a, node.outputs[0]))
        if tape.wants(b):
            tape.add(b, fold_batch(tape, tape.emit("MatMul", [transposed(tape, a), dy], domain=""), b, node.outputs[0]))


def transposed(tape: Tape, name: str) -> str:
    """Emit a value with its last two dimensions swapped."""
    rank = len(tape.type(name).shape)
    return tape.emit("Transpose", [name], {"perm": (*range(rank - 2), rank - 1, rank - 2)}, domain="")


def fold_batch(tape: Tape, gradient: str, like: str, product: str) -> str:
    """Sum a gradient over the batch dimensions along which a value was broadcast for a product."""
    same = tape.type(like).shape[:-2] == tape.type(product).shape[:-2]
    return gradient if same else tape.emit("SumToShape", [gradient, like])


class Gemm(Op):
    """ONNX Gemm: alpha * A' @ B' + beta * C, where ' transposes if transA or transB says so."""

    name = "Gemm"
    arity = (2, 3)
    attributes = {"alpha": float, "beta": float, "transA": int, "transB": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        a, b = types[:2]
        c = types[2] if len(types) > 2 else None
        assert a is not None
        assert b is not None
        need(len(a.shape) == len(b.shape) == 2, node, f"'{node.inputs[0]}' is {a} and '{node.inputs[1]}' is {b}: no matrices")
        m, k = a.shape[::-1] if node.attributes.get("transA", 0) else a.shape
        k2, n = b.shape[::-1] if node.attributes.get("transB", 0) else b.shape
        fits = same_dim(k, k2) and a.dtype == b.dtype
        need(fits, node, f"'{node.inputs[0]}' is {a} and '{node.inputs[1]}' is {b}: they do not multiply")
        if c is not None:
            padded = (1, 1, *c.shape)[-2:]
            fits = (
                len(c.shape) <= 2
                and c.dtype == a.dtype
                and all(d == 1 or same_dim(d, e) for d, e in zip(padded, (m, n), strict=True))
            )
            need(fits, node, f"'{node.inputs[2]}' is {c}, which does not broadcast to ({m}, {n})")
        return [TensorType(a.dtype, (m, n))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        a, b, c = (*inputs, None)[:3]
        alpha, beta = node.attributes.get("alpha", 1.0), node.attributes.get("beta", 1.0)
        left, right = widened(a), widened(b)
        y = (left.T if node.attributes.get("transA", 0) else left) @ (right.T if node.attributes.get("transB", 0) else right)
        y = y if alpha == 1 else y * alpha
        if c is not None:
            y = y + (widened(c) if beta == 1 else widened(c) * beta)
        return [np.asarray(y, a.dtype)]


class Einsum(Op):
    """ONNX Einsum: numpy.einsum of an equation."""

    name = "Einsum"
    arity = (1, 16)
    attributes = {"equation": str}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        terms, result = equation(node)
        need(len(terms) == len(types), node, f"the equation has {len(terms)} terms, the node {len(types)} inputs")
        sizes: dict[str, Dim] = {}
        batch: tuple[Dim, ...] = ()
        for term, kind in zip(terms, types, strict=True):
            assert kind is not None
            head, dots, tail = term.partition("...")
            spare = len(kind.shape) - len(head) - len(tail)
            need(spare == 0 or (spare > 0 and bool(dots)), node, f"term '{term}' does not fit {kind}")
            letters = [*zip(head, kind.shape, strict=False), *zip(tail, kind.shape[len(head) + spare :], strict=True)]
            for letter, dim in letters:
                known = sizes.setdefault(letter, dim)
                need(same_dim(known, dim) or 1 in (known, dim), node, f"'{letter}' is both {known} and {dim}")
                sizes[letter] = dim if isinstance(known, str) or known == 1 else known
            batch = broadcast_shapes(node, batch, kind.shape[len(head) : len(head) + spare], f"term {term!r} of {kind}")
        head, dots, tail = result.partition("...")
        need(all(letter in sizes for letter in head + tail), node, f"'{result}' has letters that no input has")
        shape = (*[sizes[letter] for letter in head], *(batch if dots else ()), *[sizes[letter] for letter in tail])
        first = types[0]
        assert first is not None
        need(all(kind is not None and kind.dtype == first.dtype for kind in types), node, "the inputs differ in dtype")
        return [TensorType(first.dtype, shape)]

    def known(self, node: Node, types: Sequence[TensorType | None], values: Sequence[Array | None]) -> list[Array] | None:
        return None  # small inputs and a small result do not bound the work

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        terms, result = equation(node)
        text = f"{','.join(terms)}->{result}"
        made = np.einsum(text, *map(widened, inputs), optimize="greedy" if len(inputs) > 1 else False)
        return [np.asarray(made, inputs[0].dtype)]


def equation(node: Node) -> tuple[list[str], str]:
    """Return the terms and the result of an equation; without an arrow, letters that appear once, in alphabetical order."""
    text = node.attributes.get("equation", "").replace(" ", "")
    fits = EQUATION.fullmatch(text) is not None and all(part in ("", "...") for part in re.findall(r"\.+", text))
    need(fits, node, f"equation {text!r} is malformed")
    left, arrow, result = text.partition("->")
    terms = left.split(",")
    need(all(term.count("...") <= 1 for term in (*terms, result)), node, f"equation {text!r} has two ellipses in a term")
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        result = ("..." if "..." in left else "") + "".join(sorted({c for c in letters if letters.count(c) == 1}))
    need(len(set(result.replace(".", ""))) == len(result.replace(".", "")), node, f"'{result}' repeats a letter")
    return terms, result


OPERATORS = (MatMul, Gemm, Einsum)
