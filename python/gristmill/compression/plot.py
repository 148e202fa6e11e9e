"""Reports as PNG files: what is most sensitive, and size and speed against quality."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gristmill.errors import MissingExtraError
from gristmill.formats.atomic import replacing

ACCENT, QUIET = "#c0582b", "#a3a3a3"
COLORS = ("#4a6fa5", ACCENT, "#7a9e7e", "#d9b44a", "#8a6d9e", "#5b8a8f")
LOWEST = 1e-6  # where an error is as good as none, on a logarithmic axis
MOST = 60  # weights in one picture; the most sensitive are shown


def plot_report(figures: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw a report's figures into a folder: `quality.png`, and `layers.png` where there are layers.

    Returns:
        The paths.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: they cannot be written.
    """
    drawings = {"quality.png": quality(figures)}
    if figures["layers"]:
        drawings["layers.png"] = layers(figures)
    folder.mkdir(exist_ok=True)
    for name, figure in drawings.items():
        _save(figure, folder / name)
    return [folder / name for name in drawings]


def plot_sensitivity(figures: Mapping[str, Any], path: Path) -> None:
    """Draw what `Sensitivity.as_dict` returns into a PNG file.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: it cannot be written.
    """
    _save(sensitivity(figures), path)


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def need_matplotlib() -> tuple[Any, Any]:
    """Return matplotlib's figure and canvas.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "compress") from error
    return Figure, FigureCanvasAgg


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    make, canvas = need_matplotlib()
    figure = make(figsize=(width, height), layout="constrained")
    canvas(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=7)
    return figure, axes


def quality(figures: Mapping[str, Any]) -> Any:
    """Return a figure of the model after each pass: its quality over the size of its file, and over its speed."""
    stages = figures["stages"]
    what, values, intervals = _quality_of(figures)
    cases = [case for case in stages[0]["per_second"] if all(case in stage["per_second"] for stage in stages)]
    figure, axes = _figure(4.5 * (1 + bool(cases)) + 0.5, 3.6, 1 + bool(cases))
    sizes = [stage["file_bytes"] / 1e6 for stage in stages]
    _path(axes[0], sizes, values, intervals, [stage["name"] for stage in stages])
    axes[0].set_xlabel("megabytes of the file", fontsize=8)
    axes[0].set_ylabel(what, fontsize=8)
    if cases:
        case = cases[-1]
        speeds = [stage["per_second"][case] for stage in stages]
        _path(axes[1], speeds, values, intervals, [stage["name"] for stage in stages])
        axes[1].set_xlabel(f"examples in a second, at {_case(case)}", fontsize=8)
        axes[1].xaxis.set_major_formatter("{x:,.0f}")
        axes[1].set_xlim(0, 1.22 * max(speeds))
    gate = figures.get("gate")
    if gate is not None and figures["metric"] and stages[0]["metric"] is not None and what == figures["metric"]:
        sign = 1 if figures["metric"] in ("cross_entropy", "mse") else -1
        for each in axes:
            each.axhline(stages[0]["metric"] + sign * gate["max_drop"], color="black", linewidth=1, linestyle=":")
            each.set_title("dotted: max_drop", fontsize=7, loc="right")
    axes[0].set_xlim(0, 1.22 * max(sizes))
    for each in axes:
        each.margins(y=0.15)
    return figure


def _case(case: str) -> str:
    batch, _, length = case.partition("x")
    return f"batch {batch}" + (f" x {length} tokens" if length else "")


def _quality_of(figures: Mapping[str, Any]) -> tuple[str, list[float], list[tuple[float, float] | None]]:
    """Return what is on the vertical axis: the metric, else the cosine, else one minus the error."""
    stages = figures["stages"]
    for name, title in (("metric", figures["metric"]), ("cosine", "cosine to the original's answers")):
        if all(stage[name] is not None for stage in stages):
            return title, [stage[name] for stage in stages], [stage[f"{name}_interval"] for stage in stages]
    return "1 - error of the answers", [1 - (stage["error"] or 0.0) for stage in stages], [None] * len(stages)


def _path(
    axes: Any, across: list[float], values: list[float], intervals: list[tuple[float, float] | None], names: list[str]
) -> None:
    """Draw points in the order of the passes, each with its name and the interval that it lies in."""
    axes.plot(across, values, color=QUIET, linewidth=1, zorder=1)
    for x, interval in zip(across, intervals, strict=True):
        if interval is not None:
            axes.plot([x, x], interval, color=QUIET, linewidth=1, zorder=1)
    colors = [QUIET, *[COLORS[0]] * (len(names) - 2), ACCENT][-len(names) :] if len(names) > 1 else [ACCENT]
    axes.scatter(across, values, color=colors, s=22, zorder=2)
    for position, (x, y, name) in enumerate(zip(across, values, names, strict=True)):
        up = position % 2 == 0  # neighbours in turn above and below, so that names of points close together stay legible
        offset = (4, 6) if up else (4, -11)
        axes.annotate(name, (x, y), xytext=offset, textcoords="offset points", fontsize=7)


def layers(figures: Mapping[str, Any]) -> Any:
    """Return a figure of the layers, most sensitive on top: their errors, and their sizes before and after."""
    rows = sorted(figures["layers"], key=lambda row: (row["sensitivity_rank"] or 0, -row["error"]))[:MOST]
    figure, axes = _figure(9, 1.1 + 0.2 * len(rows), 2)
    places = list(range(len(rows)))[::-1]
    told = any(row["output_error"] is not None for row in rows)
    errors = [max(row["output_error"] if told and row["output_error"] is not None else row["error"], LOWEST) for row in rows]
    colors = [QUIET if row["reverted"] else ACCENT for row in rows]
    axes[0].barh(places, errors, 0.75, color=colors)
    axes[0].set_xlabel("error of the answers with this weight alone compressed" if told else "error of the weight", fontsize=8)
    names = [f"{row['name']}  {row['kind']}" + (" (reverted)" if row["reverted"] else "") for row in rows]
    axes[0].set_yticks(places, names, fontsize=6)
    axes[1].barh(places, [row["bytes_before"] / 1e6 for row in rows], 0.75, color=QUIET, label="before")
    axes[1].barh(places, [row["bytes_after"] / 1e6 for row in rows], 0.45, color=ACCENT, label="after")
    axes[1].set_yticks([])
    axes[1].set_xlabel("megabytes", fontsize=8)
    axes[1].legend(fontsize=7, frameon=False, loc="lower right")
    for each in axes:
        each.set_ylim(-0.6, len(rows) - 0.4)
    return figure


def sensitivity(figures: Mapping[str, Any]) -> Any:
    """Return a figure of the error of every weight under every setting, the most sensitive weights on top."""
    trials = [trial for trial in figures["trials"] if trial["error"] is not None]
    settings = list(dict.fromkeys(trial["setting"] for trial in figures["trials"]))
    totals: dict[str, float] = {}
    for trial in trials:
        totals[trial["weight"]] = totals.get(trial["weight"], 0.0) + trial["error"]
    names = sorted(totals, key=lambda name: totals[name])[-MOST:]
    places = {name: position for position, name in enumerate(names)}
    figure, (axes,) = _figure(8, 1.3 + 0.19 * len(names))
    for setting, color in zip(settings, COLORS * len(settings), strict=False):
        shown = [trial for trial in trials if trial["setting"] == setting and trial["weight"] in places]
        errors = [max(trial["error"], LOWEST) for trial in shown]
        axes.scatter(errors, [places[trial["weight"]] for trial in shown], color=color, s=18, label=setting, zorder=2)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xscale("log")
    axes.grid(axis="y", linewidth=0.3, color=QUIET)
    axes.set_xlabel("error of the answers, |y - y0| / |y0|, with this weight alone compressed", fontsize=8)
    figure.legend(fontsize=7, frameon=False, loc="outside upper right", ncols=len(settings))
    return figure
