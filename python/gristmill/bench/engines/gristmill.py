"""Gristmill: the model loaded once and saved in our own file, in float32 and in int8."""

from pathlib import Path

import numpy as np

from gristmill.bench.engines import Inputs, Run

SESSION = {"fp32": "float32", "bf16": "bf16", "int8": "int8"}


def prepare(source: Path, cache: Path, precisions: set[str]) -> None:
    import gristmill as gm

    target = cache / "gristmill-fp32.safetensors"
    model = gm.load(source)
    gm.save(model, target)
    if "int8" in precisions:
        small, _ = gm.compress(model, [gm.Quantize("int8")])
        gm.save(small, cache / "gristmill-int8.safetensors")


def load(cache: Path, precision: str, threads: int, variant: str) -> Run:
    import gristmill as gm

    model = gm.load(cache / f"gristmill-{'int8' if precision == 'int8' else 'fp32'}.safetensors")
    session = gm.Session(model, threads=threads, precision=SESSION[precision])
    (name,) = [value.name for value in model.outputs]

    def run(inputs: Inputs) -> np.ndarray:
        return session.run(**inputs)[name]

    return run
