"""Edge gradient descent and edge mini-batch gradient descent, in a byte budget."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gristmill import _core
from gristmill.autodiff import gradient_name, gradients
from gristmill.edge.plan import MemoryPlan, flat_size, input_types, padded, plan_memory
from gristmill.edge.update import Selection, select, write_start
from gristmill.errors import DivergedError, ModelError
from gristmill.losses import LOSS, attach
from gristmill.losses import find as find_loss
from gristmill.model import Model, check_model
from gristmill.optim import SGD, Optimizer, State, check_optimizer
from gristmill.runtime.arena import Memory
from gristmill.runtime.session import Session
from gristmill.runtime.threads import check_threads
from gristmill.tensor.parts import Array
from gristmill.training.data import model_data
from gristmill.training.progress import Bar

METHODS = ("mini-batch", "gradient-descent")
UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "kB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class EdgeResult:
    """An adapted model and what it took.

    `planned_bytes` was decided before the first allocation; `peak_bytes` is the most that was allocated at once.
    `history["loss"]` is the mean loss of each epoch, taken as its updates went on.
    """

    model: Model
    planned_bytes: int
    peak_bytes: int
    plan: MemoryPlan
    history: Mapping[str, Array]


def parse_bytes(memory: int | str) -> int:
    """Return a number of bytes from 4194304, "4MiB" or "4 MB".

    Raises:
        ModelError: it is no positive amount of bytes.

    Example:
        >>> parse_bytes("4MiB")
        4194304
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(memory))
    if not match or match[2] not in UNITS or float(match[1]) <= 0:
        raise ModelError(f"memory must be bytes or a text such as '4MiB' or '512 KiB', got {memory!r}")
    return int(float(match[1]) * UNITS[match[2]])


class EdgeTrainer:
    """Trains a model, dense or compressed, on the machine that runs it.

    Args:
        model: one input, one output; weights may be dense, sparse or int8.
        memory: the budget for everything training allocates beyond the model and the data: 4194304 or "4MiB".
        update: "all", "bias" (biases, normalisation and int8 scales), or "last:k" layers. Sparse weights keep their zeros; the
            int8 codes of updated layers change through a float32 master that counts against the budget.
        loss: "cross_entropy" or "mse".
        optimizer: default SGD(0.05).
        threads: default 1.

    Raises:
        ModelError: an option is unknown or does not fit the model.

    Example:
        >>> import numpy as np, gristmill as gm
        >>> x, y = np.eye(4, dtype=np.float32), np.arange(4)
        >>> result = gm.EdgeTrainer(gm.zoo.mlp([4, 4]), memory="64KiB").fit(x, y, epochs=2)
        >>> result.peak_bytes <= result.planned_bytes <= 65536
        True
    """

    def __init__(
        self,
        model: Model,
        memory: int | str,
        update: str = "all",
        loss: str = "cross_entropy",
        optimizer: Optimizer | None = None,
        threads: int = 1,
    ) -> None:
        if len(check_model(model).inputs) != 1:
            raise ModelError(f"EdgeTrainer takes models of one input, got {sorted(model.inputs)}")
        self.model = model
        self.budget = parse_bytes(memory)
        select(model, update)  # for its errors
        self.update = update
        self.loss = find_loss(loss)
        self.optimizer = SGD(0.05) if optimizer is None else check_optimizer(optimizer)
        self.threads = check_threads(threads)

    def fit(
        self,
        x: Array,
        y: Array,
        *,
        method: str = "mini-batch",
        epochs: int = 10,
        batch_size: int = 16,
        seed: int = 0,
        progress: bool | None = None,
    ) -> EdgeResult:
        """Adapt the model to local data.

        Args:
            x: float32 [examples, ...], as the model's input.
            y: int64 [examples] labels, or float32 targets. Both are converted as `gm.fit` does.
            method: "mini-batch" updates after every `batch_size` examples, in an order drawn from `seed`; "gradient-descent"
                after all of them, their gradients accumulated in micro-batches so that they fit.
            epochs: passes over the data.
            batch_size: of the mini-batch method.
            seed: of the order.
            progress: show a bar on stderr; None for: where that is a terminal.

        Raises:
            BudgetError: the budget is too small; `needed_bytes` says what would do. Nothing was allocated.
            ModelError: an option lies outside its range.
            DataError: the data is empty, of unequal lengths, not finite, or does not fit the model.
            DivergedError: the loss stopped being finite; the model is as it was.
        """
        if method not in METHODS:
            raise ModelError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
        for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if not isinstance(value, (int, np.integer)) or value < least:
                raise ModelError(f"{name} must be a whole number of at least {least}, got {value!r}")
        inputs = model_data(self.model, self.loss, (x, y))
        examples = len(next(iter(inputs.values())))
        batch = examples if method == "gradient-descent" else min(batch_size, examples)
        run = _Run(self, batch)
        losses = []
        with Bar(progress, epochs, steps=-(-examples // batch)) as bar:
            for epoch, order in enumerate(_orders(examples, epochs, seed, shuffle=method == "mini-batch")):
                losses.append(run.epoch(inputs, order))
                bar.epoch(epoch, losses[-1], {})
        peak = run.memory.peak
        return EdgeResult(run.finish(), run.plan.nbytes, peak, run.plan, {"loss": np.array(losses)})


def _orders(count: int, epochs: int, seed: int, shuffle: bool) -> Iterator[Array]:
    for epoch in range(epochs):
        yield np.random.default_rng((seed, epoch)).permutation(count) if shuffle else np.arange(count)


class _Run:
    """One fit: memory within the budget, and the descent over it."""

    def __init__(self, trainer: EdgeTrainer, batch: int) -> None:
        self.trainer, self.batch, self.step = trainer, batch, 0
        self.selection: Selection = select(trainer.model, trainer.update)
        shapes = {name: self.selection.model.tensors[name].trainable for name in self.selection.names}
        graph = gradients(attach(self.selection.model, trainer.loss), LOSS, self.selection.names)
        sketch = Session(graph, trainer.threads, trainable=shapes, in_place=True)
        self.plan = plan_memory(sketch, shapes, trainer.optimizer, batch, trainer.budget)
        self.memory = Memory(trainer.budget)
        size = flat_size(shapes)
        self.params = self._vector(size)
        self.grads = self._vector(size)
        self.total = self._vector(size) if self.plan.accumulator else self.grads
        self.state: State = trainer.optimizer.init(size)
        self.memory.charge(sum(array.nbytes for array in self.state.values()))
        self.slices = _split(self.params, shapes)
        for name, values in self.slices.items():
            write_start(trainer.model.tensors[name], values, name in self.selection.requantise)
        self.outputs = {gradient_name(name): part for name, part in _split(self.grads, shapes).items()}
        self.session = Session(graph, trainer.threads, trainable=self.slices, in_place=True, memory=self.memory)
        self.staging = {
            name: self.memory.allocate(kind.nbytes).view(kind.dtype).reshape(kind.extents)
            for name, kind in input_types(graph, self.plan.micro_batch).items()
        }

    def _vector(self, size: int) -> Array:
        vector = self.memory.allocate(size * 4).view(np.float32)
        vector[...] = 0
        return vector

    def epoch(self, inputs: Mapping[str, Array], order: Array) -> float:
        """Go through the data once in the given order; return the mean loss."""
        losses = [self._update(inputs, order[i : i + self.batch]) for i in range(0, len(order), self.batch)]
        counts = [min(self.batch, len(order) - i) for i in range(0, len(order), self.batch)]
        return float(np.average(losses, weights=counts))

    def _update(self, inputs: Mapping[str, Array], chosen: Array) -> float:
        """One step of descent on the mean gradient of the chosen examples."""
        loss, micro = 0.0, self.plan.micro_batch
        for first in range(0, len(chosen), micro):
            part = chosen[first : first + micro]
            share = len(part) / len(chosen)
            loss += share * self._gradients(inputs, part)
            if self.total is not self.grads:
                before = 1.0 if first else 0.0
                _core.weighted_sum([self.total, self.grads], [before, share], self.total, self.trainer.threads)
        squares, finite = _core.sum_of_squares(self.total, self.trainer.threads)
        if not (finite and np.isfinite(loss)):
            raise DivergedError(f"step {self.step + 1}: the loss is {loss}; lower the learning rate or look for bad examples")
        self.step += 1
        self.trainer.optimizer.update(self.params, self.total, self.state, self.step, squares, self.trainer.threads)
        return loss

    def _gradients(self, inputs: Mapping[str, Array], part: Array) -> float:
        given = {}
        for name, array in inputs.items():
            given[name] = self.staging[name][: len(part)]
            np.take(array, part, axis=0, out=given[name], mode="clip")  # "raise" would buffer the output
        return float(self.session.execute(given, self.outputs)[LOSS])

    def finish(self) -> Model:
        """Return the adapted model; its tensors take over the parameters' memory, the rest is given back first."""
        del self.session, self.grads, self.total, self.state, self.outputs, self.staging
        trained = self.slices
        return self.selection.finish(self.trainer.model, trained)


def _split(flat: Array, shapes: Mapping[str, Array]) -> dict[str, Array]:
    """Return views of a flat vector in the given shapes, each starting on a cache line."""
    parts, offset = {}, 0
    for name, like in shapes.items():
        parts[name] = flat[offset : offset + like.size].reshape(like.shape)
        offset += padded(like.size)
    return parts
