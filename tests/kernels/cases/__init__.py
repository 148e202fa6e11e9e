"""The registry of kernel cases: one file per family, one line here."""

from kernels.cases import aggregate, dense, nn, quant, sparse, vision

CASES = [*aggregate.CASES, *dense.CASES, *nn.CASES, *quant.CASES, *sparse.CASES, *vision.CASES]
