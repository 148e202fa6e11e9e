"""The bar on the terminal."""

import sys
from collections.abc import Mapping
from time import monotonic
from types import TracebackType
from typing import Any

REDRAW_SECONDS = 0.2


class Bar:
    """Show epoch, loss and metrics while a run goes on.

    Args:
        shown: True, False, or None for: where stderr is a terminal.
        epochs: how many there will be at most, None if unknown.
        steps: of an epoch.
    """

    def __init__(self, shown: bool | None, epochs: int | None, steps: int) -> None:
        self._shown = (sys.stderr is not None and sys.stderr.isatty()) if shown is None else shown
        self._epochs, self._steps = epochs, steps
        self._drawn = 0.0
        self._metrics = ""
        self._bar: Any = None

    def __enter__(self) -> "Bar":
        if self._shown:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = ("{task.description}", BarColumn(), TextColumn("{task.fields[loss]}"), TimeElapsedColumn())
            # Drawn by `step` only: a refreshing thread would compete with the coordinator.
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), auto_refresh=False)
            total = None if self._epochs is None else self._epochs * self._steps
            self._task = self._bar.add_task("training", total=total, loss="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, epoch: int, batch: int, loss: float) -> None:
        """Tell of a complete step of an epoch; cheap unless it is time to draw."""
        if self._bar is not None and monotonic() >= self._drawn + REDRAW_SECONDS:
            self._draw(epoch, batch, loss)

    def epoch(self, epoch: int, loss: float, metrics: Mapping[str, float]) -> None:
        """Tell of the end of an epoch."""
        self._metrics = "".join(f", {name} {value:.4g}" for name, value in metrics.items())
        last = epoch + 1 == self._epochs
        if self._bar is not None and (last or metrics or monotonic() >= self._drawn + REDRAW_SECONDS):
            self._draw(epoch, self._steps, loss)

    def _draw(self, epoch: int, batch: int, loss: float) -> None:
        self._drawn = monotonic()
        total = "" if self._epochs is None else f"/{self._epochs}"
        text = f"loss {loss:.4g}{self._metrics}"
        done = epoch * self._steps + batch
        self._bar.update(self._task, completed=done, description=f"epoch {epoch + 1}{total}", loss=text, refresh=True)
