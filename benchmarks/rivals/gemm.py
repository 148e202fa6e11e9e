"""y[m, n] = x[m, k] @ W[n, k].T with a constant weight: float32, int8 with activations quantised at run time, and sparse."""

from contextlib import ExitStack

import numpy as np
from onnx_models import bound_run, perceptron, quantized

from gristmill.bench.protocol import main

FOREVER = ExitStack()


def operands(m: int, k: int, n: int, sparsity: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Draw x and a weight of which blocks of 1 x 4 are zero, the same share in every row."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((m, k), np.float32), rng.standard_normal((n, k), np.float32)
    if sparsity:
        blocks = rng.random((n, k // 4)).argsort(axis=1) >= round(sparsity * k / 4)
        weight *= np.repeat(blocks, 4, axis=1)
    return x, weight


def numpy(threads, m, k, n):
    x, weight = operands(m, k, n)
    weight, out = np.ascontiguousarray(weight.T), np.empty((m, n), np.float32)

    def call():
        np.matmul(x, weight, out=out)

    return call


def onnxruntime(threads, m, k, n):
    x, weight = operands(m, k, n)
    return bound_run(perceptron([weight], [None]), x, threads)


def onnxruntime_int8(threads, m, k, n):
    x, weight = operands(m, k, n)
    return bound_run(quantized(perceptron([weight], [None])), x, threads)


def torch_inference(threads):
    import torch

    torch.set_num_threads(threads)
    FOREVER.enter_context(torch.inference_mode())
    return torch


def quiet(call):
    """Drop what a call returns, which the protocol would take for seconds."""

    def run():
        call()

    return run


def torch_linear(threads, m, k, n):
    torch = torch_inference(threads)
    x, weight = map(torch.from_numpy, operands(m, k, n))
    return quiet(lambda: torch.nn.functional.linear(x, weight))


def torch_prepacked(threads, m, k, n):
    """oneDNN with the weight reordered beforehand: what torch.compile emits for frozen weights."""
    torch = torch_inference(threads)
    x, weight = map(torch.from_numpy, operands(m, k, n))
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, m)
    return quiet(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))


def torch_int8(backend):
    def make(threads, m, k, n):
        torch = torch_inference(threads)
        torch.backends.quantized.engine = backend
        x, weight = map(torch.from_numpy, operands(m, k, n))
        layer = torch.nn.Linear(k, n, bias=False)
        layer.weight.copy_(weight)
        layer = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear}, torch.qint8)
        return quiet(lambda: layer(x))

    return make


def torch_csr(threads, m, k, n, sparsity):
    torch = torch_inference(threads)
    x, weight = map(torch.from_numpy, operands(m, k, n, sparsity))
    weight, lanes = weight.to_sparse_csr(), x.T.contiguous()
    return quiet(lambda: weight @ lanes)


def scipy_csr(threads, m, k, n, sparsity):
    from scipy import sparse

    x, weight = operands(m, k, n, sparsity)
    weight, lanes = sparse.csr_array(weight), np.ascontiguousarray(x.T)
    return quiet(lambda: weight @ lanes)


def scipy_bsr(threads, m, k, n, sparsity):
    from scipy import sparse

    x, weight = operands(m, k, n, sparsity)
    weight, lanes = sparse.bsr_array(weight, blocksize=(1, 4)), np.ascontiguousarray(x.T)
    return quiet(lambda: weight @ lanes)


def gristmill(precision):
    def make(threads, m, k, n, sparsity=0.0):
        import gristmill as gm
        from gristmill.tensor import Dense, Sparse

        x, weight = operands(m, k, n, sparsity)
        tensor = Dense(weight)
        if sparsity:
            tensor = Sparse.from_dense(weight, weight.reshape(n, k // 4, 4).any(axis=2), (1, 4))
            tensor = tensor.quantized() if precision == "int8" else tensor
        model = gm.zoo.mlp([k, n]).replace(tensors={"layer0.weight": tensor})
        session = gm.Session(model, threads=threads, precision=precision)
        return quiet(lambda: session.run(x=x))

    return make


ENGINES = {
    "gristmill": gristmill(None),
    "gristmill_int8": gristmill("int8"),
    "torch_int8_fbgemm": torch_int8("fbgemm"),
    "torch_int8_onednn": torch_int8("onednn"),
    **{
        each.__name__: each
        for each in (numpy, onnxruntime, onnxruntime_int8, torch_linear, torch_prepacked, torch_csr, scipy_csr, scipy_bsr)
    },
}

if __name__ == "__main__":
    main(ENGINES)
