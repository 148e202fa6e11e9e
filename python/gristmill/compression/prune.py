"""Magnitude pruning, by element or by block: what is pruned is not stored, and the kernel does not compute it."""

from dataclasses import dataclass

import numpy as np

from gristmill import _core
from gristmill.compression.recipe import Context, Pass, is_number, need_float, targets
from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.tensor import Bitmask, Dense, Sparse, Tensor
from gristmill.tensor.parts import Array

PATTERNS = {"unstructured": (1, 1), "1x4": (1, 4)}


@dataclass(frozen=True)
class Prune(Pass):
    """Drop the share `sparsity` of the blocks with the least sum of squares (Han et al. 2015; in blocks Gray et al. 2017).

    Args:
        sparsity: share of the weights to drop, in (0, 1).
        pattern: "1x4" (one output, four neighbouring inputs: fast in int8 and float32) or "unstructured".
        scope: "layer" prunes each weight to the same share, "global" ranks the blocks of all weights together, which can all but
            empty a small last layer.
        names: shell patterns of the weights to prune; none for all.
        skip: shell patterns of weights to leave.

    A weight that would not get smaller, or whose inputs are no multiple of four, stays dense.

    Raises:
        ModelError: an option lies outside its range.

    Example:
        >>> import gristmill as gm
        >>> model, _ = gm.compress(gm.zoo.mlp([64, 32]), [gm.Prune(0.75, pattern="1x4")])
        >>> model.tensors["layer0.weight"].sparsity
        0.75
    """

    sparsity: float
    pattern: str = "1x4"
    scope: str = "layer"
    names: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (is_number(self.sparsity) and 0 < self.sparsity < 1):
            raise ModelError(f"Prune: sparsity must lie in (0, 1), got {self.sparsity!r}")
        if self.pattern not in PATTERNS:
            raise ModelError(f"Prune: unknown pattern {self.pattern!r}; choose one of {', '.join(PATTERNS)}")
        if self.scope not in ("global", "layer"):
            raise ModelError(f"Prune: unknown scope {self.scope!r}; choose global or layer")

    def apply(self, model: Model, context: Context) -> Model:
        block = PATTERNS[self.pattern]
        names = [name for name in targets(model, self.names, self.skip) if self._fits(model, name, block)]
        if not names:
            raise ModelError(f"no weight has a shape that {self.pattern} blocks tile")
        scores = {name: block_scores(model.tensors[name].dense(), block, context.threads) for name in names}
        masks = self._masks(scores, context.threads)
        pruned: dict[str, Tensor] = {name: smaller(model.tensors[name].dense(), masks[name], block) for name in names}
        return model.replace(tensors=pruned)

    def _fits(self, model: Model, name: str, block: tuple[int, int]) -> bool:
        need_float(model, name, "prune")
        n, k = model.tensors[name].shape
        return n % block[0] == 0 and k % block[1] == 0

    def _masks(self, scores: dict[str, Array], threads: int) -> dict[str, Array]:
        groups = [list(scores)] if self.scope == "global" else [[name] for name in scores]
        masks: dict[str, Array] = {}
        for group in groups:
            flat = np.concatenate([scores[name].reshape(-1) for name in group])
            mask = np.empty(flat.size, np.uint8)
            _core.magnitude_mask(flat, round(self.sparsity * flat.size), mask, threads)
            ends = np.cumsum([scores[name].size for name in group])
            for name, part in zip(group, np.split(mask, ends[:-1]), strict=True):
                masks[name] = part.reshape(scores[name].shape)
        return masks


def block_scores(weight: Array, block: tuple[int, int], threads: int) -> Array:
    """Return the sum of squares of each block of an [n, k] matrix."""
    n, k = weight.shape
    scores = np.empty((n // block[0], k // block[1]), np.float32)
    _core.block_magnitudes(np.ascontiguousarray(weight, np.float32), block, scores, threads)
    return scores


def smaller(weight: Array, mask: Array, block: tuple[int, int]) -> Tensor:
    """Return the pruned matrix in whichever form takes fewer bytes."""
    sparse = Bitmask.from_dense(weight, mask) if block == (1, 1) else Sparse.from_dense(weight, mask, block)
    return sparse if sparse.nbytes < weight.nbytes else Dense(sparse.dense())
