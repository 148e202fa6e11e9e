"""Who computes: engines, all with the same few verbs. A new engine is its file and its line in `ENGINES`.

An engine hosts `workers` members. The coordinator writes parameters into the Arena that `start` returns, tells the engine so
(`broadcast`), hands out leases (`submit`) and waits for whoever is ready (`wait_any`). Gradients arrive in the Arena's slots.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gristmill.errors import ModelError
from gristmill.tensor.parts import Array
from gristmill.training.arena import Arena, Sizes
from gristmill.training.shards import Lease
from gristmill.training.spec import Spec
from gristmill.training.task import Task


@dataclass(frozen=True)
class Job:
    """What an engine is started with.

    Args:
        task: what is computed.
        spec: of the parameters.
        data: arrays by name, the first axis being examples.
        slices: gradient slots.
        shuffled: whether leases point into `Arena.order` rather than straight into the data.
        workers: members to start.
        threads: of each worker; None divides the cores among them.
        timeout: seconds that a worker may take for an answer.
    """

    task: Task
    spec: Spec
    data: Mapping[str, Array]
    slices: int
    shuffled: bool
    workers: int
    threads: int | None
    timeout: float

    @property
    def examples(self) -> int:
        return len(next(iter(self.data.values())))

    def sizes(self) -> Sizes:
        kinds = tuple((name, array.dtype.str, array.shape) for name, array in self.data.items())
        return Sizes(self.spec.size, self.slices, self.examples if self.shuffled else 0, kinds)


@dataclass(frozen=True)
class Done:
    """A member has computed all its leases; `losses` are in their order."""

    member: int
    losses: list[float]


@dataclass(frozen=True)
class Failed:
    """A member's task raised: `error` is what the caller should see."""

    member: int
    error: Exception


@dataclass(frozen=True)
class Died:
    """A member is gone; what it had leased is free again."""

    member: int
    reason: str


Event = Done | Failed | Died


class Engine(Protocol):
    members: list[int]  # the living

    def start(self, job: Job) -> Arena:
        """Start the members.

        Raises:
            WorkerError: a member could not start.
        """

    def broadcast(self, what: str) -> None:
        """Make the Arena's `params` or `order`, just written, visible to all members."""

    def submit(self, member: int, leases: Sequence[Lease]) -> None:
        """Let a member that is idle compute leases. A member that is gone shows as `Died` in `wait_any`."""

    def wait_any(self, timeout: float) -> list[Event]:
        """Return what has happened, at least one event unless `timeout` seconds have passed; it may return early."""

    def stop(self, member: int | None = None) -> None:
        """End one member at once, or all and the engine; harmless when repeated."""


def _inline() -> Engine:
    from gristmill.training.engine.inline import Inline

    return Inline()


def _processes() -> Engine:
    from gristmill.training.engine.processes import Processes

    return Processes()


ENGINES: dict[str, Callable[[], Engine]] = {"inline": _inline, "processes": _processes}


def find(engine: str | Engine) -> Engine:
    """Return an engine by name, or the one given.

    Raises:
        ModelError: there is none of that name.
    """
    if not isinstance(engine, str) and hasattr(engine, "wait_any"):
        return engine
    if not isinstance(engine, str) or engine not in ENGINES:
        raise ModelError(f"unknown engine {engine!r}; choose one of {', '.join(ENGINES)}")
    return ENGINES[engine]()
