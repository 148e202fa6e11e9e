"""What is observed on calibration data, against NumPy, however the data are cut into batches."""

import numpy as np
import pytest

import gristmill as gm
from gristmill.compression import calibration
from gristmill.compression.recipe import Context
from gristmill.errors import DataError

SHAPE = {"layers": 2, "hidden": 16, "heads": 4, "vocabulary": 40, "positions": 32}


@pytest.fixture(scope="module")
def encoder():
    return gm.zoo.bert(**SHAPE)


def tokens(lengths, longest, seed=3):
    """Batches of token ids of uneven length, the same whatever they are padded to."""
    rng = np.random.default_rng(seed)
    ids, mask = (np.zeros((len(lengths), longest), np.int64) for _ in range(2))
    for row, length in enumerate(lengths):
        ids[row, :length], mask[row, :length] = rng.integers(1, 40, length), 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def read_by(model, name, batch):
    """What a Linear reads, rows of padding left out."""
    value = next(node.inputs[0] for node in model.nodes if node.op == "Linear" and node.inputs[1] == name)
    found = model.replace(outputs=(value,)).run(**batch)[value]
    return found[batch["attention_mask"] != 0].astype(np.float64)


def test_padding_does_not_count(encoder):
    lengths = [3, 9, 1, 7, 9]
    near, far = (calibration.norms(encoder, encoder.weights, [tokens(lengths, n)], 1, "test") for n in (9, 30))
    for name in encoder.weights:
        rows = read_by(encoder, name, tokens(lengths, 9))
        np.testing.assert_allclose(near[name], np.linalg.norm(rows, axis=0), rtol=1e-5)
        np.testing.assert_allclose(far[name], near[name], rtol=1e-4)


@pytest.mark.parametrize("group", [None, 4])
def test_second_moments(encoder, group):
    batch = tokens([4, 8, 6], 8)
    found = calibration.second_moments(encoder, encoder.weights, [batch], 2, "test", group)
    for name in encoder.weights:
        rows = read_by(encoder, name, batch)
        whole = rows.T @ rows / len(rows)
        size = group or len(whole)
        wanted = [whole[i : i + size, i : i + size] for i in range(0, len(whole), size)]
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-5)


def test_memory_is_bounded_by_cutting_batches(encoder, monkeypatch):
    batch = tokens([5] * 23, 5)
    values = [node.inputs[0] for node in encoder.nodes if node.op == "Linear"]
    assert [len(piece["input_ids"]) for piece in calibration.pieces(encoder, values, batch)] == [23]
    whole = calibration.norms(encoder, encoder.weights, [batch], 1, "test")
    monkeypatch.setattr(calibration, "BYTES", 60_000)
    sizes = [len(piece["input_ids"]) for piece in calibration.pieces(encoder, values, batch)]
    assert sum(sizes) == 23
    assert max(sizes) == 10  # of values of 1120 bytes a token
    for name, norm in calibration.norms(encoder, encoder.weights, [batch], 1, "test").items():
        np.testing.assert_allclose(norm, whole[name], rtol=1e-5)


def test_forms_of_calibration_data(encoder):
    context = Context(encoder, None, 0, 1, False)
    batch = tokens([2, 5], 5)
    for given in (batch, tuple(batch.values()), [batch, batch], iter([batch]), [tuple(batch.values())]):
        for made in calibration.batches(encoder, given, context, "test"):
            assert made.keys() == encoder.inputs.keys()
            np.testing.assert_array_equal(made["input_ids"], batch["input_ids"])
    for bad in ({"input_ids": batch["input_ids"]}, {**batch, "attention_mask": batch["attention_mask"][:, :3]}, [1, 2], [[]]):
        with pytest.raises(DataError, match="test: calibration"):
            list(calibration.batches(encoder, bad, context, "test"))
    with pytest.raises(DataError, match=r"test: calibration='data' needs data"):
        list(calibration.batches(encoder, "data", context, "test"))
