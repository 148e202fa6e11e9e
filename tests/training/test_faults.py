"""Workers that die, freeze, raise or lie; numbers that stop being numbers."""

import os
import signal
import time

import numpy as np
import pytest

import gristmill as gm
from gristmill.errors import DivergedError, ModelError, WorkerError
from gristmill.training.engine import Engine, Failed, processes
from gristmill.training.engine.processes import Processes, manner
from training.programs import bits, blobs, linear_gradient, linear_problem, small_model

ENGINES = ["inline", "processes"]


class Sabotaged(Processes):
    """Processes of which some get a signal just after a lease was sent to them.

    Args:
        plan: the signal by (submission, member), submissions counted from 0 for each member.
    """

    def __init__(self, plan):
        super().__init__()
        self._plan = plan
        self._submissions = {}

    def submit(self, member, leases):
        super().submit(member, leases)
        count = self._submissions[member] = self._submissions.get(member, -1) + 1
        if (count, member) in self._plan:
            os.kill(self._workers[member].process.pid, self._plan[count, member])


def fit_sabotaged(plan, **options):
    params, data = linear_problem()
    settings = {"batch_size": 10, "epochs": 3, "workers": 3} | options
    return gm.fit_gradient(linear_gradient, params, data, engine=Sabotaged(plan), **settings)


def undisturbed():
    params, data = linear_problem()
    return gm.fit_gradient(linear_gradient, params, data, batch_size=10, epochs=3, engine="inline")


def test_it_is_an_engine():
    engine: Engine = Sabotaged({})
    assert engine.members == []


@pytest.mark.parametrize(
    "plan", [{(0, 0): signal.SIGKILL}, {(4, 1): signal.SIGKILL}, {(2, 0): signal.SIGKILL, (9, 2): signal.SIGKILL}]
)
def test_a_killed_worker_changes_nothing(plan):
    result = fit_sabotaged(plan)
    assert bits(result) == bits(undisturbed())
    assert set(result.report.deaths) == {member for _, member in plan}
    for reason in result.report.deaths.values():
        assert "was killed by SIGKILL" in reason
        assert "at step" in reason


def test_a_worker_killed_while_it_writes_changes_nothing():
    parent = os.getpid()

    def gradient(params, batch):
        loss, gradients = linear_gradient(params, batch)

        class Dying:
            """Half of the gradient is written when the rest is asked for."""

            def __array__(self, dtype=None, copy=None):
                if os.getpid() != parent and batch["x"][0, 0] == marked:
                    os.kill(os.getpid(), signal.SIGKILL)
                return gradients["bias"]

        return loss, {"weight": gradients["weight"], "bias": Dying()}

    params, data = linear_problem()
    marked = data["x"][17, 0]
    options = {"batch_size": 10, "epochs": 1}
    wanted = gm.fit_gradient(gradient, params, data, engine="inline", **options)
    with pytest.raises(WorkerError, match="no worker is left") as caught:  # whoever gets that example dies
        gm.fit_gradient(gradient, params, data, workers=3, slices=10, **options)
    assert str(caught.value).count("was killed by SIGKILL") == 3
    assert bits(wanted) != b""


def test_a_frozen_worker_is_ended_after_its_deadline():
    result = fit_sabotaged({(1, 1): signal.SIGSTOP}, worker_timeout=1.0)
    assert bits(result) == bits(undisturbed())
    assert "gave no answer for 1 s" in result.report.deaths[1]
    assert "worker_timeout=" in result.report.deaths[1]


def test_nobody_is_left():
    plan = {(0, 0): signal.SIGKILL, (1, 1): signal.SIGKILL, (2, 2): signal.SIGTERM}
    with pytest.raises(WorkerError) as caught:
        fit_sabotaged(plan)
    assert "no worker is left" in str(caught.value)
    for member, name in ((0, "SIGKILL"), (1, "SIGKILL"), (2, "SIGTERM")):
        assert f"worker {member} (process " in str(caught.value)
        assert name in str(caught.value)


def test_a_worker_that_exits_is_dropped():
    parent = os.getpid()

    def gradient(params, batch):
        if os.getpid() != parent:
            os._exit(3)
        return linear_gradient(params, batch)

    params, data = linear_problem()
    with pytest.raises(WorkerError, match="exited with status 3"):
        gm.fit_gradient(gradient, params, data, epochs=1, workers=2)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_exception_comes_with_its_traceback(engine):
    def buggy(params, batch):
        return {}["missing key"]

    params, data = linear_problem()
    with pytest.raises(WorkerError, match="missing key") as caught:
        gm.fit_gradient(buggy, params, data, epochs=1, workers=2, engine=engine)
    assert "in buggy" in str(caught.value)
    assert "Traceback" in str(caught.value)


def test_sys_exit_in_a_gradient_is_an_exception():
    def leaving(params, batch):
        raise SystemExit("enough")

    params, data = linear_problem()
    with pytest.raises(WorkerError, match="SystemExit: enough"):
        gm.fit_gradient(leaving, params, data, epochs=1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_divergence_names_step_and_slice_and_keeps_the_last_good_step(engine, what, value):
    params, data = linear_problem(40)
    order = np.arange(40)
    np.random.default_rng((0, 0)).shuffle(order)
    bad = data["x"][order[24], 0]  # the third step's batch of ten, its third slice of two

    def gradient(params, batch):
        loss, gradients = linear_gradient(params, batch)
        if bad in batch["x"][:, 0]:
            if what == "loss":
                return value, gradients
            gradients["weight"][1] = value
        return loss, gradients

    options = {"batch_size": 10, "slices": 5, "workers": 2, "engine": engine}
    with pytest.raises(DivergedError, match=f"step 3, slice 2: the {what}") as caught:
        gm.fit_gradient(gradient, params, data, epochs=3, **options)
    wanted = {name: array.copy() for name, array in params.items()}
    for rows in (order[:10], order[10:20]):
        _, gradients = linear_gradient(wanted, {name: array[rows] for name, array in data.items()})
        for name, array in gradients.items():
            wanted[name] -= np.float32(0.1) * array
    for name, array in caught.value.result.params.items():
        np.testing.assert_allclose(array, wanted[name], rtol=1e-5, atol=1e-6)


def test_a_model_that_diverges():
    x, y = blobs()
    with pytest.raises(DivergedError, match="lower learning rate"):
        gm.fit(small_model(), (x, y), optimizer=gm.SGD(1e30), epochs=5, engine="inline")


LIES = {
    "shape": (lambda g: g | {"weight": g["weight"][:2]}, r"gradient of 'weight' is float32 of shape \(2,\).*shape \(4,\)"),
    "dtype": (lambda g: g | {"bias": np.zeros(1, np.int64)}, r"gradient of 'bias' is int64 of shape \(1,\)"),
    "missing": (lambda g: {"weight": g["weight"]}, r"names of the parameters, \['bias', 'weight'\]; got \['weight'\]"),
    "kind": (lambda g: [g["weight"], g["bias"]], "got a list"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("lie", sorted(LIES))
def test_gradients_that_do_not_fit(engine, lie):
    change, message = LIES[lie]

    def gradient(params, batch):
        loss, gradients = linear_gradient(params, batch)
        return loss, change(gradients)

    params, data = linear_problem()
    with pytest.raises(ModelError, match=message):
        gm.fit_gradient(gradient, params, data, epochs=1, engine=engine)


@pytest.mark.parametrize(
    ("answer", "message"), [(1.0, r"must return \(loss, gradients\), got float"), ((np.zeros(3), {}), "names of the parameters")]
)
def test_answers_that_do_not_fit(answer, message):
    params, data = linear_problem()
    with pytest.raises(ModelError, match=message):
        gm.fit_gradient(lambda params, batch: answer, params, data, epochs=1, engine="inline")


def test_a_loss_for_each_example_is_refused():
    def gradient(params, batch):
        return np.zeros(len(batch["x"])), linear_gradient(params, batch)[1]

    params, data = linear_problem()
    with pytest.raises(ModelError, match="the loss must be one number"):
        gm.fit_gradient(gradient, params, data, epochs=1, engine="inline")


def test_what_cannot_travel_fails_before_the_first_step():
    lock = __import__("threading").Lock()

    def gradient(params, batch):
        with lock:
            return linear_gradient(params, batch)

    params, data = linear_problem()
    with pytest.raises(ModelError, match=r"cannot be sent to worker processes .*lock"):
        gm.fit_gradient(gradient, params, data, epochs=1)


class Silent(Processes):
    """One worker never gets ready."""

    def _spawn(self, member, *arguments):
        super()._spawn(member, *arguments)
        os.kill(self._workers[member].process.pid, signal.SIGSTOP)


def test_a_worker_that_never_gets_ready(monkeypatch):
    monkeypatch.setattr(processes, "START_SECONDS", 0.1)
    params, data = linear_problem()
    engine = Silent()
    with pytest.raises(WorkerError, match=r"workers \[0\] did not get ready within 0.3 s"):
        gm.fit_gradient(linear_gradient, params, data, epochs=1, engine=engine, worker_timeout=0.3)
    assert engine.members == []


class Slow:
    """An engine whose clock runs: answers arrive just before they are looked for, past the deadline."""

    def __init__(self, inner):
        self._inner = inner
        self.members = []

    def start(self, job):
        arena = self._inner.start(job)
        self.members = self._inner.members
        return arena

    def wait_any(self, timeout):
        time.sleep(0.02)
        return self._inner.wait_any(timeout)

    def __getattr__(self, name):
        return getattr(self._inner, name)


def test_an_answer_that_has_arrived_counts_even_after_the_deadline():
    from gristmill.training.engine.inline import Inline

    params, data = linear_problem()
    result = gm.fit_gradient(linear_gradient, params, data, epochs=1, engine=Slow(Inline()), worker_timeout=0.001)
    assert result.report.deaths == {}


def test_a_death_is_seen_though_a_child_holds_the_socket():
    parent = os.getpid()

    def gradient(params, batch):
        if os.getpid() != parent:
            if os.fork() == 0:
                time.sleep(4)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        return linear_gradient(params, batch)

    params, data = linear_problem()
    with pytest.raises(WorkerError, match="was killed by SIGKILL"):
        gm.fit_gradient(gradient, params, data, epochs=1)


def test_how_a_process_ended():
    assert manner(3) == "exited with status 3"
    assert manner(-9) == "was killed by SIGKILL"
    assert manner(-99) == "was killed by signal 99"
    assert Failed(0, ValueError()).member == 0
