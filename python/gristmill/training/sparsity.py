"""Pruning while training: weights are driven to zero block by block along a schedule, and stay there.

Zhu and Gupta 2017, "To prune, or not to prune": the sparsity rises as 1 - (1 - t)^3, fast while there is much to spare and slowly
towards the end. Masks are zeros of the parameters themselves, so that a checkpoint holds all that is needed to go on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np

from gristmill import _core
from gristmill.errors import ModelError
from gristmill.tensor.parts import Array
from gristmill.tensor.selection import Pattern, mask_of, scores


@dataclass(frozen=True)
class GradualPruning:
    """Prune while training: `fit(..., pruning=GradualPruning(...))`.

    From step `begin` to step `end` the share of zero blocks in each weight rises from `initial` to `final` along a cubic, in an
    event every `every` steps; before, between and after, what is zero stays zero.

    Args:
        names: of the weights, matrices that train.
        final: the share of each weight to be zero in the end, in (0, 1).
        begin, end: the first and the last step of the rise, counted from 1.
        every: steps between two events.
        initial: the share to start with, below `final`.
        pattern: what is zero together: "unstructured", "1x4", "2x4" or "4x4".
        norms: by name, the norm of each input of a weight over calibration data, float32 [k]: a block's score is then the sum of
            squares of weight times norm, as Wanda (Sun et al. 2023) scores weights; without, of the weights alone.

    Raises:
        ModelError: a setting lies outside its range.

    Example:
        >>> rise = GradualPruning(("layer0.weight",), final=0.8, begin=1, end=101, every=10)
        >>> [round(rise.sparsity(step), 3) for step in (1, 51, 101, 500)]
        [0.0, 0.7, 0.8, 0.8]
    """

    names: tuple[str, ...]
    final: float
    begin: int
    end: int
    every: int = 50
    initial: float = 0.0
    pattern: str = "4x4"
    norms: Mapping[str, Array] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        if not self.names or Pattern.named(self.pattern).of:
            raise ModelError(f"GradualPruning needs names of weights, and a pattern of any sparsity, got {self.pattern!r}")
        shares = isfinite(self.final) and 0 < self.final < 1 and 0 <= self.initial <= self.final
        if not shares or not 1 <= self.begin <= self.end or self.every < 1:
            raise ModelError(
                "GradualPruning: 0 <= initial <= final < 1, 1 <= begin <= end and every >= 1 must hold, got "
                f"{self.initial!r}, {self.final!r}, {self.begin!r}, {self.end!r}, {self.every!r}"
            )

    def sparsity(self, step: int) -> float:
        """The share of zeros that is due after a step."""
        if step < self.begin:
            return 0.0
        done = 1.0 if step >= self.end else (step - self.begin) / (self.end - self.begin)
        return self.final + (self.initial - self.final) * (1.0 - done) ** 3

    def describe(self) -> dict[str, Any]:
        """The settings, in JSON-compatible terms."""
        settings = {name: getattr(self, name) for name in ("final", "begin", "end", "every", "initial", "pattern")}
        return {"names": list(self.names), **settings, "scores": "wanda" if self.norms else "magnitude"}


class Masks:
    """The masks of a run: what is zero in the parameters, and has to stay so.

    Args:
        pruning: the schedule.
        params: views of the parameters, by name, which `apply` changes.
        threads: for kernels.

    Raises:
        ModelError: a weight does not train, is no matrix that the blocks tile, or its norms do not fit.
    """

    def __init__(self, pruning: GradualPruning, params: Mapping[str, Array], threads: int) -> None:
        self.pruning, self.threads = pruning, threads
        self.pattern = Pattern.named(pruning.pattern)
        for name in pruning.names:
            if name not in params:
                raise ModelError(f"cannot prune '{name}': it does not train; what trains is {sorted(params)}")
            shape = params[name].shape
            misfit = f"its shape {shape} is no matrix" if len(shape) != 2 else self.pattern.misfit(shape)
            if misfit is not None:
                raise ModelError(f"cannot prune '{name}': {misfit}")
            norms = pruning.norms.get(name)
            if norms is not None and norms.shape != shape[1:]:
                raise ModelError(f"norms of '{name}' have shape {norms.shape}, it has {shape[1]} inputs")
        self.weights = {name: params[name] for name in pruning.names}
        self.kept = {name: (scores(each, self.pattern) != 0).astype(np.uint8) for name, each in self.weights.items()}

    def apply(self, step: int) -> None:
        """Keep what is pruned at zero and, where an event is due after this step, prune more."""
        due = self.pruning.begin <= step <= self.pruning.end and (
            (step - self.pruning.begin) % self.pruning.every == 0 or step == self.pruning.end
        )
        for name, weight in self.weights.items():
            self._clear(name, weight)
            if due:
                found = scores(weight, self.pattern, self.pruning.norms.get(name), self.threads)
                self.kept[name] = mask_of(found, self.pruning.sparsity(step), self.threads)
                self._clear(name, weight)

    def _clear(self, name: str, weight: Array) -> None:
        _core.apply_mask(weight, self.kept[name], self.pattern.block, self.threads)
