"""Gristmill trains a model over many workers, compresses it, adapts it at the edge and serves it, on plain CPUs.

model  = gm.zoo.mlp([64, 512, 256, 10])
result = gm.fit(model, (x, y), loss="cross_entropy", optimizer=gm.Adam(1e-3), workers=2, epochs=10)
small, report = gm.compress(result.model, [gm.Clip(), gm.Prune(0.8), gm.Distill(), gm.Quantize("int8")], data=(x, y))
gm.EdgeTrainer(small, memory="4MiB", update="bias").fit(local_x, local_y)
gm.save(small, "small.safetensors");  gm.serve({"digits": small})
"""

import os as _os
from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any


def _load_core() -> None:
    """Load the extension with idle OpenMP threads that go to sleep soon: a neighbour on the same cores needs the time.

    libgomp reads its spin count once, when it is loaded; the environment is left as it was.
    """
    quiet = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}.isdisjoint(_os.environ)
    if quiet:
        _os.environ["GOMP_SPINCOUNT"] = "2000"
    try:
        _import_module("gristmill._core")
    finally:
        if quiet:
            del _os.environ["GOMP_SPINCOUNT"]


_load_core()

if TYPE_CHECKING:
    from gristmill import zoo
    from gristmill.compression import (
        Clip,
        Distill,
        Prune,
        Quantize,
        RemoveHeads,
        RemoveLayers,
        compress,
        compress_file,
        read_recipe,
        sensitivity,
        write_recipe,
    )
    from gristmill.edge import EdgeTrainer
    from gristmill.formats import load, save
    from gristmill.metrics import evaluate
    from gristmill.model import Model
    from gristmill.optim import SGD, Adam, AdamW, Momentum
    from gristmill.runtime.kernels import kernels
    from gristmill.runtime.session import Session
    from gristmill.serving import serve
    from gristmill.text import embed
    from gristmill.training import Until, fit, fit_gradient

__version__ = "0.1.0"

# Where each public name lives; imported when first used, so that `gristmill --help` and a server start at once.
_HOMES = {
    "Adam": "optim",
    "AdamW": "optim",
    "Clip": "compression",
    "Distill": "compression",
    "EdgeTrainer": "edge",
    "Model": "model",
    "Momentum": "optim",
    "Prune": "compression",
    "Quantize": "compression",
    "RemoveHeads": "compression",
    "RemoveLayers": "compression",
    "SGD": "optim",
    "Session": "runtime.session",
    "Until": "training",
    "compress": "compression",
    "compress_file": "compression",
    "embed": "text",
    "evaluate": "metrics",
    "fit": "training",
    "fit_gradient": "training",
    "kernels": "runtime.kernels",
    "load": "formats",
    "read_recipe": "compression",
    "save": "formats",
    "sensitivity": "compression",
    "serve": "serving",
    "write_recipe": "compression",
}

__all__ = [
    "Adam", "AdamW", "Clip", "Distill", "EdgeTrainer", "Model", "Momentum", "Prune", "Quantize", "RemoveHeads", "RemoveLayers",
    "SGD", "Session", "Until", "__version__", "compress", "compress_file", "embed", "evaluate", "fit", "fit_gradient", "kernels",
    "load", "read_recipe", "save", "sensitivity", "serve", "write_recipe", "zoo",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "zoo":
        return _import_module("gristmill.zoo")
    if name not in _HOMES:
        raise AttributeError(f"module 'gristmill' has no attribute {name!r}")
    return getattr(_import_module(f"gristmill.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
