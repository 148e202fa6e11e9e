"""Products of one row with 4-bit weights against rivals and against the memory: python benchmarks/bench_decode.py

Weights are read from memory each time. Time is for one product; GB/s are those of the bytes that an engine reads of a weight, and
their share is of what the same threads read from memory in the same rounds.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent / "rivals"))

from contests import contest, duration, entry, main
from decode import READ

SHAPES = ((4096, 11008), (11008, 4096))
LIMIT = "reading memory"


@dataclass(frozen=True)
class Row:
    """An engine, what its worker takes after n and k, and the bits that it reads for each element of the weight."""

    label: str
    engine: str
    extra: tuple[float, ...]
    bits: float


ROWS = (
    Row("gristmill int4 g32", "gristmill", (32,), 4 + 16 / 32),
    Row("gristmill int4 g128", "gristmill", (128,), 4 + 16 / 128),
    Row("torch int4pack g32", "torch_int4pack", (32,), 4 + 32 / 32),
    Row("torch int4pack g128", "torch_int4pack", (128,), 4 + 32 / 128),
    Row("ONNX Runtime MatMulNBits g32", "onnxruntime", (32,), 4 + 32 / 32),
    Row("ONNX Runtime MatMulNBits g128", "onnxruntime", (128,), 4 + 32 / 128),
)


def contests():
    for n, k in SHAPES:
        entries = tuple(entry(row.label, "decode", row.engine, extra=(n, k, *row.extra)) for row in ROWS)
        for threads in (1, 2):
            yield contest(f"int4 {n} x {k}", (), threads, (*entries, entry(LIMIT, "decode", "read")), rounds=9, seconds=0.25)


def table(result: Mapping[str, object]) -> str:
    """Render one contest in Markdown."""
    times: Mapping[str, Sequence[float]] = result["rounds"]
    n, k = map(int, str(result["title"]).removeprefix("int4 ").split(" x "))
    limit, first = times[LIMIT], next(iter(times.values()))
    lines = [f"**{result['title']}, {result['threads']} thread{'s'[: result['threads'] != 1]}**", ""]
    lines += [f"Reading memory: {READ / median(limit) / 1e9:.1f} GB/s", ""]
    lines += ["| engine | time | GB/s | of reading memory | times the first row |", "|---|---:|---:|---:|---:|"]
    for row in ROWS:
        if row.label not in times:
            continue
        each, nbytes = times[row.label], n * k * row.bits / 8
        share = median(nbytes / a / (READ / b) for a, b in zip(each, limit, strict=True))
        factor = median(a / b for a, b in zip(each, first, strict=True))
        speed = f"{nbytes / median(each) / 1e9:.1f} | {100 * share:.0f} %"
        lines.append(f"| {row.label} | {duration(median(each))} | {speed} | {factor:.2f} |")
    return "\n".join([*lines, *[f"\n{label}: {reason}" for label, reason in result["failed"].items()]])


if __name__ == "__main__":
    main(__doc__.splitlines()[0], contests(), "decode", table)
