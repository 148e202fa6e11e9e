"""The physical limits of one core of this machine, measured in the run that quotes them."""

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np


@cache
def library() -> ctypes.CDLL:
    """Build limits.c into a temporary shared object and load it."""
    source = Path(__file__).with_name("limits.c")
    with tempfile.TemporaryDirectory(prefix="gristmill-limits-") as folder:
        target = Path(folder) / "limits.so"
        subprocess.run(["cc", "-O3", "-shared", "-fPIC", "-o", str(target), str(source)], check=True)
        lib = ctypes.CDLL(str(target))  # stays mapped when the file is gone
    lib.fma_avx512.restype = lib.fma_avx2.restype = ctypes.c_float
    return lib


@cache
def cpu_flags() -> frozenset[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


def fastest(call: Callable[[], object], repeats: int = 7) -> float:
    """Return the shortest time of several calls, in seconds."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def peak(limit: str) -> float:
    """Return operations per second ("fma", "vnni") or bytes per second ("dram": eight reads and one streaming write)."""
    lib, rounds = library(), ctypes.c_int64(400_000)
    wide = "avx512f" in cpu_flags()
    if limit == "fma":
        run, lanes, unroll = (lib.fma_avx512, 16, 24) if wide else (lib.fma_avx2, 8, 12)
        return 2.0 * lanes * unroll * rounds.value / fastest(lambda: run(rounds))
    if limit == "vnni":
        if "avx512_vnni" not in cpu_flags():
            raise RuntimeError("this CPU has no AVX-512 VNNI to take a limit from")
        return 2.0 * 64 * 24 * rounds.value / fastest(lambda: lib.vnni_avx512(rounds))
    if limit == "dram":
        return stream_bandwidth(8, 8_000_000)
    raise ValueError(f"unknown limit {limit!r}")


def stream_bandwidth(count: int, length: int) -> float:
    """Return bytes per second of reading `count` float streams and writing one with non-temporal stores."""
    lib = library()
    run = lib.stream_avx512 if "avx512f" in cpu_flags() else lib.stream_avx2
    streams = [np.ones(length, np.float32) for _ in range(count)]
    out = np.empty(length + 16, np.float32)
    aligned = out.ctypes.data + (-out.ctypes.data) % 64
    pointers = (ctypes.c_void_p * count)(*[s.ctypes.data for s in streams])
    return 4.0 * length * (count + 1) / fastest(lambda: run(pointers, count, ctypes.c_int64(length), ctypes.c_void_p(aligned)), 5)
