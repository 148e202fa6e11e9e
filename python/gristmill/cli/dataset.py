"""Reading data from .npz files, which may come from anywhere: no pickle."""

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gristmill.errors import DataError

if TYPE_CHECKING:
    from gristmill.model import Model
    from gristmill.tensor.parts import Array

    Examples = tuple[Array, Array]


def read_arrays(path: Path) -> "dict[str, Array]":
    """Return the arrays of an .npz file by name.

    Raises:
        DataError: it is no such file, or holds Python objects.
        OSError: it cannot be read.
    """
    import numpy as np

    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise DataError(f"{path} holds a single array; save it with np.savez(path, x=..., y=...)")
        with file:
            return dict(file.items())
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        # NumPy takes whatever it does not know for a pickle, and its advice is to trust it.
        reason = "it holds Python objects, or is of another kind" if "pickle" in str(error) else error
        raise DataError(f"{path} is not an .npz file of plain arrays: {reason}") from error


def read_examples(path: Path, loss: str = "cross_entropy") -> "Examples":
    """Return float32 `x` [examples, ...] and `y` of an .npz file: int64 labels for cross_entropy, float32 targets otherwise.

    Raises:
        DataError: an array is missing, not numeric, empty, or the lengths differ.
    """
    import numpy as np

    arrays = read_arrays(path)
    if not {"x", "y"} <= arrays.keys():
        raise DataError(f"{path} must hold arrays x and y, found {sorted(arrays)}; save it with np.savez(path, x=..., y=...)")
    x, y = arrays["x"], arrays["y"]
    for name, array in (("x", x), ("y", y)):
        if array.dtype.kind not in "biuf" or array.ndim == 0:
            raise DataError(f"{path}: {name} must be an array of numbers, got {array.dtype} of shape {array.shape}")
    if len(x) != len(y) or len(x) == 0:
        raise DataError(f"{path}: x and y must have the same number of examples, at least one: got {len(x)} and {len(y)}")
    if loss != "cross_entropy":
        return x.astype(np.float32), y.astype(np.float32)
    if y.ndim != 1 or y.dtype.kind == "f" or y.min() < 0:
        raise DataError(f"{path}: y must be one whole number from 0 for each example, got {y.dtype} of shape {y.shape}")
    return x.astype(np.float32), y.astype(np.int64)


def read_calibration(path: Path, model: "Model") -> Any:
    """Return inputs without labels: the sentences of a `.txt` file, a line each, or the arrays of an .npz file by input name.

    Of an .npz file, what the model takes is used, and `x` serves a model of one input.

    Raises:
        DataError: the file is of another kind, or holds no input of the model.
        OSError: it cannot be read.
    """
    if path.suffix == ".txt":
        try:
            lines = path.read_text("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text: {error}") from error
        sentences = [line for line in lines if line.strip()]
        if not sentences:
            raise DataError(f"{path} holds no sentences")
        return sentences
    arrays = read_arrays(path)
    named = {name: array for name, array in arrays.items() if name in model.inputs}
    if not named and len(model.inputs) == 1 and "x" in arrays:
        return arrays["x"]
    if not named:
        raise DataError(f"{path} holds {sorted(arrays)}, none of the model's inputs {', '.join(model.inputs)}")
    return named


def split(
    examples: "Examples", validation: str | None, seed: int, loss: str = "cross_entropy"
) -> "tuple[Examples, Examples | None]":
    """Return what to train on and what to check on.

    Args:
        examples: all of the data.
        validation: None for no check; a fraction in (0, 1) to set aside, drawn from `seed`; or the path of an .npz file.
        seed: of the draw.
        loss: see `read_examples`.

    Raises:
        DataError: the fraction leaves one side without examples.
        BadParameter: it is a number that is no fraction.
    """
    if validation is None:
        return examples, None
    try:
        fraction = float(validation)
    except ValueError:
        return examples, read_examples(Path(validation), loss)
    if not 0 < fraction < 1:
        raise typer.BadParameter(f"a fraction must lie between 0 and 1, got {validation}", param_hint="--validation")
    import numpy as np

    x, y = examples
    order = np.random.default_rng(seed).permutation(len(x))
    kept = len(x) - round(fraction * len(x))
    if kept in (0, len(x)):
        raise DataError(f"a validation share of {fraction} of {len(x)} examples leaves one side empty")
    first, last = order[:kept], order[kept:]
    return (x[first], y[first]), (x[last], y[last])
