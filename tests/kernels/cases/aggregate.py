"""Cases of the aggregate family."""

from kernels.case import Case

CASES: list[Case] = []
