"""The worker's side of a race: one engine in a process of its own that runs when it is told to.

    python gemm.py ENGINE THREADS SIZE...

builds the engine and prints "ready"; for every line "SECONDS" that it reads it calls the engine for about that long and prints
the median seconds of a call. A call may return its own figure, in seconds per unit of work, where its start does not count.
"""

import sys
import time
from collections.abc import Callable, Mapping
from statistics import median

Call = Callable[[], float | None]
WARM_SECONDS = 0.3


def serve(engines: Mapping[str, Callable[..., Call]]) -> None:
    name, threads, *size = sys.argv[1:]
    call = engines[name](int(threads), *[float(part) if "." in part else int(part) for part in size])
    measure(call, WARM_SECONDS)
    print("ready", flush=True)
    for line in sys.stdin:
        print(measure(call, float(line)), flush=True)


def measure(call: Call, seconds: float) -> float:
    """Return the median of as many calls as fit, one at least."""
    times = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        begin = time.perf_counter()
        own = call()
        times.append(time.perf_counter() - begin if own is None else own)
    return median(times)
