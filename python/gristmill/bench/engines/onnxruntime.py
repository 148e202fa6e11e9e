"""ONNX Runtime: the export with the fusions of its own optimizer; int8 by `quantize_dynamic`, signed weights per channel."""

from importlib import import_module
from pathlib import Path

from gristmill.bench.engines import Inputs, Run
from gristmill.bench.engines.encoder import exported

QUANTIZED = ("MatMul", "Attention")
PER_TENSOR = "tensor"  # one scale for a weight: a little faster, and less exact


def prepare(source: Path, cache: Path, precisions: set[str]) -> None:
    fused = cache / "onnxruntime-fp32.onnx"
    if not fused.exists():
        optimizer = import_module("onnxruntime.transformers.optimizer")
        model = optimizer.optimize_model(str(exported(source, cache)), "bert", opt_level=1)  # heads and width are detected
        model.save_model_to_file(str(fused))
    for variant in ("", PER_TENSOR):
        target = file(cache, "int8", variant)
        if "int8" in precisions and not target.exists():
            import onnx

            tool = import_module("onnxruntime.quantization")
            tool.quantize_dynamic(
                fused, target, op_types_to_quantize=QUANTIZED, per_channel=not variant, reduce_range=False,
                weight_type=tool.QuantType.QInt8, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
            )  # fmt: skip


def file(cache: Path, precision: str, variant: str) -> Path:
    return cache / f"onnxruntime-{precision}{'-' * bool(variant)}{variant}.onnx"


def load(cache: Path, precision: str, threads: int, variant: str) -> Run:
    onnxruntime = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(file(cache, precision, variant), options, providers=["CPUExecutionProvider"])

    def run(inputs: Inputs):
        return session.run(None, inputs)[0]

    return run
