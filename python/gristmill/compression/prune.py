"""Pruning by element, by block or N of M: what is pruned is not stored, and the kernel does not compute it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from gristmill import _core
from gristmill.compression.calibration import batches, norms
from gristmill.compression.recipe import Context, Pass, is_number, literal, need_float, targets
from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.tensor import Bitmask, Dense, Sparse, Tensor
from gristmill.tensor.parts import Array
from gristmill.tensor.selection import Pattern, dropped, mask_of, mask_of_groups, mask_of_rows, masks_of, scores

Shares = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Prune(Pass):
    """Drop the weights that matter least, one by one or in blocks.

    "magnitude" ranks blocks by the sum of their squares (Han et al. 2015; in blocks Gray et al. 2017). "wanda" multiplies each
    weight by the L2 norm of its input over calibration data before (Sun et al. 2023), and compares within each row of blocks. All
    norms are taken from the model as it comes; padding tokens do not count where an attention mask tells them.

    Args:
        sparsity: share of the weights to drop, in (0, 1), or a mapping of shell patterns of names to shares: the first that
            matches counts, and weights that none matches stay. N:M drops 1 - N/M and needs none.
        pattern: "1x4" (one output, four neighbouring inputs), "2x4", "4x4" (fast in int8 and float32, the larger the faster),
            "unstructured", or "N:M" such as "2:4", which keeps the N best of M neighbouring inputs.
        scope: what is ranked together: "layer" each weight, "row" each row of blocks, "global" all weights, which can all but
            empty a small last layer. Default: "layer" for magnitude, "row" for Wanda. N:M has its own groups.
        names: shell patterns of the weights to prune; none for all.
        skip: shell patterns of weights to leave.
        method: "magnitude" or "wanda".
        calibration: for Wanda: "data" (the default) for the data that `compress` is given, an array for a model of one input, a
            mapping of inputs, or an iterable of such batches.

    A weight that cannot take the pattern or the share is an error where `names` or a mapping chose it, else it stays dense, as
    does one that would not get smaller. `left_out` tells which and why.

    Raises:
        ModelError: an option lies outside its range; a weight cannot be pruned, or is not finite.
        DataError: calibration data are missing or do not fit.

    Example:
        >>> import gristmill as gm
        >>> model, _ = gm.compress(gm.zoo.mlp([64, 32]), [gm.Prune(0.75, pattern="1x4")])
        >>> model.tensors["layer0.weight"].sparsity
        0.75
    """

    sparsity: float | dict[str, float] | Shares | None = None
    pattern: str = "1x4"
    scope: str | None = None
    names: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    method: str = "magnitude"
    calibration: Any = None

    def __post_init__(self) -> None:
        try:
            pattern = Pattern.named(self.pattern)
        except ModelError as error:
            raise ModelError(f"Prune: {error}") from None
        if self.scope not in (None, "global", "layer", "row"):
            raise ModelError(f"Prune: unknown scope {self.scope!r}; choose layer, row or global")
        if self.method not in ("magnitude", "wanda"):
            raise ModelError(f"Prune: unknown method {self.method!r}; choose magnitude or wanda")
        if self.calibration is not None and self.method != "wanda":
            raise ModelError("Prune: calibration is for method='wanda'; magnitudes need no data")
        if isinstance(self.sparsity, (Mapping, list)):
            pairs = self.sparsity.items() if isinstance(self.sparsity, Mapping) else map(tuple, self.sparsity)
            object.__setattr__(self, "sparsity", tuple(pairs))
        self._check_sparsity(pattern)

    def _check_sparsity(self, pattern: Pattern) -> None:
        pairs = self._pairs
        if not pairs or not all(len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            raise ModelError(f"Prune: sparsity must be a number or map patterns of names to numbers, got {self.sparsity!r}")
        for _, share in pairs:
            if pattern.sparsity is not None:
                if share is not None and not (is_number(share) and abs(share - pattern.sparsity) < 1e-6):
                    raise ModelError(f"Prune: {self.pattern} drops the share {pattern.sparsity:.4g}, got sparsity={share!r}")
            elif not (is_number(share) and 0 < share < 1):
                raise ModelError(f"Prune: sparsity must lie in (0, 1), got {share!r}")
        if self.scope is not None and pattern.of:
            raise ModelError(f"Prune: {self.pattern} ranks groups of {pattern.of}; leave scope out")
        if self.scope == "global" and len(pairs) > 1:
            raise ModelError("Prune: scope='global' ranks all weights together and takes one sparsity")

    @property
    def _pairs(self) -> tuple[tuple[str, Any], ...]:
        return self.sparsity if isinstance(self.sparsity, tuple) else (("*", self.sparsity),)

    @property
    def _by_rows(self) -> bool:
        return self.scope == "row" or (self.scope is None and self.method == "wanda")

    @property
    def local(self) -> bool:
        """Whether what becomes of a weight depends on that weight alone."""
        return self.scope != "global" and self.method == "magnitude"

    def works_on(self, model: Model) -> list[str]:
        """Return the names of the weights that are pruned.

        Raises:
            ModelError: there are none, or one that was named cannot be pruned.
        """
        return list(self._plan(model)[0])

    def left_out(self, model: Model) -> dict[str, str]:
        return self._plan(model)[1]

    def restricted(self, name: str) -> "Prune":
        """Return the same pass for one weight."""
        return replace(self, sparsity=self._share(name), names=(literal(name),), skip=())

    def apply(self, model: Model, context: Context) -> Model:
        shares, _ = self._plan(model)
        for name in shares:
            need_finite(model, name, "prune")
        inputs: dict[str, Array] = {}
        if self.method == "wanda":
            given = "data" if self.calibration is None else self.calibration
            inputs = norms(model, shares, batches(model, given, context, "Prune"), context.threads, "Prune")
        pattern = Pattern.named(self.pattern)

        def scored(name: str) -> Array:
            return scores(model.tensors[name].dense(), pattern, inputs.get(name), context.threads)

        if self.scope == "global":
            masks = masks_of([scored(name) for name in shares], next(iter(shares.values())), context.threads)
            for name, mask in zip(shares, masks, strict=True):
                if not mask.any():
                    raise ModelError(f"Prune: nothing would be left of '{name}' {mask.shape}; use scope='layer', or skip it")
            chosen = dict(zip(shares, masks, strict=True))
            return model.replace(tensors={name: smaller(model.tensors[name], chosen[name], pattern.block) for name in shares})
        pruned: dict[str, Tensor] = {}
        for name, share in shares.items():
            mask = self._mask(scored(name), share, pattern, context.threads)
            pruned[name] = smaller(model.tensors[name], mask, pattern.block)
        return model.replace(tensors=pruned)

    def _mask(self, found: Array, share: float, pattern: Pattern, threads: int) -> Array:
        if pattern.of:
            return mask_of_groups(found, pattern, threads)
        return mask_of_rows(found, share, threads) if self._by_rows else mask_of(found, share, threads)

    def _share(self, name: str) -> float | None:
        """The share to drop of a weight; None where no pattern matches it."""
        for pattern, share in self._pairs:
            if fnmatchcase(name, pattern):
                return Pattern.named(self.pattern).sparsity if share is None else float(share)
        return None

    def _plan(self, model: Model) -> tuple[dict[str, float], dict[str, str]]:
        """Return what to drop of which weights, and which are left out why.

        Raises:
            ModelError: nothing can be pruned, or a weight that was named cannot.
        """
        mapped = isinstance(self.sparsity, tuple)
        if isinstance(self.sparsity, tuple):
            targets(model, [pattern for pattern, _ in self.sparsity], ())
        shares: dict[str, float] = {}
        left: dict[str, str] = {}
        for name in targets(model, self.names, self.skip):
            share = self._share(name)
            if share is None:
                continue
            need_float(model, name, "prune")
            reason = self._misfit(model, name, share)
            if reason is None:
                shares[name] = share
            elif mapped or self.names:
                raise ModelError(f"Prune: '{name}' cannot be pruned: {reason}; choose another pattern or sparsity, or skip it")
            else:
                left[name] = reason
        if not shares:
            raise ModelError(f"Prune: no weight can be pruned: {left or 'no pattern of names matches'}")
        return shares, left

    def _misfit(self, model: Model, name: str, share: float) -> str | None:
        pattern, shape = Pattern.named(self.pattern), model.tensors[name].shape
        others = sorted(
            {node.op for node in model.nodes if name in node.inputs and (node.op != "Linear" or node.inputs[1] != name)}
        )
        if others:
            return f"it is also read by {', '.join(others)}"
        if pattern.misfit(shape) is not None or pattern.of or self.scope == "global":
            return pattern.misfit(shape)
        rows, columns = pattern.grid(shape)
        blocks, where = (columns, "each row") if self._by_rows else (rows * columns, "its shape")
        if dropped(share, blocks) in (0, blocks):
            what = "none" if dropped(share, blocks) == 0 else "all"
            return f"{share:g} of the {blocks} blocks of {self.pattern} in {where} {shape} is {what} of them"
        return None


def need_finite(model: Model, name: str, what: str) -> None:
    """Raise unless all values of a weight are finite.

    Raises:
        ModelError: names it, and the place of the first that is not.
    """
    values = model.tensors[name].trainable
    if not _core.sum_of_squares(np.ascontiguousarray(values, np.float32).reshape(-1))[1]:
        dense = model.tensors[name].dense()
        where = [int(axis[0]) for axis in np.nonzero(~np.isfinite(dense))]
        raise ModelError(
            f"cannot {what} '{name}': element {where} of {dense.shape} is {dense[tuple(where)]}, not a finite number"
        )


def smaller(tensor: Tensor, mask: Array, block: tuple[int, int]) -> Tensor:
    """Return the pruned matrix in whichever form takes fewer bytes."""
    weight = tensor.dense()
    sparse = Bitmask.from_dense(weight, mask) if block == (1, 1) else Sparse.from_dense(weight, mask, block)
    return sparse if sparse.nbytes < weight.nbytes else Dense(sparse.dense())
