"""Memory: buffers with lifetimes, packed into one allocation."""

import os
import re
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from gristmill.errors import BudgetError, ModelError
from gristmill.tensor.parts import Array

ALIGN = 64
FOREVER = 1 << 60
UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "kB": 10**3, "MB": 10**6, "GB": 10**9}


class Buffer:
    """A value's place: a view of an array that exists, or a slice of the arena that is placed when its lifetime is known."""

    __slots__ = ("_array", "base", "dtype", "first", "last", "offset", "shape")

    def __init__(self, shape: Sequence[int], dtype: Any, array: Array | None = None, base: "Buffer | None" = None) -> None:
        self.shape = tuple(shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._array = array
        self.base = base  # what this is another shape of
        self.first, self.last = FOREVER, -1
        self.offset = 0

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def external(self) -> bool:
        return self.root._array is not None

    @property
    def root(self) -> "Buffer":
        return self if self.base is None else self.base.root

    def reshape(self, *shape: int) -> "Buffer":
        return self if tuple(shape) == self.shape else Buffer(shape, self.dtype, base=self)

    def touch(self, step: int) -> None:
        """Extend the lifetime to a step."""
        root = self.root
        root.first, root.last = min(root.first, step), max(root.last, step)

    def view(self, arena: Array) -> Array:
        """The array itself."""
        root = self.root
        array = root._array
        if array is None:
            array = arena[root.offset : root.offset + root.nbytes].view(self.dtype)
        return array.reshape(self.shape)


def place(buffers: Sequence[Buffer]) -> int:
    """Give every buffer an offset so that none overlaps another that lives at the same time; return the bytes needed.

    Largest first, each at the lowest free offset (greedy by size; Pisarchyk & Lee 2020).
    """
    placed: list[Buffer] = []
    total = 0
    for buffer in sorted(buffers, key=lambda b: (-b.nbytes, b.first)):
        neighbours = sorted((b for b in placed if b.first <= buffer.last and buffer.first <= b.last), key=lambda b: b.offset)
        offset = 0
        for other in neighbours:
            if offset + buffer.nbytes <= other.offset:
                break
            offset = max(offset, aligned(other.offset + other.nbytes))
        buffer.offset = offset
        placed.append(buffer)
        total = max(total, offset + aligned(buffer.nbytes))
    return total


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


class Memory:
    """An allocator that counts: what is in use, the most that ever was, and a limit that it refuses to pass.

    Args:
        limit: bytes, or None for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.used = self.peak = 0
        self._lock = threading.Lock()

    def charge(self, nbytes: int) -> None:
        """Count memory that somebody else allocates.

        Raises:
            BudgetError: it would pass the limit.
        """
        with self._lock:
            needed = self.used + nbytes
            if self.limit is not None and needed > self.limit:
                raise BudgetError(f"{needed:,} bytes are needed, the budget is {self.limit:,}", needed)
            self.used = needed
            self.peak = max(self.peak, needed)

    def release(self, nbytes: int) -> None:
        """Count memory that is free again."""
        with self._lock:
            self.used -= nbytes

    def allocate(self, nbytes: int) -> Array:
        """Return a cache-line-aligned uint8 array; the caller releases its nbytes when done with it."""
        self.charge(nbytes)
        return allocate(nbytes)


@cache
def machine_memory() -> int:
    """Return the bytes of memory that this machine has; a number beyond all use where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # no such call on this system
        return FOREVER


def allocate(nbytes: int) -> Array:
    """Return a cache-line-aligned uint8 array that nobody counts."""
    raw = np.empty(nbytes + ALIGN, np.uint8)
    skip = -raw.ctypes.data % ALIGN
    return raw[skip : skip + nbytes]


def parse_bytes(memory: int | str) -> int:
    """Return a number of bytes from 4194304, "4MiB" or "4 MB".

    Raises:
        ModelError: it is no positive amount of bytes.

    Example:
        >>> parse_bytes("4MiB")
        4194304
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(memory))
    if not match or match[2] not in UNITS or float(match[1]) <= 0:
        raise ModelError(f"memory must be bytes or a text such as '4MiB' or '512 KiB', got {memory!r}")
    return int(float(match[1]) * UNITS[match[2]])
