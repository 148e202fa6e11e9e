"""The physical limits of one core of this machine, measured in the run that quotes them."""

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from gristmill.bench.machine import cpu_field
from gristmill.errors import GristmillError

ROW = 384  # as in limits.c
ELEMENTWISE = ("exp", "gelu", "norm", "quantize")


class LimitUnknown(GristmillError):
    """This machine cannot measure a limit: no such instruction, or no C compiler."""


@cache
def library() -> ctypes.CDLL:
    """Build limits.c into a temporary shared object and load it."""
    source = Path(__file__).with_name("limits.c")
    with tempfile.TemporaryDirectory(prefix="gristmill-limits-") as folder:
        target = Path(folder) / "limits.so"
        try:
            subprocess.run(["cc", "-O3", "-shared", "-fPIC", "-o", str(target), str(source)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise LimitUnknown(f"measuring the limits of this machine needs a C compiler for x86: {error}") from error
        lib = ctypes.CDLL(str(target))  # stays mapped when the file is gone
    lib.fma_avx512.restype = lib.fma_avx2.restype = lib.bf16_avx512.restype = lib.exp_avx512.restype = ctypes.c_float
    return lib


@cache
def cpu_flags() -> frozenset[str]:
    return frozenset(cpu_field("flags").split())


def fastest(call: Callable[[], object], repeats: int = 7) -> float:
    """Return the shortest time of several calls, in seconds."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def peak(limit: str) -> float:
    """Return operations per second ("fma", "bf16", "vnni"), bytes per second ("dram": eight reads and one streaming write), or
    elements per second ("exp", "gelu", "norm", "quantize") of one core.
    """
    if limit == "dram":
        return stream_bandwidth(8, 8_000_000)
    if limit in ELEMENTWISE:
        need("avx512f")
        row, rounds = np.linspace(-3, 3, 3 * ROW, dtype=np.float32), ctypes.c_int64(20_000)
        run = getattr(library(), f"{limit}_avx512")
        return ROW * rounds.value / fastest(lambda: run(rounds, ctypes.c_void_p(row.ctypes.data)))
    if limit not in ("fma", "bf16", "vnni"):
        raise ValueError(f"unknown limit {limit!r}")
    lib, rounds = library(), ctypes.c_int64(400_000)
    run, multiplications, unroll = {
        "fma": (lib.fma_avx512, 16, 24) if "avx512f" in cpu_flags() else (lib.fma_avx2, 8, 12),
        "bf16": (lib.bf16_avx512, 32, 24),
        "vnni": (lib.vnni_avx512, 64, 24),
    }[limit]
    need({"fma": "fma", "bf16": "avx512_bf16", "vnni": "avx512_vnni"}[limit])
    return 2.0 * multiplications * unroll * rounds.value / fastest(lambda: run(rounds))


def need(flag: str) -> None:
    if flag not in cpu_flags():
        raise LimitUnknown(f"this CPU has no {flag} to take a limit from")


def stream_bandwidth(count: int, length: int) -> float:
    """Return bytes per second of reading `count` float streams and writing one with non-temporal stores."""
    lib = library()
    run = lib.stream_avx512 if "avx512f" in cpu_flags() else lib.stream_avx2
    streams = [np.ones(length, np.float32) for _ in range(count)]
    out = np.empty(length + 16, np.float32)
    aligned = out.ctypes.data + (-out.ctypes.data) % 64
    pointers = (ctypes.c_void_p * count)(*[s.ctypes.data for s in streams])
    return 4.0 * length * (count + 1) / fastest(lambda: run(pointers, count, ctypes.c_int64(length), ctypes.c_void_p(aligned)), 5)
