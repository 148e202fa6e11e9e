"""All members in this process, one after the other: for debugging, small models and tests."""

from collections.abc import Sequence

from gristmill.errors import GristmillError
from gristmill.runtime.threads import check_threads
from gristmill.training.arena import Arena, private
from gristmill.training.engine import Died, Done, Event, Failed, Job
from gristmill.training.member import Member, failure, revive
from gristmill.training.shards import Lease


class Inline:
    """Compute in the calling thread; nothing is copied and nothing is started."""

    def __init__(self) -> None:
        self.members: list[int] = []
        self._waiting: dict[int, list[Lease]] = {}

    def start(self, job: Job) -> Arena:
        arena = private(job.sizes(), job.data)
        self._member = Member(job.task, job.spec, arena, job.shuffled, check_threads(job.threads))
        self.members = list(range(job.workers))
        return arena

    def broadcast(self, what: str) -> None:
        pass  # members read the very arrays that the coordinator writes

    def submit(self, member: int, leases: Sequence[Lease]) -> None:
        self._waiting[member] = list(leases)

    def wait_any(self, timeout: float) -> list[Event]:
        if not self._waiting:
            return []
        member = next(iter(self._waiting))
        leases = self._waiting.pop(member)
        if member not in self.members:
            return [Died(member, "was stopped")]
        try:
            return [Done(member, [self._member.compute(lease) for lease in leases])]
        except Exception as error:
            if isinstance(error, GristmillError):
                return [Failed(member, error)]
            revived = revive(member, failure(error))
            revived.__cause__ = error
            return [Failed(member, revived)]

    def stop(self, member: int | None = None) -> None:
        self.members = [] if member is None else [other for other in self.members if other != member]
