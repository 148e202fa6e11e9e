"""What compression did: per pass, per layer and in all."""

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

BATCHES = (1, 256)  # batch sizes that latency is measured at


@dataclass(frozen=True)
class Stage:
    """The model after one pass.

    `metric` is None without data; `error` is |y - y0| / |y0| of the first output against the original model; `latency_ms` is by
    batch size; `kernels` names what serves each Linear.
    """

    name: str
    metric: float | None
    error: float
    file_bytes: int
    weight_bytes: int
    latency_ms: dict[int, float]
    kernels: dict[str, str]
    seconds: float


@dataclass(frozen=True)
class Layer:
    """One weight before and after: `error` is |W - W0| / |W0|, latencies in ms by batch size."""

    name: str
    kind: str
    shape: tuple[int, ...]
    error: float
    sparsity: float
    bytes_before: int
    bytes_after: int
    latency_ms_before: dict[int, float]
    latency_ms_after: dict[int, float]


@dataclass(frozen=True)
class Report:
    """The measured outcome of `compress`. Print it for a table; `as_dict()` is JSON-compatible."""

    stages: tuple[Stage, ...]
    layers: tuple[Layer, ...]
    recipe: tuple[dict[str, Any], ...]
    metric: str

    @property
    def bytes_before(self) -> int:
        """Size of the original model's file."""
        return self.stages[0].file_bytes

    @property
    def bytes_after(self) -> int:
        """Size of the compressed model's file."""
        return self.stages[-1].file_bytes

    @property
    def drop(self) -> float | None:
        """How much of the metric was lost; None without data."""
        first, last = self.stages[0].metric, self.stages[-1].metric
        return None if first is None or last is None else first - last

    @property
    def sparsity(self) -> float:
        """The share of zeros over all measured weights."""
        sizes = [prod(layer.shape) for layer in self.layers]
        return sum(layer.sparsity * size for layer, size in zip(self.layers, sizes, strict=True)) / max(sum(sizes), 1)

    def as_dict(self) -> dict[str, Any]:
        total = {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "ratio": self.bytes_before / self.bytes_after,
            "sparsity": self.sparsity,
            "error": self.stages[-1].error,
            "drop": self.drop,
            "latency_ms_before": self.stages[0].latency_ms,
            "latency_ms_after": self.stages[-1].latency_ms,
        }
        return {
            "metric": self.metric,
            "total": total,
            "stages": [asdict(stage) for stage in self.stages],
            "layers": [asdict(layer) for layer in self.layers],
            "recipe": list(self.recipe),
        }

    def __str__(self) -> str:
        rows = [["stage", self.metric, "error", "file bytes", "weight bytes", *[f"ms at {b}" for b in BATCHES], "kernels"]]
        for s in self.stages:
            metric = "-" if s.metric is None else f"{s.metric:.4f}"
            times = [f"{s.latency_ms[b]:.3f}" for b in BATCHES]
            kernels = ", ".join(dict.fromkeys(s.kernels.values()))
            rows.append([s.name, metric, f"{s.error:.4f}", f"{s.file_bytes:,}", f"{s.weight_bytes:,}", *times, kernels])
        rows_of_layers = [["weight", "kind", "error", "sparsity", "bytes before", "after", *[f"ms at {b}" for b in BATCHES]]]
        for layer in self.layers:
            times = [f"{layer.latency_ms_before[b]:.3f} -> {layer.latency_ms_after[b]:.3f}" for b in BATCHES]
            sizes = [f"{layer.bytes_before:,}", f"{layer.bytes_after:,}"]
            rows_of_layers.append([layer.name, layer.kind, f"{layer.error:.4f}", f"{layer.sparsity:.3f}", *sizes, *times])
        return f"{_table(rows)}\n\n{_table(rows_of_layers)}"


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
