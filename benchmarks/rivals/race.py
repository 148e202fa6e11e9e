"""The runner's side: engines take turns, A B C A B C, and only the one whose turn it is runs.

All others are stopped by SIGSTOP meanwhile, so that no idle pool spins on the cores that are measured. A ratio is taken within a
round and the median of the rounds is quoted: what drifts over minutes (clock, neighbours) meets all engines alike.
"""

import argparse
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "results"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # a rival runs as its makers meant it
PAUSE = 0.05  # seconds between turns, in which other processes catch up
PACKAGES = ("numpy", "scipy", "torch", "onnxruntime")


@dataclass(frozen=True)
class Entry:
    """One engine: its label, the script in this folder, the engine's name there, environment, and what follows the size."""

    label: str
    script: str
    engine: str
    env: Mapping[str, str] = field(default_factory=dict)
    extra: tuple[float, ...] = ()


@dataclass(frozen=True)
class Contest:
    """Engines that do the same work. The first entry is ours, which ratios refer to; `unit` is "s" or "sample"."""

    title: str
    size: tuple[float, ...]
    threads: int
    entries: tuple[Entry, ...]
    unit: str = "s"
    rounds: int = 7
    seconds: float = 0.15


class Worker:
    """An engine's process group, stopped unless it is its turn."""

    def __init__(self, entry: Entry, contest: Contest) -> None:
        self.entry = entry
        environment = {name: value for name, value in os.environ.items() if name not in UNSET}
        environment |= dict.fromkeys(THREAD_VARIABLES, str(contest.threads)) | entry.env
        size = map(str, (*contest.size, *entry.extra))
        command = [sys.executable, "-W", "ignore", str(FOLDER / f"{entry.script}.py"), entry.engine, str(contest.threads), *size]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, process_group=0
        )

    def answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.entry.label} failed with status {self.process.wait()}")
        return line.strip()

    def wait_ready(self) -> None:
        while self.answer() != "ready":  # libraries may talk on stdout while they start
            pass
        self.signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> float:
        self.signal(signal.SIGCONT)
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        figure = float(self.answer())
        self.signal(signal.SIGSTOP)
        return figure

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def close(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def race(contest: Contest) -> dict[str, object]:
    """Run one contest and return what was measured: for each label the figure of every round."""
    workers: list[Worker] = []
    times: dict[str, list[float]] = {entry.label: [] for entry in contest.entries}
    try:
        for entry in contest.entries:  # one after the other: each warms up on an idle machine
            workers.append(Worker(entry, contest))
            workers[-1].wait_ready()
        for _ in range(contest.rounds):
            for worker in workers:
                times[worker.entry.label].append(worker.turn(contest.seconds))
                time.sleep(PAUSE)
    finally:
        for worker in workers:
            worker.close()
    return {"title": contest.title, "threads": contest.threads, "unit": contest.unit, "rounds": times}


def ratios(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return each engine's time over that of the first, the median over the rounds."""
    first = next(iter(times.values()))
    return {label: median(a / b for a, b in zip(each, first, strict=True)) for label, each in times.items()}


def spread(each: Sequence[float]) -> float:
    """Return half the range of the middle half of the rounds, as a share of the median."""
    ordered = sorted(each)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / 2 / median(ordered)


def table(result: Mapping[str, object]) -> str:
    """Render one contest in Markdown."""
    times: Mapping[str, Sequence[float]] = result["rounds"]
    heading = "samples/s" if result["unit"] == "sample" else "time"
    lines = [f"**{result['title']}, {result['threads']} thread{'s'[: result['threads'] != 1]}**", ""]
    lines += [f"| engine | {heading} | noise | times the first row |", "|---|---:|---:|---:|"]
    factors = ratios(times)
    for label, each in times.items():
        middle = median(each)
        figure = f"{1 / middle:,.0f}" if result["unit"] == "sample" else duration(middle)
        lines.append(f"| {label} | {figure} | ±{100 * spread(each):.0f} % | {factors[label]:.2f} |")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} us"


def machine() -> dict[str, object]:
    """Say what the figures were measured with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return {"cpu": name, "cores": os.cpu_count(), "load": os.getloadavg(), "python": platform.python_version(), **versions}


@contextmanager
def locked(path: str | None):
    if path is None:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(description: str, contests: Iterable[Contest], name: str) -> None:
    """Run contests, print a table after each, and write everything to results/<name>.json."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", default="", help="run the contests whose title contains this")
    parser.add_argument("--threads", type=int, help="run the contests of this thread count")
    parser.add_argument("--lock", help="a file to hold locked during each contest, where the machine is shared")
    arguments = parser.parse_args()
    target = RESULTS / f"{name}.json"
    done = json.loads(target.read_text()) if target.exists() else []
    for contest in contests:
        if arguments.only not in contest.title or arguments.threads not in (None, contest.threads):
            continue
        with locked(arguments.lock):
            result = {**race(contest), "machine": machine(), "date": time.strftime("%Y-%m-%d")}
        print(table(result), end="\n\n", flush=True)
        RESULTS.mkdir(exist_ok=True)
        key = (result["title"], result["threads"])
        done = [old for old in done if (old["title"], old["threads"]) != key] + [result]
        target.write_text(json.dumps(done, indent=1) + "\n")
