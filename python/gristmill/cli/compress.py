"""`gristmill compress`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gristmill.cli.console import notes, output
from gristmill.cli.dataset import read_examples, split

if TYPE_CHECKING:
    from gristmill.compression.recipe import Pass

GATE_FAILED = 3


class Pattern(StrEnum):
    """What is pruned together."""

    blocks = "1x4"
    unstructured = "unstructured"


class Precision(StrEnum):
    """What weights are quantised to."""

    int8 = "int8"
    bf16 = "bf16"


class Style(StrEnum):
    """How the report is printed."""

    table = "table"
    json = "json"


def compress(
    model: Annotated[Path, typer.Option(help="The model file or Hugging Face folder to compress.")],
    out: Annotated[Path, typer.Option(help="Where to write the compressed model.")],
    data: Annotated[Path | None, typer.Option(help="An .npz file with x and y: to distil with, and to measure on.")] = None,
    validation: Annotated[str | None, typer.Option(help="Measure on this share of the data, or on this .npz file.")] = None,
    clip: Annotated[float | None, typer.Option(help="Clip weights at this percentile of their magnitudes, such as 99.9.")] = None,
    prune: Annotated[float | None, typer.Option(help="Drop this share of the weights, such as 0.8.")] = None,
    pattern: Annotated[Pattern, typer.Option(help="What to prune together.")] = Pattern.blocks,
    distill: Annotated[int | None, typer.Option(min=1, help="Train for this many epochs to answer as the original does.")] = None,
    quantize: Annotated[Precision | None, typer.Option(help="Store and compute weights in this precision.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="Write nothing and exit with 3 if the metric drops by more.")] = None,
    metric: Annotated[str, typer.Option(help="What to measure.")] = "accuracy",
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the physical cores.")] = None,
    report: Annotated[Style, typer.Option(help="How to print the report.")] = Style.table,
) -> None:
    """Compress a model: clip, prune, distil, quantise, in this order; report what each pass cost and gained."""
    if clip is prune is distill is quantize is None:
        raise typer.BadParameter("choose at least one of --clip, --prune, --distill and --quantize")
    for option, value in (("--distill", distill), ("--max-drop", max_drop), ("--validation", validation)):
        if value is not None and data is None:
            raise typer.BadParameter(f"{option} needs --data")
    import gristmill as gm
    from gristmill.formats import check_target

    check_target(out)
    recipe = make_recipe(clip, prune, pattern, distill, quantize)
    original = gm.load(model)
    given, checked = (None, None) if data is None else split(read_examples(data), validation, seed)
    small, outcome = gm.compress(original, recipe, given, validation=checked, metric=metric, seed=seed, threads=threads)
    if report is Style.json:
        output().print_json(data=outcome.as_dict())
    else:
        for table in report_tables(outcome.as_dict()):
            output().print(table)
    if max_drop is not None and not (outcome.drop is not None and outcome.drop <= max_drop):
        notes().print(f"gate: {metric} dropped by {outcome.drop:.4f}, more than {max_drop}; nothing was written")
        raise typer.Exit(GATE_FAILED)
    gm.save(small, out)
    notes().print(f"saved {out}: {out.stat().st_size:,} bytes")


def make_recipe(
    clip: float | None, prune: float | None, pattern: Pattern, distill: int | None, quantize: Precision | None
) -> "list[Pass]":
    """Return the passes that were asked for, in the order in which they serve each other."""
    import gristmill as gm

    recipe: list[Pass] = []
    if clip is not None:
        recipe.append(gm.Clip(percentile=clip))
    if prune is not None:
        recipe.append(gm.Prune(prune, pattern=pattern.value))
    if distill is not None:
        recipe.append(gm.Distill(epochs=distill))
    if quantize is not None:
        recipe.append(gm.Quantize(quantize.value))
    return recipe


def report_tables(report: dict[str, Any]) -> list[Any]:
    """Return the report as tables: one row for each pass, and one for each weight."""
    from rich.table import Table

    batches = list(report["total"]["latency_ms_before"])
    stages = Table("stage", report["metric"], "error", "file bytes", "weight bytes", *(f"ms at {b}" for b in batches), "kernels")
    for row in report["stages"]:
        value = "-" if row["metric"] is None else f"{row['metric']:.4f}"
        times = [f"{row['latency_ms'][b]:.3f}" for b in batches]
        kernels = ", ".join(dict.fromkeys(row["kernels"].values()))
        stages.add_row(
            row["name"], value, f"{row['error']:.4f}", f"{row['file_bytes']:,}", f"{row['weight_bytes']:,}", *times, kernels
        )
    layers = Table("weight", "kind", "error", "sparsity", "bytes before", "after", *(f"ms at {b}" for b in batches))
    for row in report["layers"]:
        times = [f"{row['latency_ms_before'][b]:.3f} -> {row['latency_ms_after'][b]:.3f}" for b in batches]
        sizes = [f"{row['bytes_before']:,}", f"{row['bytes_after']:,}"]
        layers.add_row(row["name"], row["kind"], f"{row['error']:.4f}", f"{row['sparsity']:.3f}", *sizes, *times)
    return [stages, layers]
