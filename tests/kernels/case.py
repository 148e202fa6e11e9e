"""What a kernel case is: one row that tests and benchmarks share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gristmill import _core

Arrays = dict[str, Any]  # arrays by name; scalars and options may travel along
Size = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """What one call must do at least, for the percentage of the physical limit."""

    operations: float = 0.0  # multiplications and additions
    bytes: float = 0.0  # DRAM traffic: each operand once
    limit: str = "dram"  # which limit binds: "fma" (fp32), "vnni" (int8) or "dram"


@dataclass(frozen=True)
class Case:
    """One kernel through the border, with its oracle.

    `run` must write only the arrays that `outputs` declares (the harness allocates them, misaligned, between guard bytes) and
    must leave `inputs` unchanged. `compare` is "exact" (bit-equal to the scalar variant, and within `bound` of the oracle) or
    "bounded" (within `bound` of the oracle, which computes in float64).
    """

    name: str
    slots: tuple[str, ...]  # the table slots that this case exercises
    sizes: tuple[Size, ...]  # include 0, 1, vector - 1, vector, vector + 1, and rows that are no multiple
    inputs: Callable[[np.random.Generator, Size], Arrays]
    outputs: Callable[[Arrays], Mapping[str, tuple[tuple[int, ...], Any]]]  # name -> (shape, dtype)
    run: Callable[[Arrays, Arrays, int], None]  # (inputs, outputs, threads)
    oracle: Callable[[Arrays], Arrays]  # NumPy, in float64 where the result is a float
    bound: Callable[[Arrays, Arrays], Arrays]  # (inputs, oracle's outputs) -> largest allowed |difference| by output
    compare: str = "exact"
    bind: Callable[[Arrays, Arrays], _core.Program] | None = None  # (inputs, outputs): `run` without packing, for benchmarks
    bench: tuple[Size, ...] = ()
    work: Callable[[Size], Work] | None = None
