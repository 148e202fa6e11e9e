"""The runner's side: engines take turns, A B C A B C, and only the one whose turn it is runs.

All others are stopped by SIGSTOP meanwhile, so that no idle pool spins on the cores that are measured. A ratio is taken within a
round and the median of the rounds is quoted: what drifts over minutes (clock, neighbours) meets all engines alike.
"""

import fcntl
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any, cast

from gristmill.errors import WorkerError

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # a rival runs as its makers meant it
PAUSE = 0.05  # seconds between turns, in which other processes catch up


@dataclass(frozen=True)
class Entry:
    """One engine: its label, its worker's command, what it adds to the environment, and what follows the contest's arguments."""

    label: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contest:
    """Engines that do the same work. Ratios refer to the first entry, which is ours; `unit` is "s" or "sample"."""

    title: str
    threads: int
    entries: tuple[Entry, ...]
    arguments: tuple[str, ...] = ()
    unit: str = "s"
    rounds: int = 7
    seconds: float = 0.15


class Worker:
    """An engine's process group, stopped unless it is its turn."""

    def __init__(self, label: str, command: Sequence[str], threads: int, env: Mapping[str, str]) -> None:
        self.label = label
        self.complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the worker
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complaints, text=True,
            env=environment(threads, env), process_group=0,
        )  # fmt: skip

    def answer(self) -> str:
        line = cast(IO[str], self.process.stdout).readline()
        if not line:
            status = self.process.wait()
            self.complaints.seek(0)
            last = next((line for line in reversed(self.complaints.read().splitlines()) if line.strip()), "")
            raise WorkerError(f"{self.label} ended with status {status}: {last.strip()}")
        return line.strip()

    def wait_ready(self) -> None:
        while self.answer() != "ready":  # libraries may talk on stdout while they start
            pass
        self.signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> float:
        self.signal(signal.SIGCONT)
        stdin = cast(IO[str], self.process.stdin)
        stdin.write(f"{seconds}\n")
        stdin.flush()
        figure = float(self.answer())
        self.signal(signal.SIGSTOP)
        return figure

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def close(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.complaints):
            if stream:
                stream.close()


def environment(threads: int, extra: Mapping[str, str] = {}) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in UNSET}
    return kept | dict.fromkeys(THREAD_VARIABLES, str(threads)) | dict(extra)


@contextmanager
def locked(paths: Sequence[str | Path]) -> Iterator[None]:
    """Hold files locked, where others who share the machine agree to wait for them."""
    with ExitStack() as stack:
        for path in paths:
            fcntl.flock(stack.enter_context(open(path, "w")), fcntl.LOCK_EX)
        yield


def race(contest: Contest, progress: Callable[[str], None] = lambda _: None, locks: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Run one contest and return what was measured: for each label the figure of every round, or why it failed.

    `locks` are held while engines have their turns, not while they start.
    """
    workers: list[Worker] = []
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    try:
        for entry in contest.entries:  # one after the other: each warms up on an idle machine
            progress(f"{contest.title}: {entry.label} starts")
            command = (*entry.command, *contest.arguments, *entry.extra)
            worker = Worker(entry.label, command, contest.threads, entry.env)
            workers.append(worker)
            try:
                worker.wait_ready()
                times[entry.label] = []
            except WorkerError as error:
                failed[entry.label] = str(error)
        with locked(locks):
            for turn in range(contest.rounds):
                for worker in workers:
                    if worker.label in times:
                        progress(f"{contest.title}: {worker.label}, round {turn + 1} of {contest.rounds}")
                        times[worker.label].append(worker.turn(contest.seconds))
                        time.sleep(PAUSE)
    finally:
        for worker in workers:
            worker.close()
    return {"title": contest.title, "threads": contest.threads, "unit": contest.unit, "rounds": times, "failed": failed}


def ratios(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return each engine's time over that of the first, the median over the rounds."""
    first = next(iter(times.values()))
    return {label: median(a / b for a, b in zip(each, first, strict=True)) for label, each in times.items()}


def spread(each: Sequence[float]) -> float:
    """Return half the range of the middle half of the rounds, as a share of the median."""
    ordered = sorted(each)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / 2 / median(ordered)
