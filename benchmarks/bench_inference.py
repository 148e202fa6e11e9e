"""Inference against rivals: products in float32, int8 and sparse, and the digit classifier.

python benchmarks/bench_inference.py [--only int8] [--threads 2]
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "rivals"))

from contests import RESULTS, contest, entry, main

from gristmill.bench.race import Entry, ratios

SHAPES = ((128, 768, 3072), (512, 3072, 768), (128, 384, 1536), (1, 768, 3072))  # m, k, n
SPARSITY = (0.8,)
LADDER = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95)

FLOAT = (
    entry("gristmill Session", "gemm", "gristmill"),
    entry("NumPy", "gemm", "numpy"),
    entry("NumPy, OPENBLAS_CORETYPE=Zen", "gemm", "numpy", {"OPENBLAS_CORETYPE": "Zen"}),
    entry("torch F.linear", "gemm", "torch_linear"),
    entry("torch oneDNN, prepacked", "gemm", "torch_prepacked"),
    entry("ONNX Runtime", "gemm", "onnxruntime"),
)
INT8 = (
    entry("gristmill Session", "gemm", "gristmill_int8"),
    entry("ONNX Runtime quantize_dynamic", "gemm", "onnxruntime_int8"),
    entry("torch quantize_dynamic fbgemm", "gemm", "torch_int8_fbgemm"),
    entry("torch quantize_dynamic oneDNN", "gemm", "torch_int8_onednn"),
)
SPARSE = (
    entry("gristmill 1x4", "gemm", "gristmill", extra=SPARSITY),
    entry("gristmill dense", "gemm", "gristmill"),
    entry("SciPy CSR", "gemm", "scipy_csr", extra=SPARSITY),
    entry("SciPy BSR 1x4", "gemm", "scipy_bsr", extra=SPARSITY),
    entry("torch CSR", "gemm", "torch_csr", extra=SPARSITY),
)
SPARSE_INT8 = (
    entry("gristmill 1x4 int8", "gemm", "gristmill_int8", extra=SPARSITY),
    entry("gristmill dense int8", "gemm", "gristmill_int8"),
    entry("ONNX Runtime dense int8", "gemm", "onnxruntime_int8"),
)
DIGITS = (
    entry("gristmill float32", "digits", "gristmill"),
    entry("gristmill int8", "digits", "gristmill_int8"),
    entry("gristmill int8, 80 % 1x4", "digits", "gristmill_sparse"),
    entry("ONNX Runtime float32", "digits", "onnxruntime"),
    entry("ONNX Runtime int8", "digits", "onnxruntime_int8"),
    entry("torch float32", "digits", "torch"),
    entry("torch optimize_for_inference", "digits", "torch_traced"),
    entry("torch int8 fbgemm", "digits", "torch_int8"),
)


def ladder(engine: str) -> tuple[Entry, ...]:
    """The same engine dense, and at rising sparsities: where their times cross is the break-even."""
    return entry("dense", "gemm", engine), *[entry(f"{s:.0%}", "gemm", engine, extra=(s,)) for s in LADDER]


def contests():
    for threads in (1, 2):
        for shape in SHAPES:
            name = "x".join(map(str, shape))
            yield contest(f"float32 product {name}", shape, threads, FLOAT)
            yield contest(f"int8 product {name}", shape, threads, INT8)
            yield contest(f"sparse float32 product {name}", shape, threads, SPARSE)
            yield contest(f"sparse int8 product {name}", shape, threads, SPARSE_INT8)
        for batch in (1, 256):
            yield contest(f"digits classifier, batch {batch}", (batch,), threads, DIGITS)
    for shape in SHAPES:
        name = "x".join(map(str, shape))
        yield contest(f"break-even float32 {name}", shape, 1, ladder("gristmill"), seconds=0.1)
        yield contest(f"break-even int8 {name}", shape, 1, ladder("gristmill_int8"), seconds=0.1)


def break_even(rounds: dict[str, list[float]]) -> str:
    """Return the sparsity at which sparse takes as long as dense, between the rungs around it."""
    steps = list(zip(LADDER, list(ratios(rounds).values())[1:], strict=True))
    if steps[0][1] <= 1:
        return f"below {LADDER[0]:.0%}"
    for (low, slow), (high, fast) in pairwise(steps):
        if fast <= 1:
            return f"{low + (high - low) * (slow - 1) / (slow - fast):.0%}"
    return f"above {LADDER[-1]:.0%}"


if __name__ == "__main__":
    main(__doc__, contests(), "inference")
    for result in json.loads((RESULTS / "inference.json").read_text()):
        if result["title"].startswith("break-even"):
            print(f"{result['title']}: {break_even(result['rounds'])}")
