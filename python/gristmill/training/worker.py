"""The worker process: `python -m gristmill.training.worker SOCKET ARENA PARENT`, started by engine/processes.py only.

SOCKET and ARENA are inherited descriptors, PARENT is the process to die with. The first message describes the job; each
further one is a list of leases, answered by their losses.
"""

import ctypes
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

from gristmill.training import task
from gristmill.training.arena import Sizes, carve, map_file
from gristmill.training.member import Member, failure
from gristmill.training.messages import Channel
from gristmill.training.shards import Lease
from gristmill.training.spec import Spec

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    connection, arena, parent = map(int, arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinator says when to stop
    yield_to_coordinator()
    die_with(parent)
    for descriptor in (connection, arena):
        os.set_inheritable(descriptor, False)
    channel = Channel(socket.socket(fileno=connection))
    with suppress(EOFError, ConnectionError):  # the coordinator is done with us, or gone
        serve(channel, arena)


def die_with(parent: int) -> None:
    """Ask the kernel to end this process when its parent dies; elsewhere than on Linux the closed socket has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(0)


def yield_to_coordinator() -> None:
    """Wake up without pushing others off their core: the coordinator, who may just be about to wake the next worker."""
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):  # a sandbox may forbid it; it is a matter of speed alone
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def serve(channel: Channel, descriptor: int) -> None:
    """Answer messages until the other end closes."""
    job, payload = channel.receive()
    try:
        member = prepare(job, payload, descriptor)
    except BaseException as error:
        channel.send({"failed": failure(error)})
        return
    channel.send({"ready": True})
    spin: float = job["spin"]
    while True:
        message, _ = channel.receive(spin)
        try:
            answer: dict[str, Any] = {"losses": [member.compute(Lease(*lease)) for lease in message["leases"]]}
        except BaseException as error:  # even SystemExit: the user's function must not end us unheard
            answer = {"failed": failure(error)}
        channel.send(answer)


def prepare(job: dict[str, Any], payload: bytes, descriptor: int) -> Member:
    """Make ready what a job describes."""
    sys.path[:] = job["path"]
    restore_environment(job["environment"])
    sizes = Sizes.from_dict(job["sizes"])
    arena = carve(sizes, map_file(descriptor, sizes.nbytes))
    spec = Spec({name: tuple(shape) for name, shape in job["shapes"]})
    return Member(task.decode(job["task"], payload), spec, arena, job["shuffled"], job["threads"])


def restore_environment(variables: dict[str, str | None]) -> None:
    """Undo what only the start of this process needed."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


if __name__ == "__main__":
    main(sys.argv[1:])
