"""Gradient descent with a central server.

    split the data into batches, each batch into slices
    until convergence:
        the workers compute the gradients of their slices at the current parameters
        the server gathers and combines them
        the server updates the parameters
        the server broadcasts them to the workers

Every step is synchronous, so the result is that of one machine: bits depend on the seed and the number of slices, never on the
workers, their threads, the engine, or on who died on the way. Reference: Dean et al., "Large scale distributed deep networks",
NeurIPS 2012, for the server; Chen et al., "Revisiting distributed synchronous SGD", 2016, for the synchronous form.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from gristmill.errors import DivergedError, ModelError
from gristmill.formats.atomic import check_folder
from gristmill.optim import Optimizer, check_optimizer
from gristmill.runtime.threads import check_threads, default_threads
from gristmill.tensor.parts import Array
from gristmill.training import checkpoint, shards
from gristmill.training.aggregate import Aggregator
from gristmill.training.checkpoint import Cursor, State
from gristmill.training.convergence import Until
from gristmill.training.engine import Engine, Job, find
from gristmill.training.interrupts import Interrupts
from gristmill.training.progress import Bar
from gristmill.training.server import Report, Server
from gristmill.training.sparsity import GradualPruning, Masks
from gristmill.training.spec import Spec
from gristmill.training.task import Task

REDUCTIONS = ("mean", "sum")
ITEMS_PER_THREAD = 1 << 18  # a smaller update is over before a second thread has woken up
Measure = Callable[[Mapping[str, Array]], Callable[[], dict[str, float]]]


@dataclass(frozen=True)
class Settings:
    """How to descend; `gristmill.fit` explains each field.

    Raises:
        ModelError: a setting lies outside its range, or two contradict each other.
        OSError: the checkpoint could not be written.
    """

    optimizer: Optimizer
    until: Until
    workers: int
    engine: str | Engine
    batch_size: int | None
    slices: int
    seed: int
    reduction: str
    checkpoint: str | os.PathLike[str] | None
    resume: bool
    threads: int | None
    worker_timeout: float
    progress: bool | None

    def __post_init__(self) -> None:
        for name, least in (("workers", 1), ("slices", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= least
            if not whole and not (name == "batch_size" and value is None):
                raise ModelError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if self.slices < self.workers:
            raise ModelError(
                f"{self.workers} workers need at least {self.workers} slices of each batch, got slices={self.slices}; "
                "set slices= once for all worker counts that must give the same result"
            )
        if self.reduction not in REDUCTIONS:
            raise ModelError(f"unknown reduction {self.reduction!r}; choose one of {', '.join(REDUCTIONS)}")
        check_optimizer(self.optimizer)
        if not isinstance(self.worker_timeout, (int, float)) or not self.worker_timeout > 0:
            raise ModelError(f"worker_timeout must be a positive number of seconds, got {self.worker_timeout!r}")
        if self.resume and self.checkpoint is None:
            raise ModelError("resume=True needs checkpoint=, the path to resume from")
        if self.checkpoint is not None:
            check_folder(self.checkpoint)
        if self.threads is not None:
            check_threads(self.threads)

    def describe(self) -> dict[str, Any]:
        """What the result depends on, in JSON-compatible terms."""
        own = {name: getattr(self, name) for name in ("batch_size", "slices", "seed", "reduction")}
        settings = {**own, **self.optimizer.describe()}
        return {name: value.item() if isinstance(value, np.generic) else value for name, value in settings.items()}

    def fingerprint(self, spec: Spec, data: Mapping[str, Array]) -> dict[str, Any]:
        """What a checkpoint must have in common with a run that resumes it."""
        kinds = {name: [str(array.dtype), *array.shape] for name, array in data.items()}
        return {**self.describe(), "parameters": dict(spec.shapes), "data": kinds}


@dataclass(frozen=True)
class Outcome:
    """What a descent ends with: float32 arrays by name, one number per epoch by name, and why it ended."""

    params: dict[str, Array]
    history: dict[str, Array]
    report: Report
    stopped: str


class Descent:
    """One run.

    Args:
        task: what workers compute.
        spec: of the parameters.
        data: arrays by name, the first axis being examples.
        settings: how to descend.
        identity: further settings that a checkpoint must have in common.
        measure: given the parameters as they change, returns what computes the metrics of an epoch.
        pruning: what becomes of weights after each update.
    """

    def __init__(
        self,
        task: Task,
        spec: Spec,
        data: Mapping[str, Array],
        settings: Settings,
        identity: Mapping[str, Any] | None = None,
        measure: Measure | None = None,
        pruning: GradualPruning | None = None,
    ) -> None:
        self.task, self.spec, self.data, self.settings, self.measure = task, spec, data, settings, measure
        self.pruning = pruning
        self.examples = len(next(iter(data.values())))
        self.batch_size = min(settings.batch_size or self.examples, self.examples)
        self.shuffled = self.batch_size < self.examples  # the order within a full batch is of no consequence
        # More slices than examples would stay empty, and each takes the room of a gradient.
        self.slices = min(settings.slices, self.batch_size)
        self.steps = shards.steps_per_epoch(self.examples, self.batch_size)
        self.fingerprint = {**settings.fingerprint(spec, data), **(identity or {})}
        self.interrupts = Interrupts()

    def run(self, initial: Mapping[str, Array]) -> Outcome:
        """Start the workers, descend, and stop the workers, come what may."""
        settings = self.settings
        job = Job(
            self.task, self.spec, self.data, self.slices, self.shuffled, settings.workers, settings.threads,
            settings.worker_timeout,
        )  # fmt: skip
        self.server = Server(find(settings.engine), settings.worker_timeout)
        self.engine = self.server.engine
        with self.interrupts:
            try:
                self.arena = self.server.start(job)
                return self._descend(initial)
            finally:
                with self.interrupts.held():
                    self.engine.stop()

    def _descend(self, initial: Mapping[str, Array]) -> Outcome:
        settings, arena = self.settings, self.arena
        self.threads = max(1, min(default_threads(), self.spec.size // ITEMS_PER_THREAD))
        self.aggregator = Aggregator(arena.slots, settings.reduction, self.threads)
        self.state = State(arena.params, settings.optimizer.init(self.spec.size))
        self.spec.write(initial, arena.params)
        if settings.resume and settings.checkpoint is not None and Path(settings.checkpoint).exists():
            checkpoint.load(settings.checkpoint, self.state, self.spec, self.fingerprint)
        self.masks = None if self.pruning is None else Masks(self.pruning, self.spec.views(arena.params), self.threads)
        self.engine.broadcast("params")
        metrics = self.measure(self.spec.views(arena.params)) if self.measure else dict
        with Bar(settings.progress, settings.until.epochs, self.steps) as bar:
            while (stopped := settings.until.reached(self.state.history)) is None:
                try:
                    self._epoch(bar)
                except DivergedError as error:
                    error.result = self._outcome("diverged")
                    raise
                except KeyboardInterrupt:
                    self._save()
                    raise
                with self.interrupts.held():
                    self._close_epoch(metrics, bar)
        return self._outcome(stopped)

    def _epoch(self, bar: Bar) -> None:
        """Visit every example once, from wherever the cursor stands."""
        settings, arena, state = self.settings, self.arena, self.state
        if self.shuffled:
            shards.shuffle(arena.order, settings.seed, state.cursor.epoch)
            self.engine.broadcast("order")
        while state.cursor.batch < self.steps:
            started = perf_counter()
            step = state.cursor.step + 1
            leases = shards.cut(self.examples, self.batch_size, state.cursor.batch, self.slices)
            losses = self.server.gather(leases, step)
            loss, squares = self.aggregator.combine(leases, losses, step)
            with self.interrupts.held():
                settings.optimizer.update(state.params, self.aggregator.gradient, state.optimizer, step, squares, self.threads)
                if self.masks is not None:
                    self.masks.apply(step)
                self.engine.broadcast("params")
                self._advance(loss, squares, leases[-1].stop - leases[0].start, perf_counter() - started)
            bar.step(state.cursor.epoch, state.cursor.batch, loss)

    def _advance(self, loss: float, squares: float, examples: int, seconds: float) -> None:
        cursor = self.state.cursor
        cursor.batch += 1
        cursor.step += 1
        cursor.loss += loss * examples
        cursor.squares += squares
        cursor.seconds += seconds

    def _close_epoch(self, metrics: Callable[[], dict[str, float]], bar: Bar) -> None:
        """Write history and checkpoint, and turn to the next epoch."""
        cursor = self.state.cursor
        values = metrics()
        row = {
            "loss": cursor.loss / self.examples,
            "gradient_norm": sqrt(cursor.squares / self.steps),
            "seconds": cursor.seconds,
            "examples_per_second": self.examples / max(cursor.seconds, 1e-9),
            **values,
        }
        self.state.history = {name: [*self.state.history.get(name, []), value] for name, value in row.items()}
        self.state.cursor = Cursor(epoch=cursor.epoch + 1, step=cursor.step)
        bar.epoch(cursor.epoch, row["loss"], values)
        self._save()

    def _save(self) -> None:
        if self.settings.checkpoint is not None:
            checkpoint.save(self.settings.checkpoint, self.state, self.spec, self.fingerprint)

    def _outcome(self, stopped: str) -> Outcome:
        params = {name: view.copy() for name, view in self.spec.views(self.state.params).items()}
        history = {name: np.asarray(values, np.float64) for name, values in self.state.history.items()}
        return Outcome(params, history, self.server.report, stopped)
