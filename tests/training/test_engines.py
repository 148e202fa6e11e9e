"""What every engine must do, whatever computes: one suite for all."""

import numpy as np
import pytest

from gristmill.errors import ModelError
from gristmill.training import shards
from gristmill.training.engine import ENGINES, Died, Done, Failed, Job, find
from gristmill.training.spec import describe
from gristmill.training.task import FunctionTask
from training.programs import linear_gradient, linear_problem


def failing(params, batch):
    raise ZeroDivisionError("on purpose")


def job(function=linear_gradient, workers=2, slices=4, shuffled=True):
    params, data = linear_problem()
    spec, _ = describe(params)
    return Job(FunctionTask(function, "mapping", False), spec, data, slices, shuffled, workers, 1, 60.0)


@pytest.fixture(params=sorted(ENGINES))
def engine(request):
    engine = find(request.param)
    yield engine
    engine.stop()


def drain(engine, count):
    events = []
    while len(events) < count:
        events += engine.wait_any(60.0)
    return events


def test_members_compute_their_leases_at_the_current_parameters(engine):
    work = job()
    arena = engine.start(work)
    assert engine.members == [0, 1]
    arena.order[:] = np.random.default_rng(3).permutation(work.examples)
    engine.broadcast("order")
    for scale in (0.0, 1.0):
        arena.params[:] = scale
        engine.broadcast("params")
        leases = shards.cut(work.examples, 50, 0, 4)
        for member, part in shards.share(leases, engine.members).items():
            engine.submit(member, part)
        events = sorted(drain(engine, 2), key=lambda event: event.member)
        assert all(isinstance(event, Done) for event in events)
        params = {name: np.full(shape, scale, np.float32) for name, shape in work.spec.shapes.items()}
        for lease, loss in zip(leases, [loss for event in events for loss in event.losses], strict=True):
            rows = arena.order[lease.start : lease.stop]
            wanted_loss, wanted = linear_gradient(params, {name: array[rows] for name, array in work.data.items()})
            found = work.spec.views(arena.slots[lease.slot])
            assert loss == pytest.approx(wanted_loss, rel=1e-6)
            for name, gradient in wanted.items():
                np.testing.assert_allclose(found[name], gradient, rtol=1e-5, atol=1e-6)


def test_data_in_their_own_order_need_no_order(engine):
    work = job(shuffled=False)
    arena = engine.start(work)
    assert arena.order.size == 0
    engine.submit(0, [shards.Lease(2, 10, 30)])
    (event,) = drain(engine, 1)
    wanted, _ = linear_gradient(work.spec.views(arena.params), {name: array[10:30] for name, array in work.data.items()})
    assert event.losses == [pytest.approx(wanted, rel=1e-6)]


def test_an_exception_names_the_worker_and_its_traceback(engine):
    engine.start(job(failing, shuffled=False))
    engine.submit(1, [shards.Lease(0, 0, 5)])
    (event,) = drain(engine, 1)
    assert isinstance(event, Failed)
    assert event.member == 1
    assert "worker 1 raised" in str(event.error)
    assert "ZeroDivisionError: on purpose" in str(event.error)
    assert "in failing" in str(event.error)


def test_nothing_to_wait_for(engine):
    engine.start(job())
    assert engine.wait_any(0.0) == []


def test_a_stopped_member_is_gone_and_the_others_go_on(engine):
    engine.start(job(workers=3, shuffled=False))
    engine.stop(1)
    assert engine.members == [0, 2]
    engine.submit(2, [shards.Lease(0, 0, 5)])
    (event,) = drain(engine, 1)
    assert isinstance(event, Done)
    assert event.member == 2


def test_stop_is_harmless_when_repeated(engine):
    engine.start(job(workers=1))
    engine.stop(0)
    engine.stop(0)
    engine.stop()
    engine.stop()
    assert engine.members == []


def test_stop_before_start(engine):
    engine.stop()
    assert engine.members == []


def test_unknown_engine():
    with pytest.raises(ModelError, match="choose one of inline, processes"):
        find("carrier pigeons")


def test_died_is_an_event():
    assert Died(1, "was killed").reason == "was killed"
