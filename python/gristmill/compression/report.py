"""What compression did: per pass, per layer and in all, with what it was made from."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from gristmill.compression.quality import drop_of
from gristmill.formats.atomic import replacing

Interval = tuple[float, float]
Table = list[list[str]]  # rows of cells, the first of which names the columns
MEGABYTE = 1e6
WORTH_SAYING = 1.05  # how many times slower than dense a layer is that the report speaks of


@dataclass(frozen=True)
class Stage:
    """The model after one pass.

    Args:
        name: of the pass; "original" for the model before all.
        metric, metric_interval: on the validation data, with what 95 % of other such data would give; None without labels.
        error: |y - y0| / |y0| of the answers against the original model's.
        cosine, cosine_interval: the mean cosine of the answers to the original model's; None without data.
        spearman, spearman_interval: the rank correlation of the similarities between all pairs of answers; None without data.
        file_bytes: of the model's file.
        weight_bytes: of its tensors as stored.
        latency_ms, per_second: the milliseconds of a run and the examples in a second, by "examples" or "examples x length".
        kernels: what serves each Linear.
        seconds: that the pass took.
        peak_bytes: the most memory that the process had resident so far; None where the system does not tell.
    """

    name: str
    metric: float | None
    metric_interval: Interval | None
    error: float | None
    cosine: float | None
    cosine_interval: Interval | None
    spearman: float | None
    spearman_interval: Interval | None
    file_bytes: int
    weight_bytes: int
    latency_ms: dict[str, float]
    per_second: dict[str, float]
    kernels: dict[str, str]
    seconds: float
    peak_bytes: int | None

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> "Stage":
        """Return a stage from what `asdict` made of it and JSON brought back."""
        intervals = ("metric_interval", "cosine_interval", "spearman_interval")
        restored: dict[str, Any] = {k: tuple(v) if k in intervals and v is not None else v for k, v in figures.items()}
        return cls(**restored)


@dataclass(frozen=True)
class Layer:
    """One weight before and after.

    Args:
        name, kind, shape: of the weight, and what it is stored as.
        error: |W - W0| / |W0|.
        output_error: |y - y0| / |y0| of the original model with this weight alone compressed; None without data.
        sensitivity_rank: 1 for the weight of the largest output error.
        sparsity: the share of weights that are zero.
        seconds: that local passes took on it; None where a pass treats all weights together.
        bytes_before, bytes_after: as stored.
        latency_ms_before, latency_ms_after: of the layer alone, by rows; empty where it was not timed.
        latency_ms_dense: of a sparse weight's dense twin in the same precision; None for other weights.
        break_even: the sparsity from which this kind is faster than dense here, by rows; None for other weights, or for never.
        reverted: whether it was put back to what it was, to keep to `max_drop`.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    error: float
    output_error: float | None
    sensitivity_rank: int | None
    sparsity: float
    seconds: float | None
    bytes_before: int
    bytes_after: int
    latency_ms_before: dict[str, float]
    latency_ms_after: dict[str, float]
    latency_ms_dense: dict[str, float] | None = None
    break_even: dict[str, float | None] | None = None
    reverted: bool = False

    @property
    def slower(self) -> dict[str, float]:
        """How many times slower the sparse weight is than its dense twin, for the rows where it is; where the line through
        several sparsities says otherwise, one of the two figures is noise."""
        dense, starts = self.latency_ms_dense or {}, self.break_even or {}
        ratios = {rows: self.latency_ms_after[rows] / each for rows, each in dense.items() if each > 0}
        return {
            rows: ratio
            for rows, ratio in ratios.items()
            if ratio >= WORTH_SAYING and ((start := starts.get(rows)) is None or start > self.sparsity)
        }


@dataclass(frozen=True)
class Report:
    """The measured outcome of `compress`. Print it for tables; `as_dict()` is JSON-compatible.

    Args:
        stages: the original, and the model after each pass.
        layers: each weight.
        recipe: the passes.
        metric: the name of what was measured; "" for nothing.
        provenance: what the model was made from and with.
        gate: `max_drop`, `met`, `reverted` (names of weights) and `evaluations`; None without `max_drop`.
        notes: what was left out of the measurements, and why.
    """

    stages: tuple[Stage, ...]
    layers: tuple[Layer, ...]
    recipe: tuple[dict[str, Any], ...]
    metric: str
    provenance: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

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
        """By how much the metric got worse; None without data."""
        return drop_of(self.metric, self.stages[0].metric, self.stages[-1].metric)

    @property
    def sparsity(self) -> float:
        """The share of zeros over all measured weights."""
        sizes = [prod(layer.shape) for layer in self.layers]
        return sum(layer.sparsity * size for layer, size in zip(self.layers, sizes, strict=True)) / max(sum(sizes), 1)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Plain sentences on what a reader should not miss: layers that sparsity makes slower here, and the gate."""
        return (*self.notes, *(text for layer in self.layers for text in _slower(layer)), *_gate(self))

    def as_dict(self) -> dict[str, Any]:
        """Return all figures as values that JSON has."""
        first, last = self.stages[0], self.stages[-1]
        total = {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "ratio": self.bytes_before / self.bytes_after,
            "sparsity": self.sparsity,
            "error": last.error,
            "drop": self.drop,
            "metric_before": first.metric,
            "metric_after": last.metric,
            "cosine": last.cosine,
            "spearman": last.spearman,
            "latency_ms_before": first.latency_ms,
            "latency_ms_after": last.latency_ms,
            "peak_bytes": last.peak_bytes,
        }
        return {
            "metric": self.metric,
            "total": total,
            "stages": [asdict(stage) for stage in self.stages],
            "layers": [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers],
            "recipe": list(self.recipe),
            "provenance": self.provenance,
            "gate": self.gate,
            "remarks": list(self.remarks),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.as_dict(), indent=1) + "\n", "utf-8")

    def plot(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write PNG files into a folder, which is made where there is none: size and speed against quality, and the layers.

        Returns:
            The paths.

        Raises:
            MissingExtraError: matplotlib, of the extra "compress", is not installed.
            OSError: they cannot be written.
        """
        from gristmill.compression.plot import plot_report

        return plot_report(self.as_dict(), Path(folder))

    def with_last(self, **changes: Any) -> "Report":
        """Return a copy with the last stage changed."""
        return replace(self, stages=(*self.stages[:-1], replace(self.stages[-1], **changes)))

    def __str__(self) -> str:
        figures = self.as_dict()
        return "\n\n".join([*map(_spaced, tables(figures)), *figures["remarks"]])


def _slower(layer: Layer) -> list[str]:
    said = []
    for rows, ratio in layer.slower.items():
        start = (layer.break_even or {}).get(rows)
        where = "no sparsity pays" if start is None else f"it pays from {start:.0%}"
        said.append(
            f"{layer.name}: {layer.kind} at {layer.sparsity:.0%} is {ratio:.2f} times slower than dense on {rows} "
            f"row{'s' * (rows != '1')} on this CPU; {where}. Stay dense where speed is what counts."
        )
    return said


def _gate(report: Report) -> list[str]:
    gate = report.gate
    if gate is None:
        return []
    put_back = gate["reverted"]
    said = [f"reverted to keep to max_drop: {', '.join(put_back)}"] if put_back else []
    drop = "unknown" if report.drop is None else f"{report.drop:.4f}"
    return [*said, f"gate: {report.metric} dropped by {drop}, {gate['max_drop']} allowed: {'met' if gate['met'] else 'not met'}"]


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Return a report's figures as tables: one row for each pass, one for each weight."""
    return [_stages(figures), _layers(figures)]


def _stages(figures: Mapping[str, Any]) -> Table:
    cases = list(figures["total"]["latency_ms_before"])
    agreed = any(row.get("cosine") is not None for row in figures["stages"])
    rows = [
        ["stage", figures["metric"] or "metric", "error", *(["cosine", "spearman"] if agreed else []), "file bytes",
         "weight bytes", *(f"ms at {case}" for case in cases), "kernels"]
    ]  # fmt: skip
    for row in figures["stages"]:
        agreement = [_number(row["cosine"]), _number(row["spearman"])] if agreed else []
        times = [_number(row["latency_ms"].get(case), 3) for case in cases]
        kernels = ", ".join(dict.fromkeys(row["kernels"].values()))
        metric = with_interval(row["metric"], row.get("metric_interval"))
        sizes = [f"{row['file_bytes']:,}", f"{row['weight_bytes']:,}"]
        rows.append([row["name"], metric, _number(row["error"]), *agreement, *sizes, *times, kernels])
    return rows


def _layers(figures: Mapping[str, Any]) -> Table:
    layers = figures["layers"]
    cases = list(layers[0]["latency_ms_after"]) if layers else []
    header = ["weight", "kind", "error", "output error", "rank", "sparsity", "bytes before", "after"]
    rows = [[*header, *(f"ms at {case}" for case in cases), "pays from"]]
    for row in layers:
        rank = "-" if row["sensitivity_rank"] is None else str(row["sensitivity_rank"])
        kind = f"{row['kind']} (reverted)" if row["reverted"] else row["kind"]
        times = [f"{row['latency_ms_before'][case]:.3f} -> {row['latency_ms_after'][case]:.3f}" for case in cases]
        sizes = [f"{row['bytes_before']:,}", f"{row['bytes_after']:,}"]
        errors = [_number(row["error"]), _number(row["output_error"]), rank, f"{row['sparsity']:.3f}"]
        rows.append([row["name"], kind, *errors, *sizes, *times, pays_from(row["break_even"])])
    return rows


def pays_from(break_even: Mapping[str, float | None] | None) -> str:
    """Return the break-even sparsities as text, by rows."""
    if break_even is None:
        return "-"
    return ", ".join(f"{'never' if share is None else f'{share:.0%}'} at {rows}" for rows, share in break_even.items())


def with_interval(value: float | None, interval: Interval | None) -> str:
    """Return a figure with its interval.

    Example:
        >>> with_interval(0.91, (0.88, 0.93))
        '0.9100 [0.8800, 0.9300]'
    """
    return _number(value) + ("" if interval is None else f" [{interval[0]:.4f}, {interval[1]:.4f}]")


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _spaced(rows: Table) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
