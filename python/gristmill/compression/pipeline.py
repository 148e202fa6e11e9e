"""Run a recipe and measure what each pass cost and gained."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from gristmill.compression.measure import measure_layers, measure_model
from gristmill.compression.recipe import Context, Pass
from gristmill.compression.report import Report
from gristmill.errors import DataError, ModelError
from gristmill.model import Model, check_model
from gristmill.runtime.threads import check_threads
from gristmill.tensor.parts import Array
from gristmill.training.data import as_array


def compress(
    model: Model,
    recipe: Sequence[Pass],
    data: Array | tuple[Array, Array] | None = None,
    *,
    validation: tuple[Array, Array] | None = None,
    metric: str = "accuracy",
    seed: int = 0,
    threads: int | None = None,
    progress: bool | None = None,
) -> tuple[Model, Report]:
    """Apply the passes of a recipe in turn.

    Args:
        model: what to compress; also the teacher, unless a `Distill` names another.
        recipe: passes in order, such as `[Clip(), Prune(0.8), Distill(), Quantize("int8")]`.
        data: (x, labels) that passes train on; `Distill` needs both. x alone is enough to report the output error.
        validation: (x, labels) that the report measures the metric and the output error on; default: `data`.
        metric: of `evaluate`.
        seed: of everything random.
        threads: for kernels and measurements.
        progress: show a progress bar on long passes; None for where a terminal listens.

    Returns:
        The compressed model, whose `meta` records the recipe, and the report.

    Raises:
        ModelError: the recipe is empty or a pass does not fit the model.
        DataError: the data are not x or (x, labels), or do not fit the model.

    Example:
        >>> import gristmill as gm
        >>> small, report = gm.compress(gm.zoo.mlp([256, 256]), [gm.Prune(0.8), gm.Quantize("int8")])
        >>> report.bytes_after < report.bytes_before / 8
        True
    """
    if not isinstance(recipe, Sequence) or not recipe or not all(isinstance(step, Pass) for step in recipe):
        raise ModelError(f"a recipe is a list of passes such as [Clip(), Prune(0.8), Quantize()], got {recipe!r}")
    check_model(model)
    if not (data is validation is None or len(model.inputs) == 1):
        raise DataError(f"data are for models of one input, this one takes {', '.join(model.inputs)}; compress it without data")
    examples = None if data is None else checked_examples("data", data)
    context = Context(model, examples, seed, check_threads(threads), progress)
    checked = examples if validation is None else checked_examples("validation", validation)
    stages = [measure_model("original", model, model, checked, metric, 0.0, context.threads)]
    current = model
    for step in recipe:
        begin = time.perf_counter()
        current = recorded(step.apply(current, context), step)
        seconds = time.perf_counter() - begin
        stages.append(measure_model(type(step).__name__, current, model, checked, metric, seconds, context.threads))
    passes = [described(step) for step in recipe]
    return current, Report(tuple(stages), tuple(measure_layers(model, current, context.threads)), tuple(passes), metric)


def checked_examples(name: str, data: Array | tuple[Array, Array | None]) -> tuple[Array, Array | None]:
    """Return (x, labels), or (x, None) for x alone.

    Raises:
        DataError: it is neither, or x is no array of numbers.
    """
    if isinstance(data, tuple) and len(data) != 2:
        raise DataError(f"{name} must be x or (x, labels), got a tuple of {len(data)}")
    x, labels = data if isinstance(data, tuple) else (data, None)
    array = as_array("x", x)
    if array.dtype.kind not in "biuf" or array.ndim == 0 or len(array) == 0:
        raise DataError(f"{name} must be x or the tuple (x, labels), x numbers [examples, ...]; got {array.dtype} {array.shape}")
    return array, labels


def recorded(model: Model, step: Pass) -> Model:
    """Return the model with a pass added to the recipe that its meta tells."""
    return model.replace(meta={**model.meta, "recipe": [*model.meta.get("recipe", []), described(step)]})


def described(step: Pass) -> dict[str, Any]:
    """Return the settings of a pass in terms that JSON has: 0.5 for np.float32(0.5)."""
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in step.describe().items()}
