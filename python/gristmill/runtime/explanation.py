"""What a plan does, step by step: which product serves each layer, what it reads, how long it takes, and what else could."""

import time
from statistics import median
from typing import Any

from gristmill import _core
from gristmill.model import Model
from gristmill.runtime.choice import Choice
from gristmill.runtime.costs import Costs
from gristmill.runtime.plan import Layout, Plan, Step

ROUNDS, SECONDS = 5, 0.2  # that steps are timed for, at least
COLUMNS = ("node", "op", "kernel", "weight", "rows", "product", "layout", "reads", "expected_ms", "measured_ms", "alternatives")


class Explanation(list[dict[str, Any]]):
    """One row for each step; print it for a table.

    A row has `node`, `op`, `kernel` ("numpy" where there is none), and, where the step multiplies by the weight of a Linear,
    `weight` (kind and shape), `bytes` (of it as stored), `rows`, `product`, `layout` (of the activations that it reads), `reads`
    (bytes that the product reads: the weight in its packed form, and the activations), `expected_ms` by the cost model, and
    `alternatives`: for each other product that could serve, `product`, `reads` and `expected_ms`, with the conversions that it
    would add or save counted in. `measured_ms` is None unless it was asked for.
    """

    def __str__(self) -> str:
        lines = [COLUMNS, *([_cell(name, row) for name in COLUMNS] for row in self), self._total()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    def _total(self) -> list[str]:
        return [self._sum(name) if name in ("reads", "measured_ms") else "total" if name == "node" else "" for name in COLUMNS]

    def _sum(self, name: str) -> str:
        return _cell(name, {name: sum(row[name] or 0 for row in self) or None})


def _cell(name: str, row: dict[str, Any]) -> str:
    value = row[name]
    if name == "alternatives":
        return "; ".join(f"{other['product']} {_number(other['expected_ms'])}" for other in value)
    if value is None:
        return "-" if name.endswith("_ms") and row.get("weight") else ""
    if name.endswith("_ms"):
        return _number(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _number(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.4f}"


def explain(layout: Layout, stored: Model, costs: Costs) -> Explanation:
    """Describe the steps of a layout; `stored` holds the weights in the form that the model has them."""
    products = {id(step): layout.choices[step.node.name] for step in _products(layout)}
    rows = Explanation()
    for step in layout.steps:
        row: dict[str, Any] = {**_blank(step), "expected_ms": None, "measured_ms": None, "alternatives": []}
        choice = products.get(id(step))
        if choice is not None or (step.kernel is None and step.node.op == "Linear"):
            tensor = stored.tensors[step.node.inputs[1]]
            row["weight"] = f"{tensor.kind} {tensor.shape[0]}x{tensor.shape[1]}"
            row["bytes"] = tensor.nbytes
        if choice is not None:
            row.update(_chosen(choice, layout, costs))
        rows.append(row)
    return rows


def _products(layout: Layout) -> list[Step]:
    """The step of each product: of what it appended, the last that converts nothing."""
    last = {step.node.name: step for step in layout.steps if not step.moves and step.kernel is not None}
    return [step for name, step in last.items() if name in layout.choices]


def _blank(step: Step) -> dict[str, Any]:
    kernel = "numpy" if step.kernel is None else step.kernel.__name__
    return {"node": step.node.name, "op": step.node.op, "kernel": kernel, "weight": "", "bytes": 0, "rows": None, "product": "",
            "layout": "", "reads": None}  # fmt: skip


def _chosen(choice: Choice, layout: Layout, costs: Costs) -> dict[str, Any]:
    def extra(way: Any) -> float:
        """What the conversions of another way would take beyond those of the way that was chosen."""
        return costs.total(way, layout.threads, layout.resident) - costs.total(choice.way, layout.threads, layout.resident)

    expected = costs.expected(choice.way, layout.threads, layout.resident)
    others = [way for way in choice.ways if way is not choice.way]
    return {
        "rows": choice.way.size.m,
        "product": choice.way.product.name,
        "layout": choice.way.product.layout,
        "reads": choice.way.nbytes,
        "expected_ms": _milliseconds(expected),
        "alternatives": [
            {"product": way.product.name, "reads": way.nbytes, "expected_ms": _milliseconds(expected + extra(way))}
            for way in others
        ],
    }


def _milliseconds(seconds: float) -> float | None:
    return 1e3 * seconds if seconds < float("inf") else None


def measure(rows: Explanation, plan: Plan, threads: int) -> None:
    """Fill in the median milliseconds of each step, over rounds in which all run in their order. `plan` has them apart."""
    times: list[list[float]] = [[] for _ in plan.segments]
    begin = time.perf_counter()
    while len(times[0]) < ROUNDS + 1 or (time.perf_counter() - begin < SECONDS):
        for segment, taken in zip(plan.segments, times, strict=True):
            start = time.perf_counter()
            if isinstance(segment, _core.Program):
                segment.run(threads)
            else:
                segment()
            taken.append(time.perf_counter() - start)
    for row, taken in zip(rows, times, strict=True):
        row["measured_ms"] = 1e3 * median(taken[1:])  # the first round packs and warms up
