"""`gristmill run`."""

import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from gristmill.cli.console import notes, output
from gristmill.cli.dataset import read_arrays
from gristmill.errors import DataError

if TYPE_CHECKING:
    from gristmill.model import Model
    from gristmill.tensor.parts import Array


def run(
    model: Annotated[Path, typer.Argument(help="The model file or Hugging Face folder.")],
    data: Annotated[Path, typer.Option(help="An .npz file with an array for each input of the model; others are ignored.")],
    out: Annotated[Path | None, typer.Option(help="Write the outputs to this .npz file instead of printing them.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the physical cores.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bf16, or int8 to quantise dense weights first.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Runs to time, after a first one that plans.")] = 5,
) -> None:
    """Run a model on arrays from a file; print or write its outputs and the latency."""
    import gristmill as gm
    from gristmill.formats.atomic import check_folder

    if out is not None:
        check_folder(out)
    loaded = gm.load(model)
    inputs = pick_inputs(loaded, data)
    session = gm.Session(loaded, threads=threads, precision=precision)
    begin = time.perf_counter()
    outputs = session.run(**inputs)
    first = time.perf_counter() - begin
    if out is None:
        for name, array in outputs.items():
            output().print(f"{name} {array.dtype} {array.shape}\n{array}")
    else:
        write_arrays(out, outputs)
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        session.run(**inputs)
        times.append(time.perf_counter() - begin)
    notes().print(f"latency {1e3 * median(times):.3f} ms (median of {repeat}), first run {1e3 * first:.3f} ms")


def pick_inputs(model: "Model", path: Path) -> "dict[str, Array]":
    """Return an array for each input, converted to its dtype where that loses no more than precision.

    Raises:
        DataError: an array is missing or of another kind.
    """
    import numpy as np

    arrays = read_arrays(path)
    missing = model.inputs.keys() - arrays.keys()
    if missing:
        takes = ", ".join(f"{name}: {kind}" for name, kind in model.inputs.items())
        raise DataError(f"{path} holds {sorted(arrays)} but the model takes {takes}")
    for name, kind in model.inputs.items():
        if not np.can_cast(arrays[name].dtype, kind.dtype, "same_kind"):
            raise DataError(f"{path}: {name} is {arrays[name].dtype}, which cannot become {kind.dtype}")
    return {name: arrays[name].astype(kind.dtype) for name, kind in model.inputs.items()}


def write_arrays(path: Path, arrays: "dict[str, Array]") -> None:
    """Write an .npz file, whole or not at all."""
    import numpy as np

    from gristmill.formats.atomic import replacing

    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    notes().print(f"saved {path}: {', '.join(arrays)}")
