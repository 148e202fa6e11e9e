"""The worker's side of a race: one engine in a process of its own that runs when it is told to.

It builds the engine and prints "ready"; for every line "SECONDS" that it reads it calls the engine for about that long and prints
the median seconds of a call. A call may return its own figure, in seconds per unit of work, where its start does not count.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from statistics import median

Call = Callable[[], float | None]
WARM_SECONDS = 0.3
PR_SET_PDEATHSIG = 1
TASKS = Path("/proc/self/task")  # the threads of this process


def main(engines: Mapping[str, Callable[..., Call]]) -> None:
    """Serve one of the engines of a file: python FILE ENGINE THREADS SIZE..."""
    name, threads, *size = sys.argv[1:]
    serve(int(threads), engines[name](int(threads), *[float(part) if "." in part else int(part) for part in size]))


def serve(threads: int, call: Call) -> None:
    die_with_parent()
    measure(call, WARM_SECONDS)
    pin_busiest(threads)
    measure(call, WARM_SECONDS)
    print("ready", flush=True)
    for line in sys.stdin:
        print(measure(call, float(line)), flush=True)


def die_with_parent() -> None:
    """Ask Linux to kill this process when the runner ends in whatever way: a stopped one would never see its pipe close."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def pin_busiest(threads: int) -> None:
    """Give each of the busiest threads a core of its own, whatever library they belong to.

    Virtual machines may pack the threads of a process on one core while another idles; unpinned, a race would measure that.
    """
    if sys.platform != "linux":
        return
    spent = {
        int(task.name): sum(map(int, (task / "stat").read_text().rpartition(")")[2].split()[11:13])) for task in TASKS.iterdir()
    }
    busiest = sorted(spent, key=lambda task: -spent[task])[:threads]
    for task, core in zip(busiest, cycle(sorted(os.sched_getaffinity(0))), strict=False):
        os.sched_setaffinity(task, {core})


def measure(call: Call, seconds: float) -> float:
    """Return the median of as many calls as fit, one at least."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        begin = time.perf_counter()
        own = call()
        times.append(time.perf_counter() - begin if own is None else own)
    return median(times)
