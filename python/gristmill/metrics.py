"""How good a model is: metrics, and their evaluation over data."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gristmill import losses
from gristmill.errors import DataError, ModelError
from gristmill.model import Model
from gristmill.ops.loss import mean_cross_entropy
from gristmill.runtime.session import Session, session_of
from gristmill.tensor.parts import Array

Metric = Callable[[Array, Array], float]


def accuracy(output: Array, labels: Array) -> float:
    """Return the share of rows whose largest output is the labelled one.

    Args:
        output: scores [examples, classes].
        labels: integers [examples].

    Example:
        >>> accuracy(np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([1, 1]))
        0.5
    """
    return float(np.mean(output.argmax(axis=-1) == labels))


def cross_entropy(output: Array, labels: Array) -> float:
    """Return the mean of -log softmax(output)[label], in nats; scores [examples, classes], integer labels [examples].

    Example:
        >>> round(cross_entropy(np.zeros((1, 2)), np.array([0])), 4)
        0.6931
    """
    return float(mean_cross_entropy(output, labels))


def mse(output: Array, target: Array) -> float:
    """Return the mean of (output - target)^2 over all elements; both of one shape.

    Example:
        >>> mse(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
        2.0
    """
    return float(np.mean((output.astype(np.float64) - target) ** 2))


METRICS: dict[str, Metric] = {"accuracy": accuracy, "cross_entropy": cross_entropy, "mse": mse}


def spearman(a: Array, b: Array) -> float:
    """Return Spearman's rank correlation of two vectors of equal length; ties get the mean of their ranks.

    Raises:
        DataError: they are no vectors of one length, or have fewer than two values.

    Example:
        >>> round(spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 8.0, 27.0])), 6)
        1.0
    """
    if a.shape != b.shape or a.ndim != 1 or a.size < 2:
        raise DataError(f"a rank correlation needs two vectors of one length, got {a.shape} and {b.shape}")
    with np.errstate(invalid="ignore"):  # of constants there is none: NaN
        return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Array) -> Array:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def name_of(metric: str | Metric) -> str:
    """The name that a metric has in a history."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")


def evaluate(model: Model | Session, data: Any, metric: str | Metric = "accuracy", batch_size: int = 1024) -> float:
    """Run a model over data and measure its output.

    Args:
        model: with one output, or a Session of one.
        data: `(x, y)`, where x is an array or arrays by input name; or one mapping with `labels` or `target` among them.
        metric: "accuracy", "cross_entropy" or "mse", averaged over batches; or a function of (output, target) over all examples.
        batch_size: examples of one run.

    Raises:
        ModelError: the metric is unknown, or the inputs do not fit the model.
        DataError: the lengths differ, or there are no examples.

    Example:
        >>> import gristmill as gm
        >>> evaluate(gm.zoo.mlp([4, 3]), (np.zeros((5, 4), np.float32), np.zeros(5, np.int64)))
        1.0
    """
    session = model if isinstance(model, Session) else session_of(model)
    if not callable(metric) and (not isinstance(metric, str) or metric not in METRICS):
        raise ModelError(f"unknown metric {metric!r}; choose one of {', '.join(METRICS)}, or give a function")
    if len(session.model.outputs) != 1:
        raise ModelError(f"a metric needs a model with one output, this one has {session.model.outputs}")
    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise ModelError(f"batch_size must be at least 1 and whole, got {batch_size!r}")
    inputs, target = _split(session.model, data)
    ranges = [slice(start, start + batch_size) for start in range(0, len(target), batch_size)]
    if callable(metric):
        return float(metric(np.concatenate([_output(session, inputs, part) for part in ranges]), target))
    measure = METRICS[metric]
    values = [measure(_fitting(metric, _output(session, inputs, part), target[part]), target[part]) for part in ranges]
    return float(np.average(values, weights=[len(target[part]) for part in ranges]))


def _split(model: Model, data: Any) -> tuple[dict[str, Array], Array]:
    """Return inputs of the model's dtypes, and what the output is compared with."""
    if isinstance(data, Mapping):
        keys = [name for name in (losses.LABELS, losses.TARGET) if name in data]
        if len(keys) != 1:
            raise DataError(f"data must hold '{losses.LABELS}' or '{losses.TARGET}' beside the inputs, got {sorted(data)}")
        x, target = {name: data[name] for name in model.inputs if name in data}, data[keys[0]]
    elif isinstance(data, (tuple, list)) and len(data) == 2:
        x, target = data
    else:
        raise DataError("data must be (x, y), or a mapping with the inputs and 'labels' or 'target'")
    named = x if isinstance(x, Mapping) else {next(iter(model.inputs)): x}
    inputs = {name: np.asarray(value) for name, value in named.items()}
    for name, kind in model.inputs.items():
        if name in inputs and np.can_cast(inputs[name].dtype, kind.dtype, "same_kind"):
            inputs[name] = inputs[name].astype(kind.dtype, copy=False)
    target = np.asarray(target)
    lengths = {name: array.shape[:1] for name, array in inputs.items()} | {"target": target.shape[:1]}
    if len(set(lengths.values())) > 1 or lengths["target"] in ((), (0,)):
        raise DataError(f"data must have the same number of examples, at least one, in every array; got {lengths}")
    return inputs, target


def _output(session: Session, inputs: Mapping[str, Array], part: slice) -> Array:
    return next(iter(session.run(**{name: array[part] for name, array in inputs.items()}).values()))


def _fitting(metric: str, output: Array, target: Array) -> Array:
    """Return the output after checking that the metric is defined for it; broadcasting would give a wrong number."""
    wanted = output.shape if metric == "mse" else output.shape[:-1]
    if target.shape != wanted:
        raise DataError(f"{metric} of an output of shape {output.shape} needs a target of shape {wanted}, got {target.shape}")
    if target.dtype.kind not in "biuf":
        raise DataError(f"{metric} needs numbers to compare with, got {target.dtype}")
    if metric == "cross_entropy" and not (target.min() >= 0 and target.max() < output.shape[-1]):
        raise DataError(f"labels must lie in [0, {output.shape[-1]}), found {target.min()} to {target.max()}")
    return output
