"""The measurements behind a report."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill.compression.break_even import blocks_of, break_even, dense_twin, layer_latency
from gristmill.compression.examples import Examples
from gristmill.compression.mixing import with_weights_of
from gristmill.compression.quality import Figure, agreement_of_ranks, answers, averaged, cosines, error_of, measured
from gristmill.compression.report import Layer, Stage
from gristmill.errors import GristmillError
from gristmill.formats.streaming import file_bytes
from gristmill.metrics import Metric
from gristmill.model import Model
from gristmill.runtime.explanation import Explanation
from gristmill.runtime.session import Session
from gristmill.runtime.timing import LENGTH, latency, random_inputs
from gristmill.tensor import Bitmask, Int4, Sparse, Tensor
from gristmill.tensor.parts import Array

BATCHES = (1, 256)  # rows that latency is measured at
SEQUENCES = ((1, LENGTH), (1, 128), (32, 128))  # examples and their length, where an example is a sequence
ONE_BY_ONE = 64  # examples that the error of each layer alone is taken on


@dataclass(frozen=True)
class Yardstick:
    """What a compressed model is held against: the original's answers to the same examples.

    Args:
        original: the model.
        examples: or None for random inputs.
        metric: or None.
        answers: of the original.
    """

    original: Model
    examples: Examples | None
    metric: str | Metric | None
    answers: Array

    def part(self, count: int) -> "Yardstick":
        """The same with at most `count` examples."""
        few = None if self.examples is None else self.examples.first(count)
        return Yardstick(self.original, few, self.metric, self.answers[:count])

    def figure(self, given: Array) -> Figure | None:
        """The metric of answers, where there is one."""
        if self.metric is None or self.examples is None:
            return None
        return measured(self.metric, given, self.answers, self.examples.target)


def measure_model(name: str, model: Model, yardstick: Yardstick, seconds: float, threads: int) -> Stage:
    """Measure a whole model: its answers against the original's and the labels, its size, and its speed on this machine."""
    given = yardstick.answers if model is yardstick.original else answers(model, yardstick.examples, threads)
    metric, cosine, ranks = yardstick.figure(given), None, None
    if yardstick.examples is not None:
        cosine, ranks = averaged(cosines(given, yardstick.answers)), agreement_of_ranks(given, yardstick.answers)
    session = Session(model, threads=threads)
    times = dict(timed(session))
    return Stage(
        name=name,
        metric=value_of(metric),
        metric_interval=interval_of(metric),
        error=error_of(given, yardstick.answers),
        cosine=value_of(cosine),
        cosine_interval=interval_of(cosine),
        spearman=value_of(ranks),
        spearman_interval=interval_of(ranks),
        file_bytes=file_bytes(model),
        weight_bytes=model.nbytes,
        latency_ms={case: 1e3 * each for case, (_, each) in times.items()},
        per_second={case: examples / each for case, (examples, each) in times.items()},
        kernels={row["node"]: row["product"] or row["kernel"] for row in explained(session) if row["weight"]},
        seconds=seconds,
        peak_bytes=memory("VmHWM"),
    )


def explained(session: Session) -> Explanation:
    """Say what serves the largest of the cases that are timed, or the smallest where the model does not take that."""
    batch, length = SEQUENCES[-1] if of_sequences(session.model) else (BATCHES[-1], LENGTH)
    try:
        return session.explain(**{n: a.shape for n, a in random_inputs(session.model, batch, length=length).items()})
    except (GristmillError, IndexError, ValueError):
        return session.explain()


def of_sequences(model: Model) -> bool:
    return any(isinstance(dim, str) for kind in model.inputs.values() for dim in kind.shape[1:])


def value_of(figure: Figure | None) -> float | None:
    return None if figure is None else figure.value


def interval_of(figure: Figure | None) -> tuple[float, float] | None:
    return None if figure is None else (figure.low, figure.high)


def timed(session: Session) -> Iterator[tuple[str, tuple[int, float]]]:
    """Yield cases by name, "examples" or "examples x length", with the number of examples and the seconds that a run takes."""
    if not of_sequences(session.model):
        for batch in BATCHES:
            yield str(batch), (batch, latency(session, random_inputs(session.model, batch)))
        return
    for batch, length in SEQUENCES:
        try:
            seconds = latency(session, random_inputs(session.model, batch, length=length))
        except (GristmillError, IndexError, ValueError):
            continue  # the model does not take sequences of this length
        yield f"{batch}x{length}", (batch, seconds)


def memory(which: str) -> int | None:
    """Return what Linux says of this process in bytes: VmRSS, resident now, or VmHWM, the most so far. None elsewhere."""
    status = Path("/proc/self/status")
    if not sys.platform.startswith("linux") or not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(lines[which].split()[0]) * 1024 if which in lines else None


def measure_layers(
    before: Model,
    after: Model,
    threads: int,
    yardstick: Yardstick | None = None,
    seconds: Mapping[str, float] | None = None,
    reverted: Mapping[str, float] | None = None,
) -> list[Layer]:
    """Compare every weight that the two models share. Weights alike in all that time depends on are timed once.

    Args:
        before, after: the original and the compressed model.
        threads: for kernels.
        yardstick: with examples, to say what each layer alone does to the answers.
        seconds: what the passes took on each weight, where they went weight by weight.
        reverted: the weights that were put back, and the error of the answers that each alone made before.
    """
    times: dict[Any, dict[str, float]] = {}

    def latency_of(tensor: Tensor) -> dict[str, float]:
        key = tensor.kind, tensor.shape, describe(tensor), tensor.nbytes
        if key not in times:
            times[key] = layer_latency(tensor, threads)
        return times[key]

    kept = [name for name in (*before.weights, *tables_changed(before, after)) if name in after.tensors]
    shared = [name for name in kept if after.tensors[name].shape == before.tensors[name].shape]
    put_back = dict(reverted or {})
    alone = {**output_errors(before, after, shared, yardstick, threads), **put_back}
    order = sorted(alone, key=lambda name: -alone[name])
    made = []
    for name in shared:
        old, new = before.tensors[name], after.tensors[name]
        made.append(
            Layer(
                name=name,
                kind=describe(new),
                shape=new.shape,
                error=error_of(new.dense(), old.dense()),
                output_error=alone.get(name),
                sensitivity_rank=order.index(name) + 1 if name in alone else None,
                sparsity=new.sparsity,
                seconds=None if seconds is None else seconds.get(name),
                bytes_before=old.nbytes,
                bytes_after=new.nbytes,
                latency_ms_before=latency_of(old) if name in before.weights else {},
                latency_ms_after=latency_of(new) if name in before.weights else {},
                latency_ms_dense=latency_of(dense_twin(new, threads)) if isinstance(new, (Sparse, Bitmask)) else None,
                break_even=break_even(new, threads) if isinstance(new, (Sparse, Bitmask)) else None,
                reverted=name in put_back,
            )
        )
    return made


def tables_changed(before: Model, after: Model) -> list[str]:
    """Return the tensors that are stored in another form and that no Linear multiplies by, such as tables of embeddings."""
    stored = {name: after.tensors[name].kind for name in before.tensors if name in after.tensors}
    return [name for name, kind in stored.items() if kind != before.tensors[name].kind and name not in before.weights]


def output_errors(
    before: Model, after: Model, names: Iterable[str], yardstick: Yardstick | None, threads: int
) -> dict[str, float]:
    """Return |y - y0| / |y0| of the original with one weight after the other as it is compressed; of those that differ."""
    if yardstick is None or yardstick.examples is None:
        return {}
    few = yardstick.part(ONE_BY_ONE)
    return {
        name: error_of(answers(with_weights_of(before, after, [name]), few.examples, threads), few.answers)
        for name in names
        if after.tensors[name] is not before.tensors[name]
    }


def describe(tensor: Tensor) -> str:
    """Name what a weight is stored as, such as "int8" or "1x4 float32"."""
    if isinstance(tensor, Int4):
        return f"int4 g{tensor.group}"
    if isinstance(tensor, Bitmask):
        return f"bitmask {tensor.precision}" + (f" g{tensor.group}" if tensor.group else "")
    if not isinstance(tensor, Sparse):
        return {"dense": "float32", "bf16": "bf16", "quantized": "int8"}.get(tensor.kind, tensor.kind)
    return f"{blocks_of(tensor)} {tensor.values.dtype}"
