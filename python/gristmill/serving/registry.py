"""The models that a server hosts: their names, their metadata in the protocol's terms, and their sessions."""

import logging
import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gristmill.errors import BudgetError, ModelError, ServingError
from gristmill.model import Model
from gristmill.ops import TensorType
from gristmill.runtime.session import Session
from gristmill.serving.limits import MAX_RANK, Limits
from gristmill.serving.refusal import Reason, Refusal, need
from gristmill.serving.tensors import DATATYPES, Array

log = logging.getLogger("gristmill.serving")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
VERSION = "1"
SHAPES = 256  # remembered per model as fitting the memory bound

ModelSource = Model | str | os.PathLike[str]


@dataclass(frozen=True)
class Port:
    """An input or output of a hosted model."""

    name: str
    datatype: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]

    @property
    def wire_shape(self) -> list[int]:
        """The shape with -1 for a dimension that may vary."""
        return [-1 if isinstance(dim, str) else dim for dim in self.shape]

    def admit(self, datatype: str, shape: Sequence[int]) -> None:
        """Raise a Refusal unless a tensor of this datatype and shape can be given here."""
        need(datatype != "BYTES", f"input '{self.name}': BYTES tensors are not supported")
        need(datatype == self.datatype, f"input '{self.name}': datatype must be {self.datatype}")
        fits = len(shape) == len(self.shape) and all(
            isinstance(want, str) or have == want for have, want in zip(shape, self.shape, strict=True)
        )
        need(fits and min(shape, default=0) >= 0, f"input '{self.name}': shape must be {self.wire_shape}")


class HostedModel:
    """A model under a name, with one session for each run that may go on at the same time.

    Args:
        name: letters, digits, dot, underscore and hyphen, at most 128.
        model: what to run.
        threads: of each session.
        limits: of the server.

    Raises:
        ServingError: the name is not a strict token, or a value of the model has a dtype that the protocol cannot carry.
    """

    def __init__(self, name: str, model: Model, threads: int | None, limits: Limits) -> None:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ServingError(f"model name {name!r} must be 1 to 128 letters, digits, '.', '_' or '-', a letter or digit first")
        self.name, self.limits = name, limits
        self.inputs = {key: _port(name, key, kind) for key, kind in model.inputs.items()}
        self.outputs = {key: _port(name, key, model.types[key]) for key in model.outputs}
        self._session = Session(model, threads)
        self._sessions = [self._session, *(self._session.clone() for _ in range(limits.max_concurrent - 1))]
        self._fitting: OrderedDict[tuple[tuple[int, ...], ...], None] = OrderedDict()
        self._warm_up()

    def _warm_up(self) -> None:
        """Run once on zeros, varying dimensions taken as 1: weights get packed, and a model that cannot run fails now."""
        shapes = {name: [1 if isinstance(dim, str) else dim for dim in port.shape] for name, port in self.inputs.items()}
        try:
            self.run({name: np.zeros(shapes[name], port.dtype) for name, port in self.inputs.items()})
        except (Refusal, ModelError) as error:
            raise ServingError(f"model {self.name!r} cannot be served: {error}") from error

    def check(self, inputs: Mapping[str, Array]) -> None:
        """Raise a Refusal unless every input is there and dimensions of one name are equal."""
        missing = [name for name in self.inputs if name not in inputs]
        need(not missing, f"input '{missing[0] if missing else ''}' is missing")
        symbols: dict[str, int] = {}
        for name, port in self.inputs.items():
            for have, want in zip(inputs[name].shape, port.shape, strict=True):
                if isinstance(want, str):
                    fits = have == symbols.setdefault(want, have)
                    need(fits, f"input '{name}': dimension '{want}' differs from that of another input")

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute all outputs. Called by at most `max_concurrent` threads at the same time.

        Raises:
            Refusal: the shapes do not fit the model, or the run would need more memory than `max_working_bytes`.
        """
        session = self._sessions.pop()
        try:
            self._check_memory(session, inputs)
            return session.execute(inputs)
        finally:
            self._sessions.append(session)

    def _check_memory(self, session: Session, inputs: Mapping[str, Array]) -> None:
        # A small input may need large activations: plan, which allocates nothing, before the first run of a shape.
        key = tuple(inputs[name].shape for name in self.inputs)
        if key in self._fitting:
            return
        types = {name: TensorType(port.dtype, inputs[name].shape) for name, port in self.inputs.items()}
        try:
            nbytes = session.layout(types).nbytes
        except BudgetError as error:
            raise Refusal(Reason.TOO_LARGE, f"a run of these shapes needs {error.needed_bytes} bytes, no machine's") from error
        except ModelError as error:
            log.warning("model %s refuses shapes %s: %s", self.name, key, error)
            raise Refusal(Reason.INVALID, f"the model does not take inputs of shapes {', '.join(map(str, key))}") from error
        if nbytes > self.limits.max_working_bytes:
            message = f"a run of these shapes needs {nbytes} bytes, the server allows {self.limits.max_working_bytes}"
            raise Refusal(Reason.TOO_LARGE, message)
        self._fitting[key] = None
        while len(self._fitting) > SHAPES:
            self._fitting.popitem(last=False)


def _port(model: str, name: str, kind: TensorType) -> Port:
    if kind.dtype not in DATATYPES or len(kind.shape) > MAX_RANK:
        raise ServingError(f"model {model!r}: '{name}' is {kind}, which the protocol cannot carry")
    return Port(name, DATATYPES[kind.dtype], kind.dtype, kind.shape)


class Registry:
    """The hosted models by name."""

    def __init__(self, models: Mapping[str, HostedModel]) -> None:
        self.models = dict(models)

    def find(self, name: str, version: str = "") -> HostedModel:
        """Return a model.

        Raises:
            Refusal: there is none of this name, or none of this version ("" takes the only one, "1").
        """
        hosted = self.models.get(name)
        if hosted is None or version not in ("", VERSION):
            raise Refusal(Reason.NOT_FOUND, "unknown model or version")
        return hosted


def host_models(models: Model | Mapping[str, ModelSource], threads: int | None, limits: Limits) -> Registry:
    """Compile models for serving; a lone Model is called "model", paths are loaded.

    Raises:
        ServingError: there is no model, or one cannot be hosted.
        FormatError: a file is damaged.
    """
    named: Mapping[str, ModelSource] = {"model": models} if isinstance(models, Model) else models
    if not isinstance(named, Mapping) or not named:
        raise ServingError(f"models must be a Model or a mapping of names to models or paths, got {models!r}")
    return Registry({name: HostedModel(name, _loaded(source), threads, limits) for name, source in named.items()})


def _loaded(source: ModelSource) -> Model:
    if isinstance(source, Model):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise ModelError(f"a hosted model must be a Model or a path, got {type(source).__name__}")
    from gristmill.formats import load

    return load(source)
