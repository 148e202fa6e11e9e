"""What the central server does with the slices of a batch: one gradient and one loss out of many, in a fixed binary tree."""

from collections.abc import Mapping, Sequence
from math import isfinite

import numpy as np

from gristmill import _core
from gristmill.errors import DivergedError
from gristmill.tensor.parts import Array
from gristmill.training.shards import Lease


class Aggregator:
    """Combine the means over slices into the mean (or the sum) over the batch.

    Args:
        slots: the gradient of each slice, float32 [size].
        reduction: "mean" or "sum" over the examples.
        threads: for the kernel; the result does not depend on it.
    """

    def __init__(self, slots: Sequence[Array], reduction: str, threads: int) -> None:
        self.slots, self.reduction, self.threads = slots, reduction, threads
        self.gradient = np.zeros_like(slots[0])

    def combine(self, leases: Sequence[Lease], losses: Mapping[int, float], step: int) -> tuple[float, float]:
        """Fill `gradient`; return the mean loss and the gradient's sum of squares.

        Raises:
            DivergedError: the loss or the gradient of a slice is not finite.
        """
        counts = [lease.stop - lease.start for lease in leases]
        examples = sum(counts)
        loss = tree_sum([losses[lease.slot] * (count / examples) for lease, count in zip(leases, counts, strict=True)])
        if not isfinite(loss):
            self._report(leases, losses, step)
        weights = counts if self.reduction == "sum" else [count / examples for count in counts]
        inputs = [self.slots[lease.slot] for lease in leases]
        squares, finite = _core.weighted_sum(inputs, weights, self.gradient, self.threads)
        if not finite:
            self._report(leases, losses, step)
        return loss, squares

    def _report(self, leases: Sequence[Lease], losses: Mapping[int, float], step: int) -> None:
        remedy = "the parameters are those of the last good step; try a lower learning rate or clip_norm="
        for lease in leases:
            if not isfinite(losses[lease.slot]):
                raise DivergedError(f"step {step}, slice {lease.slot}: the loss is {losses[lease.slot]}; {remedy}")
            if not np.isfinite(self.slots[lease.slot]).all():
                raise DivergedError(f"step {step}, slice {lease.slot}: the gradient is not finite; {remedy}")
        raise DivergedError(f"step {step}: the slices are finite but their {self.reduction} is not; {remedy}")


def tree_sum(values: Sequence[float]) -> float:
    """Add in the left-complete binary tree that the kernel uses."""
    if len(values) == 1:
        return values[0]
    half = 1 << (len(values) - 1).bit_length() - 1
    return tree_sum(values[:half]) + tree_sum(values[half:])
