"""Architectures: config -> Model."""

from gristmill.zoo.bert import bert
from gristmill.zoo.mlp import mlp

__all__ = ["bert", "mlp"]
