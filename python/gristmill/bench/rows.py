"""The rows of the table: what work, which rival was measured for the target, and how far ahead of it we must be."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gristmill.bench.engines import OURS


@dataclass(frozen=True)
class Row:
    """`target` is the ratio to reach: the rival's time over ours. Rows that train have `train`."""

    precision: str
    batch: int
    length: int
    threads: int
    rival: str = "openvino"
    target: float | None = None
    goal: float | None = None
    train: bool = False

    @property
    def name(self) -> str:
        return f"{'train-' * self.train}{self.precision}-{self.batch}x{self.length}-{self.threads}t"

    @property
    def title(self) -> str:
        plural = "s" * (self.threads != 1)
        return f"{'training step, ' * self.train}{self.precision}, {self.batch} x {self.length}, {self.threads} thread{plural}"

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
