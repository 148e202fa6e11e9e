"""Gristmill trains a model over many workers, compresses it, adapts it at the edge and serves it, on plain CPUs."""

from gristmill import zoo
from gristmill.model import Model
from gristmill.optim import SGD, Adam, AdamW, Momentum
from gristmill.runtime.session import Session

__version__ = "0.1.0"
__all__ = ["SGD", "Adam", "AdamW", "Model", "Momentum", "Session", "__version__", "zoo"]
