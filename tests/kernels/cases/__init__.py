"""The registry of kernel cases: one file per family, one line here."""

from kernels.cases import aggregate, attention, bitmask, dense, int4, nn, quant, sparse, text, vision

CASES = [
    *aggregate.CASES,
    *attention.CASES,
    *bitmask.CASES,
    *dense.CASES,
    *int4.CASES,
    *nn.CASES,
    *quant.CASES,
    *sparse.CASES,
    *text.CASES,
    *vision.CASES,
]
