"""OpenVINO: the export in fp32, in bf16 by its hint of precision, and in int8 by nncf, calibrated.

Variants: "latency" runs one batch at a time; "streams" runs one batch a thread at the same time; "-bf16" runs in bf16 what int8
leaves. Tried and slower or level: nncf's preset PERFORMANCE, an export with `sdpa`, conversion of the PyTorch module itself.
"""

from importlib import import_module
from pathlib import Path

import numpy as np

from gristmill.bench.engines import Inputs, Run
from gristmill.bench.engines.encoder import exported
from gristmill.bench.inputs import calibration

STREAMS = "streams"


def prepare(source: Path, cache: Path, precisions: set[str]) -> None:
    openvino = import_module("openvino")
    plain = cache / "openvino-fp32.xml"
    if not plain.exists():
        openvino.save_model(openvino.convert_model(exported(source, cache)), plain, compress_to_fp16=False)
    target = cache / "openvino-int8.xml"
    if "int8" in precisions and not target.exists():
        nncf = import_module("nncf")
        samples = calibration(cache)
        model = nncf.quantize(
            openvino.Core().read_model(plain), nncf.Dataset(samples), preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples),
        )  # fmt: skip
        openvino.save_model(model, target, compress_to_fp16=False)


def load(cache: Path, precision: str, threads: int, variant: str) -> Run:
    openvino = import_module("openvino")
    streams = threads if STREAMS in variant else 1
    settings = {
        "PERFORMANCE_HINT": "THROUGHPUT" if streams > 1 else "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": streams,
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" or variant.endswith("bf16") else "f32",
    }
    path = cache / f"openvino-{'int8' if precision == 'int8' else 'fp32'}.xml"
    model = openvino.Core().compile_model(path, "CPU", settings)
    requests = [model.create_infer_request() for _ in range(streams)]

    def run_one(inputs: Inputs) -> np.ndarray:
        return requests[0].infer(inputs, share_inputs=True, share_outputs=True)[0]

    def run_all(inputs: Inputs) -> np.ndarray:
        for request in requests:
            request.start_async(inputs, share_inputs=True)
        for request in requests:
            request.wait()
        return requests[0].get_output_tensor(0).data

    run: Run = run_all if streams > 1 else run_one
    run.batches = streams  # type: ignore[attr-defined]
    return run
