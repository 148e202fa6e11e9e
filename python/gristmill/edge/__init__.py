"""Adapt a model where it runs: gradient descent in a byte budget, on data that never leaves."""

from gristmill.edge.trainer import EdgeResult, EdgeTrainer

__all__ = ["EdgeResult", "EdgeTrainer"]
