"""Pruning of a model's Linear weights in blocks by the error that it makes, layer after layer.

Within a weight, columns are visited from left to right; the error of what is dropped is made up for by those to the right of it,
as in SparseGPT (Frantar and Alistarh 2023), rows of a block deciding together. What is kept is then solved for by least squares.
Both are measured on the inputs that the layers before, pruned already, hand over; what is aimed at is what the teacher's layer
makes of its own inputs.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from gristmill.model import Model, leading_to
from gristmill.runtime.session import Session
from gristmill.tensor import Dense
from gristmill.tensor.parts import Array

DAMPING = 0.01  # of the mean diagonal of the second moments, towards the teacher's weight
STRETCH = 128  # columns whose blocks are ranked together
REFINEMENTS = 25  # of the least squares, by conjugate gradients
BATCH = 64


def prune(
    teacher: Model, student: Model, names: Sequence[str], tokens: Mapping[str, Array], block: tuple[int, int], sparsity: float
) -> Model:
    """Return the student with the share `sparsity` of the blocks of the named weights at zero.

    Args:
        teacher: what to come close to; a model of the same graph.
        student: where the weights start.
        names: weights, in the order of the graph.
        tokens: inputs with an attention mask, of which padding is left out.
        block: rows and columns of a block.
    """
    read = {node.inputs[1]: node for node in teacher.nodes if node.op == "Linear"}
    wanted = dict(zip(names, (read[name].inputs[0] for name in names), strict=True))
    theirs = observed(teacher, tuple(dict.fromkeys(wanted.values())), tokens)
    for value in dict.fromkeys(wanted.values()):
        moments = Moments(observed(student, (value,), tokens)[value], theirs[value])
        tensors = {}
        for name in (name for name in names if wanted[name] == value):
            bias = read[name].inputs[2]
            weight, offset = moments.pruned(
                teacher.tensors[name].dense(), teacher.tensors[bias].dense(), student.tensors[name].dense() != 0, block, sparsity
            )
            tensors |= {name: Dense(weight), bias: Dense(offset)}
        student = student.replace(tensors=tensors)
    return student


class Moments:
    """What least squares need to know of a student's inputs [tokens, k] and the teacher's."""

    def __init__(self, ours: Array, theirs: Array) -> None:
        self.our_mean, self.their_mean = ours.mean(axis=0, dtype=np.float64), theirs.mean(axis=0, dtype=np.float64)
        a, b = (ours - self.our_mean).astype(np.float32), (theirs - self.their_mean).astype(np.float32)
        self.own = (a.T @ a).astype(np.float64) / len(a)
        self.cross = (b.T @ a).astype(np.float64) / len(a)
        self.ridge = DAMPING * np.trace(self.own) / len(self.own)
        self.own += self.ridge * np.eye(len(self.own))
        self.factor = np.linalg.cholesky(np.linalg.inv(self.own)).T  # upper: its square is the inverse

    def pruned(self, weight: Array, bias: Array, alive: Array, block: tuple[int, int], sparsity: float) -> tuple[Array, Array]:
        """Return a pruned weight [n, k] and its bias; what is not `alive` stays zero."""
        goal = weight @ self.cross + weight * self.ridge
        dense = np.linalg.solve(self.own, goal.T).T * alive
        kept = self._kept(dense, block, sparsity)
        solved = self._least_squares(goal, dense * kept, kept)
        return solved.astype(np.float32), (bias + weight @ self.their_mean - solved @ self.our_mean).astype(np.float32)

    def _kept(self, weight: Array, block: tuple[int, int], sparsity: float) -> Array:
        rows, columns = block
        weight, made = weight.copy(), []
        for first in range(0, weight.shape[1], STRETCH):
            last = min(first + STRETCH, weight.shape[1])
            factor = self.factor[first:last, first:last]
            scores = np.stack(list(_scores(weight[:, first:last], factor, block)), axis=1)
            order = np.argsort(scores, axis=None, kind="stable")
            keep = np.ones(scores.size, bool)
            keep[order[: round(sparsity * scores.size)]] = False
            kept = np.repeat(np.repeat(keep.reshape(scores.shape), rows, axis=0), columns, axis=1)
            errors = np.zeros(kept.shape)
            for j in range(last - first):
                errors[:, j] = np.where(kept[:, j], 0.0, weight[:, first + j] / factor[j, j])
                weight[:, first + j : last] -= np.outer(errors[:, j], factor[j, j:])
            weight[:, last:] -= errors @ self.factor[first:last, last:]
            made.append(kept)
        return np.concatenate(made, axis=1)

    def _least_squares(self, goal: Array, start: Array, kept: Array) -> Array:
        """Solve weight @ own = goal for what is kept, all rows at once, by preconditioned conjugate gradients."""
        own, scale = self.own.astype(np.float32), np.diag(self.own).astype(np.float32)
        weight = start.astype(np.float32)
        rest = (goal.astype(np.float32) - weight @ own) * kept
        step = rest / scale
        size = (rest * step).sum(axis=1)
        for _ in range(REFINEMENTS):
            moved = (step @ own) * kept
            length = size / np.maximum((step * moved).sum(axis=1), 1e-30)
            weight += length[:, None] * step
            rest -= length[:, None] * moved
            scaled = rest / scale
            before, size = size, (rest * scaled).sum(axis=1)
            step = scaled + (size / np.maximum(before, 1e-30))[:, None] * step
        return weight


def _scores(weight: Array, factor: Array, block: tuple[int, int]) -> Iterator[Array]:
    """Yield, for each column of blocks, the error that dropping each block makes."""
    rows, columns = block
    for first in range(0, weight.shape[1], columns):
        part = slice(first, first + columns)
        inverse = np.linalg.inv(factor[part, part].T @ factor[part, part])
        yield np.einsum("ni,ij,nj->n", weight[:, part], inverse, weight[:, part]).reshape(-1, rows).sum(axis=1)


def observed(model: Model, values: tuple[str, ...], tokens: Mapping[str, Array]) -> dict[str, Array]:
    """Return values [tokens, k] of a model without padding, computed by no more of its graph than they need."""
    nodes = leading_to(model.nodes, values)
    needed = {*values, *(name for node in nodes for name in node.inputs)}
    inputs = {name: kind for name, kind in model.inputs.items() if name in needed}
    session = Session(Model(tuple(nodes), model.tensors, inputs, values))
    mask = tokens["attention_mask"].astype(bool)
    parts: dict[str, list[Array]] = {name: [] for name in values}
    for start in range(0, len(mask), BATCH):
        batch = slice(start, start + BATCH)
        for name, array in session.run(**{name: tokens[name][batch] for name in inputs}).items():
            parts[name].append(array[mask[batch]])
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}
