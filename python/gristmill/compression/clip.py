"""Weight clipping: bound the largest weights, so that a few outliers do not set the scale of all the others."""

from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from gristmill import _core
from gristmill.compression.calibration import batches, second_moments
from gristmill.compression.prune import need_finite
from gristmill.compression.recipe import Context, Pass, is_number, need_float, targets
from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

ATTENTION = ("MaskedAttention", "PackedAttention", "Attention")
MOST_CANDIDATES = 100


@dataclass(frozen=True)
class Clip(Pass):
    """Clip the weights of Linear nodes to [-bound, bound].

    The bound is a value; or a percentile of each weight's magnitudes; or, with calibration data, for each row (output channel),
    or each group of a row, the share of its peak with which the layer, quantised to `bits`, errs least on its inputs. That share
    is one of `candidates` from 50 to 100 %, as in AWQ (Lin et al. 2023). The error is that over all calibration data, for it
    follows from the second moments of the inputs.

    The search leaves projections to queries and keys as they are unless `names` chooses them: their product decides what is
    attended to, which the error of either alone does not tell.

    Args:
        value: the bound itself; or
        percentile: the bound of each weight is this percentile of its magnitudes (default 99.9); or
        calibration: search on these data: "data" for what `compress` is given, an array for a model of one input, a mapping of
            inputs, or an iterable of such batches.
        names: shell patterns of the weights to clip; none for all.
        skip: shell patterns of weights to leave.
        bits: of what the layer will be quantised to, 2 to 8, for the search.
        group: neighbouring inputs that will have a scale of their own, such as 32; None for one scale per row.
        candidates: how many shares the search tries, 2 to 100.

    Raises:
        ModelError: more than one of value, percentile and calibration are given, or an option lies outside its range.
        DataError: calibration data are missing or do not fit.

    Example:
        >>> import gristmill as gm
        >>> model, _ = gm.compress(gm.zoo.mlp([4, 3]), [gm.Clip(value=0.5)])
        >>> bool(abs(model.tensors["layer0.weight"].dense()).max() <= 0.5)
        True
    """

    value: float | None = None
    percentile: float | None = None
    names: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    calibration: Any = None
    bits: int = 8
    group: int | None = None
    candidates: int = 20

    def __post_init__(self) -> None:
        if sum(setting is not None for setting in (self.value, self.percentile, self.calibration)) > 1:
            raise ModelError("Clip takes a value, a percentile or calibration data, not several of them")
        if self.value is not None and not (is_number(self.value) and self.value > 0):
            raise ModelError(f"Clip: value must be positive, got {self.value!r}")
        if self.percentile is not None and not (is_number(self.percentile) and 0 < self.percentile <= 100):
            raise ModelError(f"Clip: percentile must lie in (0, 100], got {self.percentile!r}")
        for name, low, high in (("bits", 2, 8), ("candidates", 2, MOST_CANDIDATES), ("group", 1, 1 << 20)):
            setting = getattr(self, name)
            if not (isinstance(setting, int) and low <= setting <= high) and (name, setting) != ("group", None):
                raise ModelError(f"Clip: {name} must be a whole number from {low} to {high}, got {setting!r}")

    @property
    def local(self) -> bool:
        """Whether what becomes of a weight depends on that weight alone."""
        return self.calibration is None

    def apply(self, model: Model, context: Context) -> Model:
        chosen = targets(model, self.names, self.skip)
        for name in chosen:
            need_float(model, name, "clip")
            need_finite(model, name, "clip")
        if self.calibration is not None:
            return self._search(model, chosen, context)
        clipped: dict[str, Tensor] = {}
        for name in chosen:
            tensor = model.tensors[name]
            bound = np.float32(self.value if self.value is not None else self._bound(tensor.trainable, context.threads))
            clipped[name] = tensor.with_trainable(np.clip(tensor.trainable, -bound, bound))
        return model.replace(tensors=clipped)

    def _bound(self, values: Array, threads: int) -> float:
        percentile = 99.9 if self.percentile is None else self.percentile
        rank = min(max(ceil(values.size * percentile / 100), 1), values.size)
        return _core.kth_magnitude(values.reshape(-1), rank, threads) if values.size else 0.0

    def _search(self, model: Model, chosen: list[str], context: Context) -> Model:
        if not self.names:
            chosen = [name for name in chosen if name not in queries_and_keys(model)]
        for name in chosen:
            inputs = model.tensors[name].shape[1]
            if model.tensors[name].kind == "sparse":
                raise ModelError(f"Clip: '{name}' is sparse; search for its bounds before Prune")
            if self.group and inputs % self.group:
                raise ModelError(f"Clip: groups of {self.group} do not divide the {inputs} inputs of '{name}'")
        data = batches(model, self.calibration, context, "Clip")
        moments = second_moments(model, chosen, data, context.threads, "Clip", self.group)
        clipped: dict[str, Tensor] = {}
        for name in chosen:
            tensor = model.tensors[name]
            bounds = least_error_bounds(tensor.dense(), moments.pop(name), 2 ** (self.bits - 1) - 1, self.candidates)
            limit = np.repeat(bounds, tensor.shape[1] // bounds.shape[1], axis=1)
            clipped[name] = tensor.with_trainable(np.clip(tensor.dense(), -limit, limit))
        return model.replace(tensors=clipped)


def queries_and_keys(model: Model) -> set[str]:
    """Return the weights whose outputs are the queries or the keys of an attention."""
    read = {value for node in model.nodes if node.op in ATTENTION for value in node.inputs[:2]}
    return {node.inputs[1] for node in model.nodes if node.op == "Linear" and node.outputs[0] in read}


def least_error_bounds(weight: Array, moments: Array, levels: int, candidates: int) -> Array:
    """Return the bounds of each row's groups with which rounding to integers up to `levels` errs least in the output.

    With an error e of a row's group, the output's mean square error is e M e^T, M the second moment of the group's inputs. Groups
    are searched one by one, as if their errors added up.

    Args:
        weight: float32 [n, k], finite.
        moments: float32 [k / group, group, group], the means of x x^T over the inputs of each group; group = k for whole rows.
        levels: the largest code: codes are -levels to levels, the scale is bound / levels.
        candidates: shares of the peak that are tried, evenly from 50 to 100 %.

    Returns:
        float32 [n, k / group]; equal errors take the larger bound.
    """
    n, groups = len(weight), len(moments)
    by_group = weight.reshape(n, groups, -1).swapaxes(0, 1)  # [groups, n, group]
    peaks = np.abs(by_group).max(axis=2)
    least, bounds = np.full(peaks.shape, np.inf, np.float32), peaks.copy()
    for share in np.linspace(1.0, 0.5, candidates, dtype=np.float32):
        limit = share * peaks
        scale = np.maximum(limit / np.float32(levels), np.finfo(np.float32).tiny)[:, :, None]
        error = by_group - scale * np.clip(np.rint(by_group / scale), -levels, levels)
        found = np.einsum("gni,gni->gn", error @ moments, error)
        better = found < least
        least, bounds = np.where(better, found, least), np.where(better, limit, bounds)
    return bounds.T
