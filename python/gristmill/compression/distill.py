"""Knowledge distillation: a student learns the teacher's soft answers beside the labels."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gristmill.compression.recipe import Context, Pass, is_number
from gristmill.errors import DataError, ModelError
from gristmill.losses import LABELS, TEACHER, distillation
from gristmill.model import Model, check_model
from gristmill.optim import Adam, Optimizer, check_optimizer
from gristmill.runtime.session import Session
from gristmill.tensor.parts import Array
from gristmill.training import fit

BATCH = 1024  # rows per run of the teacher


@dataclass(frozen=True)
class Distill(Pass):
    """Train the model on its teacher's logits, softened by a temperature, and on the labels (Hinton, Vinyals & Dean 2015).

    A pruned model keeps its zeros: only stored values train. An int8 model trains its scales and biases.

    Args:
        epochs: passes over the data.
        temperature: softens both distributions; above 0.
        alpha: weight of the teacher against the labels, in [0, 1].
        teacher: any model of the same inputs and outputs; default: the model that entered `compress`.
        optimizer: default Adam(1e-3).
        batch_size: examples per update.
        workers: processes to train with.

    Raises:
        ModelError: an option lies outside its range, or the teacher's outputs do not match the student's.
        DataError: `compress` was given no data.
    """

    epochs: int = 10
    temperature: float = 2.0
    alpha: float = 0.5
    teacher: Model | None = None
    optimizer: Optimizer = field(default_factory=lambda: Adam(1e-3))
    batch_size: int = 32
    workers: int = 1

    def __post_init__(self) -> None:
        numbers = all(map(is_number, (self.epochs, self.temperature, self.alpha)))
        if not numbers or self.epochs < 1 or not self.temperature > 0 or not 0 <= self.alpha <= 1:
            raise ModelError(
                "Distill: epochs must be at least 1, temperature positive, alpha in [0, 1]; "
                f"got {self.epochs!r}, {self.temperature!r}, {self.alpha!r}"
            )
        check_optimizer(self.optimizer)
        if self.teacher is not None:
            check_model(self.teacher)

    def describe(self) -> dict[str, Any]:
        settings = {"epochs": self.epochs, "temperature": self.temperature, "alpha": self.alpha, "batch_size": self.batch_size}
        return {"pass": "Distill", **settings, **self.optimizer.describe()}

    def apply(self, model: Model, context: Context) -> Model:
        if context.data is None or context.data[1] is None:
            raise DataError("Distill needs examples: pass data=(x, labels) to compress")
        x, labels = context.data
        teacher = self.teacher or context.teacher
        check_pair(teacher, model)
        (name,) = model.inputs
        result = fit(
            model,
            {name: x, TEACHER: answers(teacher, x, context.threads), LABELS: labels},
            loss=distillation(self.temperature, self.alpha),
            optimizer=self.optimizer,
            epochs=self.epochs,
            batch_size=self.batch_size,
            workers=self.workers,
            engine="processes" if self.workers > 1 else "inline",
            slices=max(4, self.workers),
            seed=context.seed,
            progress=context.progress,
        )
        return result.model


def check_pair(teacher: Model, student: Model) -> None:
    """Raise unless both models map the same input to the same output."""
    for model in (teacher, student):
        if len(model.inputs) != 1 or len(model.outputs) != 1:
            raise ModelError(f"Distill needs models of one input and one output, got {model}")
    theirs, ours = teacher.types[teacher.outputs[0]], student.types[student.outputs[0]]
    if list(teacher.inputs.values()) != list(student.inputs.values()) or theirs != ours:
        raise ModelError(f"teacher {teacher} and student {student} must agree in input and output shapes")


def answers(teacher: Model, x: Array, threads: int) -> Array:
    """Return the teacher's logits for all examples, batch by batch."""
    session = Session(teacher, threads=threads)
    (name,), (output,) = teacher.inputs, teacher.outputs
    x = np.ascontiguousarray(x, teacher.inputs[name].dtype)
    return np.concatenate([session.execute({name: x[i : i + BATCH]})[output] for i in range(0, len(x), BATCH)])
