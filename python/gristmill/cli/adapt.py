"""`gristmill adapt`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gristmill.cli.console import notes, output
from gristmill.cli.dataset import read_examples
from gristmill.cli.train import Method, Objective, make_optimizer


class Descent(StrEnum):
    """How often the model is updated."""

    minibatch = "mini-batch"
    full = "gradient-descent"


def adapt(
    model: Annotated[Path, typer.Option(help="The model file to adapt, compressed or not.")],
    data: Annotated[Path, typer.Option(help="An .npz file with the local x and y.")],
    out: Annotated[Path, typer.Option(help="Where to write the adapted model.")],
    memory: Annotated[str, typer.Option(help="The budget beyond model and data, such as 4MiB.")] = "4MiB",
    update: Annotated[str, typer.Option(help="all, bias, or last:k for the last k layers.")] = "all",
    method: Annotated[Descent, typer.Option(help="Update after each batch, or after all of the data.")] = Descent.minibatch,
    loss: Annotated[Objective, typer.Option(help="What to minimise.")] = Objective.cross_entropy,
    optimizer: Annotated[Method, typer.Option(help="How to descend.")] = Method.sgd,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 0.001 for adam and adamw, 0.05 otherwise.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Of momentum (default 0.9).")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default: 0.01 for adamw, 0 otherwise.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Of the mini-batch method.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the order.")] = 0,
) -> None:
    """Adapt a model to local data within a memory budget, on the machine that runs it."""
    import gristmill as gm
    from gristmill.formats import check_target

    chosen = make_optimizer(optimizer, learning_rate, momentum, weight_decay)
    check_target(out)
    x, y = read_examples(data, loss.value)
    trainer = gm.EdgeTrainer(gm.load(model), memory=memory, update=update, loss=loss.value, optimizer=chosen)
    result = trainer.fit(x, y, method=method.value, epochs=epochs, batch_size=batch_size, seed=seed)
    losses = result.history["loss"]
    output().print(f"loss {losses[0]:.5g} -> {losses[-1]:.5g} in {len(losses)} epochs on {len(x)} examples")
    output().print(f"memory {result.peak_bytes:,} bytes used, {result.planned_bytes:,} planned, budget {memory}")
    gm.save(result.model, out)
    notes().print(f"saved {out}: {out.stat().st_size:,} bytes")
