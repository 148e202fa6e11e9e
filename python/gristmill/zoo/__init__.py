"""Architectures: config -> Model."""

from gristmill.zoo.mlp import mlp

__all__ = ["mlp"]
