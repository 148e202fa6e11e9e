"""PyTorch: the model of `transformers` with fused attention; bf16 weights, or `quantize_dynamic` for int8."""

from pathlib import Path
from typing import Any

import numpy as np

from gristmill.bench.engines import Inputs, Run
from gristmill.bench.engines.encoder import INPUTS, encoder


def prepare(source: Path, cache: Path, precisions: set[str]) -> None:
    (cache / "torch.txt").write_text(str(source.absolute()))


def module(cache: Path, threads: int) -> Any:
    import torch

    torch.set_num_threads(threads)
    return encoder(Path((cache / "torch.txt").read_text()), "sdpa")


def load(cache: Path, precision: str, threads: int, variant: str) -> Run:
    import torch

    model = module(cache, threads)
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    if precision == "int8":
        torch.backends.quantized.engine = variant or "x86"
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)

    def run(inputs: Inputs) -> np.ndarray:
        with torch.inference_mode():
            return model(*[torch.from_numpy(inputs[name]) for name in INPUTS]).float().numpy()

    return run


def trainer(cache: Path, precision: str, threads: int, variant: str, inputs: Inputs) -> Any:
    """Return one step: forward, mean squared error to fixed vectors, backward, AdamW. No dropout, as nobody else has it."""
    import torch

    model = module(cache, threads)
    feed = [torch.from_numpy(inputs[name]) for name in INPUTS]
    target = torch.nn.functional.normalize(torch.randn(len(feed[0]), 384, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def loss_of() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            vectors = model(*feed)
        return torch.nn.functional.mse_loss(vectors.float(), target)

    compute = torch.compile(loss_of) if variant == "compile" else loss_of

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        compute().backward()
        optimizer.step()

    return step
