"""`gristmill sensitivity`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gristmill.cli.compress import terminal_table
from gristmill.cli.console import notes, output
from gristmill.cli.dataset import read_calibration, read_examples

if TYPE_CHECKING:
    from gristmill.compression.recipe import Pass


def sensitivity(
    model: Annotated[Path, typer.Option(help="The model file or Hugging Face folder to look at.")],
    recipe: Annotated[
        Path | None, typer.Option(help="A .yaml or .json file of passes to try, each by itself, in place of the options below.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="An .npz file with x and y, for the drop of a metric.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Inputs without labels: an .npz file, or for encoders a .txt file of sentences.")
    ] = None,
    prune: Annotated[list[float] | None, typer.Option(help="A share to prune; may be repeated. Default: 0.5 and 0.8.")] = None,
    pattern: Annotated[str, typer.Option(help="What to prune together.")] = "1x4",
    quantize: Annotated[list[str] | None, typer.Option(help="A precision; may be repeated. Default: int8.")] = None,
    metric: Annotated[str | None, typer.Option(help="As for compress. Default: as data allow.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them into this PNG file.")] = None,
    state: Annotated[Path | None, typer.Option(help="A file with which a killed run goes on.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the physical cores.")] = None,
) -> None:
    """Compress one weight after the other, all others left as they are, and show what each alone does to the answers."""
    if data is not None and calibration is not None:
        raise typer.BadParameter("--calibration is for inputs without labels: leave it out where there is --data")
    if recipe is not None and (prune or quantize):
        raise typer.BadParameter("--recipe holds all passes: leave out --prune and --quantize")
    import gristmill as gm
    from gristmill.formats.atomic import check_folder

    for path in (json_out, plot):
        if path is not None:
            check_folder(path)
    if plot is not None:
        from gristmill.compression.plot import need_matplotlib

        need_matplotlib()
    passes = gm.read_recipe(recipe) if recipe is not None else settings(prune, pattern, quantize)
    loaded = gm.load(model)
    examples = read_examples(data) if data is not None else None
    if calibration is not None:
        examples = read_calibration(calibration, loaded)
    found = gm.sensitivity(loaded, examples, passes, metric=metric, state=state, seed=seed, threads=threads)
    output().print(terminal_table(found.table()))
    if json_out is not None:
        found.save(json_out)
        notes().print(f"saved {json_out}")
    if plot is not None:
        found.plot(plot)
        notes().print(f"saved {plot}")


def settings(prune: list[float] | None, pattern: str, quantize: list[str] | None) -> "list[Pass]":
    """Return the passes to try: what was asked for, or the default of both kinds."""
    import gristmill as gm

    nothing = not prune and not quantize
    shares = [0.5, 0.8] if nothing else prune or []
    precisions = ["int8"] if nothing else quantize or []
    return [*(gm.Prune(share, pattern=pattern) for share in shares), *map(gm.Quantize, precisions)]
