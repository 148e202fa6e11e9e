"""The encoder as a PyTorch module, with its pooling and normalisation, and its export to ONNX for the engines that read that."""

import shutil
import warnings
from pathlib import Path
from typing import Any

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "sentence_embedding"
OPSET = 17


def encoder(source: Path, attention: str) -> Any:
    """Return a module from token ids to unit vectors; `attention` is "sdpa", or "eager" where a graph is to be matched."""
    import torch
    from transformers import AutoModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = AutoModel.from_pretrained(source, attn_implementation=attention, add_pooling_layer=False).eval()

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            states = self.body(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state
            weights = attention_mask.unsqueeze(-1).to(states.dtype)
            mean = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
            return torch.nn.functional.normalize(mean, p=2.0, dim=1)

    return Encoder()


def exported(source: Path, cache: Path) -> Path:
    """Return the model as an ONNX file, exported by PyTorch unless it is one."""
    target = cache / "model.onnx"
    if target.exists():
        return target
    if source.suffix == ".onnx":
        shutil.copytree(source.parent, cache / "onnx", dirs_exist_ok=True)  # external data lie beside the file
        return cache / "onnx" / source.name
    import torch

    warnings.filterwarnings("ignore")
    ids = torch.arange(1000, 1032).reshape(2, 16)
    axes = {name: {0: "batch", 1: "sequence"} for name in INPUTS} | {OUTPUT: {0: "batch"}}
    partial = cache / "partial.onnx"
    with torch.no_grad():
        torch.onnx.export(
            encoder(source, "eager"), (ids, torch.ones_like(ids), torch.zeros_like(ids)), str(partial), input_names=list(INPUTS),
            output_names=[OUTPUT], dynamic_axes=axes, opset_version=OPSET, dynamo=False,
        )  # fmt: skip
    return partial.rename(target)
