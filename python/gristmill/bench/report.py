"""What a run says: from the rounds of every engine to ratios, shares of the limit, and the JSON file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from gristmill.bench.engines import ENGINES, OURS
from gristmill.bench.race import ratios, spread

FORMAT = "gristmill-bench-1"
YARDSTICK = "onnxruntime"  # what we must not be heavier or slower to start than
QUALITY = (0.998, 0.990)  # mean and least cosine of int8 to fp32
SIZE_SHARE = 0.2
MIB = 1 << 20
BOUNDED = (("imported", "import", "s"), ("first", "load + first answer", "s"), ("peak", "peak memory", "MiB"))


@dataclass(frozen=True)
class Figure:
    """One engine in one row at the setting that was fastest; `times_ours` is its time over ours, within rounds."""

    engine: str
    variant: str
    seconds: float
    noise: float
    times_ours: float | None

    @property
    def label(self) -> str:
        return ENGINES[self.engine].label


@dataclass(frozen=True)
class Line:
    """A row of the table. `ratio` is the fastest rival's time over ours; `share` is the floor's time over ours."""

    row: Mapping[str, Any]
    figures: tuple[Figure, ...]
    ours: Figure | None
    rival: Figure | None
    ratio: float | None
    share: float | None

    @property
    def reached(self) -> bool | None:
        target = self.row["target"]
        return None if self.ratio is None or target is None else self.ratio >= target

    def amount(self, figure: Figure) -> str:
        """Return sentences a second, or the time of a call where one sentence is waited for or a step is made."""
        if self.row["batch"] == 1 or self.row["train"]:
            return f"{1e3 * figure.seconds:,.2f} ms"
        return f"{self.row['batch'] / figure.seconds:,.0f} /s"


def figures(rounds: Mapping[str, Sequence[float]]) -> tuple[Figure, ...]:
    """Return the fastest setting of each engine, ours first and the others from fast to slow."""
    own = [label for label in rounds if label.partition(" ")[0] == OURS]
    first = {label: rounds[label] for label in sorted(own, key=lambda label: median(rounds[label]))[:1]}
    factors = ratios({**first, **rounds}) if rounds else {}
    best: dict[str, Figure] = {}
    for label, times in rounds.items():
        engine, _, variant = label.partition(" ")
        figure = Figure(engine, variant, median(times), spread(times), factors[label] if first else None)
        if engine not in best or figure.seconds < best[engine].seconds:
            best[engine] = figure
    return tuple(sorted(best.values(), key=lambda each: (each.engine != OURS, each.seconds)))


def line(row: Mapping[str, Any]) -> Line:
    """Sum up one row of a run."""
    found = figures(row["rounds"])
    ours = next((each for each in found if each.engine == OURS), None)
    rival = next((each for each in found if each.engine != OURS), None)
    share = sum(row["floor"].values()) / ours.seconds if ours and row["floor"] else None
    return Line(row, found, ours, rival, rival.times_ours if rival else None, share)


@dataclass(frozen=True)
class Check:
    """A figure of ours that has a bound: the target of the quality of int8, or what ONNX Runtime needs."""

    title: str
    ours: float
    bound: float
    unit: str
    higher: bool = False

    @property
    def reached(self) -> bool:
        return self.ours >= self.bound if self.higher else self.ours <= self.bound

    def shown(self, value: float) -> str:
        return f"{value / MIB:.1f} MiB" if self.unit == "MiB" else f"{value:.4f} {self.unit}".rstrip()


def installed(result: Mapping[str, Any], engine: str) -> int:
    """Return the bytes of an engine's own files."""
    found = result["engines"].get(engine, {"sizes": {}})
    return sum(size for package, size in found["sizes"].items() if package in ENGINES[engine].size)


def checks(result: Mapping[str, Any]) -> Iterator[Check]:
    """Yield what is asked of us beside speed, as far as both sides were measured; precision by precision."""
    settings: dict[tuple[str, str], dict[str, Any]] = {}
    for part in ("quality", "start", "memory"):
        for found in result.get(part, ()):
            if found["engine"] in (OURS, YARDSTICK) and not found["variant"]:
                settings.setdefault((found["engine"], found["precision"]), {}).update(found)
    small = settings.get((OURS, "int8"), {})
    if "mean" in small:
        yield Check("int8: mean cosine to fp32", small["mean"], QUALITY[0], "", higher=True)
        yield Check("int8: least cosine to fp32", small["min"], QUALITY[1], "", higher=True)
    for precision in ("fp32", "int8"):
        ours, theirs = settings.get((OURS, precision), {}), settings.get((YARDSTICK, precision), {})
        for name, title, unit in BOUNDED:
            if name in ours and name in theirs:
                yield Check(f"{precision}: {title}, as ONNX Runtime", ours[name], theirs[name], unit)
    own, their = installed(result, OURS), installed(result, YARDSTICK)
    if own and their:
        yield Check("installed size, a fifth of ONNX Runtime's", own, their * SIZE_SHARE, "MiB")


def cosines(vectors: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Return the mean and the least cosine of rows to those of the reference."""
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(reference, axis=1)
    each = np.einsum("ij,ij->i", vectors, reference) / norms
    return float(each.mean()), float(each.min())
