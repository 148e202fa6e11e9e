"""`fit` and `fit_gradient`: train a model, or parameters under a gradient function of one's own, over many workers."""

import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gristmill import autodiff, losses, metrics
from gristmill.errors import DataError, ModelError
from gristmill.model import Model, check_model
from gristmill.optim import SGD, Optimizer
from gristmill.runtime.session import Session
from gristmill.tensor.parts import Array
from gristmill.training.convergence import Until
from gristmill.training.data import model_data, own_data
from gristmill.training.engine import Engine
from gristmill.training.loop import Descent, Measure, Outcome, Settings
from gristmill.training.server import Report
from gristmill.training.spec import describe
from gristmill.training.task import SINGLE, Arrays, FunctionTask, GradientFunction, ModelTask

PLAIN_DESCENT = SGD(0.1)
TRAINING_PRECISIONS = (None, "float32", "bf16")
DEFAULT_METRICS = {losses.TARGET: "mse", losses.LABELS: "accuracy"}


@dataclass(frozen=True)
class GradientResult:
    """What `fit_gradient` returns.

    Args:
        params: float32, in the form in which they were given.
        history: a 1-D array by name with one number per epoch: `loss` (mean over the examples while the epoch went on),
            `gradient_norm` (root mean square over the steps), `seconds`, `examples_per_second`, and the metrics.
        report: what the workers did.
        stopped: why training ended: "epochs", "gradient_norm" or "improvement".
    """

    params: Arrays
    history: dict[str, Array]
    report: Report
    stopped: str


@dataclass(frozen=True)
class FitResult(GradientResult):
    """What `fit` returns: as `GradientResult`, and the trained model."""

    model: Model


def fit(
    model: Model,
    data: Any,
    loss: str | losses.Loss = "cross_entropy",
    optimizer: Optimizer = PLAIN_DESCENT,
    *,
    workers: int = 1,
    engine: str | Engine = "processes",
    batch_size: int | None = 32,
    epochs: int | None = None,
    until: Until | None = None,
    slices: int = 4,
    seed: int = 0,
    reduction: str = "mean",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    validation: Any = None,
    metric: str | Callable[[Array, Array], float] | None = None,
    trainable: Iterable[str] | None = None,
    precision: str | None = None,
    threads: int | None = None,
    worker_timeout: float = 300.0,
    progress: bool | None = None,
) -> FitResult:
    """Train a model by gradient descent over many workers with a central server.

    The result depends on the seed and `slices` to the last bit, and on nothing else: not on workers, engine, threads, or deaths
    on the way. A worker that dies is replaced by the others.

    Args:
        model: with one output. It is not changed.
        data: `(x, y)`, where x is an array, or for a model with several inputs a mapping by input name or a tuple in their
            order; or all arrays by input name (`labels` or `target`, `teacher`). The first axis is the examples. Dtypes are
            converted by NumPy's "same_kind" rule: float64 to float32, any integers to int64 labels.
        loss: "cross_entropy", "mse", "cosine", or what `losses.distillation` returns.
        optimizer: applied by the server.
        workers: how many compute gradients.
        engine: "processes" or "inline" (in this process, one after the other).
        batch_size: examples of one step over all workers; None for all examples: batch gradient descent.
        epochs: passes over the data.
        until: conditions to end before that.
        slices: parts of each batch, at least one for each worker.
        seed: of the order of the examples.
        reduction: "mean" over the batch, or "sum": the textbook's theta <- theta - eta * (sum of the examples' gradients).
        checkpoint: a file that the whole state is written to after each epoch and on Ctrl-C.
        resume: go on from `checkpoint` where that exists, to the same bits as if there had been no break.
        validation: as `data`; measured by `metric` after each epoch.
        metric: "accuracy", "cross_entropy", "mse", or a function of (output, target). Default: accuracy, or mse for that loss.
        trainable: names of the tensors to train. Default: all float tensors that influence the output.
        precision: of the workers' sessions: None, or "bf16" for products of bfloat16 with float32 sums, parameters and optimizer,
            where the CPU is fast at it.
        threads: of each worker. Default: cores / workers, at least 1.
        worker_timeout: seconds after which a worker without an answer counts as frozen and is ended.
        progress: show a bar on stderr; None for: where that is a terminal.

    Raises:
        ModelError: an option does not fit, or the model cannot be trained with this loss.
        DataError: the data do not fit the model.
        DivergedError: loss or gradients stopped being finite; its `result` holds the last good parameters.
        WorkerError: no worker is left, or one could not start.
        FormatError: the checkpoint is damaged.
        OSError: the checkpoint cannot be written or read.
        BudgetError: there is no room for parameters, gradients and data.

    Example:
        >>> import numpy as np, gristmill as gm
        >>> x = np.random.default_rng(0).standard_normal((64, 4))
        >>> result = fit(gm.zoo.mlp([4, 2]), (x, x[:, 0] > 0), epochs=20, engine="inline")
        >>> bool(result.history["loss"][-1] < result.history["loss"][0])
        True

        Teach an encoder to give vectors, here those of random ones:

        >>> encoder = gm.zoo.bert(layers=1, hidden=8, heads=2, vocabulary=50, positions=16)
        >>> ids = np.random.default_rng(0).integers(0, 50, (16, 6))
        >>> tokens = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        >>> vectors = np.random.default_rng(1).standard_normal((16, 8))
        >>> result = fit(encoder, (tokens, vectors), "cosine", gm.AdamW(1e-2), epochs=5, engine="inline")
        >>> bool(result.history["loss"][-1] < result.history["loss"][0])
        True
    """
    check_model(model)
    if precision not in TRAINING_PRECISIONS:
        raise ModelError(f"training runs in precision float32 or bf16, got {precision!r}")
    chosen = losses.find(loss)
    settings = Settings(
        optimizer, ending(epochs, until), workers, engine, batch_size, slices, seed, reduction, checkpoint, resume, threads,
        worker_timeout, progress,
    )  # fmt: skip
    arrays = model_data(model, chosen, data)
    names = trainable_names(model, chosen, trainable)
    spec, initial = describe({name: model.tensors[name].trainable for name in names})
    measure, named = measurement(model, chosen, validation, metric)
    identity: dict[str, Any] = {"loss": [chosen.op, dict(chosen.attributes)], "metric": named, "model": fingerprint(model, names)}
    if precision == "bf16":
        identity["precision"] = precision
    outcome = Descent(ModelTask(model, chosen, precision), spec, arrays, settings, identity, measure).run(initial)
    return _fit_result(model, chosen, settings, outcome)


def _fit_result(model: Model, loss: losses.Loss, settings: Settings, outcome: Outcome) -> FitResult:
    tensors = {name: model.tensors[name].with_trainable(array) for name, array in outcome.params.items()}
    record = {**settings.describe(), "loss": loss.op, "epochs": len(outcome.history["loss"])}
    trained = model.replace(tensors=tensors, meta={**model.meta, "training": record})
    return FitResult(outcome.params, outcome.history, outcome.report, outcome.stopped, trained)


def fit_gradient(
    gradient: GradientFunction,
    params: Mapping[str, Array] | Array,
    data: Any,
    optimizer: Optimizer = PLAIN_DESCENT,
    *,
    workers: int = 1,
    engine: str | Engine = "processes",
    batch_size: int | None = 32,
    epochs: int | None = None,
    until: Until | None = None,
    slices: int = 4,
    seed: int = 0,
    reduction: str = "mean",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    threads: int | None = None,
    worker_timeout: float = 300.0,
    progress: bool | None = None,
) -> GradientResult:
    """Descend along a gradient function of your own, written with NumPy, torch, JAX or anything else.

    Args:
        gradient: `gradient(params, batch) -> (loss, gradients)`, both means over the batch. `params` are read-only float32
            arrays in the form of the argument `params`, valid during the call; `gradients` must be floating-point arrays of
            their names and shapes; `batch` is a part of `data` in its form. It must compute the same from the same arguments,
            wherever it runs, and may be defined anywhere: in a script, a notebook or at the prompt.
        params: initial values: floating-point arrays by name, or one array. They are not changed.
        data: an array, a tuple of arrays or arrays by name; the first axis is the examples.

    The other arguments are those of `fit`. Needs cloudpickle (the extra "train") unless the engine is "inline".

    Raises:
        ModelError: an option does not fit, or the function returned what does not fit the parameters.
        DataError: the data are empty or of different lengths.
        WorkerError: the function raised (the message holds its traceback), or no worker is left.
        MissingExtraError: cloudpickle is not installed.
        DivergedError, FormatError, OSError, BudgetError: as `fit`.

    Example:
        >>> import numpy as np
        >>> def gradient(theta, x):
        ...     return 0.5 * np.mean((x - theta) ** 2), np.mean(theta - x, axis=0, dtype=np.float32)
        >>> result = fit_gradient(gradient, np.zeros(1), np.full((8, 1), 3.0), epochs=100, engine="inline")
        >>> result.params.round(3).tolist()
        [3.0]
    """
    settings = Settings(
        optimizer, ending(epochs, until), workers, engine, batch_size, slices, seed, reduction, checkpoint, resume, threads,
        worker_timeout, progress,
    )  # fmt: skip
    if not callable(gradient):
        raise ModelError(f"gradient must be a function of (params, batch), got {gradient!r}")
    dataset = own_data(data)
    single = not isinstance(params, Mapping)
    named = {SINGLE: params} if not isinstance(params, Mapping) else params
    spec, initial = describe({str(name): value for name, value in named.items()})
    task = FunctionTask(gradient, dataset.structure, single)
    outcome = Descent(task, spec, dataset.arrays, settings).run(initial)
    found = outcome.params[SINGLE] if single else outcome.params
    return GradientResult(found, outcome.history, outcome.report, outcome.stopped)


def ending(epochs: int | None, until: Until | None) -> Until:
    """Merge `epochs=` and `until=`."""
    if until is None:
        return Until(epochs=epochs)
    if not isinstance(until, Until):
        raise ModelError(f"until must be an Until(epochs=, gradient_norm=, improvement=), got {until!r}")
    if epochs is not None and until.epochs is not None:
        raise ModelError("give epochs= or until=Until(epochs=), not both")
    return until if epochs is None else Until(epochs, until.gradient_norm, until.improvement, until.patience)


def trainable_names(model: Model, loss: losses.Loss, names: Iterable[str] | None) -> list[str]:
    """Return the tensors to train, after trying that their gradients exist.

    Raises:
        ModelError: a name is no float tensor of the model, or has no gradient.
    """
    if names is None:
        used = {name for node in model.nodes for name in node.inputs}
        chosen = [name for name in model.trainable if name in used]
    else:
        chosen = list(dict.fromkeys([names] if isinstance(names, str) else names))
        for name in chosen:
            if name not in model.tensors or model.tensors[name].trainable.dtype != np.float32:
                raise ModelError(f"'{name}' is no float32 tensor of the model; it has {sorted(model.tensors)}")
    if not chosen:
        raise ModelError("there is nothing to train: no tensors were chosen")
    autodiff.gradients(losses.attach(model, loss), losses.LOSS, chosen)
    return chosen


def fingerprint(model: Model, trained: list[str]) -> int:
    """A number that tells apart models that differ in more than the values of what is trained."""
    graph = [(n.op, n.domain, n.inputs, n.outputs, sorted(n.attributes.items())) for n in model.nodes]
    total = zlib.crc32(repr(graph).encode())
    for name, tensor in model.tensors.items():
        parts = {} if name in trained and tensor.kind in ("dense", "bf16") else tensor.parts()
        for part in parts.values():
            total = zlib.crc32(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data, total)
    return total


def measurement(
    model: Model, loss: losses.Loss, validation: Any, metric: str | Callable[[Array, Array], float] | None
) -> tuple[Measure | None, str | None]:
    """Return what evaluates the model on the validation data at the parameters' current values, and the metric's name."""
    if validation is None:
        if metric is not None:
            raise DataError("metric= is measured on validation data; give validation=(x, y) too")
        return None, None
    target = next(name for name in (losses.LABELS, losses.TARGET) if name in loss.extra)
    chosen = metric or DEFAULT_METRICS[target]
    plain = losses.find("cross_entropy" if target == losses.LABELS else "mse")
    if isinstance(validation, Mapping):
        validation = {name: value for name, value in validation.items() if name != losses.TEACHER}
    arrays = model_data(model, plain, validation)
    inputs = {name: arrays[name] for name in model.inputs}
    name = metrics.name_of(chosen)

    def measure(params: Mapping[str, Array]) -> Callable[[], dict[str, float]]:
        session = Session(model, trainable=params)
        return lambda: {name: metrics.evaluate(session, (inputs, arrays[target]), chosen)}

    return measure, name
