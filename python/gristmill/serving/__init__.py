"""Servers of models: the Open Inference Protocol, version 2, over REST and gRPC."""

from gristmill.errors import ServingError
from gristmill.serving.server import Server, serve

__all__ = ["Server", "ServingError", "serve"]
