"""Inference of the digit classifier, a perceptron 64-512-256-10, from a NumPy array to a NumPy array."""

from itertools import pairwise

import numpy as np
from gemm import quiet, torch_inference
from onnx_models import bound_run, perceptron, quantized

from gristmill.bench.protocol import main

SIZES = (64, 512, 256, 10)


def batch_of(size: int) -> np.ndarray:
    return np.random.default_rng(0).random((size, SIZES[0]), np.float32)


def parameters() -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    pairs = list(pairwise(SIZES))
    return [rng.standard_normal((n, k), np.float32) / k**0.5 for k, n in pairs], [np.zeros(n, np.float32) for _, n in pairs]


def onnxruntime(threads, batch):
    return bound_run(perceptron(*parameters()), batch_of(batch), threads)


def onnxruntime_int8(threads, batch):
    return bound_run(quantized(perceptron(*parameters())), batch_of(batch), threads)


def torch_module(torch):
    layers = []
    for weight, bias in zip(*parameters(), strict=True):
        layers += [torch.nn.Linear(weight.shape[1], weight.shape[0]), torch.nn.ReLU()]
        layers[-2].weight.data, layers[-2].bias.data = torch.from_numpy(weight), torch.from_numpy(bias)
    return torch.nn.Sequential(*layers[:-1]).eval()


def torch(threads, batch):
    library = torch_inference(threads)
    model, x = torch_module(library), library.from_numpy(batch_of(batch))
    return quiet(lambda: model(x))


def torch_traced(threads, batch):
    library = torch_inference(threads)
    x = library.from_numpy(batch_of(batch))
    model = library.jit.optimize_for_inference(library.jit.trace(torch_module(library), x))
    return quiet(lambda: model(x))


def torch_int8(threads, batch):
    library = torch_inference(threads)
    library.backends.quantized.engine = "fbgemm"
    x = library.from_numpy(batch_of(batch))
    model = library.ao.quantization.quantize_dynamic(torch_module(library), {library.nn.Linear}, library.qint8)
    return quiet(lambda: model(x))


def gristmill(recipe):
    def make(threads, batch):
        import gristmill as gm

        passes = {"dense": [], "int8": [gm.Quantize()], "sparse": [gm.Prune(0.8, pattern="1x4"), gm.Quantize()]}[recipe]
        model = gm.zoo.mlp(SIZES)
        if passes:
            model, _ = gm.compress(model, passes)
        session, x = gm.Session(model, threads=threads), batch_of(batch)
        return quiet(lambda: session.run(x=x))

    return make


ENGINES = {
    "gristmill": gristmill("dense"),
    "gristmill_int8": gristmill("int8"),
    "gristmill_sparse": gristmill("sparse"),
    **{each.__name__: each for each in (onnxruntime, onnxruntime_int8, torch, torch_traced, torch_int8)},
}

if __name__ == "__main__":
    main(ENGINES)
