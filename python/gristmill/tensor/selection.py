"""Which blocks of a matrix pruning keeps: patterns, scores of blocks, and masks of the best of them.

A mask is uint8, one entry for each block: 1 keeps it. Of equal scores that of the lowest index goes first. Magnitude: Han et al.
2015; in blocks: Gray et al. 2017; Wanda, |weight| times the norm of its input: Sun et al. 2023; N of M: Mishra et al. 2021.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gristmill import _core
from gristmill.errors import ModelError
from gristmill.tensor.parts import Array

BLOCKS = {"unstructured": (1, 1), "1x4": (1, 4), "2x4": (2, 4), "4x4": (4, 4)}
LARGEST_GROUP = 64  # of N:M


@dataclass(frozen=True)
class Pattern:
    """What is dropped together.

    Args:
        name: "unstructured", "1x4", "2x4", "4x4", or "N:M" such as "2:4".
        block: rows (outputs) and columns (inputs) of a block.
        keep, of: for N:M the numbers that are kept of each group of neighbouring inputs; else 0.

    Example:
        >>> Pattern.named("2:4").sparsity
        0.5
        >>> Pattern.named("4x4").misfit((10, 64))
        'blocks of 4x4 do not tile its shape (10, 64)'
    """

    name: str
    block: tuple[int, int] = (1, 1)
    keep: int = 0
    of: int = 0

    @classmethod
    def named(cls, name: str) -> "Pattern":
        """Return a pattern.

        Raises:
            ModelError: there is none of that name.
        """
        if name in BLOCKS:
            return cls(name, BLOCKS[name])
        found = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", name) if isinstance(name, str) else None
        keep, of = map(int, found.groups()) if found else (0, 0)
        if not 0 < keep < of <= LARGEST_GROUP:
            raise ModelError(
                f"unknown pattern {name!r}; choose one of {', '.join(BLOCKS)}, or N:M such as 2:4, N below M and M at most "
                f"{LARGEST_GROUP}"
            )
        return cls(name, (1, 1), keep, of)

    @property
    def sparsity(self) -> float | None:
        """The share that N:M drops; None for patterns that drop any."""
        return 1 - self.keep / self.of if self.of else None

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Say why a matrix of this shape cannot have the pattern; None where it can."""
        if self.of:
            return f"groups of {self.of} do not divide the {shape[1]} inputs of its shape {shape}" if shape[1] % self.of else None
        tiles = not (shape[0] % self.block[0] or shape[1] % self.block[1])
        return None if tiles else f"blocks of {self.name} do not tile its shape {shape}"

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many blocks a matrix has along each axis."""
        return shape[0] // self.block[0], shape[1] // self.block[1]


def scores(weight: Array, pattern: Pattern, norms: Array | None = None, threads: int = 1) -> Array:
    """Return what blocks are ranked by, in float32 of any sign: of an element its magnitude, of a block the sum of its squares.

    Args:
        weight: float32 [n, k].
        pattern: whose blocks tile it.
        norms: float32 [k], the norm of each input over calibration data, for Wanda; None for magnitudes alone.
        threads: for kernels.

    Returns:
        [n / rows, k / columns]; where elements are ranked by magnitude, the weight itself.
    """
    weight = np.ascontiguousarray(weight, np.float32)
    if pattern.block == (1, 1) and norms is None:
        return weight
    found = np.empty(pattern.grid(weight.shape), np.float32)
    if pattern.block == (1, 1):
        _core.channel_magnitudes(weight, np.ascontiguousarray(norms, np.float32), found, threads)
    else:
        _core.block_magnitudes(
            weight, pattern.block, found, threads, None if norms is None else np.ascontiguousarray(norms, np.float32)
        )
    return found


def dropped(sparsity: float, blocks: int) -> int:
    """How many of so many blocks go."""
    return round(sparsity * blocks)


def mask_of(found: Array, sparsity: float, threads: int = 1) -> Array:
    """Return the mask of one matrix of scores that drops the lowest share of all.

    Raises:
        ValueError: a score is NaN; this holds for all masks.

    Example:
        >>> mask_of(np.array([[1, -4], [3, 2]], np.float32), 0.5).tolist()
        [[0, 1], [1, 0]]
    """
    return masks_of([found], sparsity, threads)[0]


def masks_of(found: Sequence[Array], sparsity: float, threads: int = 1) -> list[Array]:
    """Return the masks of matrices of scores that are ranked together. Two passes over memory; nothing is copied or sorted."""
    masks = [np.empty(each.shape, np.uint8) for each in found]
    drop = dropped(sparsity, sum(each.size for each in found))
    _core.magnitude_mask([each.reshape(-1) for each in found], drop, [mask.reshape(-1) for mask in masks], threads)
    return masks


def mask_of_rows(found: Array, sparsity: float, threads: int = 1) -> Array:
    """Return the mask that drops the lowest share of every row of scores, as Wanda compares them."""
    mask = np.empty(found.shape, np.uint8)
    _core.magnitude_mask_rows(found, dropped(sparsity, found.shape[1]), mask, threads)
    return mask


def mask_of_groups(found: Array, pattern: Pattern, threads: int = 1) -> Array:
    """Return the mask that keeps the N highest scores of each M neighbours in a row.

    Example:
        >>> mask_of_groups(np.array([[1, -4, 3, 2]], np.float32), Pattern.named("2:4")).tolist()
        [[0, 1, 1, 0]]
    """
    mask = np.empty(found.shape, np.uint8)
    _core.n_of_m_mask(found, pattern.keep, pattern.of, mask, threads)
    return mask
