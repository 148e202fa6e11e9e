"""Hugging Face folders: encoders of the BERT family, and sentence-transformers on top of them.

What is read: config.json, model.safetensors (or its index and shards), tokenizer.json and tokenizer_config.json, and in a
sentence-transformers folder modules.json, sentence_bert_config.json and the configuration of each module. Nothing is trusted.
"""

from pathlib import Path
from typing import Any

from gristmill.errors import FormatError, GristmillError
from gristmill.formats.folder import Folder
from gristmill.formats.hf.architectures import read_encoder
from gristmill.formats.hf.sentence import read_modules
from gristmill.formats.hf.tokenizer import read_tokenizer
from gristmill.model import Model
from gristmill.zoo.bert import encoder


def load(path: Path) -> Model:
    """Read an encoder from a Hugging Face folder. Float32 tensors are read-only views of the mapped file; others are widened,
    and those that compressed-tensors wrote stay compressed where a kind of tensor holds them exactly.

    Inputs are int64 `input_ids`, `attention_mask` and, where the model has token types, `token_type_ids`, all [batch, sequence].
    A sentence-transformers folder gives the output `sentence_embedding` [batch, width] alone; a model with a classifier `logits`;
    any other `last_hidden_state` [batch, sequence, hidden].

    Raises:
        FormatError: a file is damaged, hostile, or of an architecture that is not known.
        OSError: a file cannot be read; FileNotFoundError if the weights are missing.
    """
    folder = Folder(path)
    try:
        return _read(folder)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    except GristmillError as error:  # a rule of the model that the files break
        raise FormatError(f"{path}: {error}") from error


def _read(folder: Folder) -> Model:
    modules = read_modules(folder)
    inner = folder if modules is None else folder.inner(modules.transformer)
    found = read_encoder(inner, modules)
    source: dict[str, Any] = {"format": "huggingface", "architecture": found.architecture}
    if found.compression is not None:
        source["compression"] = found.compression
    meta: dict[str, Any] = {"source": source}
    tokenizer = read_tokenizer(inner, found.longest)
    if tokenizer is not None:
        meta["tokenizer"] = tokenizer
    return encoder(found.shape, found.tensors).replace(meta=meta)
