"""The rows of the table: what work, which rival was measured for the target, and how far ahead of it we must be."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gristmill.bench.engines import OURS


@dataclass(frozen=True)
class Row:
    """`target` is the ratio to reach: the rival's time over ours. Rows that train have `train`.

    In rows with `pruned`, such as "4x4-80", our weights are in blocks of that shape with that percentage of zeros. Speed alone is
    told: they are pruned by magnitude and not retrained. Rivals run dense, and so do we once more, beside it.
    """

    precision: str
    batch: int
    length: int
    threads: int
    rival: str = "openvino"
    target: float | None = None
    goal: float | None = None
    train: bool = False
    pruned: str = ""

    @property
    def name(self) -> str:
        kind = f"{self.pruned}-" if self.pruned else "train-" * self.train
        return f"{kind}{self.precision}-{self.batch}x{self.length}-{self.threads}t"

    @property
    def title(self) -> str:
        plural = "s" * (self.threads != 1)
        block, _, percent = self.pruned.partition("-")
        form = f"{percent} % zeros in {block}, " if self.pruned else "training step, " * self.train
        return f"{form}{self.precision}, {self.batch} x {self.length}, {self.threads} thread{plural}"

    @property
    def latency(self) -> bool:
        """Whether one sentence is waited for; otherwise the figure is sentences a second."""
        return self.batch == 1


ROWS = (
    Row("int8", 32, 128, 2, target=1.2, goal=1.4),
    Row("int8", 32, 16, 2, target=1.2, goal=1.4),
    Row("int8", 1, 16, 2, target=1.45, goal=1.8),
    Row("int8", 1, 128, 1, target=1.2, goal=1.4),
    Row("int8", 32, 128, 1),
    Row("bf16", 32, 128, 2, target=1.05, goal=1.2),
    Row("fp32", 32, 128, 2, target=1.0, goal=1.1),
    Row("fp32", 32, 128, 1),
    Row("fp32", 32, 128, 2, rival="torch", target=1.5, train=True),
    Row("bf16", 32, 128, 2, rival="torch", target=1.0, train=True),
    Row("int8", 32, 128, 2, target=2.5, goal=3.5, pruned="4x4-80"),
    Row("int8", 32, 128, 2, target=2.5, goal=3.5, pruned="2x4-80"),
    Row("int8", 32, 128, 2, target=2.5, goal=3.5, pruned="1x4-80"),
    Row("int8", 32, 128, 2, target=1.4, pruned="2x4-50"),
    Row("int8", 32, 128, 2, target=1.4, pruned="4x4-50"),
    Row("int8", 1, 128, 1, target=2.0, pruned="2x4-80"),
)
QUICK = ("int8-32x128-2t", "int8-1x16-2t", "fp32-32x128-2t")

# Settings of a rival that are raced against each other; the fastest of each row is its figure.
VARIANTS = {
    ("openvino", "int8"): ("latency", "latency-bf16"),
    ("openvino", "bf16"): ("latency",),
    ("openvino", "fp32"): ("latency",),
    ("onnxruntime", "int8"): ("", "tensor"),
    ("onnxruntime", "fp32"): ("",),
    ("ctranslate2", "int8"): ("",),
    ("ctranslate2", "fp32"): ("",),
    ("torch", "int8"): ("",),
    ("torch", "bf16"): ("",),
    ("torch", "fp32"): ("",),
}
STREAMING = {"latency": "streams", "latency-bf16": "streams-bf16"}


def contenders(row: Row) -> Iterator[tuple[str, str]]:
    """Yield (engine, variant) of a row, ours first."""
    if row.pruned:
        yield OURS, row.pruned
    yield OURS, ""
    if row.train:
        yield "torch", ""
        return
    for (engine, precision), variants in VARIANTS.items():
        if precision != row.precision:
            continue
        for variant in variants:
            yield engine, variant
            if variant in STREAMING and row.threads > 1 and not row.latency:
                yield engine, STREAMING[variant]


def scaled(rows: tuple[Row, ...], threads: int | None) -> tuple[Row, ...]:
    """Give the rows of two threads another count."""
    return tuple(replace(row, threads=threads) if threads and row.threads > 1 else row for row in rows)
