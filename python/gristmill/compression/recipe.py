"""What a pass is, and what it may use."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any

import numpy as np

from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.tensor.parts import Array


@dataclass(frozen=True)
class Context:
    """What a recipe runs with.

    Args:
        teacher: the model that entered `compress`.
        data: inputs, and labels or targets where there are any; or None.
        seed: of everything random.
        threads: for kernels.
        progress: whether long passes show a progress bar; None for where a terminal listens.
    """

    teacher: Model
    data: tuple[Array, Array | None] | None
    seed: int
    threads: int
    progress: bool | None


@dataclass(frozen=True)
class Pass:
    """A step of a recipe: an immutable config that maps a model to a model."""

    def apply(self, model: Model, context: Context) -> Model:
        """Return the changed model.

        Raises:
            ModelError: the pass does not fit the model, or needs data that `compress` was not given.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return the settings, for provenance."""
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"pass": type(self).__name__, **settings}


def targets(model: Model, patterns: Sequence[str], skip: Sequence[str], among: Sequence[str] | None = None) -> list[str]:
    """Return the weights of Linear nodes whose names match `patterns` (shell style; none for all) and not `skip`.

    `among` names other tensors to choose from.

    Raises:
        ModelError: a pattern matches nothing, or nothing is left.
    """
    among = model.weights if among is None else among
    patterns, skip = ((given,) if isinstance(given, str) else given for given in (patterns, skip))
    for pattern in (*patterns, *skip):
        if not any(fnmatchcase(name, pattern) for name in among):
            raise ModelError(f"pattern '{pattern}' matches none of the weights {list(among)}")
    chosen = [
        name
        for name in among
        if (not patterns or any(fnmatchcase(name, p) for p in patterns)) and not any(fnmatchcase(name, p) for p in skip)
    ]
    if not chosen:
        raise ModelError(f"no weights are left to work on: the model has {list(among)}")
    return chosen


def is_number(value: Any) -> bool:
    """Say whether a setting is one finite real number."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool) and isfinite(value)


def need_float(model: Model, name: str, what: str) -> None:
    """Raise unless a weight is still float32.

    Raises:
        ModelError: it is quantised.
    """
    tensor = model.tensors[name]
    if tensor.kind == "quantized" or getattr(tensor, "scale", None) is not None:
        form = "int4" if tensor.kind == "int4" or getattr(tensor, "precision", "") == "int4" else "int8"
        raise ModelError(f"cannot {what} '{name}': it is {form} already; put Quantize last in the recipe")
