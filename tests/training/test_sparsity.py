"""Pruning while training, and losses on several values."""

import numpy as np
import pytest

import gristmill as gm
from gristmill import losses
from gristmill.errors import ModelError
from gristmill.training.sparsity import GradualPruning

HIDDEN = "encoder.layer.0.output.LayerNorm"


def encoder_and_data() -> tuple[gm.Model, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    encoder = gm.zoo.bert(layers=1, hidden=16, heads=2, vocabulary=50, positions=16)
    ids = rng.integers(0, 50, (24, 6))
    tokens = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    targets = {"target": rng.standard_normal((24, 16)), f"target.{HIDDEN}": rng.standard_normal((24, 6, 16))}
    return encoder, tokens | targets


def pruning(encoder: gm.Model, **settings: object) -> GradualPruning:
    names = tuple(name for name in encoder.weights if name.startswith("encoder."))
    return GradualPruning(names, **({"final": 0.75, "begin": 2, "end": 9, "every": 3} | settings))


def fit(encoder: gm.Model, data: dict[str, np.ndarray], **options: object) -> object:
    loss = losses.weighted({"sentence_embedding": ("cosine", 1.0), HIDDEN: ("mse", 0.5)})
    return gm.fit(encoder, data, loss, gm.AdamW(1e-2), batch_size=8, **({"epochs": 4, "engine": "inline"} | options))


@pytest.mark.parametrize("pattern", ["unstructured", "1x4", "2x4", "4x4"])
def test_weights_end_at_the_asked_sparsity_in_whole_blocks(pattern: str) -> None:
    encoder, data = encoder_and_data()
    rise = pruning(encoder, pattern=pattern)
    trained = fit(encoder, data, pruning=rise).model
    rows, columns = {"unstructured": (1, 1)}.get(pattern) or map(int, pattern.split("x"))
    for name in rise.names:
        weight = trained.tensors[name].dense()
        blocks = weight.reshape(weight.shape[0] // rows, rows, -1, columns)
        zero = (blocks == 0).all(axis=(1, 3))
        assert zero.mean() == 0.75
        assert (blocks != 0).any(axis=(1, 3)).mean() == 0.25


def test_sparsity_rises_along_the_cubic_and_never_falls() -> None:
    rise = GradualPruning(("w",), final=0.9, begin=10, end=110, every=10, initial=0.5)
    shares = [rise.sparsity(step) for step in range(1, 140)]
    assert shares[8] == 0.0
    assert shares[9] == 0.5
    assert shares[59] == pytest.approx(0.9 - 0.4 * 0.125)
    assert shares[109:] == [0.9] * 30
    assert shares == sorted(shares)


def test_bits_depend_on_neither_workers_nor_a_break(tmp_path: object) -> None:
    encoder, data = encoder_and_data()
    rise = pruning(encoder)
    whole = fit(encoder, data, pruning=rise)
    fit(encoder, data, pruning=rise, epochs=2, checkpoint=tmp_path / "run")  # type: ignore[operator]
    resumed = fit(encoder, data, pruning=rise, checkpoint=tmp_path / "run", resume=True, workers=2, engine="processes")  # type: ignore[operator]
    for name, tensor in whole.model.tensors.items():
        assert np.array_equal(tensor.dense(), resumed.model.tensors[name].dense()), name


def test_norms_decide_which_blocks_stay() -> None:
    model = gm.zoo.mlp([8, 4, 2])
    rng = np.random.default_rng(0)
    norms = np.array([0, 0, 0, 0, 100, 100, 100, 100], np.float32)
    rise = GradualPruning(("layer0.weight",), 0.5, 1, 1, pattern="1x4", norms={"layer0.weight": norms})
    data = rng.standard_normal((8, 8)), rng.integers(0, 2, 8)
    trained = gm.fit(model, data, epochs=1, engine="inline", pruning=rise).model
    weight = trained.tensors["layer0.weight"].dense()
    assert (weight[:, :4] == 0).all()
    assert (weight[:, 4:] != 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"final": 1.0}, "final"),
        ({"begin": 9, "end": 2}, "begin"),
        ({"pattern": "3x3"}, "pattern"),
        ({"names": ("embeddings.LayerNorm.bias",)}, "'embeddings.LayerNorm.bias': its shape .* is no matrix"),
        ({"names": ("nothing",)}, "'nothing': it does not train"),
        ({"norms": {"encoder.layer.0.output.dense.weight": np.ones(3, np.float32)}}, "norms of 'encoder.layer.0.output"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, object], message: str) -> None:
    encoder, data = encoder_and_data()
    with pytest.raises(ModelError, match=message):
        fit(encoder, data, pruning=pruning(encoder, **settings) if "names" not in settings else wrong(settings))


def wrong(settings: dict[str, object]) -> GradualPruning:
    return GradualPruning(**({"final": 0.5, "begin": 1, "end": 2} | settings))  # type: ignore[arg-type]


def test_a_weighted_loss_is_the_sum_of_its_terms() -> None:
    encoder, data = encoder_and_data()
    graph = losses.attach(encoder, losses.weighted({"sentence_embedding": ("cosine", 2.0), HIDDEN: ("mse", 0.5)}))
    inputs = {name: np.asarray(data[name], kind.dtype) for name, kind in graph.inputs.items()}
    total = float(graph.run(**inputs)["loss"])
    tokens = {name: inputs[name] for name in encoder.inputs}
    found = encoder.replace(outputs=("sentence_embedding", HIDDEN)).run(**tokens)
    a, b = found["sentence_embedding"], inputs["target"]
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    squared = ((found[HIDDEN] - inputs[f"target.{HIDDEN}"]) ** 2).mean()
    assert total == pytest.approx(2.0 * (1 - cosine).mean() + 0.5 * squared, rel=1e-5)


@pytest.mark.parametrize(
    ("terms", "message"),
    [({}, "at least one"), ({HIDDEN: ("cross_entropy", 1.0)}, "one target"),
     ({"sentence_embedding": ("mse", 0.0)}, "positive weight"), ({"nowhere": ("mse", 1.0)}, "'nowhere'")],
)  # fmt: skip
def test_weighted_losses_that_make_no_sense_are_refused(terms: dict[str, tuple[str, float]], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        losses.attach(encoder_and_data()[0], losses.weighted(terms))
