"""Benchmark every kernel case on one core, as a percentage of the physical limit measured in the same run.

pytest benchmarks/bench_kernels.py --benchmark-columns=min,median,rounds
"""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from gristmill.bench import limits
from kernels.cases import CASES

ROWS = [(case, size) for case in CASES for size in case.bench]


@pytest.mark.parametrize(("case", "size"), ROWS, ids=[f"{case.name}-{'x'.join(map(str, size))}" for case, size in ROWS])
def test_kernel(benchmark, case, size):
    inputs = case.inputs(np.random.default_rng(0), size)
    outputs = {name: np.empty(shape, dtype) for name, (shape, dtype) in case.outputs(inputs).items()}
    case.run(inputs, outputs, 1)  # touch every page
    benchmark.group = case.name
    if case.bind is None:
        benchmark(case.run, inputs, outputs, 1)
    else:
        benchmark(case.bind(inputs, outputs).run, 1)  # a weight is packed once, not at every run
    work = case.work(size)
    amount = work.bytes if work.limit == "dram" else work.operations
    rate = amount / benchmark.stats["min"]
    benchmark.extra_info["percent_of_limit"] = round(100 * rate / limits.peak(work.limit), 1)
    benchmark.extra_info["rate"] = f"{rate / 1e9:.1f} G{'B' if work.limit == 'dram' else 'OP'}/s of {work.limit}"
    print(f"{case.name} {size}: {benchmark.extra_info['percent_of_limit']} % of {work.limit}")
