"""`gristmill demo`."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    json: Annotated[Path | None, typer.Option(help="Write every figure to this file.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Of training.")] = 20,
) -> None:
    """Train on handwritten digits, compress, adapt, serve, and embed sentences: all stages, measured as they run."""
    from gristmill.cli.demo import demo as run_demo

    run_demo(json=json, seed=seed, epochs=epochs)
