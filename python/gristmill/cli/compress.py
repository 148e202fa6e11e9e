"""`gristmill compress`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gristmill.cli.console import notes, output
from gristmill.cli.dataset import read_calibration, read_examples, split

if TYPE_CHECKING:
    from gristmill.compression.recipe import Pass
    from gristmill.compression.report import Report
    from gristmill.model import Model

GATE_FAILED = 3
STYLES = ("table", "json")


def compress(
    model: Annotated[Path, typer.Option(help="The model file or Hugging Face folder to compress.")],
    out: Annotated[Path, typer.Option(help="Where to write the compressed model.")],
    recipe: Annotated[
        Path | None, typer.Option(help="A .yaml or .json file of passes, in place of --clip, --prune, --distill and --quantize.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="An .npz file with x and y: to distil with, and to measure on.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Inputs without labels, in place of --data: an .npz file, or for encoders a .txt file of sentences."),
    ] = None,
    validation: Annotated[str | None, typer.Option(help="Measure on this share of the data, or on this .npz file.")] = None,
    clip: Annotated[float | None, typer.Option(help="Clip weights at this percentile of their magnitudes, such as 99.9.")] = None,
    prune: Annotated[float | None, typer.Option(help="Drop this share of the weights, such as 0.8.")] = None,
    pattern: Annotated[str, typer.Option(help="What to prune together: 1x4, 2x4, 4x4, unstructured, or N:M.")] = "1x4",
    distill: Annotated[int | None, typer.Option(min=1, help="Train for this many epochs to answer as the original does.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Store and compute weights in this precision, such as int8.")] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(min=0, help="Let the metric get worse by no more: revert the most sensitive layers, else exit with 3."),
    ] = None,
    revert: Annotated[bool, typer.Option(help="With --max-drop: revert layers. Without, only judge.")] = True,
    metric: Annotated[
        str | None,
        typer.Option(
            help="accuracy, cross_entropy or mse; cosine or spearman to the original's answers. Default: as data allow."
        ),
    ] = None,
    report: Annotated[str, typer.Option(help="Print the report as table or json; a path that ends in .json to write.")] = "table",
    plots: Annotated[Path | None, typer.Option(help="Write PNG plots into this folder.")] = None,
    state: Annotated[
        Path | None,
        typer.Option(help="The folder with which a killed run goes on. Default: OUT.state, removed in the end."),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew whatever the state says.")] = False,
    max_memory: Annotated[
        str | None,
        typer.Option(help="Resident memory that may be used, such as 2GiB. Recipes without data then go from file to file."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the physical cores.")] = None,
) -> None:
    """Compress a model: by a recipe, or clip, prune, distil, quantise in this order; report what each pass cost and gained.

    The model given is never changed, and the compressed one appears whole or not at all. A run that was killed goes on where it
    was when it is started again with the same options. Exit codes: 0 done, 1 an error, 2 wrong options, 3 --max-drop not met.
    """
    given = (clip, prune, distill, quantize)
    check_options(recipe, given, data, calibration, distill, max_drop, validation, report)
    import gristmill as gm
    from gristmill.compression.layerwise import goes_by_weight
    from gristmill.compression.state import discard
    from gristmill.formats import check_target

    check_target(out)
    check_distinct(model, out)
    check_outputs(report, plots)
    passes = gm.read_recipe(recipe) if recipe is not None else make_recipe(clip, prune, pattern, distill, quantize)
    folder = state if state is not None else out.with_name(f"{out.name}.state")
    if restart:
        discard(folder)
    shared: dict[str, Any] = {"max_memory": max_memory, "state": folder, "seed": seed, "threads": threads}
    original = gm.load(model)
    if max_memory is not None and data is calibration is None and goes_by_weight(passes, original, out):
        del original
        outcome = gm.compress_file(model, out, passes, **shared)
        tell(outcome, report, plots)
        notes().print(f"saved {out}: {out.stat().st_size:,} bytes")
        return
    examples, checked = read_data(original, data, calibration, validation, seed, metric)
    bound = max_drop if revert else None
    small, outcome = gm.compress(original, passes, examples, validation=checked, metric=metric, max_drop=bound, **shared)
    tell(outcome, report, plots)
    if max_drop is not None and not (outcome.drop is not None and outcome.drop <= max_drop):
        drop = "could not be measured" if outcome.drop is None else f"dropped by {outcome.drop:.4f}"
        notes().print(f"gate: {outcome.metric} {drop}, more than {max_drop}; nothing was written")
        if state is None:
            discard(folder)
        raise typer.Exit(GATE_FAILED)
    gm.save(small, out)
    if state is None:
        discard(folder)
    notes().print(f"saved {out}: {out.stat().st_size:,} bytes")


def check_options(
    recipe: Path | None,
    given: tuple[Any, ...],
    data: Path | None,
    calibration: Path | None,
    distill: int | None,
    max_drop: float | None,
    validation: str | None,
    report: str,
) -> None:
    """Refuse options that do not go together.

    Raises:
        BadParameter: names them.
    """
    asked = any(value is not None for value in given)
    if recipe is None and not asked:
        raise typer.BadParameter("choose at least one of --clip, --prune, --distill and --quantize, or give a --recipe")
    if recipe is not None and asked:
        raise typer.BadParameter("--recipe holds all passes: leave out --clip, --prune, --distill and --quantize")
    if data is not None and calibration is not None:
        raise typer.BadParameter("--calibration is for inputs without labels: leave it out where there is --data")
    if distill is not None and data is None:
        raise typer.BadParameter("--distill needs --data")
    if max_drop is not None and data is calibration is None:
        raise typer.BadParameter("--max-drop needs --data or --calibration")
    if validation is not None and data is None:
        raise typer.BadParameter("--validation needs --data")
    if report not in STYLES and not report.endswith(".json"):
        raise typer.BadParameter(f"--report is table, json or a path that ends in .json, got {report!r}")


def check_distinct(model: Path, out: Path) -> None:
    """Refuse to write over what is read, which is mapped while it is compressed.

    Raises:
        BadParameter: both are one file.
    """
    if out.exists() and model.exists() and out.samefile(model):
        raise typer.BadParameter(f"--out is the model itself, {model}: name another file")


def check_outputs(report: str, plots: Path | None) -> None:
    """Find out before the work whether the report and the plots could be written.

    Raises:
        OSError: they could not.
        MissingExtraError: the library that draws is not installed.
    """
    from gristmill.formats.atomic import check_folder

    if report not in STYLES:
        check_folder(report)
    if plots is not None:
        from gristmill.compression.plot import need_matplotlib

        need_matplotlib()
        check_folder(plots / "quality.png" if plots.is_dir() else plots)


def read_data(
    model: "Model", data: Path | None, calibration: Path | None, validation: str | None, seed: int, metric: str | None
) -> tuple[Any, Any]:
    """Return what to compress with and what to measure on, which is None for the same."""
    if data is not None:
        loss = "mse" if metric == "mse" else "cross_entropy"
        return split(read_examples(data, loss), validation, seed, loss)
    return (None if calibration is None else read_calibration(calibration, model)), None


def make_recipe(clip: float | None, prune: float | None, pattern: str, distill: int | None, quantize: str | None) -> "list[Pass]":
    """Return the passes that were asked for, in the order in which they serve each other."""
    import gristmill as gm

    recipe: list[Pass] = []
    if clip is not None:
        recipe.append(gm.Clip(percentile=clip))
    if prune is not None:
        recipe.append(gm.Prune(prune, pattern=pattern))
    if distill is not None:
        recipe.append(gm.Distill(epochs=distill))
    if quantize is not None:
        recipe.append(gm.Quantize(quantize))
    return recipe


def tell(outcome: "Report", report: str, plots: Path | None) -> None:
    """Print the report, or write it; draw the plots."""
    if report == "json":
        output().print_json(data=outcome.as_dict())
    else:
        figures = outcome.as_dict()
        for table in report_tables(figures):
            output().print(table)
        for remark in figures["remarks"]:
            output().print(remark)
    if report not in STYLES:
        outcome.save(report)
        notes().print(f"saved {report}")
    if plots is not None:
        for path in outcome.plot(plots):
            notes().print(f"saved {path}")


def report_tables(figures: dict[str, Any]) -> list[Any]:
    """Return the report as tables: one row for each pass, and one for each weight."""
    from gristmill.compression.report import tables

    return [terminal_table(rows) for rows in tables(figures)]


def terminal_table(rows: list[list[str]]) -> Any:
    """Return rows of cells, the first of which names the columns, as a table."""
    from rich.table import Table

    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    return table
