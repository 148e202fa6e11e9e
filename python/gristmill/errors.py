"""Every error that Gristmill raises on purpose. Catch `GristmillError` for all of them."""

from typing import Any


class GristmillError(Exception):
    """The base of all errors below."""


class ModelError(GristmillError, ValueError):
    """A graph, a tensor or an input does not fit: the message names it, the shapes and the remedy."""


class FormatError(GristmillError, ValueError):
    """A file is damaged, hostile or of an unknown kind; nothing of it was used."""


class DataError(GristmillError, ValueError):
    """Training or calibration data is unusable: wrong shapes, too few examples, or values that are not finite."""


class BudgetError(GristmillError, MemoryError):
    """Work does not fit the memory budget; `needed_bytes` says what would."""

    def __init__(self, message: str, needed_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class WorkerError(GristmillError, RuntimeError):
    """Workers died or failed and nobody is left to take over their work."""


class DivergedError(GristmillError, ArithmeticError):
    """The loss or the gradients stopped being finite; `result` holds what `fit` had reached by the last good step, or None."""

    result: Any = None


class ServingError(GristmillError, RuntimeError):
    """A server cannot start as asked: an unsafe address, a port in use, an unusable key or certificate, a bad model name."""


class MissingExtraError(GristmillError, ImportError):
    """An optional dependency is absent; the message holds the pip command that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs {package}, which is not installed; run: pip install 'gristmill[{extra}]'")
