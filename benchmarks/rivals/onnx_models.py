"""The ONNX files that ONNX Runtime is given: products with constant weights, and perceptrons of them."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def perceptron(weights: Sequence[np.ndarray], biases: Sequence[np.ndarray | None]) -> bytes:
    """Build x -> MatMul (-> Add -> Relu) ...; weights are [n, k]."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants, value = [], [], "x"
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        constants.append(numpy_helper.from_array(np.ascontiguousarray(weight.T), f"w{i}"))
        nodes.append(helper.make_node("MatMul", [value, f"w{i}"], [value := f"product{i}"]))
        if bias is not None:
            constants.append(numpy_helper.from_array(bias, f"b{i}"))
            nodes.append(helper.make_node("Add", [value, f"b{i}"], [value := f"sum{i}"]))
        if i < len(weights) - 1:
            nodes.append(helper.make_node("Relu", [value], [value := f"relu{i}"]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", weights[0].shape[1]])
    y = helper.make_tensor_value_info(value, TensorProto.FLOAT, ["batch", weights[-1].shape[0]])
    graph = helper.make_graph(nodes, "perceptron", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def quantized(model: bytes) -> bytes:
    """Quantise as ONNX Runtime's own tool does; signed weights per tensor are its fastest form."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(model)
        quantize_dynamic(source, target, weight_type=QuantType.QInt8)
        return target.read_bytes()


def bound_run(model: bytes, x: np.ndarray, threads: int):
    """Return a call that runs a model with its input and outputs bound beforehand, which saves it all copies."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    for name, y in zip(names, session.run(names, {"x": x}), strict=True):
        binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(y))
    return lambda: session.run_with_iobinding(binding)
