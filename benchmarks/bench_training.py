"""Training against rivals: the mean of gradients, an optimiser step, the mask of a pruning pass, and whole epochs.

python benchmarks/bench_training.py [--only adamw] [--threads 2]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "rivals"))

from contests import contest, entry, main

AGGREGATE = (
    entry("gristmill weighted_sum", "aggregate", "gristmill"),
    entry("NumPy add, whole arrays", "aggregate", "numpy_whole"),
    entry("NumPy add, in blocks", "aggregate", "numpy_blocks"),
    entry("NumPy dot of a stacked matrix", "aggregate", "numpy_dot"),
    entry("torch add_", "aggregate", "torch_add"),
    entry("torch mean of a stacked tensor", "aggregate", "torch_mean"),
)
ADAMW = (
    entry("gristmill AdamW", "adamw", "gristmill"),
    entry("torch AdamW fused", "adamw", "torch_fused"),
    entry("torch AdamW foreach", "adamw", "torch_foreach"),
)
MASK = (
    entry("gristmill magnitude_mask", "mask", "gristmill"),
    entry("NumPy partition", "mask", "numpy_partition"),
    entry("torch kthvalue", "mask", "torch_kthvalue"),
    entry("torch prune.global_unstructured", "mask", "torch_prune"),
)
INLINE = (
    entry("gristmill fit inline, 1 slice", "fit", "gristmill_inline"),
    entry("gristmill fit inline, 4 slices (default)", "fit", "gristmill_slices"),
    entry("torch", "fit", "torch"),
    entry("torch.compile", "fit", "torch_compiled"),
)
WORKERS = (
    entry("gristmill fit, 2 workers, 2 slices", "fit", "gristmill_workers"),
    entry("gristmill fit, 2 workers, 4 slices (default)", "fit", "gristmill_workers_slices"),
    entry("torch DistributedDataParallel gloo, 2 processes", "fit", "torch_distributed"),
)
FITS = (
    ("fit 64-512-256-10, batch 32", (1, 32)),
    ("fit 64-512-256-10, batch 128", (1, 128)),
    ("fit 784-2048-2048-2048-10, batch 256", (10, 256)),
)


def contests():
    for threads in (1, 2):
        yield contest("mean of 8 x 25M float32", (8, 25_000_000), threads, AGGREGATE, rounds=7, seconds=0.3)
        yield contest("adamw step of 25M parameters", (25_000_000,), threads, ADAMW, rounds=7, seconds=0.3)
        yield contest("magnitude mask of 64M weights, 80 %", (1 << 26, 0.8), threads, MASK, rounds=3, seconds=0.3)
        for title, size in FITS:
            yield contest(title, size, threads, INLINE, unit="sample", rounds=5, seconds=0.3)
    for title, size in FITS:
        yield contest(f"{title}, processes", size, 2, WORKERS, unit="sample", rounds=5, seconds=0.3)


if __name__ == "__main__":
    main(__doc__, contests(), "training")
