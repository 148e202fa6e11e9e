"""Encoders trained to give vectors: several int64 inputs, a table of embeddings, and attention on the way."""

import numpy as np
import pytest

import gristmill as gm
from gristmill import _core
from gristmill.errors import DataError, ModelError
from training.programs import bits

SIZES = {"layers": 2, "hidden": 16, "heads": 4, "vocabulary": 60, "positions": 16}
RATE = gm.AdamW(5e-3)


def texts(examples=24, length=9, seed=0):
    """Tokens of texts of uneven length, and a unit vector for each."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 60, (examples, length))
    mask = (np.arange(length) < rng.integers(1, length + 1, (examples, 1))).astype(np.int64)
    vectors = rng.standard_normal((examples, SIZES["hidden"])).astype(np.float32)
    tokens = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return tokens, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def fine_tune(data, loss="cosine", **options):
    return gm.fit(gm.zoo.bert(**SIZES), data, loss, RATE, batch_size=8, epochs=6, slices=2, **options)


@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_an_encoder_learns_vectors_with_the_same_bits_on_any_workers(loss):
    one, two = (fine_tune(texts(), loss, workers=workers) for workers in (1, 2))
    assert bits(one) == bits(two)
    assert one.history["loss"][-1] < 0.7 * one.history["loss"][0]
    tokens, vectors = texts()
    made = gm.Session(one.model).run(**tokens)["sentence_embedding"]
    assert np.mean((made * vectors).sum(axis=1)) > 0.2


def test_inputs_come_as_a_mapping_or_a_tuple():
    tokens, vectors = texts()
    forms = [(tokens, vectors), (tuple(tokens.values()), vectors), {**tokens, "target": vectors}]
    assert len({bits(fine_tune(form, engine="inline")) for form in forms}) == 1
    measured = fine_tune(forms[0], engine="inline", validation=forms[1], metric="mse")
    assert len(measured.history["mse"]) == 6


@pytest.mark.parametrize("drop", [0, 1, 2])
def test_a_missing_input_is_named(drop):
    tokens, vectors = texts()
    some = {name: array for at, (name, array) in enumerate(tokens.items()) if at != drop}
    for x in (some, tuple(some.values())):
        with pytest.raises(DataError, match=r"mapping|got"):
            fine_tune((x, vectors), engine="inline")


def test_rows_of_the_table_that_no_text_names_only_decay():
    tokens, vectors = texts()
    model = gm.zoo.bert(**SIZES)
    table = next(name for name in model.tensors if name.endswith("word_embeddings.weight"))
    unused = np.setdiff1d(np.arange(60), tokens["input_ids"])
    trained = gm.fit(model, (tokens, vectors), "mse", gm.AdamW(1e-2, weight_decay=0.0), epochs=1, engine="inline").params[table]
    before = model.tensors[table].dense()
    assert len(unused)
    np.testing.assert_array_equal(trained[unused], before[unused])
    used = np.unique(tokens["input_ids"][tokens["attention_mask"] > 0])
    assert (trained[used] != before[used]).any(axis=1).all()


def test_bf16_products_train_about_as_well():
    exact, rounded = (fine_tune(texts(), engine="inline", precision=precision) for precision in (None, "bf16"))
    np.testing.assert_allclose(rounded.history["loss"], exact.history["loss"], rtol=0.05)
    assert (bits(rounded) != bits(exact)) == _core.has_bf16()
    with pytest.raises(ModelError, match="precision"):
        fine_tune(texts(), engine="inline", precision="int8")
