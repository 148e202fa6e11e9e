"""Knowledge distillation: a student learns to answer as its teacher does, at the output and inside."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np

from gristmill import losses
from gristmill.compression.calibration import batches, norms
from gristmill.compression.examples import Examples
from gristmill.compression.prune import Prune, smaller
from gristmill.compression.recipe import Context, Pass, is_number
from gristmill.errors import DataError, ModelError
from gristmill.model import Model, check_model
from gristmill.ops.op import same_type
from gristmill.optim import Adam, Optimizer, check_optimizer
from gristmill.runtime.session import Session
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array
from gristmill.tensor.selection import Pattern, scores
from gristmill.training import fit
from gristmill.training.sparsity import GradualPruning

BATCH = 64  # examples per run of the teacher
LOSSES = ("logits", "cosine", "mse")


@dataclass(frozen=True)
class Distill(Pass):
    """Train the model to answer as its teacher does, on the data that `compress` is given.

    The teacher's answers are computed once. A pruned model keeps its zeros: only stored values train. An int8 or int4 model
    trains the scales and biases with the rounding in place.

    Args:
        epochs: passes over the data.
        loss: on the output: "logits" for classifiers, softened by a temperature and mixed with the labels (Hinton, Vinyals and
            Dean 2015); "cosine" or "mse" for vectors, which needs no labels.
        temperature: softens both distributions; above 0.
        alpha: weight of the teacher's logits against the labels, in [0, 1]; at 1 no labels are needed.
        hidden: values inside that are to be the teacher's too (Jiao et al. 2020, "TinyBERT"): shell patterns of names that both
            graphs have, or a mapping from the student's names to the teacher's, as for a student with fewer layers. Their mean
            squared errors count relative to the variance of the teacher's values.
        hidden_weight: of the mean over the hidden values, against the output's 1.
        prune: prune on the way: the sparsity rises along a cubic over the first half of the steps, and the weights that it names
            end up sparse. They must be dense at the start.
        teacher: any model of the same inputs and outputs; default: the model that entered `compress`.
        optimizer: default Adam(1e-3).
        batch_size: examples per update.
        workers: processes to train with.
        precision: None, or "bf16" for faster products in training where the CPU has them.

    Raises:
        ModelError: an option lies outside its range, or the teacher does not fit the student.
        DataError: `compress` was given no data, or no labels where they count.

    Example:
        >>> import numpy as np, gristmill as gm
        >>> encoder = gm.zoo.bert(layers=2, hidden=16, heads=2, vocabulary=50, positions=16)
        >>> ids = np.random.default_rng(0).integers(0, 50, (32, 8))
        >>> data = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        >>> step = gm.Distill(2, loss="cosine", hidden=("*.output.LayerNorm",), prune=gm.Prune(0.75, names=("encoder.*",)))
        >>> small, _ = gm.compress(encoder, [step], data=data)
        >>> small.tensors["encoder.layer.0.output.dense.weight"].sparsity
        0.75
    """

    epochs: int = 10
    temperature: float = 2.0
    alpha: float = 0.5
    teacher: Model | None = None
    optimizer: Optimizer = field(default_factory=lambda: Adam(1e-3))
    batch_size: int = 32
    workers: int = 1
    loss: str = "logits"
    hidden: tuple[str, ...] | dict[str, str] = ()
    hidden_weight: float = 1.0
    prune: Prune | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        numbers = all(map(is_number, (self.epochs, self.temperature, self.alpha, self.hidden_weight)))
        if not numbers or self.epochs < 1 or not self.temperature > 0 or not 0 <= self.alpha <= 1 or not self.hidden_weight > 0:
            raise ModelError(
                "Distill: epochs must be at least 1, temperature and hidden_weight positive, alpha in [0, 1]; "
                f"got {self.epochs!r}, {self.temperature!r}, {self.hidden_weight!r}, {self.alpha!r}"
            )
        if self.loss not in LOSSES:
            raise ModelError(f"Distill: unknown loss {self.loss!r}; choose one of {', '.join(LOSSES)}")
        if self.prune is not None and not isinstance(self.prune, Prune):
            raise ModelError(f"Distill: prune must be a Prune(...), got {self.prune!r}")
        if isinstance(self.hidden, (str, list)):
            object.__setattr__(self, "hidden", (self.hidden,) if isinstance(self.hidden, str) else tuple(self.hidden))
        check_optimizer(self.optimizer)
        if self.teacher is not None:
            check_model(self.teacher)

    def apply(self, model: Model, context: Context) -> Model:
        if context.data is None:
            raise DataError("Distill needs examples: pass data= to compress")
        teacher = self.teacher or context.teacher
        check_pair(teacher, model)
        pairs = hidden_pairs(self.hidden, teacher, model)
        answers = answers_of(teacher, (teacher.outputs[0], *pairs.values()), context.data, context.threads)
        arrays = {**context.data.by_name(model), **self._wanted(model, context.data, answers[teacher.outputs[0]])}
        arrays |= {losses.target_of(model, ours): answers[theirs] for ours, theirs in pairs.items()}
        steps = self.epochs * -(-context.data.number // self.batch_size)
        result = fit(
            model,
            arrays,
            loss=self._loss(model, pairs, answers),
            optimizer=self.optimizer,
            epochs=self.epochs,
            batch_size=self.batch_size,
            workers=self.workers,
            engine="processes" if self.workers > 1 else "inline",
            slices=max(4, self.workers),
            seed=context.seed,
            pruning=None if self.prune is None else gradual(self.prune, model, context, end=max(1, steps // 2)),
            precision=self.precision,
            checkpoint=None if context.folder is None else context.folder / "distill.checkpoint",
            resume=context.folder is not None,
            progress=context.progress,
        )
        return result.model if self.prune is None else stored(result.model, self.prune.works_on(model), self.prune.pattern)

    def _wanted(self, model: Model, data: Examples, answers: Array) -> dict[str, Array]:
        """What the loss on the output compares it with."""
        if self.loss != "logits":
            return {losses.TARGET: answers}
        if data.target is None and self.alpha < 1:
            raise DataError("Distill(loss='logits') needs labels: pass data=(x, labels) to compress, or set alpha=1")
        labels = np.zeros(data.number, np.int64) if data.target is None else data.target
        return {losses.TEACHER: answers, losses.LABELS: labels}

    def _loss(self, model: Model, pairs: Mapping[str, str], answers: Mapping[str, Array]) -> losses.Loss:
        own = losses.distillation(self.temperature, self.alpha) if self.loss == "logits" else losses.find(self.loss)
        terms: dict[str, tuple[str | losses.Loss, float]] = {model.outputs[0]: (own, 1.0)}
        for ours, theirs in pairs.items():
            variance = max(float(np.var(answers[theirs], dtype=np.float64)), 1e-12)
            terms[ours] = ("mse", self.hidden_weight / (len(pairs) * variance))
        return losses.weighted(terms) if pairs else own


def check_pair(teacher: Model, student: Model) -> None:
    """Raise unless both models map the same inputs to the same output."""
    for model in (teacher, student):
        if len(model.outputs) != 1:
            raise ModelError(f"Distill needs models of one output, got {model}")
    theirs, ours = teacher.types[teacher.outputs[0]], student.types[student.outputs[0]]
    if dict(teacher.inputs) != dict(student.inputs) or theirs != ours:
        raise ModelError(f"teacher {teacher} and student {student} must agree in input and output shapes")


def gradual(prune: Prune, model: Model, context: Context, end: int) -> GradualPruning:
    """Return the schedule along which a pruning takes place within `end` steps.

    Raises:
        ModelError: it cannot be done gradually, or a weight is not dense.
    """
    if not is_number(prune.sparsity) or prune.scope not in (None, "layer") or Pattern.named(prune.pattern).of:
        raise ModelError("Distill prunes on the way to one sparsity in each weight: give a number, scope='layer' and blocks")
    names = prune.works_on(model)
    for name in names:
        if model.tensors[name].kind != "dense":
            raise ModelError(f"Distill cannot prune '{name}' on the way: it is {model.tensors[name].kind} already, not dense")
    inputs: Mapping[str, Array] = {}
    if prune.method == "wanda":
        given = "data" if prune.calibration is None else prune.calibration
        inputs = norms(model, names, batches(model, given, context, "Prune"), context.threads, "Prune")
    return GradualPruning(tuple(names), float(prune.sparsity), 1, end, max(1, end // 50), pattern=prune.pattern, norms=inputs)  # type: ignore[arg-type]


def stored(model: Model, names: Iterable[str], pattern: str) -> Model:
    """Return the model with weights of zero blocks in sparse form."""
    kind = Pattern.named(pattern)
    tensors: dict[str, Tensor] = {}
    for name in names:
        mask = (scores(model.tensors[name].dense(), kind) != 0).astype(np.uint8)
        tensors[name] = smaller(model.tensors[name], mask, kind.block)
    return model.replace(tensors=tensors)


def hidden_pairs(hidden: Iterable[str] | Mapping[str, str], teacher: Model, student: Model) -> dict[str, str]:
    """Return the hidden values to learn: the student's name of each, and the teacher's.

    Raises:
        ModelError: a name or pattern stands for none, or the two differ in type.
    """
    made = [name for node in student.nodes for name in node.outputs if name not in student.outputs]
    pairs: dict[str, str] = dict(hidden) if isinstance(hidden, Mapping) else {}
    for pattern in () if isinstance(hidden, Mapping) else hidden:
        found = [name for name in made if fnmatchcase(name, pattern)]
        if not found:
            raise ModelError(f"Distill: hidden pattern '{pattern}' matches no value inside the student")
        pairs |= {name: name for name in found}
    values = {name for node in teacher.nodes for name in node.outputs}
    for ours, theirs in pairs.items():
        if ours not in made or theirs not in values:
            raise ModelError(f"Distill: there is no value '{ours}' inside the student, or no '{theirs}' in the teacher")
        if not same_type(student.types[ours], teacher.types[theirs]):
            types = f"{student.types[ours]} in the student and {teacher.types[theirs]} in the teacher"
            raise ModelError(f"Distill: '{ours}' and '{theirs}' must have one type, they are {types}")
    return pairs


def answers_of(teacher: Model, values: Iterable[str], data: Examples, threads: int) -> dict[str, Array]:
    """Return the teacher's values for all examples, batch by batch."""
    session = Session(teacher.replace(outputs=tuple(dict.fromkeys(values))), threads=threads)
    parts = [session.execute(batch) for batch in data.batches(teacher, BATCH)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
