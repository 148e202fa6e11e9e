"""One file for each engine: how it prepares a published model in its best form, and how it runs it.

A file is imported in a process of its own, by the interpreter that has the engine, and then imports nothing of Gristmill but
this package. It has `prepare(source, cache, precisions)` and `load(cache, precision, threads, variant) -> run(inputs)`; both
import the engine late.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Inputs = Mapping[str, np.ndarray]
Run = Callable[[Inputs], np.ndarray]


@dataclass(frozen=True)
class Engine:
    """A name, what must be importable to run it, and to prepare its files, and the distributions that bring these.

    `size` names those that take part when it runs, `start` is the statement by which a program imports it.
    """

    label: str
    imports: tuple[str, ...]
    packages: tuple[str, ...]
    size: tuple[str, ...]
    start: str
    prepares: tuple[str, ...] = ()


OURS = "gristmill"
ENGINES = {
    OURS: Engine(
        "Gristmill", ("gristmill",), ("gristmill[hf]",), ("gristmill",), "import gristmill; gristmill.load, gristmill.Session"
    ),
    "openvino": Engine(
        "OpenVINO", ("openvino",), ("openvino", "nncf", "onnx", "torch", "transformers"), ("openvino",), "import openvino",
        ("nncf", "onnx", "torch", "transformers"),
    ),
    "onnxruntime": Engine(
        "ONNX Runtime", ("onnxruntime",), ("onnxruntime", "onnx", "torch", "transformers"), ("onnxruntime",),
        "import onnxruntime", ("onnx", "torch", "transformers"),
    ),
    "ctranslate2": Engine(
        "CTranslate2", ("ctranslate2",), ("ctranslate2", "torch", "transformers"), ("ctranslate2",), "import ctranslate2",
        ("torch", "transformers"),
    ),
    "torch": Engine(
        "PyTorch", ("torch", "transformers"), ("torch", "transformers"), ("torch",), "import torch, transformers",
    ),
}  # fmt: skip
