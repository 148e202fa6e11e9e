"""The attention family beyond its cases: bits that must not change, hostile offsets, special values, and what is refused."""

import numpy as np
import pytest

from gristmill import _core

LEVELS = ("scalar", "avx2", "avx512")


@pytest.fixture(params=LEVELS)
def level(request):
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(None)


def draw(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def run(step, *arguments, out, heads=2, scale=0.3, keys=None, threads=1, grad=False, precision=()):
    keys, width = keys or arguments[-2].shape[-2], out[0].shape[-1] // heads
    scratch = np.empty(_core.attention_scratch(keys, width, threads, grad), np.uint8)
    program = _core.Program()
    step(program, *arguments, heads, scale, *out, scratch, *precision)
    program.run(threads)
    return out[0] if len(out) == 1 else out


def masked(q, k, v, mask=None, **options):
    return run(_core.masked_attention, q, k, v, mask, out=[np.full_like(q, 7)], **options)


def packed(q, k, v, offsets, **options):
    return run(_core.packed_attention, q, k, v, np.asarray(offsets, np.int64), out=[np.full_like(q, 7)], **options)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_text_has_the_same_bits_alone_in_a_batch_padded_and_packed(level, precision):
    """Neither other texts nor padding may change a text's answer."""
    q, k, v = (draw(3, 21, 20, seed=s) for s in range(3))
    lengths = [21, 1, 14]
    options = {"precision": (precision,)}
    mask = (np.arange(21) < np.array(lengths)[:, None]).astype(np.int64)
    batch = masked(q, k, v, mask, threads=3, **options)
    rows = [np.concatenate([x[i, :n] for i, n in enumerate(lengths)]) for x in (q, k, v)]
    together = packed(*rows, np.cumsum([0, *lengths]), threads=2, **options)
    begin = 0
    for i, n in enumerate(lengths):
        alone = masked(q[i : i + 1, :n].copy(), k[i : i + 1, :n].copy(), v[i : i + 1, :n].copy(), **options)[0]
        assert np.array_equal(batch[i, :n], alone)
        assert np.array_equal(together[begin : begin + n], alone)
        begin += n


def test_masks_of_any_form_agree(level):
    q, k, v = (draw(2, 9, 20, seed=s) for s in range(3))
    mask = np.array([[1, 0, 1, 1, 0, 1, 0, 0, 1], [1, 1, 1, 0, 0, 0, 0, 0, 0]], np.int64)
    want = masked(q, k, v, mask)
    assert np.array_equal(masked(q, k, v, mask.astype(bool)), want)
    assert np.array_equal(masked(q, k, v, mask * -(2**40)), want)
    chosen = np.flatnonzero(mask[0])
    assert np.array_equal(masked(q[:1], k[:1, chosen], v[:1, chosen])[0], want[0])


def test_what_is_masked_is_not_read_into_the_answer(level):
    q, k, v = (draw(1, 9, 20, seed=s) for s in range(3))
    mask = np.array([[1, 0, 1, 1, 1, 1, 0, 0, 0]], np.int64)
    want = masked(q, k, v, mask)
    for x in (k, v):
        x[:, mask[0] == 0] = np.nan
    assert np.array_equal(masked(q, k, v, mask), want)
    assert not np.isnan(masked(q, k, v, mask, precision=("bf16",))).any()


def test_a_text_whose_keys_are_all_masked_attends_to_all_alike(level):
    q, k, v = (draw(2, 5, 20, seed=s) for s in range(3))
    mask = np.zeros((2, 5), np.int64)
    np.testing.assert_allclose(masked(q, k, v, mask), np.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-6)
    dq, dk, dv = (np.empty_like(q) for _ in range(3))
    run(_core.masked_attention_grad, q, q, k, v, mask, out=[dq, dk, dv], keys=5, grad=True)
    assert not dq.any()
    assert not dk.any()
    np.testing.assert_allclose(dv, np.broadcast_to(q.mean(1, keepdims=True), q.shape), atol=1e-6)


HOSTILE = [
    [], [0], [5], [0, 13], [-3, 4, 99], [0, 9, 2, 13], [2**62, -(2**62), 2**63 - 1], [-(2**63), 2**63 - 1], [3, 3, 3], [4, 1, 6],
]  # fmt: skip


@pytest.mark.parametrize("offsets", HOSTILE, ids=str)
def test_offsets_of_any_value_are_safe_and_mean_what_the_reference_says(level, offsets):
    from gristmill.ops import GRAD, OWN, Node, find

    q, k, v, dout = (draw(13, 20, seed=s) for s in range(4))
    offsets = np.array(offsets, np.int64)
    attributes = {"heads": 2, "scale": 0.3}
    node = Node("PackedAttention", ("q", "k", "v", "o"), ("y",), attributes, OWN)
    np.testing.assert_allclose(packed(q, k, v, offsets, threads=2), find(node).reference(node, q, k, v, offsets)[0], atol=1e-5)
    node = Node("PackedAttentionGrad", ("d", "q", "k", "v", "o"), ("a", "b", "c"), attributes, GRAD)
    got = [np.full_like(q, 7) for _ in range(3)]
    run(_core.packed_attention_grad, dout, q, k, v, offsets, out=got, keys=13, grad=True, threads=2)
    for value, want in zip(got, find(node).reference(node, dout, q, k, v, offsets), strict=True):
        np.testing.assert_allclose(value, want, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_nan_stays_in_its_row_and_its_head(level, precision):
    q, k, v = (draw(1, 18, 20, seed=s) for s in range(3))
    clean = masked(q, k, v, precision=(precision,))
    q[0, 3, 4] = np.nan
    got = masked(q, k, v, precision=(precision,))
    assert np.isnan(got[0, 3, :10]).all()
    got[0, 3, :10] = clean[0, 3, :10]
    assert np.array_equal(got, clean)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_scores_of_any_size(level, precision):
    """The largest score is taken away before exp: no overflow, and a clear winner takes all."""
    q, k, v = (draw(1, 4, 20, seed=s) for s in range(3))
    k[:] = 0
    k[0, 2] = 1e15
    q[:] = 1e15
    np.testing.assert_allclose(masked(q, k, v, precision=(precision,))[0], np.tile(v[0, 2], (4, 1)), rtol=2.0**-8)
    q[:] = -1e15
    others = v[0, [0, 1, 3]].mean(0)
    np.testing.assert_allclose(masked(q, k, v, precision=(precision,))[0], np.tile(others, (4, 1)), atol=2.0**-8)


def test_less_scratch_means_fewer_threads(level):
    q, k, v = (draw(2, 30, 20, seed=s) for s in range(3))
    out, program = np.empty_like(q), _core.Program()
    scratch = np.empty(_core.attention_scratch(30, 10, 1), np.uint8)
    _core.masked_attention(program, q, k, v, None, 2, 0.3, out, scratch)
    program.run(3)
    assert np.array_equal(out, masked(q, k, v))


def test_wrong_arguments_are_refused():
    q = draw(2, 3, 20)
    flat = q.reshape(6, 20)
    scratch = np.empty(_core.attention_scratch(3, 10, 1), np.uint8)
    good = {"q": q, "k": q, "v": q, "mask": None, "heads": 2, "scale": 0.3, "out": q.copy(), "scratch": scratch}
    wrong = [
        {"heads": 0}, {"heads": 3}, {"scale": 0.0}, {"scale": -1.0}, {"scale": np.inf}, {"scale": np.nan}, {"k": q[:1]},
        {"v": q[:, :2].copy()}, {"out": q[:, :2].copy()}, {"mask": np.ones((2, 4), np.int64)}, {"scratch": scratch[:-1]},
        {"k": q.astype(np.float64)}, {"mask": np.ones((2, 3), np.int32)}, {"q": flat}, {"precision": "fp8"},
    ]  # fmt: skip
    for change in wrong:
        with pytest.raises((TypeError, ValueError)):
            _core.masked_attention(_core.Program(), **{**good, **change})
    with pytest.raises((TypeError, ValueError)):
        _core.packed_attention(_core.Program(), flat, flat, flat, np.array([0, 6], np.int32), 2, 0.3, flat.copy(), scratch)


def test_bf16_is_chosen_where_the_session_allows_it():
    from types import SimpleNamespace

    from gristmill.ops.attention import precision_of

    _core.set_isa("avx2")
    assert precision_of(SimpleNamespace(low_precision=True)) == "float32"
    _core.set_isa(None)
    assert precision_of(SimpleNamespace(low_precision=False)) == "float32"
    has_bf16 = _core.slots()["attention_product_bf16"][0] != "scalar"
    assert precision_of(SimpleNamespace(low_precision=True)) == ("bf16" if has_bf16 else "float32")
