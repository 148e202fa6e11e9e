"""Gristmill: the model loaded once and saved in our own file, in float32 and in int8."""

from itertools import count
from pathlib import Path

import numpy as np

from gristmill.bench.engines import Inputs, Run
from gristmill.bench.protocol import Call

SESSION = {"fp32": "float32", "bf16": "bf16", "int8": "int8"}


def prepare(source: Path, cache: Path, precisions: set[str]) -> None:
    import gristmill as gm

    target = cache / "gristmill-fp32.safetensors"
    model = gm.load(source)
    gm.save(model, target)
    if "int8" in precisions:
        from gristmill.compression.recipe import Context

        # The pass alone: `compress` would also measure the model on a thousand random inputs.
        small = gm.Quantize("int8").apply(model, Context(model, None, 0, 1, False))
        gm.save(small, cache / "gristmill-int8.safetensors")


def prune(cache: Path, variant: str) -> Path:
    """Make the model that a variant such as "4x4-80" names, once; pruned by magnitude: of use for its speed alone."""
    target = cache / f"gristmill-{variant}.safetensors"
    if not target.exists():
        import gristmill as gm
        from gristmill.compression.recipe import Context

        model = gm.load(cache / "gristmill-fp32.safetensors")
        pattern, _, percent = variant.partition("-")
        for step in (gm.Prune(int(percent) / 100, pattern=pattern), gm.Quantize("int8")):
            model = step.apply(model, Context(model, None, 0, 1, False))
        gm.save(model, target)
    return target


def load(cache: Path, precision: str, threads: int, variant: str) -> Run:
    import gristmill as gm

    dense = cache / f"gristmill-{'int8' if precision == 'int8' else 'fp32'}.safetensors"
    model = gm.load(prune(cache, variant) if variant else dense)
    session = gm.Session(model, threads=threads, precision=SESSION[precision])
    name = model.outputs[0]

    def run(inputs: Inputs) -> np.ndarray:
        return session.run(**inputs)[name]

    return run


def trainer(cache: Path, precision: str, threads: int, variant: str, inputs: Inputs) -> Call:
    """Return one step: forward, mean squared error to fixed vectors, backward, AdamW, as `fit` does it."""
    import gristmill as gm
    from gristmill.autodiff import gradient_name, gradients
    from gristmill.losses import LOSS, TARGET, attach, find
    from gristmill.ops import TensorType
    from gristmill.training.fitting import trainable_names
    from gristmill.training.spec import describe

    model = gm.load(cache / "gristmill-fp32.safetensors")
    spec, arrays = describe({name: model.tensors[name].trainable for name in trainable_names(model, find("mse"), None)})
    params, slopes = np.zeros(spec.size, np.float32), np.zeros(spec.size, np.float32)
    spec.write(arrays, params)
    width = int(model.types[model.outputs[0]].shape[-1])
    target = np.random.default_rng(0).standard_normal((len(inputs["input_ids"]), width))
    feed = {**inputs, TARGET: (target / np.linalg.norm(target, axis=1, keepdims=True)).astype(np.float32)}
    training = gradients(attach(model, "mse"), LOSS, arrays)
    session = gm.Session(training, threads=threads, precision=SESSION[precision], trainable=spec.views(params))
    types = {name: TensorType(array.dtype, array.shape) for name, array in feed.items()}
    run = session.prepare(types, {gradient_name(name): view for name, view in spec.views(slopes).items()})
    optimizer = gm.AdamW(1e-5)
    state, steps = optimizer.init(spec.size), count(1)

    def step() -> None:
        run(feed)
        optimizer.update(params, slopes, state, next(steps), threads=threads)

    return step
