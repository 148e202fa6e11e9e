"""Cases of the dense family."""

from kernels.case import Case

CASES: list[Case] = []
