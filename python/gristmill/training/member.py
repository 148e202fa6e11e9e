"""What every member of an engine does with a lease: gather its examples, compute, and leave the gradient in its slot."""

import traceback
from typing import Any

from gristmill import errors
from gristmill.errors import GristmillError, WorkerError
from gristmill.training.arena import Arena
from gristmill.training.shards import Lease
from gristmill.training.spec import Spec
from gristmill.training.task import Task


class Member:
    """A task at work on an Arena."""

    def __init__(self, task: Task, spec: Spec, arena: Arena, shuffled: bool, threads: int) -> None:
        self._compute = task.build(spec.views(arena.params), threads)
        self._slots = [spec.views(slot) for slot in arena.slots]
        self._order, self._data, self._shuffled = arena.order, {}, shuffled
        for name, array in arena.data.items():
            self._data[name] = array.view()
            self._data[name].flags.writeable = False

    def compute(self, lease: Lease) -> float:
        """Fill the lease's slot and return the loss."""
        slot, start, stop = lease
        if self._shuffled:
            rows = self._order[start:stop]
            batch = {name: array.take(rows, axis=0) for name, array in self._data.items()}
        else:
            batch = {name: array[start:stop] for name, array in self._data.items()}
        return self._compute(batch, slot, self._slots[slot])


def failure(error: BaseException) -> dict[str, Any]:
    """Describe an exception in JSON-compatible terms."""
    kind = type(error).__name__ if isinstance(error, GristmillError) else ""
    return {"kind": kind, "message": str(error), "traceback": "".join(traceback.format_exception(error))}


def revive(member: int, description: dict[str, Any]) -> Exception:
    """Return the exception that the caller sees: one of our own as it was, any other as a WorkerError with its traceback."""
    text = f"worker {member} raised:\n{description['traceback']}"
    kind = getattr(errors, description["kind"], None) if description["kind"] else None
    if kind is None:
        return WorkerError(text)
    try:
        error = kind(description["message"])
    except TypeError:  # it takes more than a message
        return WorkerError(text)
    error.add_note(text)
    return error
