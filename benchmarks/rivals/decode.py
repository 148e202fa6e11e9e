"""y[1, n] = x[1, k] @ W[n, k].T with 4-bit weights in groups: what generating one token after the other is made of.

Several weights take turns, more than the caches hold together, so that each is read from memory; a call returns the seconds
of one.
"""

import ctypes
import mmap
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from gemm import torch_inference

from gristmill.bench.protocol import main

TOGETHER = 160 << 20  # bytes of int4 weights that take turns
READ = 256 << 20


def copies(n: int, k: int) -> int:
    return -(-TOGETHER // (n * k // 2))


def operands(n: int, k: int, group: int):
    """Draw x [1, k], codes [n, k] from 0 to 15 and scales [n, k / group]."""
    rng = np.random.default_rng(0)
    x, codes = rng.standard_normal((1, k), np.float32), rng.integers(0, 16, (n, k), np.uint8)
    return x, codes, rng.uniform(0.001, 0.01, (n, k // group)).astype(np.float32)


def timed(run, count: int):
    def call() -> float:
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) / count

    return call


def gristmill(threads, n, k, group):
    import gristmill as gm
    from gristmill.model import Model
    from gristmill.ops import OWN, Node, TensorType
    from gristmill.tensor import Int4

    x, codes, scale = operands(n, k, group)
    words = (codes[:, ::2] | codes[:, 1::2] << 4).view(np.int32)
    weights = {f"w{i}": Int4((n, k), group, words, scale.astype(np.float16)) for i in range(copies(n, k))}
    nodes = tuple(Node("Linear", ("x", name), (f"y{name}",), domain=OWN) for name in weights)
    outputs = tuple(node.outputs[0] for node in nodes)
    session = gm.Session(Model(nodes, weights, {"x": TensorType(x.dtype, (1, k))}, outputs), threads=threads)
    return timed(lambda: session.run(x=x), len(weights))


def torch_int4pack(threads, n, k, group):
    torch = torch_inference(threads)
    x, codes, scale = operands(n, k, group)
    x = torch.from_numpy(x).bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(codes.astype(np.int32)), 1)
    weights = [packed.clone() for _ in range(copies(n, k))]
    scales = torch.from_numpy(np.stack([scale.T, np.zeros_like(scale.T)], axis=-1)).bfloat16().contiguous()
    all_scales = [scales.clone() for _ in weights]

    def run():
        for weight, each in zip(weights, all_scales, strict=True):
            torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group, each)

    return timed(run, len(weights))


def onnxruntime(threads, n, k, group):
    """MatMulNBits with int8 activations, accuracy level 4: its fastest."""
    from onnx import TensorProto, helper, numpy_helper
    from onnx_models import bound_run

    x, codes, scale = operands(n, k, group)
    blocks = (codes[:, ::2] | codes[:, 1::2] << 4).reshape(n, k // group, group // 2)
    count = copies(n, k)
    attributes = {"K": k, "N": n, "bits": 4, "block_size": group, "accuracy_level": 4, "domain": "com.microsoft"}
    nodes, constants, outputs = [], [], []
    for i in range(count):
        constants += [numpy_helper.from_array(blocks, f"b{i}"), numpy_helper.from_array(scale.reshape(-1), f"s{i}")]
        nodes.append(helper.make_node("MatMulNBits", ["x", f"b{i}", f"s{i}"], [f"y{i}"], **attributes))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [1, n]))
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, k])
    graph = helper.make_graph(nodes, "decode", [given], outputs, constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return timed(bound_run(model, x, threads), count)


def read(threads):
    """Read READ bytes from memory: the limit."""
    from gristmill.bench.limits import library

    lib, memory = library(), mmap.mmap(-1, READ)
    memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = np.frombuffer(memory, np.uint8)
    buffer[:] = 1
    share, pool = READ // threads, ThreadPoolExecutor(threads)

    def read_share(rank):
        lib.read_ahead_avx512(ctypes.c_void_p(buffer.ctypes.data + share * rank), ctypes.c_int64(share))

    def call():
        list(pool.map(read_share, range(threads)))

    return call


ENGINES = {each.__name__: each for each in (gristmill, torch_int4pack, onnxruntime, read)}

if __name__ == "__main__":
    main(ENGINES)
