"""Run a recipe and measure what each pass cost and gained."""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from gristmill.compression.examples import Examples, checked
from gristmill.compression.layerwise import meta_of
from gristmill.compression.measure import Yardstick, measure_layers, measure_model, memory
from gristmill.compression.provenance import check_finite_weights, data_checksum, made_with, model_checksum
from gristmill.compression.quality import answers, check_metric, sample
from gristmill.compression.recipe import Context, Pass
from gristmill.compression.recipe_file import described
from gristmill.compression.report import Report, Stage
from gristmill.compression.revert import check_drop, revert
from gristmill.compression.state import State
from gristmill.compression.watching import watched
from gristmill.errors import BudgetError, ModelError
from gristmill.formats.streaming import file_bytes
from gristmill.metrics import Metric, name_of
from gristmill.model import Model, check_model
from gristmill.runtime.arena import parse_bytes
from gristmill.runtime.threads import check_threads
from gristmill.tensor import Tensor

COPIES, COPIES_TRAINED = 3, 8  # of all weights in float32: packed, made and before; with gradients and optimiser in training


def compress(
    model: Model,
    recipe: Sequence[Pass],
    data: Any = None,
    *,
    validation: Any = None,
    metric: str | Metric | None = None,
    max_drop: float | None = None,
    max_memory: int | str | None = None,
    state: str | os.PathLike[str] | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: bool | None = None,
) -> tuple[Model, Report]:
    """Apply the passes of a recipe in turn.

    Args:
        model: what to compress; also the teacher, unless a `Distill` names another.
        recipe: passes in order, such as `[Clip(), Prune(0.8), Distill(), Quantize("int8")]`; `read_recipe` reads one from a file.
        data: what passes calibrate and train on: inputs, or (inputs, labels). Inputs are an array for a model of one input,
            arrays by input name, a tuple in the order of `model.inputs`, sentences for a model with a tokenizer, or an iterable
            of batches. Inputs alone are enough to report the output error.
        validation: the same form; what the report measures the metric and the output error on. Default: `data`.
        metric: "accuracy", "cross_entropy" or "mse" against labels; "cosine" to the original's answers or "spearman" of the
            similarities between all pairs of them, without labels; or a function of (output, target). Default: accuracy for whole
            labels, mse for others, none without.
        max_drop: revert the most sensitive weights to what they were until the metric has got worse by no more than this (without
            labels and a metric, the cosine). `report.gate` tells which, and whether that sufficed.
        max_memory: bytes, or a text such as "2GiB", that the process may have resident at most; refused beforehand where that
            cannot be kept. `compress_file` needs far less.
        state: a folder that keeps the model and the report after each pass, made where there is none. The same call goes on from
            there after a kill, to the same model.
        seed: of everything random.
        threads: for kernels and measurements.
        progress: show a progress bar on long passes; None for where a terminal listens.

    Returns:
        The compressed model, whose `meta` records the recipe and what it ran with, and the report.

    Raises:
        ModelError: the recipe is empty, a pass does not fit the model, a weight is not finite, or `state` is of another run.
        DataError: the data do not fit the model, or are missing where a pass or `max_drop` needs them.
        BudgetError: it needs more than `max_memory`; `needed_bytes` says how much.
        OSError: the state cannot be written; what was there before is intact.

    Example:
        >>> import gristmill as gm
        >>> small, report = gm.compress(gm.zoo.mlp([256, 256]), [gm.Prune(0.8), gm.Quantize("int8")])
        >>> report.bytes_after < report.bytes_before / 8
        True
    """
    if not isinstance(recipe, Sequence) or not recipe or not all(isinstance(step, Pass) for step in recipe):
        raise ModelError(f"a recipe is a list of passes such as [Clip(), Prune(0.8), Quantize()], got {recipe!r}")
    check_model(model)
    if max_memory is not None:
        check_budget(model, recipe, parse_bytes(max_memory))
    check_finite_weights(model)
    examples = None if data is None else checked("data", model, data)
    measured_on = sample(model, examples if validation is None else checked("validation", model, validation))
    if metric is None and max_drop is not None and measured_on is not None and measured_on.target is None:
        metric = "cosine"
    metric = check_metric(metric, measured_on)
    if max_drop is not None:
        check_drop(max_drop, metric if measured_on is not None else None)
    context = Context(model, examples, seed, check_threads(threads), progress)
    entry = {**made_with(), "seed": seed, "data": checksum_of(examples), "input": model_checksum(model)}
    identity = {
        "recipe": [described(step) for step in recipe],
        "input model": entry["input"],
        "data": entry["data"],
        "validation": checksum_of(measured_on),
        "metric": "" if metric is None else name_of(metric),
        "seed": seed,
    }
    yardstick = Yardstick(model, measured_on, metric, answers(model, measured_on, context.threads))
    kept = None if state is None else State(state, identity)
    notes: list[str] = []
    current, stages, seconds = run_passes(model, recipe, context, yardstick, kept, notes)
    report = Report(tuple(stages), (), tuple(map(described, recipe)), "" if metric is None else name_of(metric))
    report = replace(report, notes=tuple(notes))
    if max_drop is not None:
        current, report = within_drop(model, current, yardstick, report, float(max_drop), context.threads)
    put_back = report.gate["reverted"] if report.gate else ()
    layers = measure_layers(model, current, context.threads, yardstick, seconds, put_back)
    entry |= {"output": model_checksum(current), **({"reverted": list(put_back)} if put_back else {})}
    current = current.replace(meta=meta_of(model, recipe, entry))
    report = replace(report, layers=tuple(layers), provenance=entry)
    return current, report.with_last(file_bytes=file_bytes(current), peak_bytes=memory("VmHWM"))


def checksum_of(examples: Examples | None) -> str | None:
    """Return the fingerprint of data; None without."""
    return None if examples is None else data_checksum(tuple(examples))


def check_budget(model: Model, recipe: Sequence[Pass], budget: int) -> None:
    """Refuse a recipe whose memory would pass a budget.

    Raises:
        BudgetError: it would.
    """
    copies = COPIES if all(step.local for step in recipe) else COPIES_TRAINED
    needed = (memory("VmRSS") or 0) + copies * sum(4 * prod(tensor.shape) for tensor in model.tensors.values())
    if needed > budget:
        raise BudgetError(
            f"to compress and measure this model takes about {needed:,} bytes of memory, {copies} times its weights in float32 "
            f"and what the process holds already; max_memory is {budget:,}. compress_file goes weight by weight from file to "
            "file, for recipes that need no data",
            needed,
        )


def run_passes(
    model: Model, recipe: Sequence[Pass], context: Context, yardstick: Yardstick, kept: State | None, notes: list[str]
) -> tuple[Model, list[Stage], dict[str, float]]:
    """Apply the passes that are not done yet, and measure after each; `notes` gets what they leave out.

    Returns:
        The model, the stages, and the seconds that local passes spent on each weight.
    """
    stages = list(kept.stages) if kept else []
    seconds = dict(kept.seconds) if kept else {}
    current = kept.model if kept is not None and kept.model is not None else model
    if not stages:
        stages.append(measure_model("original", model, yardstick, 0.0, context.threads))
        if kept is not None:
            kept.begin(stages)
    for position in range(len(stages) - 1, len(recipe)):
        step = recipe[position]
        here = context if kept is None else replace(context, folder=kept.open_pass_folder(position))
        begin = time.perf_counter()
        notes += [f"{type(step).__name__} left '{name}' as it is: {why}" for name, why in step.left_out(current).items()]
        current, spent = applied(step, current, here)
        for name, each in spent.items():
            seconds[name] = seconds.get(name, 0.0) + each
        took = time.perf_counter() - begin
        stages.append(measure_model(type(step).__name__, current, yardstick, took, context.threads))
        if kept is not None:
            kept.commit(current, stages, seconds)
    return current, stages, seconds


def applied(step: Pass, model: Model, context: Context) -> tuple[Model, dict[str, float]]:
    """Apply a pass, a local one weight by weight.

    Returns:
        The model, and the seconds that each weight took where the pass is local.
    """
    if not step.local:
        return step.apply(model, context), {}
    changed: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    for name in watched(step.works_on(model), type(step).__name__, context.progress):
        begin = time.perf_counter()
        changed[name] = step.restricted(name).apply(model, context).tensors[name]
        seconds[name] = time.perf_counter() - begin
    return model.replace(tensors=changed), seconds


def within_drop(
    original: Model, current: Model, yardstick: Yardstick, report: Report, max_drop: float, threads: int
) -> tuple[Model, Report]:
    """Revert what must be reverted, and say so in the report."""
    begin = time.perf_counter()
    outcome = revert(original, current, yardstick, max_drop, threads, report.drop)
    took = time.perf_counter() - begin
    gate = {
        "max_drop": max_drop,
        "met": outcome.met,
        "reverted": list(outcome.names),
        "evaluations": outcome.evaluations,
    }
    if outcome.names:
        stage = measure_model("revert", outcome.model, yardstick, took, threads)
        report = replace(report, stages=(*report.stages, stage))
    return outcome.model, replace(report, gate=gate)
