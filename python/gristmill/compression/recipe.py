"""What a pass is, and what it may use."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gristmill.compression.examples import Examples
from gristmill.errors import ModelError
from gristmill.model import Model

Self = TypeVar("Self", bound="Pass")


@dataclass(frozen=True)
class Context:
    """What a recipe runs with.

    Args:
        teacher: the model that entered `compress`.
        data: inputs, and labels or targets where there are any; or None.
        seed: of everything random.
        threads: for kernels.
        progress: whether long passes show a progress bar; None for where a terminal listens.
        folder: where a long pass may keep files of its own, to go on from after a kill; None where nobody asked for that. It is
            there, empty the first time, and is removed when the pass is done.
    """

    teacher: Model
    data: Examples | None
    seed: int
    threads: int
    progress: bool | None
    folder: Path | None = None


@dataclass(frozen=True)
class Pass:
    """A step of a recipe: an immutable config that maps a model to a model."""

    def apply(self, model: Model, context: Context) -> Model:
        """Return the changed model.

        Raises:
            ModelError: the pass does not fit the model, or needs data that `compress` was not given.
        """
        raise NotImplementedError

    @property
    def local(self) -> bool:
        """Whether what becomes of a weight depends on that weight alone: such passes can go through a model weight by weight."""
        return False

    def works_on(self, model: Model) -> list[str]:
        """Return the names of the weights that the pass is to change, those that it turns out not to fit included.

        Raises:
            ModelError: a pattern matches nothing, or nothing is left.
        """
        settings = {setting.name for setting in fields(self)}
        if not {"names", "skip"} <= settings:
            return list(model.weights)
        return targets(model, getattr(self, "names"), getattr(self, "skip"))  # noqa: B009

    def left_out(self, model: Model) -> dict[str, str]:
        """Return the names of weights that the pass leaves as they are although nobody excluded them, and why."""
        return {}

    def restricted(self: Self, name: str) -> Self:
        """Return the same pass for one weight.

        Raises:
            ModelError: the pass does not choose weights by name.
        """
        if not {"names", "skip"} <= {setting.name for setting in fields(self)}:
            raise ModelError(f"{type(self).__name__} works on a whole model, not on one weight")
        changes: dict[str, Any] = {"names": (literal(name),), "skip": ()}
        return replace(self, **changes)


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


def literal(name: str) -> str:
    """Return the shell pattern that matches one name only.

    Example:
        >>> literal("layer[0]")
        'layer[[]0]'
    """
    return "".join(f"[{character}]" if character in "[*?" else character for character in name)


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
