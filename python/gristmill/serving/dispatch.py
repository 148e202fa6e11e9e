"""Bounded work: a few threads that run models, and a short queue in front of them.

The event loop owns all bookkeeping; a thread only computes and posts its result back. A slot is held from the moment a job is
handed to a thread until that thread is done with it, whatever became of the request meanwhile, so a cancelled request can never
leave two jobs on one thread or a thread that nobody uses.
"""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from gristmill.serving.refusal import ClientGone, Reason, Refusal

Job = Callable[[], Any]
Gone = Callable[[], Awaitable[None]]  # returns when the client has left


class Dispatcher:
    """Runs jobs on `workers` threads; at most `max_queued` wait. To be made and used on one running event loop."""

    def __init__(self, workers: int, max_queued: int) -> None:
        self.max_queued = max_queued
        self._loop = asyncio.get_running_loop()
        self._free = workers
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._jobs: queue.SimpleQueue[tuple[Job, asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"gristmill-run-{number}", daemon=True) for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued(self) -> int:
        return len(self._waiting)

    async def submit(self, job: Job, deadline: float, gone: Gone | None = None) -> Any:
        """Run a job on a thread and return what it returns.

        Args:
            job: what to call.
            deadline: in the loop's time; a job that has not begun by then is never begun.
            gone: watched while the job waits; a job whose client has left is never begun.

        Raises:
            Refusal: the queue is full, or the deadline passed.
            ClientGone: the client left while the job was waiting.
        """
        if deadline <= self._loop.time():
            raise _expired()
        if self._free:
            self._free -= 1
        else:
            await self._take_turn(deadline, gone)
        done: asyncio.Future[Any] = self._loop.create_future()
        self._jobs.put((job, done))
        return await done

    async def _take_turn(self, deadline: float, gone: Gone | None) -> None:
        if len(self._waiting) >= self.max_queued:
            raise Refusal(Reason.OVERLOADED, "the server is busy")
        turn: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(turn)
        timer = self._loop.call_at(deadline, _fail, turn, _expired())
        watcher = self._loop.create_task(_watch(gone, turn)) if gone is not None else None
        try:
            await turn
        except BaseException:
            if turn in self._waiting:
                self._waiting.remove(turn)
            elif turn.done() and not turn.cancelled() and turn.exception() is None:
                self._release()  # the slot was handed over in the moment of cancellation
            raise
        finally:
            timer.cancel()
            if watcher is not None:
                watcher.cancel()

    def _release(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _finish(self, done: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        self._release()
        if done.done():
            return  # the request was cancelled while it ran
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, done = item
            result, error = None, None
            try:
                result = job()
            except BaseException as raised:  # it is raised again where the job was submitted
                error = raised
            try:
                self._loop.call_soon_threadsafe(self._finish, done, result, error)
            except RuntimeError:
                return  # the loop was closed while this job ran past the grace period
            del item, job, done, result, error  # nothing of the last request is kept while idle

    def close(self, seconds: float) -> int:
        """End the threads when they are idle and return how many were still running a job after `seconds`."""
        for _ in self._threads:
            self._jobs.put(None)
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return sum(thread.is_alive() for thread in self._threads)


async def _watch(gone: Gone, turn: "asyncio.Future[None]") -> None:
    await gone()
    _fail(turn, ClientGone())


def _fail(turn: "asyncio.Future[None]", error: Exception) -> None:
    if not turn.done():
        turn.set_exception(error)


def _expired() -> Refusal:
    return Refusal(Reason.EXPIRED, "the deadline passed before the request could be run")
