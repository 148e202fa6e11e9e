"""CTranslate2: its own conversion of the encoder, quantised when it is loaded; pooling and normalisation in NumPy."""

from importlib import import_module
from pathlib import Path

import numpy as np

from gristmill.bench.engines import Inputs, Run

TYPES = {"fp32": "float32", "int8": "int8"}


def prepare(source: Path, cache: Path, precisions: set[str]) -> None:
    target = cache / "ctranslate2"
    if not (target / "model.bin").exists():
        import_module("ctranslate2.converters").TransformersConverter(str(source)).convert(str(target), force=True)


def load(cache: Path, precision: str, threads: int, variant: str) -> Run:
    ctranslate2 = import_module("ctranslate2")
    model = ctranslate2.Encoder(
        str(cache / "ctranslate2"), device="cpu", compute_type=TYPES[precision], inter_threads=1, intra_threads=threads
    )

    def run(inputs: Inputs) -> np.ndarray:
        mask = inputs["attention_mask"]
        ids = ctranslate2.StorageView.from_array(inputs["input_ids"].astype(np.int32))
        lengths = ctranslate2.StorageView.from_array(mask.sum(axis=1).astype(np.int32))
        states = np.asarray(model.forward_batch(ids, lengths).last_hidden_state)
        vectors = np.einsum("bsd,bs->bd", states, mask.astype(np.float32))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return run
