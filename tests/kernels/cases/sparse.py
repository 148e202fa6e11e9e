"""Cases of the sparse family."""

from kernels.case import Case

CASES: list[Case] = []
