"""The arrays that the coordinator and its workers share, and the memory under them.

One block holds everything: parameters, one gradient slot for each slice, the epoch's order and the data. For processes it is
an anonymous file (memfd, or an unlinked temporary file) that workers inherit by descriptor: it has no name, so nothing can be
left behind.
"""

import errno
import mmap
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from gristmill.errors import BudgetError
from gristmill.runtime.arena import Memory, aligned
from gristmill.tensor.parts import Array

Kind = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


@dataclass(frozen=True)
class Arena:
    """What all members see.

    Args:
        params: float32 [size], written by the coordinator alone.
        slots: the gradient of each slice, float32 [size], written by whoever holds its lease.
        order: int64 [examples], or [0] where examples are visited in their own order; written by the coordinator alone.
        data: the examples, by name.
    """

    params: Array
    slots: list[Array]
    order: Array
    data: dict[str, Array]


@dataclass(frozen=True)
class Sizes:
    """What the layout of an Arena depends on."""

    params: int
    slices: int
    order: int
    data: tuple[Kind, ...]

    def kinds(self) -> list[Kind]:
        flat = [(f"slot {i}", "<f4", (self.params,)) for i in range(self.slices)]
        return [("params", "<f4", (self.params,)), *flat, ("order", "<i8", (self.order,)), *self.data]

    @property
    def nbytes(self) -> int:
        return sum(aligned(prod(shape) * np.dtype(dtype).itemsize) for _, dtype, shape in self.kinds())

    def as_dict(self) -> dict[str, Any]:
        return {"params": self.params, "slices": self.slices, "order": self.order, "data": self.data}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Sizes":
        data = tuple((name, dtype, tuple(shape)) for name, dtype, shape in fields["data"])
        return cls(fields["params"], fields["slices"], fields["order"], data)


def carve(sizes: Sizes, block: Any) -> Arena:
    """Return the arrays of an Arena as views of a writable block of bytes."""
    raw = np.frombuffer(block, np.uint8)
    arrays: list[Array] = []
    offset = 0
    for _, dtype, shape in sizes.kinds():
        nbytes = prod(shape) * np.dtype(dtype).itemsize
        arrays.append(raw[offset : offset + nbytes].view(dtype).reshape(shape))
        offset += aligned(nbytes)
    params, slots, rest = arrays[0], arrays[1 : sizes.slices + 1], arrays[sizes.slices + 1 :]
    return Arena(params, slots, rest[0], {name: array for (name, _, _), array in zip(sizes.data, rest[1:], strict=True)})


def private(sizes: Sizes, data: Mapping[str, Array]) -> Arena:
    """Return an Arena of this process alone, over the caller's own data."""
    bare = Sizes(sizes.params, sizes.slices, sizes.order, ())
    block = Memory().allocate(bare.nbytes)
    block[:] = 0
    arena = carve(bare, block)
    return Arena(arena.params, arena.slots, arena.order, dict(data))


def anonymous_file(nbytes: int) -> int:
    """Return a descriptor of a file without a name, its space reserved, so that no write can fail later.

    Raises:
        BudgetError: there is not enough room.
    """
    try:
        descriptor = os.memfd_create("gristmill", os.MFD_CLOEXEC)
        place = "memory"
    except (AttributeError, OSError):
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
        place = tempfile.gettempdir()
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, nbytes)
        else:
            os.truncate(descriptor, nbytes)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG):
            raise
        raise BudgetError(f"{place} has no room for {nbytes:,} bytes of parameters, gradients and data", nbytes) from error
    return descriptor


def map_file(descriptor: int, nbytes: int) -> mmap.mmap:
    return mmap.mmap(descriptor, nbytes)
