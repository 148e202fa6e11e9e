"""Cases of the nn family."""

from kernels.case import Case

CASES: list[Case] = []
