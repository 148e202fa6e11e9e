"""What the aggregate family promises beyond single cases: tree, norm, aliasing, refusals, and torch's optimisers."""

import json
from pathlib import Path

import numpy as np
import pytest

from gristmill import _core
from kernels.cases.aggregate import ROUNDING, left_complete_tree
from kernels.harness import Guarded, same_bits

LEVELS = ("scalar", "avx2", "avx512")
FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(params=LEVELS)
def level(request):
    _core.set_isa(request.param)
    return request.param


def draw(count, length, seed=0):
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((count, length)) * 10.0 ** rng.integers(-4, 4, (count, 1))).astype(np.float32)
    return list(rows), [float(np.float32(w)) for w in rng.uniform(-2, 2, count)]


def total(rows, weights, threads=1):
    out = np.empty(rows[0].shape, np.float32)
    _core.weighted_sum(rows, weights, out, threads)
    return out


def adam_step(params, grads, first, second, step=1):
    _core.adam_step(params, grads, first, second, 0.1, 0.9, 0.999, 1e-8, 0.0, False, step, 1.0)


# ---- the tree ----


@pytest.mark.parametrize("group", [2, 4, 8, 16])
@pytest.mark.parametrize("count", [2, 3, 5, 7, 8, 9, 12, 16, 17, 31, 64, 65, 100])
def test_aligned_subtrees_may_be_added_beforehand(level, count, group):
    rows, weights = draw(count, 131, seed=count)
    whole = total(rows, weights)
    subtrees = [total(rows[i : i + group], weights[i : i + group]) for i in range(0, count, group)]
    assert same_bits(total(subtrees, [1.0] * len(subtrees)), whole)


def test_every_count_follows_the_tree(level):
    for count in (*range(1, 41), 63, 64, 65, 127, 129, 511, 513):
        rows, weights = draw(count, 37, seed=count)
        wanted = left_complete_tree([np.float32(w) * row for w, row in zip(weights, rows, strict=True)])
        assert same_bits(total(rows, weights), wanted), count


def test_sum_is_close_to_float64():
    rows, weights = draw(100, 2000)
    terms = np.array([w * row.astype(np.float64) for w, row in zip(weights, rows, strict=True)])
    # One product and at most seven additions on the way of a term to the root.
    assert (np.abs(total(rows, weights) - terms.sum(0)) <= 1.01 * 8 * ROUNDING * np.abs(terms).sum(0)).all()


def test_streaming_stores_reach_every_alignment(level):
    rows, weights = draw(8, 140_003)
    wanted = left_complete_tree([np.float32(w) * row for w, row in zip(weights, rows, strict=True)])
    raw = np.empty(140_003 + 64, np.float32)
    base = (-raw.ctypes.data) % 64 // 4
    norms = set()
    for offset in (*range(16), 17):
        raw[:] = 7
        out = raw[base + offset : base + offset + 140_003]
        norms.add(_core.weighted_sum(rows, weights, out))
        assert same_bits(out, wanted), offset
        assert (raw[: base + offset] == 7).all()
        assert (raw[base + offset + 140_003 :] == 7).all()
    assert len(norms) == 1


# ---- aliasing ----


@pytest.mark.parametrize("count", [1, 3, 8, 20])
def test_out_may_be_any_input(level, count):
    for place in {0, count // 2, count - 1}:
        rows, weights = draw(count, 150_000)
        wanted = total(rows, weights)
        _core.weighted_sum(rows, weights, rows[place], 2)
        assert same_bits(rows[place], wanted)


def test_partial_overlap_is_refused():
    store = np.zeros(101, np.float32)
    with pytest.raises(ValueError, match=r"out overlaps a part of inputs\[1\]"):
        _core.weighted_sum([np.zeros(100, np.float32), store[:100]], [1.0, 1.0], store[1:])
    with pytest.raises(ValueError, match="share memory"):
        _core.sgd_step(store[:100], store[1:], 0.1, 0.0, 1.0)
    with pytest.raises(ValueError, match="share memory"):
        adam_step(np.zeros(100, np.float32), np.zeros(100, np.float32), store[:100], store[:100])


def test_neighbours_in_one_store_are_fine():
    store = np.ones(200, np.float32)
    _core.sgd_step(store[:100], store[100:], 0.5, 0.0, 1.0)
    assert (store == np.repeat(np.float32([0.5, 1]), 100)).all()


# ---- the norm and the finite check ----


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 15, 16, 16383, 16384, 39_999])
def test_one_value_that_is_not_finite_is_seen(level, bad, where):
    rows, weights = draw(3, 40_000)
    rows[1][where] = bad
    out = np.empty(40_000, np.float32)
    squares, finite = _core.weighted_sum(rows, weights, out)
    assert finite is False
    assert not np.isfinite(squares)
    assert np.isfinite(out).sum() == out.size - 1
    assert not np.isfinite(out[where])
    assert _core.sum_of_squares(rows[1])[1] is False
    assert _core.sum_of_squares(rows[0])[1] is True


def test_an_overflow_in_the_sum_is_seen(level):
    rows = [np.full(20, 3e38, np.float32)] * 2
    out = np.empty(20, np.float32)
    assert _core.weighted_sum(rows, [1.0, 1.0], out) == (np.inf, False)
    # The same values, each finite: squares of the largest floats do not overflow a float64.
    squares, finite = _core.weighted_sum(rows, [0.5, 0.5], out)
    assert finite
    assert squares == pytest.approx(20 * float(np.float32(3e38)) ** 2, rel=1e-12)


def test_subnormals_are_kept(level):
    x = np.full(33, 2.0**-149, np.float32)
    assert _core.sum_of_squares(x) == (33 * 2.0**-298, True)
    assert (total([x, x], [1.0, 2.0]) == np.float32(3 * 2.0**-149)).all()


def test_the_norm_of_the_output_is_the_norm_of_the_array(level):
    rows, weights = draw(11, 70_001)
    out = np.empty(70_001, np.float32)
    norm = _core.weighted_sum(rows, weights, out)
    for threads in (1, 2, 5):
        assert _core.sum_of_squares(out, threads) == norm


def test_nothing_is_fine():
    empty = np.empty(0, np.float32)
    assert _core.weighted_sum([empty], [1.0], empty) == (0.0, True)
    assert _core.sum_of_squares(empty, 4) == (0.0, True)
    adam_step(*[np.empty(0, np.float32) for _ in range(4)])


# ---- refusals ----


def bad_vectors(length):
    good = np.zeros(length, np.float32)
    return {
        "float64": (good.astype(np.float64), TypeError),
        "two axes": (good.reshape(1, -1), ValueError),
        "shorter": (good[:-1], ValueError),
        "strided": (np.zeros(2 * length, np.float32)[::2], (ValueError, BufferError)),
        "none": (None, TypeError),
        "unaligned": (memoryview(bytearray(4 * length + 4))[1:-3].cast("f"), ValueError),
    }


@pytest.mark.parametrize("name", bad_vectors(8))
def test_bad_vectors_are_refused(name):
    bad, error = bad_vectors(8)[name]
    good = [np.zeros(8, np.float32) for _ in range(3)]
    with pytest.raises(error):
        _core.weighted_sum([good[0], bad], [1.0, 1.0], good[1])
    if name != "shorter":
        with pytest.raises(error):
            _core.sum_of_squares(bad)
    for place in range(4):
        vectors = [*good[:place], bad, *good[place:]]
        with pytest.raises(error):
            adam_step(*vectors)
        if place < 3:
            with pytest.raises(error):
                _core.momentum_step(*vectors[:3], 0.1, 0.9, 0.0, False, 0.0, 1.0)
        if place < 2:
            with pytest.raises(error):
                _core.sgd_step(*vectors[:2], 0.1, 0.0, 1.0)


def test_read_only_targets_are_refused():
    fixed, free = np.zeros(8, np.float32), [np.zeros(8, np.float32) for _ in range(3)]
    fixed.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        _core.weighted_sum([free[0]], [1.0], fixed)
    with pytest.raises((ValueError, BufferError)):
        _core.sgd_step(fixed, free[0], 0.1, 0.0, 1.0)
    with pytest.raises((ValueError, BufferError)):
        adam_step(free[0], free[1], free[2], fixed)


def test_counts_and_steps_are_checked():
    x = np.zeros(8, np.float32)
    with pytest.raises(ValueError, match="as many weights"):
        _core.weighted_sum([x, x], [1.0], x)
    with pytest.raises(ValueError, match="at least one"):
        _core.weighted_sum([], [], x)
    with pytest.raises(ValueError, match="step"):
        adam_step(*np.zeros((4, 8), np.float32), step=0)


# ---- optimisers ----


def misaligned_copy(array):
    guarded = Guarded(array.shape, array.dtype)
    guarded.array[...] = array
    return guarded.array


class Stepper:
    """Drives the kernels by torch's option names."""

    def __init__(self, start, options):
        self.options = options
        self.params, self.first, self.second = (misaligned_copy(x) for x in (start, 0 * start, 0 * start))

    def step(self, number, grads, threads=1):
        o = self.options
        decay = o.get("weight_decay", 0.01 if o["name"] == "AdamW" else 0.0)
        if o["name"] == "SGD" and "momentum" not in o:
            _core.sgd_step(self.params, grads, o["lr"], decay, 1.0, threads)
        elif o["name"] == "SGD":
            # torch starts the velocity as the undamped gradient.
            dampening = o.get("dampening", 0.0) if number > 1 else 0.0
            options = (o["lr"], o["momentum"], dampening, o.get("nesterov", False), decay, 1.0)
            _core.momentum_step(self.params, grads, self.first, *options, threads)
        else:
            beta1, beta2 = o.get("betas", (0.9, 0.999))
            options = (o["lr"], beta1, beta2, o.get("eps", 1e-8), decay, o["name"] == "AdamW", number, 1.0)
            _core.adam_step(self.params, grads, self.first, self.second, *options, threads)


def golden():
    with np.load(FIXTURES / "optimizers.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", json.loads(str(golden()["configurations"])))
def test_steps_agree_with_torch(level, name):
    data = golden()
    options = json.loads(str(data["configurations"]))[name]
    stepper = Stepper(data["start"], options)
    # A step rounds fewer than 16 times on the way to the parameter. It takes at most lr times the largest gradient
    # (SGD; with momentum times the number of steps so far) or a few lr (Adam). The reference is float64.
    largest = np.abs(data["grads"]).max(0) + np.abs(data["start"])
    for number, (grads, wanted) in enumerate(zip(data["grads"], data[name], strict=True), 1):
        stepper.step(number, grads)
        move = options["lr"] * (largest * number if options["name"] == "SGD" else 8)
        bound = 16 * ROUNDING * number * (np.abs(wanted) + move)
        assert (np.abs(stepper.params - wanted) <= bound).all(), number


def test_clip_scales_the_gradient():
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal((2, 50)).astype(np.float32)
    clipped, plain = start.copy(), start.copy()
    _core.sgd_step(clipped, grads, 0.1, 0.0, 0.25)
    _core.sgd_step(plain, grads * np.float32(0.25), 0.1, 0.0, 1.0)
    assert same_bits(clipped, plain)


def test_a_gradient_that_is_not_finite_stays_where_it_is(level):
    params, first, second = np.ones((3, 40), np.float32)
    grads = np.ones(40, np.float32)
    grads[7] = np.nan
    adam_step(params, grads, first, second)
    for array in (params, first, second):
        assert np.isnan(array).nonzero()[0].tolist() == [7]


def test_a_zero_gradient_moves_nothing(level):
    params, grads, first, second = np.ones(40, np.float32), *np.zeros((3, 40), np.float32)
    adam_step(params, grads, first, second)
    _core.momentum_step(params, grads, first, 0.1, 0.9, 0.0, True, 0.0, 1.0)
    assert (params == 1).all()


def test_late_steps_lose_their_bias_correction():
    arrays = np.ones((2, 4, 40), np.float32)
    adam_step(*arrays[0], step=10**6)
    adam_step(*arrays[1], step=10**12)
    assert same_bits(arrays[0], arrays[1])
