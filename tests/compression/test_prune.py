"""What pruning drops is what the papers say, against NumPy; what it cannot do it says before it changes anything."""

import json

import numpy as np
import pytest

import gristmill as gm
from gristmill.compression.recipe import Context
from gristmill.errors import DataError, ModelError
from gristmill.ops import OWN, Node, TensorType
from gristmill.tensor import Dense, Sparse
from gristmill.tensor.selection import Pattern, mask_of, mask_of_groups, mask_of_rows, masks_of, scores

BLOCKS = {"unstructured": (1, 1), "1x4": (1, 4), "2x4": (2, 4), "4x4": (4, 4)}


@pytest.fixture(scope="module")
def model():
    return gm.zoo.mlp([32, 64, 48, 8], seed=1)


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    return (rng.standard_normal((300, 32)) * rng.uniform(0.01, 3, 32)).astype(np.float32)


def pruned(model, step):
    return step.apply(model, Context(model, None, 0, 2, False))


def inputs_of(model, x):
    """What each Linear of a multilayer perceptron reads, in float64."""
    values = {}
    for name in model.weights:
        values[name] = x.astype(np.float64)
        bias = model.tensors[name.replace("weight", "bias")].dense()
        x = np.maximum(values[name] @ model.tensors[name].dense().T + bias, 0)
    return values


def block_scores(weight, block, norms=None):
    scaled = np.abs(weight.astype(np.float64)) * (1 if norms is None else norms)
    (n, k), (r, c) = weight.shape, block
    return (scaled.reshape(n // r, r, k // c, c) ** 2).sum(axis=(1, 3))


def kept_blocks(before, after, block):
    """Which blocks of a matrix are still there, after checking that nothing else changed."""
    (n, k), (r, c) = before.shape, block
    zero = (after.reshape(n // r, r, k // c, c) == 0).all(axis=(1, 3))
    np.testing.assert_array_equal(after, np.where(np.repeat(np.repeat(zero, r, 0), c, 1), 0, before))
    return ~zero


@pytest.mark.parametrize("pattern", BLOCKS)
@pytest.mark.parametrize("scope", [None, "row", "layer", "global"])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_the_lowest_scores_go(model, x, pattern, scope, method):
    share, block = 0.625, BLOCKS[pattern]
    small = pruned(model, gm.Prune(share, pattern, scope, method=method, calibration=x if method == "wanda" else None))
    norms = {name: np.linalg.norm(value, axis=0) for name, value in inputs_of(model, x).items()}
    dropped, kept = [], []
    for name in model.weights:
        before = model.tensors[name].dense()
        alive = kept_blocks(before, small.tensors[name].dense(), block)
        found = block_scores(before, block, norms[name] if method == "wanda" else None)
        if scope == "row" or (scope is None and method == "wanda"):  # as the paper compares: within each output
            assert set((~alive).sum(axis=1)) == {round(share * alive.shape[1])}
            for row, there in zip(found, alive, strict=True):
                assert row[~there].max() <= row[there].min() * (1 + 1e-5)
        elif scope != "global":
            assert (~alive).sum() == round(share * alive.size)
            assert found[~alive].max() <= found[alive].min() * (1 + 1e-5)
        dropped.append(found[~alive])
        kept.append(found[alive])
    if scope == "global":
        dropped, kept = np.concatenate(dropped), np.concatenate(kept)
        assert len(dropped) == round(share * (len(dropped) + len(kept)))
        assert dropped.max() <= kept.min() * (1 + 1e-5)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:4", "2:16"])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_n_of_m_keeps_the_best_of_each_group(model, x, pattern, method):
    keep, of = map(int, pattern.split(":"))
    small = pruned(model, gm.Prune(pattern=pattern, method=method, calibration=x if method == "wanda" else None))
    norms = {name: np.linalg.norm(value, axis=0) for name, value in inputs_of(model, x).items()}
    for name in model.weights:
        before = model.tensors[name].dense()
        alive = kept_blocks(before, small.tensors[name].dense(), (1, 1)).reshape(-1, of)
        assert (alive.sum(axis=1) == keep).all()
        found = block_scores(before, (1, 1), norms[name] if method == "wanda" else None).reshape(-1, of)
        assert (np.where(alive, 0, found).max(axis=1) <= np.where(alive, found, np.inf).min(axis=1) * (1 + 1e-5)).all()
        assert small.tensors[name].sparsity == 1 - keep / of


def test_of_equal_scores_the_first_go():
    equal = np.ones((2, 8), np.float32)
    assert mask_of(equal, 0.25).tolist() == [[0] * 4 + [1] * 4, [1] * 8]
    assert mask_of_rows(equal, 0.25).tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]] * 2
    assert mask_of_groups(equal, Pattern.named("1:4")).tolist() == [[0, 0, 0, 1] * 2] * 2
    together = masks_of([equal, equal], 0.75)
    assert [mask.sum() for mask in together] == [0, 8]


def test_scores_do_not_underflow_for_elements():
    tiny = np.array([[1e-30, 2e-30, 3e-30, 4e-30]], np.float32)
    assert mask_of(scores(tiny, Pattern.named("unstructured")), 0.5).tolist() == [[0, 0, 1, 1]]


def test_wanda_does_less_harm_where_inputs_differ(model, x):
    want = model.run(x=x)["logits"]
    errors = {}
    for method in ("magnitude", "wanda"):
        step = gm.Prune(0.5, "unstructured", method=method, calibration=x if method == "wanda" else None)
        errors[method] = np.linalg.norm(pruned(model, step).run(x=x)["logits"] - want)
    assert errors["wanda"] < 0.8 * errors["magnitude"]


def test_shares_by_name(model):
    small = pruned(model, gm.Prune({"layer0.*": 0.25, "layer*": 0.75}, skip=("layer2*",)))
    assert [round(small.tensors[name].sparsity, 2) for name in model.weights] == [0.25, 0.75, 0.0]
    assert small.tensors["layer2.weight"] is model.tensors["layer2.weight"]
    with pytest.raises(ModelError, match="matches none"):
        pruned(model, gm.Prune({"encoder*": 0.5}))


def test_a_recipe_with_shares_is_plain_data_and_back(model):
    from gristmill.compression.recipe_file import from_dict, to_dict

    recipe = [gm.Prune({"layer0.*": 0.25, "layer1.*": 0.5}, method="wanda", calibration="data"), gm.Prune(pattern="2:4")]
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


def test_what_goes_weight_by_weight_gives_the_same(model):
    for step in (gm.Prune({"layer0.*": 0.25, "layer1.*": 0.75}), gm.Prune(pattern="2:4"), gm.Prune(0.5, "4x4", "row")):
        assert step.local
        whole = pruned(model, step)
        for name in step.works_on(model):
            alone = pruned(model, step.restricted(name))
            np.testing.assert_array_equal(alone.tensors[name].dense(), whole.tensors[name].dense())
    assert not gm.Prune(0.5, scope="global").local
    assert not gm.Prune(0.5, method="wanda").local


def test_weights_that_cannot_take_it_stay_and_are_listed_or_refused_by_name():
    model = gm.zoo.mlp([64, 30, 10])
    step = gm.Prune(0.5, "4x4", skip=())
    with pytest.raises(ModelError, match=r"no weight can be pruned.*do not tile"):
        pruned(model, step)
    model = gm.zoo.mlp([64, 32, 10])
    small, report = gm.compress(model, [step])
    assert [small.tensors[name].kind for name in small.weights] == ["sparse", "dense"]
    assert list(step.left_out(model)) == ["layer1.weight"]
    assert any("layer1.weight" in note and "4x4" in note and "(10, 32)" in note for note in report.notes)
    for named in (gm.Prune(0.5, "4x4", names=("*",)), gm.Prune({"*": 0.5}, "4x4")):
        with pytest.raises(ModelError, match=r"'layer1.weight' cannot be pruned.*\(10, 32\)"):
            pruned(model, named)
    with pytest.raises(ModelError, match=r"groups of 12 do not divide the 64 inputs"):
        pruned(model, gm.Prune(pattern="5:12", names=("layer0.weight",)))
    with pytest.raises(ModelError, match=r"all of them"):
        pruned(model, gm.Prune(0.999, "1x4", names=("layer1.weight",)))
    with pytest.raises(ModelError, match=r"none of them"):
        pruned(model, gm.Prune(0.001, "1x4", scope="row", names=("layer1.weight",)))


def test_global_pruning_does_not_empty_a_weight(model):
    tensors = {"layer1.weight": Dense(model.tensors["layer1.weight"].dense() * 1e-3)}
    with pytest.raises(ModelError, match=r"nothing would be left of 'layer1.weight'"):
        pruned(model.replace(tensors=tensors), gm.Prune(0.8, scope="global"))


def test_a_weight_that_something_else_reads_stays():
    table = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
    nodes = (
        Node("Gather", ("table", "ids"), ("x",)),
        Node("Linear", ("x", "first"), ("h",), domain=OWN),
        Node("Linear", ("h", "table"), ("y",), domain=OWN),
    )
    tensors = {"table": Dense(table), "first": Dense(np.ascontiguousarray(table[:8]))}
    model = gm.Model(nodes, tensors, {"ids": TensorType(np.dtype(np.int64), ("n",))}, ("y",))
    step = gm.Prune(0.5)
    assert step.left_out(model) == {"table": "it is also read by Gather"}
    assert [tensor.kind for tensor in pruned(model, step).tensors.values()] == ["dense", "sparse"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(model, bad):
    weight = model.tensors["layer1.weight"].dense().copy()
    weight[5, 7] = bad
    broken = model.replace(tensors={"layer1.weight": Dense(weight)})
    for step in (gm.Prune(0.5), gm.Prune(pattern="2:4"), gm.Prune(0.5, scope="global"), gm.Clip()):
        with pytest.raises(ModelError, match=r"'layer1.weight': element \[5, 7\] of \(48, 64\) is"):
            pruned(broken, step)


@pytest.mark.parametrize(
    "make",
    [
        lambda: gm.Prune(), lambda: gm.Prune(0.4, "2:4"), lambda: gm.Prune({"*": 0.4}, "2:4"), lambda: gm.Prune(0.5, "4:2"),
        lambda: gm.Prune(0.5, "0:4"), lambda: gm.Prune(0.5, "2:99"), lambda: gm.Prune(0.5, "2:4", scope="layer"),
        lambda: gm.Prune({}), lambda: gm.Prune({"*": 1.5}), lambda: gm.Prune({"*": None}), lambda: gm.Prune("0.5"),
        lambda: gm.Prune({"a": 0.1, "b": 0.2}, scope="global"), lambda: gm.Prune(0.5, method="random"),
        lambda: gm.Prune(0.5, calibration="data"), lambda: gm.Prune(0.5, scope="column"), lambda: gm.Prune(np.nan),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(make):
    with pytest.raises(ModelError, match="Prune"):
        make()


def test_calibration_data_must_be_there_and_fit(model, x):
    for bad in (None, "other", 3, [], x[:, :5], {"y": x}, x[0], [x, x[:, :5]], {"x": np.full((2, 32), np.inf, np.float32)}):
        with pytest.raises(DataError, match="Prune"):
            pruned(model, gm.Prune(0.5, method="wanda", calibration=bad))
    small, _ = gm.compress(model, [gm.Prune(0.5, method="wanda")], x)
    again = pruned(model, gm.Prune(0.5, method="wanda", calibration=iter([x[:100], x[100:]])))
    for name in model.weights:
        np.testing.assert_array_equal(small.tensors[name].dense(), again.tensors[name].dense())


def test_pruning_further_keeps_what_is_zero(model):
    once = pruned(model, gm.Prune(0.5, "2x4"))
    twice = pruned(once, gm.Prune(0.75, "2x4"))
    for name in model.weights:
        assert isinstance(twice.tensors[name], Sparse)
        before, after = once.tensors[name].dense(), twice.tensors[name].dense()
        assert not after[before == 0].any()
        assert (after == 0).sum() == round(0.75 * after.size)
