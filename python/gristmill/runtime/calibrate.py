"""Measure what products and conversions cost on this machine: a few short runs each, fitted to their amounts of work."""

import time
from collections.abc import Callable, Iterator, Sequence
from math import ceil

import numpy as np

from gristmill import _core
from gristmill.model import Model
from gristmill.ops import OWN, Node, TensorType
from gristmill.ops.products import Product
from gristmill.ops.products.product import Size, size_of
from gristmill.runtime.arena import Memory
from gristmill.runtime.choice import CODES, Move, Way
from gristmill.runtime.plan import Layout, Options, Plan, Weights
from gristmill.runtime.shapes import determine
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

# Weights (n, k, stored share) and rows that tell the terms of a fit apart; odd rows show what padding costs.
WEIGHTS = ((768, 768, 0.5), (1536, 384, 0.1), (384, 1536, 0.1))
ROWS = (1, 4, 16, 40, 64, 128)
MOST_ROWS = 512  # of the first weight
COLD = 6 << 20  # bytes of weights that take turns, so that each has left the first levels of cache when its turn comes
COPIES = 4
ROUNDS, SECONDS = 3, 1e-3  # at least, for one figure
LONGEST = 20e-3


def prices(item: Product | Move) -> tuple[float, ...] | None:
    """Return the price of each kind of work, in seconds, or None for what this machine cannot run."""
    samples = list(_product_samples(item) if isinstance(item, Product) else _move_samples(item))
    if not samples:
        return None
    work = np.array([item.work(size) for size, _ in samples])
    seconds = np.array([time for _, time in samples])
    return tuple(float(price) for price in fit(work / seconds[:, None]))


def fit(work: Array) -> Array:
    """Return non-negative prices p that minimise |work @ p - 1|: relative errors, where rows were divided by their time.

    Lawson and Hanson, Solving Least Squares Problems (1974), chapter 23: columns come in one by one, and leave where their price
    would fall below zero.
    """
    scale = np.maximum(work.max(axis=0), np.finfo(float).tiny)
    a, wanted = work / scale, np.ones(len(work))
    found, active = np.zeros(a.shape[1]), np.zeros(a.shape[1], bool)
    for _ in range(3 * a.shape[1]):
        slope = a.T @ (wanted - a @ found)
        if active.all() or slope[~active].max() < 1e-9:
            break
        active[np.argmax(np.where(active, -np.inf, slope))] = True
        while True:
            best = np.zeros_like(found)
            best[active] = np.linalg.lstsq(a[:, active], wanted, rcond=None)[0]
            falling = active & (best <= 0)
            if not falling.any():
                break
            step = np.min(found[falling] / np.maximum(found[falling] - best[falling], np.finfo(float).tiny))
            found += step * (best - found)
            active &= found > 1e-12
        found = best
    return found / scale


def _product_samples(product: Product) -> Iterator[tuple[Size, float]]:
    for n, k, share in WEIGHTS:
        tensors = _examples(product, n, k, share)
        for m in (*ROWS, *((MOST_ROWS,) if tensors and (n, k, share) == WEIGHTS[0] else ())):
            programs = _steps(product, tensors, m)
            if programs:
                yield size_of(tensors[0], m), fastest(programs)


def _examples(product: Product, n: int, k: int, share: float) -> list[Tensor]:
    first = product.example(n, k, share, 0)
    if first is None:
        return []
    copies = min(COPIES, ceil(COLD / max(product.nbytes(first, 0), 1)))
    rest = [product.example(n, k, share, seed) for seed in range(1, copies)]
    return [first, *(tensor for tensor in rest if tensor is not None)]


def _steps(product: Product, tensors: Sequence[Tensor], m: int) -> list[_core.Program]:
    """Bind one Linear for each weight, all of one input, to a product; return their programs without conversions."""
    if not tensors:
        return []
    nodes = tuple(Node("Linear", ("x", f"w{i}"), (f"y{i}",), {}, OWN) for i in range(len(tensors)))
    x = TensorType(np.dtype(np.float32), (m, tensors[0].shape[1]))
    model = Model(nodes, {f"w{i}": tensor for i, tensor in enumerate(tensors)}, {"x": x}, (nodes[-1].name,))

    def only(ways: Sequence[Way], threads: int, resident: int) -> Way:
        return next((way for way in ways if way.product == product), ways[0])

    layout = Layout(model, determine(model, {"x": x}, {}), 1, {}, {}, Options(decide=only))
    if any(choice.way.product != product for choice in layout.choices.values()) or len(layout.choices) < len(nodes):
        return []
    plan = Plan(layout, np.zeros(layout.nbytes, np.uint8), Weights(model, {}, Memory()), apart=True)
    plan.inputs["x"][...] = np.random.default_rng(0).standard_normal(x.extents, np.float32)
    plan.run(1)
    return [program for step, program in zip(layout.steps, plan.segments, strict=True) if not step.moves]  # type: ignore[misc]


def _move_samples(move: Move) -> Iterator[tuple[Size, float]]:
    for m, k in ((1, 384), (1, 3072), (16, 768), (64, 384), (128, 768), (128, 1536)):
        yield Size(m, k, 0, 0), fastest([_move(move, m, k)])


def _move(move: Move, m: int, k: int) -> _core.Program:
    rng, program = np.random.default_rng(0), _core.Program()
    x = rng.standard_normal((m, k) if move.source == "rows" else (k, m), np.float32)
    if not move.target.endswith(CODES):
        _core.transpose(program, x, np.empty(x.shape[::-1], np.float32))
        return program
    panel = move.target.removesuffix(CODES)
    codes, scales, zeros = np.empty(_core.codes_nbytes(m, k, panel), np.uint8), np.empty(m, np.float32), np.empty(m, np.int32)
    _core.quantize_activations(program, x, move.source == "lanes", panel, codes, scales, zeros)
    return program


def fastest(programs: Sequence[_core.Program], threads: int = 1) -> float:
    """Return the seconds of one program of a round, in the fastest round: others on this machine only ever add."""
    for program in programs:
        program.run(threads)
    best, spent, rounds = float("inf"), 0.0, 0
    while spent < LONGEST and (rounds < ROUNDS or spent < SECONDS):
        begin = time.perf_counter()
        for program in programs:
            program.run(threads)
        taken = time.perf_counter() - begin
        best, spent, rounds = min(best, taken), spent + taken, rounds + 1
    return best / len(programs)


def read_speed(threads: int, nbytes: int) -> float:
    """Return the bytes per second at which memory beyond the caches is read."""
    data = np.ones(nbytes // 4, np.float32)
    read: Callable[[], object] = lambda: _core.sum_of_squares(data, threads)  # noqa: E731
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        read()
        times.append(time.perf_counter() - begin)
    return nbytes / min(times)
