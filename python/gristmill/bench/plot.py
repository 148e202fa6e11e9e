"""The table as a bar chart, in a PNG file."""

from pathlib import Path
from typing import Any

from gristmill.bench.engines import ENGINES, OURS
from gristmill.bench.report import line
from gristmill.errors import MissingExtraError

COLORS = {OURS: "#c0582b", "openvino": "#4a6fa5", "onnxruntime": "#7a9e7e", "ctranslate2": "#a3a3a3", "torch": "#d9b44a"}


def plot(result: dict[str, Any], target: Path) -> None:
    """Write the chart of a run to a PNG file.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    draw(result).savefig(target, dpi=150, format="png")


def draw(result: dict[str, Any]) -> Any:
    """Return a figure of the speed of each engine in each row over that of the fastest rival, with the limit of the machine."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "bench") from error
    lines = [each for each in map(line, result["rows"]) if each.figures]
    bars = [(each, figure) for each in lines for figure in reversed(each.figures)]
    figure = Figure(figsize=(9, 0.6 + 0.26 * len(bars) + 0.4 * len(lines)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(f"{result['model']}: speed over the fastest rival\n{result['machine']['cpu']}", fontsize=10)
    ticks, names, position = [], [], 0.0
    for each in reversed(lines):
        unit = each.rival or each.figures[0]
        for bar in reversed(each.figures):
            axes.barh(position, unit.seconds / bar.seconds, 0.8, color=COLORS[bar.engine])
            axes.text(unit.seconds / bar.seconds, position, f" {each.amount(bar)}", va="center", fontsize=7)
            ticks.append(position)
            names.append(ENGINES[bar.engine].label)
            position += 1
        axes.text(0, position - 0.15, each.row["title"], fontsize=8, weight="bold", va="center")
        if each.row["floor"]:
            limit = unit.seconds / sum(each.row["floor"].values())
            axes.plot([limit, limit], [position - len(each.figures) - 0.5, position - 0.5], color="black", linewidth=1.2)
        position += 1.2
    axes.set_yticks(ticks, names, fontsize=7)
    axes.set_xlabel("black line: the physical limit of this machine", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12, y=0.01)
    return figure
