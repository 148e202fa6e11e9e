"""Training a perceptron with Adam and cross-entropy: seconds per example of an epoch, once everything is running.

Data are random numbers of the right shapes, in memory. The shuffling is not timed, nor the start of any process.
"""

import os
import subprocess
import sys
import time
from itertools import pairwise
from statistics import median

import numpy as np

from gristmill.bench.protocol import main

MODELS = {1: ((64, 512, 256, 10), 1408, 8), 10: ((784, 2048, 2048, 2048, 10), 2560, 2)}  # layers, examples, epochs of a call
RATE = 1e-3
RANKS = 2


def dataset(which: int) -> tuple[np.ndarray, np.ndarray]:
    sizes, examples, _ = MODELS[which]
    rng = np.random.default_rng(0)
    return rng.random((examples, sizes[0]), np.float32), rng.integers(0, sizes[-1], examples)


def gristmill(engine, workers, slices):
    def make(threads, which, batch):
        import gristmill as gm

        sizes, _, epochs = MODELS[which]
        x, y = dataset(which)
        model = gm.zoo.mlp(sizes)

        def call():
            result = gm.fit(
                model, (x, y), optimizer=gm.Adam(RATE), engine=engine, workers=workers, slices=slices, batch_size=batch,
                epochs=epochs, threads=max(1, threads // workers), progress=False,
            )  # fmt: skip
            return median(result.history["seconds"]) / len(x)

        return call

    return make


def torch_step(torch, which, compiled=False):
    """Return the module, and what runs one optimiser step on a batch."""
    sizes = MODELS[which][0]
    torch.manual_seed(0)
    layers = [part for k, n in pairwise(sizes) for part in (torch.nn.Linear(k, n), torch.nn.ReLU())]
    model = torch.nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)

    def loss_of(module, x, y):
        return torch.nn.functional.cross_entropy(module(x), y)

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def step(module, x, y):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(module, x, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return model, step


def torch_epoch(torch, module, step, x, y, batch):
    order = torch.randperm(len(x))
    total = torch.zeros(())
    begin = time.perf_counter()
    for rows in order.split(batch):
        total += step(module, x[rows], y[rows])
    total.item()
    return (time.perf_counter() - begin) / len(x)


def torch_single(compiled):
    def make(threads, which, batch):
        import torch

        torch.set_num_threads(threads)
        x, y = map(torch.from_numpy, dataset(which))
        model, step = torch_step(torch, which, compiled)
        return lambda: torch_epoch(torch, model, step, x, y, batch)

    return make


def torch_distributed(threads, which, batch):
    """DistributedDataParallel over gloo, a thread and a half of every batch for each of two processes."""
    rank = int(os.environ.setdefault("RANK", "0"))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(max(1, threads // RANKS))
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, RANKS, is_master=True, wait_for_workers=False)
        environment = {**os.environ, "RANK": "1", "STORE_PORT": str(store.port)}
        subprocess.Popen(sys.orig_argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    else:
        store = dist.TCPStore("127.0.0.1", int(os.environ["STORE_PORT"]), RANKS, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    x, y = map(torch.from_numpy, dataset(which))
    model, step = torch_step(torch, which)
    module = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    mine = slice(rank, None, RANKS)

    def call():
        dist.barrier()
        return torch_epoch(torch, module, step, x[mine], y[mine], batch // RANKS) / RANKS

    while rank:  # the other process says when: nothing passes this barrier before it does
        call()
    return call


ENGINES = {
    "gristmill_inline": gristmill("inline", 1, 1),
    "gristmill_slices": gristmill("inline", 1, 4),
    "gristmill_workers": gristmill("processes", 2, 2),
    "gristmill_workers_slices": gristmill("processes", 2, 4),
    "torch": torch_single(False),
    "torch_compiled": torch_single(True),
    "torch_distributed": torch_distributed,
}

if __name__ == "__main__":
    main(ENGINES)
