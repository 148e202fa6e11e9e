"""Which instruction set serves what."""

from typing import NamedTuple

from gristmill import _core


class Kernel(NamedTuple):
    """A dispatch slot: the variant that serves it, and why."""

    variant: str
    why: str


def kernels() -> dict[str, Kernel]:
    """Return, for every kernel slot, the variant that serves it and why a better one does not.

    Chosen once at import from CPUID and XCR0; GRISTMILL_ISA=scalar|avx2|avx512 caps the choice.

    Example:
        >>> import gristmill as gm
        >>> all(kernel.variant for kernel in gm.kernels().values())
        True
    """
    return {slot: Kernel(variant, _why(variant, best, reason)) for slot, (variant, best, reason) in _core.slots().items()}


def _why(variant: str, best: str, reason: str) -> str:
    if variant == best:
        return "the best variant there is"
    if reason.startswith("capped"):
        return f"{best} is {reason}"
    return f"{best} needs {reason}, which this CPU or its operating system lacks"
