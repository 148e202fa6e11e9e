"""What a run says: from the rounds of every engine to ratios, shares of the limit, and the JSON file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from gristmill.bench.engines import ENGINES, OURS
from gristmill.bench.race import ratios, spread

FORMAT = "gristmill-bench-1"


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
    first = {OURS: rounds[OURS]} if OURS in rounds else {}
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


def cosines(vectors: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Return the mean and the least cosine of rows to those of the reference."""
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(reference, axis=1)
    each = np.einsum("ij,ij->i", vectors, reference) / norms
    return float(each.mean()), float(each.min())
