"""Run a recipe and measure what each pass cost and gained."""

import time
from collections.abc import Sequence

from gristmill.compression.measure import measure_layers, measure_model
from gristmill.compression.recipe import Context, Pass
from gristmill.compression.report import Report
from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.runtime.threads import check_threads
from gristmill.tensor.parts import Array


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

    Example:
        >>> import gristmill as gm
        >>> small, report = gm.compress(gm.zoo.mlp([256, 256]), [gm.Prune(0.8), gm.Quantize("int8")])
        >>> report.bytes_after < report.bytes_before / 8
        True
    """
    if not recipe or not all(isinstance(step, Pass) for step in recipe):
        raise ModelError(f"a recipe is a list of passes such as [Clip(), Prune(0.8), Quantize()], got {recipe!r}")
    examples = data if data is None or isinstance(data, tuple) else (data, None)
    context = Context(model, examples, seed, check_threads(threads), progress)
    checked = examples if validation is None else validation
    stages = [measure_model("original", model, model, checked, metric, 0.0, context.threads)]
    current = model
    for step in recipe:
        begin = time.perf_counter()
        current = recorded(step.apply(current, context), step)
        seconds = time.perf_counter() - begin
        stages.append(measure_model(type(step).__name__, current, model, checked, metric, seconds, context.threads))
    passes = [step.describe() for step in recipe]
    return current, Report(tuple(stages), tuple(measure_layers(model, current, context.threads)), tuple(passes), metric)


def recorded(model: Model, step: Pass) -> Model:
    """Return the model with a pass added to the recipe that its meta tells."""
    return model.replace(meta={**model.meta, "recipe": [*model.meta.get("recipe", []), step.describe()]})
