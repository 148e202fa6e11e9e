"""The central server's dealings with its workers: hand out the slices of a batch, wait for all, cope with those who are lost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from gristmill.errors import WorkerError
from gristmill.training.arena import Arena
from gristmill.training.engine import Died, Done, Engine, Failed, Job
from gristmill.training.shards import Lease, share


@dataclass
class Report:
    """What the workers did.

    Args:
        leases: slices computed, by worker.
        deaths: why a worker was lost, by worker.
    """

    leases: dict[int, int] = field(default_factory=dict)
    deaths: dict[int, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"leases": dict(self.leases), "deaths": dict(self.deaths)}


class Server:
    """Lease slices to the members of an engine.

    Args:
        engine: where they compute.
        timeout: seconds that a member may take for one hand-out; then it counts as frozen and is ended.
    """

    def __init__(self, engine: Engine, timeout: float) -> None:
        self.engine, self.timeout = engine, timeout
        self.report = Report()
        self._busy: dict[int, list[Lease]] = {}
        self._deadlines: dict[int, float] = {}

    def start(self, job: Job) -> Arena:
        arena = self.engine.start(job)
        self.report.leases = dict.fromkeys(self.engine.members, 0)
        return arena

    def gather(self, leases: Sequence[Lease], step: int) -> Mapping[int, float]:
        """Have every lease computed by somebody; return the loss of each slot.

        Raises:
            WorkerError: the task raised, or nobody is left.
        """
        losses: dict[int, float] = {}
        open_leases = list(leases)
        while len(losses) < len(leases):
            if open_leases:
                open_leases = self._hand_out(open_leases, step)
            for event in self.engine.wait_any(max(0.0, min(self._deadlines.values(), default=0.0) - monotonic())):
                if isinstance(event, Done):
                    done = self._release(event.member)
                    self.report.leases[event.member] += len(done)
                    losses |= {lease.slot: loss for lease, loss in zip(done, event.losses, strict=True)}
                elif isinstance(event, Failed):
                    raise event.error
                else:
                    open_leases += self._lost(event, step)
            open_leases += self._drop_frozen(step)
        return losses

    def _hand_out(self, leases: list[Lease], step: int) -> list[Lease]:
        """Submit leases to idle members; return what has to wait because all are busy."""
        if not self.engine.members:
            deaths = "; ".join(f"worker {member} {reason}" for member, reason in self.report.deaths.items())
            raise WorkerError(f"no worker is left at step {step}: {deaths}")
        idle = [member for member in self.engine.members if member not in self._busy]
        if not idle:
            return leases
        for member, part in share(leases, idle).items():
            self._busy[member] = part
            self._deadlines[member] = monotonic() + self.timeout
            self.engine.submit(member, part)
        return []

    def _release(self, member: int) -> list[Lease]:
        self._deadlines.pop(member, None)
        return self._busy.pop(member, [])

    def _lost(self, event: Died, step: int) -> list[Lease]:
        self.report.deaths[event.member] = f"{event.reason} at step {step}"
        return self._release(event.member)

    def _drop_frozen(self, step: int) -> list[Lease]:
        """End members that are past their deadline; return their leases.

        The engine was asked before: what had arrived is taken, even where this process itself was stopped for a while.
        """
        leases: list[Lease] = []
        for member, deadline in list(self._deadlines.items()):
            if monotonic() >= deadline:
                self.engine.stop(member)
                reason = f"gave no answer for {self.timeout:g} s and was ended (raise worker_timeout= if its work takes longer)"
                leases += self._lost(Died(member, reason), step)
        return leases
