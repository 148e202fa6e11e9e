"""What a worker computes: the mean loss over some examples, and its gradient, written where it belongs.

A task is a description that travels to workers; `build` makes the thing that computes, once for each worker.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gristmill import autodiff, losses
from gristmill.errors import MissingExtraError, ModelError
from gristmill.formats import native
from gristmill.model import Model
from gristmill.ops import TensorType
from gristmill.runtime.session import Run, Session
from gristmill.tensor.parts import Array

Batch = Any  # in the structure of the data: a mapping, a tuple or one array
Arrays = Any  # named arrays, or a single one
GradientFunction = Callable[[Arrays, Batch], tuple[Any, Arrays]]

SINGLE = "params"  # the name of a parameter array that came without one


class Compute(Protocol):
    """The part of a task that runs."""

    def __call__(self, batch: dict[str, Array], slot: int, gradients: dict[str, Array]) -> float:
        """Fill `gradients`, the views of slot `slot`, and return the loss; both are means over the batch."""


class Task(Protocol):
    def build(self, params: dict[str, Array], threads: int) -> Compute:
        """Return what computes at the current values of `params`, views that somebody else updates."""

    def encode(self) -> tuple[dict[str, Any], bytes]:
        """Return a JSON-compatible description and a payload, for `decode`."""


@dataclass(frozen=True)
class ModelTask:
    """The gradient of a model's loss, by a Session over the differentiated graph."""

    model: Model
    loss: losses.Loss
    precision: str | None = None  # of the Session

    def build(self, params: dict[str, Array], threads: int) -> Compute:
        return _ModelGradient(self, params, threads)

    def encode(self) -> tuple[dict[str, Any], bytes]:
        return {"kind": "model", "loss": self.loss.as_dict(), "precision": self.precision}, native.to_bytes(self.model)


class _ModelGradient:
    def __init__(self, task: ModelTask, params: dict[str, Array], threads: int) -> None:
        training = autodiff.gradients(losses.attach(task.model, task.loss), losses.LOSS, params)
        self._session = Session(training, threads, task.precision, trainable=params)
        self._runs: dict[tuple[int, int], Run] = {}  # by slot and number of examples, of which an epoch has few

    def __call__(self, batch: dict[str, Array], slot: int, gradients: dict[str, Array]) -> float:
        key = slot, len(next(iter(batch.values())))
        if key not in self._runs:
            types = {name: TensorType(array.dtype, array.shape) for name, array in batch.items()}
            outputs = {autodiff.gradient_name(name): view for name, view in gradients.items()}
            self._runs[key] = self._session.prepare(types, outputs)
        return float(self._runs[key](batch)[losses.LOSS])


@dataclass(frozen=True)
class FunctionTask:
    """A gradient function of the user's own.

    Args:
        function: `gradient(params, batch) -> (loss, gradients)`.
        structure: how batches are handed over: "mapping", "tuple" or "single".
        single: whether the parameters are one array without a name.
    """

    function: GradientFunction
    structure: str
    single: bool

    def build(self, params: dict[str, Array], threads: int) -> Compute:
        return _FunctionGradient(self, params)

    def encode(self) -> tuple[dict[str, Any], bytes]:
        try:
            import cloudpickle  # type: ignore[import-untyped]
        except ImportError as error:
            raise MissingExtraError("cloudpickle", "train") from error
        header = {"kind": "function", "structure": self.structure, "single": self.single}
        try:
            return header, cloudpickle.dumps(self.function)
        except Exception as error:  # whatever the objects that the function refers to raise
            raise ModelError(
                f"the gradient function cannot be sent to worker processes ({error}); "
                "make what it refers to inside the function, or use engine='inline'"
            ) from error


class _FunctionGradient:
    def __init__(self, task: FunctionTask, params: dict[str, Array]) -> None:
        self._task = task
        frozen = {name: array.view() for name, array in params.items()}
        for array in frozen.values():
            array.flags.writeable = False
        self._params = frozen[SINGLE] if task.single else frozen

    def __call__(self, batch: dict[str, Array], slot: int, gradients: dict[str, Array]) -> float:
        result = self._task.function(self._params, restructured(batch, self._task.structure))
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ModelError(f"the gradient function must return (loss, gradients), got {type(result).__name__}")
        loss, found = result
        self._write({SINGLE: found} if self._task.single else found, gradients)
        if np.ndim(loss) != 0:
            raise ModelError(f"the loss must be one number, the mean over the batch; got shape {np.shape(loss)}")
        return float(loss)

    def _write(self, found: Any, gradients: dict[str, Array]) -> None:
        if not isinstance(found, Mapping) or found.keys() != gradients.keys():
            names = sorted(map(str, found)) if isinstance(found, Mapping) else f"a {type(found).__name__}"
            raise ModelError(f"gradients must be a mapping with the names of the parameters, {sorted(gradients)}; got {names}")
        for name, view in gradients.items():
            array = np.asarray(found[name])
            if array.shape != view.shape or array.dtype.kind != "f":
                raise ModelError(
                    f"the gradient of '{name}' is {array.dtype} of shape {array.shape}, "
                    f"the parameter is float32 of shape {view.shape}"
                )
            view[...] = array


def restructured(batch: dict[str, Array], structure: str) -> Batch:
    """Return a batch as its data were given."""
    if structure == "mapping":
        return batch
    arrays = tuple(batch.values())
    return arrays if structure == "tuple" else arrays[0]


def decode(header: dict[str, Any], payload: bytes) -> Task:
    """Rebuild a task in a worker. The payload comes from the process that started it, never from a file or a network."""
    if header["kind"] == "model":
        return ModelTask(native.from_bytes(payload), losses.Loss.from_dict(header["loss"]), header["precision"])
    import cloudpickle

    return FunctionTask(cloudpickle.loads(payload), header["structure"], header["single"])
