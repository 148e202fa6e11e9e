"""Members as processes of this machine, over shared memory.

Workers are fresh interpreters, never forks: a fork after a parallel region of OpenMP can hang, and a fresh process needs no
`if __name__ == "__main__"` guard. A message to a worker names leases; parameters, gradients and data never travel.
"""

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from gristmill.errors import ModelError, WorkerError
from gristmill.runtime.threads import default_threads
from gristmill.tensor.parts import Array
from gristmill.training.arena import Arena, anonymous_file, carve, map_file
from gristmill.training.engine import Died, Done, Event, Failed, Job
from gristmill.training.member import revive
from gristmill.training.messages import Channel
from gristmill.training.shards import Lease

WORKER_SPIN = 200e-6  # about what the coordinator takes for the update of a small model
COORDINATOR_SPIN = 50e-6  # about what the kernel takes to wake a sleeper
LOOK_SECONDS = 1.0  # how often to look for processes that died with their socket held open by a child
GRACE_SECONDS = 2.0
START_SECONDS = 60.0  # for a worker to get ready, at least: a busy machine starts interpreters slowly
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    channel: Channel


class Processes:
    """Run members as `python -m gristmill.training.worker`."""

    def __init__(self) -> None:
        self.members: list[int] = []
        self._workers: dict[int, _Worker] = {}
        self._by_descriptor: dict[int, int] = {}
        self._news: list[Event] = []  # what was found out while submitting
        self._spin = 0.0

    def start(self, job: Job) -> Arena:
        if os.name != "posix" or not sys.executable:
            raise ModelError("engine='processes' needs a POSIX system and sys.executable; use engine='inline'")
        self._poll = select.poll()
        cores = default_threads()
        self._spin = COORDINATOR_SPIN if job.workers < cores else 0.0
        sizes = job.sizes()
        header, payload = job.task.encode()
        threads = job.threads or max(1, cores // job.workers)
        patience = max(START_SECONDS, job.timeout)
        descriptor = anonymous_file(sizes.nbytes)
        try:
            arena = carve(sizes, map_file(descriptor, sizes.nbytes))
            fill(arena.data, job.data)
            for member in range(job.workers):
                self._spawn(member, descriptor, threads, patience)
        finally:
            os.close(descriptor)
        greeting = {
            "task": header,
            "shapes": list(job.spec.shapes.items()),
            "sizes": sizes.as_dict(),
            "shuffled": job.shuffled,
            "threads": threads,
            "spin": WORKER_SPIN if job.workers <= cores else 0.0,
            "path": [entry or os.getcwd() for entry in sys.path],
            "environment": {"PYTHONPATH": os.environ.get("PYTHONPATH")},
        }
        for member in list(self.members):
            self._send(member, greeting, payload)
        self._await_ready(patience)
        return arena

    def broadcast(self, what: str) -> None:
        pass  # members read the very pages that the coordinator writes; the next message orders the accesses

    def submit(self, member: int, leases: Sequence[Lease]) -> None:
        self._send(member, {"leases": leases})

    def wait_any(self, timeout: float) -> list[Event]:
        events, self._news = self._news, []
        ready = [] if events else self._ready(min(timeout, LOOK_SECONDS))
        for descriptor in ready:
            events += self._read(self._by_descriptor[descriptor])
        if not ready and not events:
            events = [self._bury(member) for member in list(self.members) if self._workers[member].process.poll() is not None]
        return events

    def stop(self, member: int | None = None) -> None:
        if member is not None:
            if member in self._workers:
                self._workers[member].process.kill()
                self._forget(member)
            return
        leaving = [worker.process for worker in self._workers.values()]
        for worker in self._workers.values():
            worker.channel.close()  # which they take as a goodbye
        deadline = monotonic() + GRACE_SECONDS
        for process in leaving:
            try:
                process.wait(max(0.0, deadline - monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._workers, self.members, self._by_descriptor = {}, [], {}

    def _spawn(self, member: int, arena: int, threads: int, timeout: float) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            ours.settimeout(timeout)
            inherited = (theirs.fileno(), arena)
            command = [sys.executable, "-P", "-m", "gristmill.training.worker", *map(str, inherited), str(os.getpid())]
            environment = dict(os.environ) | dict.fromkeys(THREAD_VARIABLES, str(threads))
            environment["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
            # A process group of its own: Ctrl-C on the terminal reaches the coordinator alone, even while workers start.
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=inherited, env=environment, process_group=0)
        self._workers[member] = _Worker(process, Channel(ours))
        self._by_descriptor[ours.fileno()] = member
        self._poll.register(ours.fileno(), select.POLLIN)
        self.members.append(member)

    def _await_ready(self, timeout: float) -> None:
        waiting, deadline = set(self.members), monotonic() + timeout
        while waiting:
            for event in self.wait_any(deadline - monotonic()):
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Died):
                    raise WorkerError(f"worker {event.member} {event.reason} while it started")
                waiting.discard(event.member)
            if waiting and monotonic() >= deadline:
                for member in waiting:
                    self.stop(member)
                raise WorkerError(f"workers {sorted(waiting)} did not get ready within {timeout:g} s")

    def _ready(self, timeout: float) -> list[int]:
        deadline = monotonic() + self._spin
        while self._spin and monotonic() < deadline:
            if found := self._poll.poll(0):
                return [descriptor for descriptor, _ in found]
        return [descriptor for descriptor, _ in self._poll.poll(max(0.0, timeout) * 1000)]

    def _send(self, member: int, header: dict[str, Any], payload: bytes = b"") -> None:
        try:
            self._workers[member].channel.send(header, payload)
        except OSError:  # it died, or is frozen and its socket is full
            self._workers[member].process.kill()
            self._news.append(self._bury(member))

    def _read(self, member: int) -> list[Event]:
        channel = self._workers[member].channel
        events: list[Event] = []
        try:
            channel.feed()
            while (message := channel.take()) is not None:
                events.append(_event(member, message[0]))
        except (EOFError, OSError, ValueError):
            events.append(self._bury(member))
        return events

    def _bury(self, member: int) -> Died:
        """Note that a member's connection broke: whatever the process still does, it is over."""
        process = self._workers[member].process
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        self._forget(member)
        return Died(member, f"(process {process.pid}) {manner(process.returncode)}")

    def _forget(self, member: int) -> None:
        """Wait for a process that is ended; until it is gone it might still write into its slots."""
        worker = self._workers.pop(member)
        self.members.remove(member)
        self._poll.unregister(worker.channel)
        del self._by_descriptor[worker.channel.fileno()]
        worker.channel.close()
        worker.process.wait()


def fill(arena: dict[str, Array], data: Any) -> None:
    for name, array in arena.items():
        array[...] = data[name]


def _event(member: int, message: dict[str, Any]) -> Event:
    if "failed" in message:
        return Failed(member, revive(member, message["failed"]))
    return Done(member, message.get("losses", []))


def manner(returncode: int) -> str:
    """Say how a process ended."""
    if returncode >= 0:
        return f"exited with status {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"
