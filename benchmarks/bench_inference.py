"""Inference against rivals: products in float32, int8 and sparse, and the digit classifier.

python benchmarks/bench_inference.py [--only int8] [--threads 2]
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "rivals"))

from race import RESULTS, Contest, Entry, main, ratios

SHAPES = ((128, 768, 3072), (512, 3072, 768), (128, 384, 1536), (1, 768, 3072))  # m, k, n
SPARSITY = (0.8,)
LADDER = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95)

FLOAT = (
    Entry("gristmill Session", "gemm", "gristmill"),
    Entry("NumPy", "gemm", "numpy"),
    Entry("NumPy, OPENBLAS_CORETYPE=Zen", "gemm", "numpy", {"OPENBLAS_CORETYPE": "Zen"}),
    Entry("torch F.linear", "gemm", "torch_linear"),
    Entry("torch oneDNN, prepacked", "gemm", "torch_prepacked"),
    Entry("ONNX Runtime", "gemm", "onnxruntime"),
)
INT8 = (
    Entry("gristmill Session", "gemm", "gristmill_int8"),
    Entry("ONNX Runtime quantize_dynamic", "gemm", "onnxruntime_int8"),
    Entry("torch quantize_dynamic fbgemm", "gemm", "torch_int8_fbgemm"),
    Entry("torch quantize_dynamic oneDNN", "gemm", "torch_int8_onednn"),
)
SPARSE = (
    Entry("gristmill 1x4", "gemm", "gristmill", extra=SPARSITY),
    Entry("gristmill dense", "gemm", "gristmill"),
    Entry("SciPy CSR", "gemm", "scipy_csr", extra=SPARSITY),
    Entry("SciPy BSR 1x4", "gemm", "scipy_bsr", extra=SPARSITY),
    Entry("torch CSR", "gemm", "torch_csr", extra=SPARSITY),
)
SPARSE_INT8 = (
    Entry("gristmill 1x4 int8", "gemm", "gristmill_int8", extra=SPARSITY),
    Entry("gristmill dense int8", "gemm", "gristmill_int8"),
    Entry("ONNX Runtime dense int8", "gemm", "onnxruntime_int8"),
)
DIGITS = (
    Entry("gristmill float32", "digits", "gristmill"),
    Entry("gristmill int8", "digits", "gristmill_int8"),
    Entry("gristmill int8, 80 % 1x4", "digits", "gristmill_sparse"),
    Entry("ONNX Runtime float32", "digits", "onnxruntime"),
    Entry("ONNX Runtime int8", "digits", "onnxruntime_int8"),
    Entry("torch float32", "digits", "torch"),
    Entry("torch optimize_for_inference", "digits", "torch_traced"),
    Entry("torch int8 fbgemm", "digits", "torch_int8"),
)


def ladder(engine: str) -> tuple[Entry, ...]:
    """The same engine dense, and at rising sparsities: where their times cross is the break-even."""
    return Entry("dense", "gemm", engine), *[Entry(f"{s:.0%}", "gemm", engine, extra=(s,)) for s in LADDER]


def contests():
    for threads in (1, 2):
        for shape in SHAPES:
            name = "x".join(map(str, shape))
            yield Contest(f"float32 product {name}", shape, threads, FLOAT)
            yield Contest(f"int8 product {name}", shape, threads, INT8)
            yield Contest(f"sparse float32 product {name}", shape, threads, SPARSE)
            yield Contest(f"sparse int8 product {name}", shape, threads, SPARSE_INT8)
        for batch in (1, 256):
            yield Contest(f"digits classifier, batch {batch}", (batch,), threads, DIGITS)
    for shape in SHAPES:
        name = "x".join(map(str, shape))
        yield Contest(f"break-even float32 {name}", shape, 1, ladder("gristmill"), seconds=0.1)
        yield Contest(f"break-even int8 {name}", shape, 1, ladder("gristmill_int8"), seconds=0.1)


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
