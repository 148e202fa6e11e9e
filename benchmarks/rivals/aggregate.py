"""The mean of n gradients, into an array that exists: what a parameter server does once a step."""

import numpy as np

from gristmill.bench.protocol import main

BLOCK = 16384  # elements whose sum stays in the first-level cache


def gradients(count: int, length: int) -> list[np.ndarray]:
    """NumPy asks for huge pages for what it allocates; torch does not, so it borrows these."""
    row = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    return [np.resize(row, length) for _ in range(count)]


def numpy_whole(threads, count, length):
    inputs, out = gradients(count, length), np.empty(length, np.float32)

    def call():
        np.add(inputs[0], inputs[1], out=out)
        for each in inputs[2:]:
            np.add(out, each, out=out)
        np.multiply(out, np.float32(1 / count), out=out)

    return call


def numpy_blocks(threads, count, length):
    inputs, out = gradients(count, length), np.empty(length, np.float32)
    blocks = [[each[i : i + BLOCK] for each in (out, *inputs)] for i in range(0, length, BLOCK)]

    def call():
        for total, first, second, *rest in blocks:
            np.add(first, second, out=total)
            for each in rest:
                np.add(total, each, out=total)
            np.multiply(total, np.float32(1 / count), out=total)

    return call


def numpy_dot(threads, count, length):
    stack, out = np.stack(gradients(count, length)), np.empty(length, np.float32)
    weights = np.full(count, 1 / count, np.float32)

    def call():
        np.dot(weights, stack, out=out)

    return call


def torch_inputs(threads, count, length):
    import torch

    torch.set_num_threads(threads)
    return torch, [torch.from_numpy(each) for each in gradients(count, length)], torch.from_numpy(np.ones(length, np.float32))


def torch_add(threads, count, length):
    torch, inputs, out = torch_inputs(threads, count, length)

    def call():
        torch.add(inputs[0], inputs[1], out=out)
        for each in inputs[2:]:
            out.add_(each)
        out.mul_(1 / count)

    return call


def torch_mean(threads, count, length):
    import torch

    torch.set_num_threads(threads)
    stack = torch.from_numpy(np.stack(gradients(count, length)))
    out = torch.from_numpy(np.ones(length, np.float32))

    def call():
        torch.mean(stack, 0, out=out)

    return call


def gristmill(threads, count, length):
    from gristmill import _core

    inputs, out, weights = gradients(count, length), np.empty(length, np.float32), [1 / count] * count

    def call():
        _core.weighted_sum(inputs, weights, out, threads)

    return call


ENGINES = {each.__name__: each for each in (gristmill, numpy_whole, numpy_blocks, numpy_dot, torch_add, torch_mean)}

if __name__ == "__main__":
    main(ENGINES)
