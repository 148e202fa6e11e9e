"""A global magnitude mask: which 20 % of all weights stay."""

import numpy as np

from gristmill.bench.protocol import main

TENSORS = 16


def weights(length: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(length, np.float32)


def gristmill(threads, length, drop):
    from gristmill import _core

    x, mask = weights(length), np.empty(length, np.uint8)

    def call():
        _core.magnitude_mask(x, int(drop * length), mask, threads)

    return call


def numpy_partition(threads, length, drop):
    x, magnitude, mask = weights(length), np.empty(length, np.float32), np.empty(length, bool)
    k = int(drop * length)

    def call():
        np.abs(x, out=magnitude)
        magnitude.partition(k)
        threshold = magnitude[k]
        np.abs(x, out=magnitude)
        np.greater_equal(magnitude, threshold, out=mask)

    return call


def torch_kthvalue(threads, length, drop):
    import torch

    torch.set_num_threads(threads)
    x, k = torch.from_numpy(weights(length)), int(drop * length)

    def call():
        magnitude = x.abs()
        torch.gt(magnitude, torch.kthvalue(magnitude, k).values)

    return call


def torch_prune(threads, length, drop):
    import torch
    from torch.nn.utils import prune

    torch.set_num_threads(threads)
    layers = [torch.nn.Linear(1024, length // TENSORS // 1024, bias=False) for _ in range(TENSORS)]
    named = [(layer, "weight") for layer in layers]

    def call():
        prune.global_unstructured(named, prune.L1Unstructured, amount=drop)
        for layer in layers:
            layer.weight_orig.data, layer.weight_mask = layer.weight_orig.data, None
            del layer._forward_pre_hooks[next(iter(layer._forward_pre_hooks))]
            del layer.weight, layer.weight_mask
            layer.register_parameter("weight", layer._parameters.pop("weight_orig"))

    return call


ENGINES = {each.__name__: each for each in (gristmill, numpy_partition, torch_kthvalue, torch_prune)}

if __name__ == "__main__":
    main(ENGINES)
