"""The queue in front of the threads: its bounds, deadlines and cancellation, without a network."""

import asyncio
import random
import threading
import time

import pytest

from gristmill.serving.dispatch import Dispatcher
from gristmill.serving.refusal import ClientGone, Reason, Refusal


def run(scenario, workers=1, max_queued=4):
    async def main():
        dispatcher = Dispatcher(workers, max_queued)
        try:
            return await asyncio.wait_for(scenario(dispatcher), 30)
        finally:
            assert dispatcher.close(10) == 0

    return asyncio.run(main())


def later(seconds=60.0):
    return asyncio.get_running_loop().time() + seconds


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


class Blocker:
    """Occupies a thread until it is told to end."""

    def __init__(self):
        self.begun, self.end = threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        assert self.end.wait(30)
        return "blocked"


async def occupy(dispatcher):
    blocker = Blocker()
    task = asyncio.create_task(dispatcher.submit(blocker, later()))
    await until(blocker.begun.is_set)
    return blocker, task


def test_results_and_errors_come_back():
    async def scenario(dispatcher):
        assert await dispatcher.submit(lambda: 5, later()) == 5
        with pytest.raises(ZeroDivisionError):
            await dispatcher.submit(lambda: 1 // 0, later())
        assert await dispatcher.submit(lambda: threading.current_thread().name, later()) == "gristmill-run-0"

    run(scenario)


def test_a_full_queue_refuses_at_once_and_order_is_kept():
    async def scenario(dispatcher):
        blocker, first = await occupy(dispatcher)
        order = []
        waiting = [asyncio.create_task(dispatcher.submit(lambda n=n: order.append(n), later())) for n in range(4)]
        await until(lambda: dispatcher.queued == 4)
        with pytest.raises(Refusal) as caught:
            await dispatcher.submit(lambda: order.append("never"), later())
        assert caught.value.reason is Reason.OVERLOADED
        blocker.end.set()
        assert await first == "blocked"
        await asyncio.gather(*waiting)
        assert order == [0, 1, 2, 3]

    run(scenario)


def test_no_queue_at_all():
    async def scenario(dispatcher):
        blocker, first = await occupy(dispatcher)
        with pytest.raises(Refusal):
            await dispatcher.submit(lambda: 1, later())
        blocker.end.set()
        await first
        assert await dispatcher.submit(lambda: 1, later()) == 1

    run(scenario, max_queued=0)


def test_what_is_late_is_never_begun():
    async def scenario(dispatcher):
        began = []
        with pytest.raises(Refusal) as caught:
            await dispatcher.submit(lambda: began.append(1), later(0))
        assert caught.value.reason is Reason.EXPIRED
        blocker, first = await occupy(dispatcher)
        with pytest.raises(Refusal) as caught:
            await dispatcher.submit(lambda: began.append(2), later(0.02))
        assert caught.value.reason is Reason.EXPIRED
        assert dispatcher.queued == 0
        blocker.end.set()
        await first
        assert not began

    run(scenario)


def test_a_client_that_leaves_while_waiting_is_never_run():
    async def scenario(dispatcher):
        blocker, first = await occupy(dispatcher)
        left, began = asyncio.Event(), []
        task = asyncio.create_task(dispatcher.submit(lambda: began.append(1), later(), left.wait))
        await until(lambda: dispatcher.queued == 1)
        left.set()
        with pytest.raises(ClientGone):
            await task
        blocker.end.set()
        await first
        assert await dispatcher.submit(lambda: 1, later(), left.wait) == 1
        assert not began

    run(scenario)


def test_cancelled_while_waiting():
    async def scenario(dispatcher):
        blocker, first = await occupy(dispatcher)
        task = asyncio.create_task(dispatcher.submit(lambda: 1, later()))
        await until(lambda: dispatcher.queued == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert dispatcher.queued == 0
        blocker.end.set()
        await first
        assert await dispatcher.submit(lambda: 2, later()) == 2

    run(scenario)


def test_cancelled_in_the_moment_of_its_turn():
    async def scenario(dispatcher):
        blocker, first = await occupy(dispatcher)
        task = asyncio.create_task(dispatcher.submit(lambda: 1, later()))
        await until(lambda: dispatcher.queued == 1)
        first.add_done_callback(lambda _: task.cancel())
        blocker.end.set()
        await asyncio.wait([task])
        assert await dispatcher.submit(lambda: 2, later()) == 2

    run(scenario)


def test_a_slot_is_held_while_a_cancelled_job_still_runs():
    async def scenario(dispatcher):
        blocker, first = await occupy(dispatcher)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        with pytest.raises(Refusal):
            await dispatcher.submit(lambda: 1, later(0.02))  # the thread is not free
        blocker.end.set()
        assert await dispatcher.submit(lambda: 2, later()) == 2

    run(scenario)


@pytest.mark.parametrize("seed", range(5))
def test_slots_survive_any_mixture(seed):
    random_ = random.Random(seed)
    running, most = 0, 0
    lock = threading.Lock()

    def job():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(random_.random() / 500)
        with lock:
            running -= 1
        if random_.random() < 0.1:
            raise ValueError

    async def client(dispatcher):
        await asyncio.sleep(random_.random() / 50)
        task = asyncio.create_task(dispatcher.submit(job, later(random_.choice([0.002, 60]))))
        if random_.random() < 0.4:
            await asyncio.sleep(random_.random() / 200)
            task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            assert isinstance(task.exception(), (Refusal, ValueError, type(None)))

    async def scenario(dispatcher):
        await asyncio.gather(*(client(dispatcher) for _ in range(200)))
        assert dispatcher.queued == 0
        await until(lambda: dispatcher._free == 2)
        assert most == 2

    run(scenario, workers=2, max_queued=8)


def test_close_reports_what_still_runs():
    async def main():
        dispatcher = Dispatcher(1, 1)
        blocker, task = await occupy(dispatcher)
        assert dispatcher.close(0.01) == 1
        task.cancel()
        return blocker

    blocker = asyncio.run(main())
    blocker.end.set()  # the thread finds its loop closed and ends
    for thread in threading.enumerate():
        if thread.name.startswith("gristmill-run"):
            thread.join(10)
            assert not thread.is_alive()
