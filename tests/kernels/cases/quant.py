"""Cases of the quant family."""

from kernels.case import Case

CASES: list[Case] = []
