"""How the data are split: an epoch into batches, a batch into slices, the slices among workers.

The split depends on the seed, the batch size and the number of slices alone. Who computes a slice is a lease: it may move to
another worker without changing a bit of the result.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gristmill.tensor.parts import Array


class Lease(NamedTuple):
    """Examples start..stop of the epoch's order, whose gradient belongs into gradient slot `slot`."""

    slot: int
    start: int
    stop: int


def shuffle(order: Array, seed: int, epoch: int) -> None:
    """Write the order in which an epoch visits the examples, keyed by (seed, epoch)."""
    order[:] = np.arange(len(order))
    np.random.default_rng((seed, epoch)).shuffle(order)


def steps_per_epoch(examples: int, batch_size: int) -> int:
    return -(-examples // batch_size)


def cut(examples: int, batch_size: int, batch: int, slices: int) -> list[Lease]:
    """Return the leases of a batch: at most `slices` of them, none empty, their sizes equal or one apart.

    Example:
        >>> cut(examples=10, batch_size=8, batch=0, slices=3)
        [Lease(slot=0, start=0, stop=2), Lease(slot=1, start=2, stop=5), Lease(slot=2, start=5, stop=8)]
    """
    first = batch * batch_size
    count = min(batch_size, examples - first)
    edges = [first + count * i // slices for i in range(slices + 1)]
    return [Lease(slot, edges[slot], edges[slot + 1]) for slot in range(slices) if edges[slot] < edges[slot + 1]]


def share(leases: Sequence[Lease], members: Sequence[int]) -> dict[int, list[Lease]]:
    """Split leases evenly among members, in order; members may get none."""
    count = len(members)
    shares = {m: list(leases[len(leases) * i // count : len(leases) * (i + 1) // count]) for i, m in enumerate(members)}
    return {member: part for member, part in shares.items() if part}
