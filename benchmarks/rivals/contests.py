"""Contests between the engines of this folder's files, run by `gristmill.bench.race` and shown as Markdown."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

from gristmill.bench import apart
from gristmill.bench.machine import machine
from gristmill.bench.race import Contest, Entry, race, ratios, spread

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "results"
PACKAGES = ("numpy", "scipy", "torch", "onnxruntime")
SCRIPT = "import os; sys.argv = sys.argv[2:]; sys.path.insert(0, os.path.dirname(sys.argv[0])); "
SCRIPT += "runpy.run_path(sys.argv[0], run_name='__main__')"


def entry(label: str, script: str, engine: str, env: Mapping[str, str] = {}, extra: Sequence[float] = ()) -> Entry:
    """Name an engine of a file; `extra` follows the size of the contest."""
    ours = engine.startswith("gristmill")
    command = apart.command(sys.executable, ours, SCRIPT, str(FOLDER / f"{script}.py"), engine)
    return Entry(label, command, env, tuple(map(str, extra)))


def contest(title: str, size: Sequence[float], threads: int, entries: tuple[Entry, ...], **settings) -> Contest:
    return Contest(title, threads, entries, (str(threads), *map(str, size)), **settings)


def table(result: Mapping[str, object]) -> str:
    """Render one contest in Markdown."""
    times: Mapping[str, Sequence[float]] = result["rounds"]
    heading = "samples/s" if result["unit"] == "sample" else "time"
    lines = [f"**{result['title']}, {result['threads']} thread{'s'[: result['threads'] != 1]}**", ""]
    lines += [f"| engine | {heading} | noise | times the first row |", "|---|---:|---:|---:|"]
    factors = ratios(times)
    for label, each in times.items():
        middle = median(each)
        figure = f"{1 / middle:,.0f}" if result["unit"] == "sample" else duration(middle)
        lines.append(f"| {label} | {figure} | ±{100 * spread(each):.0f} % | {factors[label]:.2f} |")
    return "\n".join([*lines, *[f"\n{label}: {reason}" for label, reason in result["failed"].items()]])


def duration(seconds: float) -> str:
    """Return a time in the unit that gives it one to three digits before the point."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.2f} {unit}"
    return f"{seconds * 1e6:.1f} us"


def main(description: str, contests: Iterable[Contest], name: str, show: Callable[[Mapping[str, object]], str] = table) -> None:
    """Run contests, print a table after each, and write everything to results/<name>.json."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", default="", help="run the contests whose title contains this")
    parser.add_argument("--threads", type=int, help="run the contests of this thread count")
    parser.add_argument("--lock", action="append", default=[], help="a file to hold locked during each contest")
    arguments = parser.parse_args()
    target = RESULTS / f"{name}.json"
    done = json.loads(target.read_text()) if target.exists() else []
    for each in contests:
        if arguments.only not in each.title or arguments.threads not in (None, each.threads):
            continue
        result = {**race(each, locks=arguments.lock), "machine": machine(PACKAGES), "date": time.strftime("%Y-%m-%d")}
        print(show(result), end="\n\n", flush=True)
        RESULTS.mkdir(exist_ok=True)
        key = (result["title"], result["threads"])
        done = [old for old in done if (old["title"], old["threads"]) != key] + [result]
        target.write_text(json.dumps(done, indent=1) + "\n")
