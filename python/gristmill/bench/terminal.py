"""A run as tables and bars for a terminal."""

from collections.abc import Iterator
from typing import Any

from rich.bar import Bar
from rich.console import RenderableType
from rich.table import Column, Table

from gristmill.bench.engines import ENGINES, OURS
from gristmill.bench.report import MIB, checks, installed, line

ABSENT = "-"
LABEL_WIDTH, BAR_WIDTH = 13, 60


def everything(result: dict[str, Any]) -> Iterator[RenderableType]:
    """Yield all that there is to show."""
    if result["rows"]:
        yield main_table(result)
        yield from bars(result)
    yield from other_tables(result)
    table = Table("also asked", "Gristmill", "at most or least", "")
    for check in checks(result):
        table.add_row(check.title, check.shown(check.ours), check.shown(check.bound), "reached" if check.reached else "missed")
    if table.row_count:
        yield table


def main_table(result: dict[str, Any]) -> Table:
    """Return our figure, the fastest rival's, their ratio, the target, and the share of the physical limit, row by row."""
    table = Table("work", "Gristmill", "fastest rival", "", "ratio", "target", "", "of the limit")
    for each in map(line, result["rows"]):
        target = each.row["target"]
        table.add_row(
            each.row["title"],
            each.amount(each.ours) if each.ours else ABSENT,
            each.amount(each.rival) if each.rival else ABSENT,
            f"{each.rival.label} {each.rival.variant}".strip() if each.rival else "",
            ABSENT if each.ratio is None else f"{each.ratio:.2f}x",
            ABSENT if target is None else f"{target:.2f}x",
            {None: "", True: "reached", False: "missed"}[each.reached],
            ABSENT if each.share is None else f"{each.share:.0%}",
        )
    return table


def bars(result: dict[str, Any]) -> Iterator[RenderableType]:
    """Yield each row's title and its bars: the speed of each engine, as a share of the physical limit or of the fastest one."""
    for each in map(line, result["rows"]):
        if not each.figures:
            continue
        limit = sum(each.row["floor"].values()) or min(figure.seconds for figure in each.figures)
        yield f"\n{each.row['title']}: speed, {'the physical limit' if each.row['floor'] else 'the fastest'} is the full width"
        table = Table.grid(Column(width=LABEL_WIDTH), Column(width=BAR_WIDTH), Column(), padding=(0, 1))
        for figure in each.figures:
            bar = Bar(1.0, 0.0, min(1.0, limit / figure.seconds), color="red" if figure.engine == OURS else "blue")
            table.add_row(figure.label, bar, f"{each.amount(figure)}  ±{100 * figure.noise:.0f} %")
        yield table


def other_tables(result: dict[str, Any]) -> Iterator[Table]:
    """Yield the tables of quality, start, memory and size, as far as they were measured."""
    if any(part in result for part in ("quality", "start", "memory")):
        rows: dict[tuple[str, str, str], dict[str, Any]] = {}
        for part in ("quality", "start", "memory"):
            for found in result.get(part, ()):
                rows.setdefault((found["engine"], found["precision"], found["variant"]), {}).update(found)
        table = Table("engine", "precision", "cosine mean / min", "import", "load + first answer", "peak at 32 x 256")
        for (engine, precision, variant), found in rows.items():
            quality = f"{found['mean']:.4f} / {found['min']:.4f}" if "mean" in found else ABSENT
            started = (f"{found['imported']:.3f} s", f"{found['first']:.3f} s") if "first" in found else (ABSENT, ABSENT)
            peak = f"{found['peak'] / MIB:.0f} MiB" if "peak" in found else ABSENT
            table.add_row(ENGINES[engine].label, f"{precision} {variant}".strip(), quality, *started, peak)
        yield table
    table = Table("engine", "version", "installed, without NumPy")
    for name, engine in result["engines"].items():
        size = installed(result, name)
        version = engine["versions"].get(ENGINES[name].size[0], ABSENT)
        table.add_row(engine["label"], version, f"{size / MIB:.1f} MiB" if size else ABSENT)
    yield table


def remarks(result: dict[str, Any]) -> Iterator[str]:
    """Yield what is missing or failed, one line each."""
    for name, reason in result["missing"].items():
        yield f"{ENGINES[name].label} is not measured: {reason}"
    for row in result["rows"]:
        for reason in row["failed"].values():
            yield f"{row['title']}: {reason}"
    for part in ("quality", "start", "memory"):
        for found in result.get(part, ()):
            if "failed" in found:
                yield f"{part}: {found['failed']}"
    for reason in sorted({row["floor_unknown"] for row in result["rows"]} - {""}):
        yield f"the physical limit is not known: {reason}"
