"""`gristmill train`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gristmill.cli.console import notes, output
from gristmill.cli.dataset import read_examples, split
from gristmill.errors import DataError

if TYPE_CHECKING:
    from gristmill.model import Model
    from gristmill.optim import Optimizer
    from gristmill.tensor.parts import Array


class Method(StrEnum):
    """The optimisers, by their names on the command line."""

    sgd = "sgd"
    momentum = "momentum"
    adam = "adam"
    adamw = "adamw"


class Objective(StrEnum):
    """The losses, by their names on the command line."""

    cross_entropy = "cross_entropy"
    mse = "mse"


def train(
    data: Annotated[Path, typer.Option(help="An .npz file with arrays x and y, one row for each example.")],
    out: Annotated[Path, typer.Option(help="Where to write the model.")],
    layers: Annotated[str | None, typer.Option(help="Hidden widths of a new perceptron, such as 512,256.")] = None,
    model: Annotated[Path | None, typer.Option(help="A model file to go on training, instead of --layers.")] = None,
    activation: Annotated[str, typer.Option(help="Of a new perceptron: relu, gelu, tanh, sigmoid or silu.")] = "relu",
    loss: Annotated[Objective, typer.Option(help="What to minimise.")] = Objective.cross_entropy,
    optimizer: Annotated[Method, typer.Option(help="How to descend.")] = Method.adam,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 0.001 for adam and adamw, 0.05 otherwise.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Of momentum (default 0.9).")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default: 0.01 for adamw, 0 otherwise.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per step, over all workers.")] = 32,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 10,
    slices: Annotated[int, typer.Option(min=1, help="Parts of a batch; the result depends on it, but not on workers.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order and split.")] = 0,
    validation: Annotated[
        str | None, typer.Option(help="A share of the data to set aside, such as 0.2, or an .npz file.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Write the state here after each epoch.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")] = False,
) -> None:
    """Train a model over worker processes."""
    if (layers is None) == (model is None):
        raise typer.BadParameter("give either --layers for a new model or --model to go on with one")
    if resume and checkpoint is None:
        raise typer.BadParameter("--resume needs --checkpoint, the file to resume from")
    import gristmill as gm
    from gristmill.formats import check_target

    chosen = make_optimizer(optimizer, learning_rate, momentum, weight_decay)
    widths = None if layers is None else parse_layers(layers)
    check_target(out)
    examples = read_examples(data, loss.value)
    training, checked = split(examples, validation, seed, loss.value)
    start = gm.load(model) if model is not None else new_model(widths or [], activation, seed, *examples, loss.value)
    result = gm.fit(
        start, training, loss=loss.value, optimizer=chosen, workers=workers, engine="processes", batch_size=batch_size,
        epochs=epochs, slices=slices, seed=seed, checkpoint=checkpoint, resume=resume, validation=checked,
    )  # fmt: skip
    output().print(epochs_table(result.history))
    gm.save(result.model, out)
    notes().print(f"saved {out}: {out.stat().st_size:,} bytes")


def parse_layers(text: str) -> list[int]:
    """Return the widths in a text such as "512,256"; an empty text means none."""
    try:
        widths = [int(part) for part in text.split(",") if text.strip()]
    except ValueError:
        widths = [0]
    if any(width < 1 for width in widths):
        raise typer.BadParameter(
            f"widths must be positive whole numbers with commas between, got {text!r}", param_hint="--layers"
        )
    return widths


def make_optimizer(
    method: Method, learning_rate: float | None, momentum: float | None, weight_decay: float | None
) -> "Optimizer":
    """Return the optimiser that the options describe; what is not given keeps the optimiser's default."""
    from gristmill import optim

    if momentum is not None and method is not Method.momentum:
        raise typer.BadParameter(f"--optimizer {method.value} has no momentum", param_hint="--momentum")
    kinds = {Method.sgd: optim.SGD, Method.momentum: optim.Momentum, Method.adam: optim.Adam, Method.adamw: optim.AdamW}
    given: dict[str, Any] = {"learning_rate": learning_rate, "momentum": momentum, "weight_decay": weight_decay}
    settings = {name: value for name, value in given.items() if value is not None}
    if method in (Method.sgd, Method.momentum):
        settings.setdefault("learning_rate", 0.05)
    return kinds[method](**settings)


def new_model(widths: list[int], activation: str, seed: int, x: "Array", y: "Array", loss: str) -> "Model":
    """Build a perceptron from the features of x to the classes or the targets in y.

    Raises:
        DataError: x is not [examples, features].
    """
    import gristmill as gm

    if x.ndim != 2 or (loss == "mse" and y.ndim != 2):
        raise DataError(
            f"a new model takes x [examples, features] and, for mse, y [examples, targets]; got {x.shape}, {y.shape}; "
            "reshape(len(y), 1) makes one target of each number"
        )
    outputs = int(y.max()) + 1 if loss == "cross_entropy" else y.shape[1]
    return gm.zoo.mlp([x.shape[1], *widths, outputs], activation=activation, seed=seed)


def epochs_table(history: "dict[str, Array]") -> Any:
    """One row for each epoch, one column for each figure."""
    from rich.table import Table

    table = Table("epoch", *(name.replace("_", " ") for name in history))
    for epoch in range(len(history["loss"])):
        table.add_row(str(epoch + 1), *(f"{values[epoch]:.5g}" for values in history.values()))
    return table
