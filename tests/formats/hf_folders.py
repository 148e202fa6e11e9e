"""Small Hugging Face folders, written as their libraries write them."""

import json

import numpy as np
from safetensors.numpy import save_file

from gristmill.zoo.bert import Encoder, encoder

SHAPE = Encoder(layers=2, hidden=12, heads=3, intermediate=20, vocabulary=40, positions=24, types=2)
BERT = {
    "model_type": "bert", "architectures": ["BertModel"], "num_hidden_layers": 2, "hidden_size": 12, "num_attention_heads": 3,
    "intermediate_size": 20, "vocab_size": 40, "max_position_embeddings": 24, "type_vocab_size": 2, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "pad_token_id": 0,
}  # fmt: skip
DISTILBERT = {
    "model_type": "distilbert", "architectures": ["DistilBertModel"], "n_layers": 2, "dim": 12, "n_heads": 3, "hidden_dim": 20,
    "vocab_size": 40, "max_position_embeddings": 24, "activation": "gelu",
}  # fmt: skip
ROBERTA = {**BERT, "model_type": "roberta", "architectures": ["RobertaModel"], "type_vocab_size": 1, "pad_token_id": 1}
POOLING = {
    "word_embedding_dimension": 12, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True,
    "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False,
}  # fmt: skip
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "mill",
    "grinds",
    "grain",
    "flour",
    "is",
    "white",
    "water",
    "turns",
    "the",
    "wheel",
]
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
    "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
    "added_tokens": [], "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
    "strip_accents": None, "lowercase": True}, "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}},
    {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "[SEP]", "type_id": 0}}], "pair": [{"Sequence":
    {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2],
    "tokens": ["[CLS]"]}, "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]}}}, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(WORDS)}, "unk_token": "[UNK]"},
}  # fmt: skip


def tensors_of(shape=SHAPE, seed=0):
    """Random tensors of an encoder, by BERT's names."""
    rng = np.random.default_rng(seed)
    return {
        name: (0.3 * rng.standard_normal(size) + name.endswith("Norm.weight")).astype(np.float32)
        for name, size in shape.tensors().items()
    }


def model_of(shape, tensors):
    from gristmill.tensor import Dense

    return encoder(shape, {name: Dense(array) for name, array in tensors.items()})


def distilled(tensors):
    """The same tensors by DistilBERT's names."""
    names = (
        ("encoder.layer.", "transformer.layer."), ("attention.self.query.", "attention.q_lin."),
        ("attention.self.key.", "attention.k_lin."),
        ("attention.self.value.", "attention.v_lin."), ("attention.output.dense.", "attention.out_lin."),
        ("attention.output.LayerNorm.", "sa_layer_norm."), ("intermediate.dense.", "ffn.lin1."), (".output.dense.", ".ffn.lin2."),
        (".output.LayerNorm.", ".output_layer_norm."),
    )  # fmt: skip
    made = {}
    for name, array in tensors.items():
        if "token_type" not in name:
            for old, new in names:
                name = name.replace(old, new)
            made[f"distilbert.{name}"] = array
    return made


def write(folder, config, tensors, modules=None, pooling=POOLING, tokenizer=TOKENIZER, length=10):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if modules is not None:
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length, "do_lower_case": False}))
    return folder


def batch(seed=0, lengths=(7, 4, 1), vocabulary=40, pad=0):
    """Ids padded to the longest sentence, mask and types."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.where(mask, rng.integers(4, vocabulary, mask.shape), pad)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": rng.integers(0, 2, mask.shape) * mask}
