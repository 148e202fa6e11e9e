"""`gristmill inspect`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gristmill.cli.console import output

if TYPE_CHECKING:
    from gristmill.model import Model

LONGEST = 1000  # characters of a text that is shown
RIGHT = ("bytes", "sparsity", "expected_ms")  # columns of numbers
KERNELS = ("node", "op", "kernel", "weight", "bytes", "product", "expected_ms")  # what the table has of an explanation


def inspect(
    model: Annotated[Path, typer.Argument(help="The model file or Hugging Face folder.")],
    batch: Annotated[int, typer.Option(min=1, help="What symbolic dimensions are taken as when kernels are chosen.")] = 1,
    precision: Annotated[str | None, typer.Option(help="Show the kernels of this precision: float32, bf16 or int8.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that the times are for. Default: as for a session.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Time each step, and say what the choices that were made against would take.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a model holds: its graph, its tensors, the kernels that serve it here, and where it comes from."""
    import gristmill as gm

    loaded = gm.load(model)
    shapes = {name: tuple(batch if isinstance(dim, str) else dim for dim in kind.shape) for name, kind in loaded.inputs.items()}
    kernels = gm.Session(loaded, threads, precision).explain(measure=explain, **shapes)
    facts = {**describe(loaded), "kernels": kernels, "meta": shortened(dict(loaded.meta))}
    if as_json:
        output().print_json(data=facts)
        return
    console = output()
    size = sum(file.stat().st_size for file in model.glob("**/*") if file.is_file()) if model.is_dir() else model.stat().st_size
    console.print(f"{model}: {size:,} bytes, tensors {loaded.nbytes:,} bytes")
    if explain:
        console.print(str(kernels), markup=False, highlight=False, soft_wrap=True)
        return
    for table in tables(facts):
        console.print(table)
    console.print("provenance" if facts["meta"] else "provenance: none")
    for name, value in facts["meta"].items():
        for item in value if isinstance(value, list) else [value]:
            console.print(f"  {name}: {json.dumps(item, ensure_ascii=False)}")


def shortened(value: Any) -> Any:
    """Return JSON-compatible values with the length of long texts, such as a tokenizer's definition, in their place."""
    if isinstance(value, dict):
        return {name: shortened(item) for name, item in value.items()}
    if isinstance(value, list):
        return [shortened(item) for item in value]
    return f"({len(value):,} characters)" if isinstance(value, str) and len(value) > LONGEST else value


def describe(model: "Model") -> dict[str, Any]:
    """Return the graph and the tensors of a model as JSON-compatible rows."""
    values = {"input": model.inputs, "output": {name: model.types[name] for name in model.outputs}}
    nodes = [
        {
            "node": node.name,
            "op": f"{node.domain}::{node.op}" if node.domain else node.op,
            "inputs": list(node.inputs),
            "attributes": dict(node.attributes),
            "outputs": {name: str(model.types[name]) for name in node.outputs},
        }
        for node in model.nodes
    ]
    tensors = [
        {"tensor": name, "kind": kind_of(tensor), "dtype": str(tensor.dtype), "shape": list(tensor.shape),
         "bytes": tensor.nbytes, "sparsity": round(float(tensor.sparsity), 4)}
        for name, tensor in model.tensors.items()
    ]  # fmt: skip
    return {
        "values": [
            {"role": role, "name": name, "type": str(kind)} for role, kinds in values.items() for name, kind in kinds.items()
        ],
        "nodes": nodes,
        "tensors": tensors,
    }


def kind_of(tensor: Any) -> str:
    """Return a tensor's kind with what tells it from others of that kind, such as "sparse int8 1x4"."""
    spec = tensor.spec()
    block = "x".join(map(str, spec["block"])) if "block" in spec else ""
    return " ".join(part for part in (spec["kind"], spec.get("dtype", ""), block) if part)


def tables(facts: dict[str, Any]) -> list[Any]:
    """Return one table for each part of the facts."""
    from rich.table import Table

    made = []
    for title in ("values", "nodes", "tensors", "kernels"):
        rows = facts[title]
        if title == "kernels":
            rows = [{column: row[column] for column in KERNELS} for row in rows]
        table = Table(title=title, title_justify="left")
        for column in rows[0] if rows else ():
            table.add_column(column, justify="right" if column in RIGHT else "left", overflow="fold")
        for row in rows:
            table.add_row(*(cell(value) for value in row.values()))
        made.append(table)
    return made


def cell(value: Any) -> str:
    """Return the text of a table cell."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={item}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(str(item) or "-" for item in value)
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str("" if value is None else value)
