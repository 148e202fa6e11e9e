"""ONNX files in and out, with the packages of the extra `onnx`, which are imported when they are used."""

from gristmill.formats.onnx.reader import from_proto, load
from gristmill.formats.onnx.writer import save

__all__ = ["from_proto", "load", "save"]
