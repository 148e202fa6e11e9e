"""How good a model still is: a metric against labels, agreement with the original's answers, and how sure the figures are."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gristmill.compression.examples import Examples
from gristmill.errors import DataError, ModelError
from gristmill.metrics import METRICS, Metric, name_of
from gristmill.model import Model
from gristmill.runtime.packing import sentence_model
from gristmill.runtime.session import Session
from gristmill.runtime.timing import random_inputs
from gristmill.tensor.parts import Array

AGREEMENT = ("cosine", "spearman")  # metrics that compare with the original and need no labels
FALLING = ("cross_entropy", "mse")  # metrics that are better where they are smaller
BATCH = 64  # examples of one run
SAMPLE = 1024  # examples that agreement is taken on
SEQUENCES = 256  # as many of them where an example is a sequence
PAIRED = 200  # vectors whose similarities are ranked: 19,900 pairs
RESAMPLES, RANKED_RESAMPLES = 1000, 100
CONFIDENCE = 0.95
DECIMALS = 12  # of a cosine: what differs by less is taken for equal, and shares its rank
PIECE = 1 << 20  # elements compared at a time


class Figure(NamedTuple):
    """A measured value, and the interval that holds 95 % of what the same number of other examples would have given (Efron's
    percentile bootstrap)."""

    value: float
    low: float
    high: float


def check_metric(metric: str | Metric | None, examples: Examples | None) -> str | Metric | None:
    """Return the metric: by default accuracy where there are whole labels, none otherwise.

    Raises:
        ModelError: it is unknown.
        DataError: it needs labels, and there are none.
    """
    if metric is None:
        labelled = examples is not None and examples.target is not None
        return "accuracy" if labelled and examples.target.dtype.kind in "biu" else "mse" if labelled else None  # type: ignore[union-attr]
    if not callable(metric) and metric not in METRICS and metric not in AGREEMENT:
        raise ModelError(f"unknown metric {metric!r}; choose one of {', '.join((*METRICS, *AGREEMENT))}, or give a function")
    if metric in AGREEMENT and examples is None:
        raise DataError(f"metric {metric!r} compares answers on examples: pass data=")
    return metric


def drop_of(metric: str | Metric | None, before: float | None, after: float | None) -> float | None:
    """Return by how much a metric got worse; None where it was not measured."""
    if before is None or after is None:
        return None
    return after - before if metric in FALLING else before - after


def answering(model: Model) -> Model:
    """Return the model with one output: its first or, of an encoder with a vector for each token, the one for the sentence."""
    output = model.outputs[0]
    if len(model.types[output].shape or ()) == 3:
        try:
            return sentence_model(model)
        except ModelError:
            pass
    return model if len(model.outputs) == 1 else model.replace(outputs=(output,))


def answers(model: Model, examples: Examples | None, threads: int) -> Array:
    """Return what a model answers to examples [examples, ...]; to random ones where there are none."""
    whole = answering(model)
    session = Session(whole, threads=threads)
    output = whole.outputs[0]
    if examples is None:
        return session.execute(random_inputs(whole, BATCH))[output]
    named = Examples({name: array for name, array in examples.by_name(model).items() if name in whole.inputs}, None)
    return np.concatenate([session.execute(batch)[output] for batch in named.batches(whole, BATCH)])


def sample(model: Model, examples: Examples | None) -> Examples | None:
    """Return the examples that are run: all where labels say what is right, else enough to compare answers on."""
    if examples is None or examples.target is not None:
        return examples
    sequences = any(isinstance(dim, str) for kind in model.inputs.values() for dim in kind.shape[1:])
    return examples.first(SEQUENCES if sequences else SAMPLE)


def error_of(after: Array, before: Array) -> float:
    """Return |y - y0| / |y0| over all elements, in float64 piece by piece, so that no copy of a large array is made."""
    y, y0 = after.reshape(-1), before.reshape(-1)
    strayed = size = 0.0
    for start in range(0, y0.size, PIECE):
        wanted = y0[start : start + PIECE].astype(np.float64)
        off = y[start : start + PIECE] - wanted
        strayed, size = strayed + float(off @ off), size + float(wanted @ wanted)
    return float(np.sqrt(strayed) / max(np.sqrt(size), 1e-30))


def measured(metric: str | Metric, output: Array, original: Array, target: Array | None) -> Figure:
    """Measure answers.

    Args:
        metric: of METRICS or AGREEMENT, or a function of (output, target).
        output: the model's answers [examples, ...].
        original: the original model's.
        target: labels or targets.

    Raises:
        DataError: they do not fit the metric.
    """
    if metric == "cosine":
        return averaged(cosines(output, original))
    if metric == "spearman":
        return agreement_of_ranks(output, original)
    if target is None:
        raise DataError(f"metric {name_of(metric)!r} needs labels: pass (x, labels)")
    if callable(metric):
        value = float(metric(output, target))
        return _resampled(value, len(target), RANKED_RESAMPLES, lambda rows: float(metric(output[rows], target[rows])))
    return averaged(_scores(metric, output, target))


def _scores(metric: str, output: Array, target: Array) -> Array:
    """Return the metric of each example."""
    wanted = output.shape if metric == "mse" else output.shape[:-1]
    if target.shape != wanted:
        raise DataError(f"{metric} of an output of shape {output.shape} needs a target of shape {wanted}, got {target.shape}")
    if metric == "mse":
        return _by_example((output.astype(np.float64) - target) ** 2)
    if target.dtype.kind not in "biu" or not (target.min() >= 0 and target.max() < output.shape[-1]):
        raise DataError(f"labels must be whole numbers in [0, {output.shape[-1]}), found {target.min()} to {target.max()}")
    if metric == "accuracy":
        return _by_example(output.argmax(axis=-1) == target)
    shifted = output.astype(np.float64) - output.max(axis=-1, keepdims=True)
    picked = np.take_along_axis(shifted, target[..., None].astype(np.int64), axis=-1)[..., 0]
    return _by_example(np.log(np.exp(shifted).sum(axis=-1)) - picked)


def _by_example(values: Array) -> Array:
    return values.reshape(len(values), -1).mean(axis=1, dtype=np.float64)


def averaged(scores: Array) -> Figure:
    """Return the mean of scores, one for each example, and how sure it is.

    Example:
        >>> averaged(np.ones(8))
        Figure(value=1.0, low=1.0, high=1.0)
    """
    return _resampled(float(scores.mean()), len(scores), RESAMPLES, lambda rows: float(scores[rows].mean()))


def _resampled(value: float, count: int, times: int, again: Callable[[Array], float]) -> Figure:
    rng = np.random.default_rng(0)
    values = [again(rng.integers(0, count, count)) for _ in range(times)]
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Figure(value, float(low), float(high))


def cosines(after: Array, before: Array) -> Array:
    """Return the cosine of each example's answer to what it was; 1 where both are zero, 0 where one is.

    Args:
        after, before: [examples, ...].

    Example:
        >>> cosines(np.array([[1.0, 0.0]]), np.array([[1.0, 1.0]])).round(4).tolist()
        [0.7071]
    """
    a, b = (values.reshape(len(values), -1).astype(np.float64) for values in (after, before))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    same = (a == b).all(axis=1)
    return np.where(same, 1.0, (a * b).sum(axis=1) / np.where(lengths > 0, lengths, 1.0))


def agreement_of_ranks(after: Array, before: Array) -> Figure:
    """Return Spearman's rank correlation of the cosines between all pairs of answers, before and after: whether the model still
    finds the same things alike. Of the first 200 answers; 1 where there are fewer than 3.

    The interval keeps the ranks that pairs have among all pairs, and counts a pair as often as both its examples were drawn.
    """
    count = min(len(after), PAIRED)
    if count < 3:
        return Figure(1.0, 1.0, 1.0)
    first, second = np.triu_indices(count, 1)
    x, y = np.zeros((2, count, count))
    for ranks, values in ((x, after), (y, before)):
        ranks[first, second] = _ranks(_similarities(values[:count])[first, second])
    pairs = np.triu(np.ones((count, count)), 1)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RANKED_RESAMPLES)
    weights = np.concatenate([np.ones((1, count)), draws])
    n, sx, sy, sxx, syy, sxy = (((weights @ m) * weights).sum(axis=1) for m in (pairs, x, y, x * x, y * y, x * y))
    spread = np.sqrt(np.maximum(sxx * n - sx * sx, 0) * np.maximum(syy * n - sy * sy, 0))
    found = np.where(spread > 0, np.clip((sxy * n - sx * sy) / np.where(spread > 0, spread, 1), -1, 1), 1.0)
    low, high = np.quantile(found[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Figure(float(found[0]), float(low), float(high))


def _similarities(values: Array) -> Array:
    flat = values.reshape(len(values), -1).astype(np.float64)
    unit = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-30)
    return np.round(unit @ unit.T, DECIMALS)


def _ranks(values: Array) -> Array:
    """Return ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place.reshape(-1)]
