"""What the prune family refuses, how it treats special values, and what its results may not depend on."""

import numpy as np
import pytest

from gristmill import _core
from kernels.cases import prune

LEVELS = ("scalar", "avx2", "avx512")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", [1, 20, 5000, 400_000])
def test_nan_is_refused(rng, level, n):
    x = rng.standard_normal(n).astype(np.float32)
    x[n // 3] = -np.nan
    _core.set_isa(level)
    with pytest.raises(ValueError, match="NaN"):
        _core.kth_magnitude(x, 1)
    for drop in (0, n // 2, n):
        with pytest.raises(ValueError, match="NaN"):
            _core.magnitude_mask(x, drop, np.empty(n, np.uint8))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["equal", "two", "zeros", "periodic", "sorted", "wide", "infinite"])
def test_selection_from_awkward_distributions(rng, level, kind):
    """What misleads a sample, or falls into one bucket, must not change the answer."""
    n = 300_007
    x = {
        "equal": np.full(n, -3.25),
        "two": np.where(np.arange(n) % 2, 1.0, -1e-30),
        "zeros": np.where(rng.random(n) < 0.9, -0.0, 1.0),
        "periodic": np.where(np.arange(n) // 16 % 64, 5.0, 1e-3) * rng.random(n),
        "sorted": np.linspace(-1, 1, n),
        "wide": np.exp(rng.uniform(-100, 88, n)),
        "infinite": np.where(rng.random(n) < 0.5, np.inf, 2.0),
    }[kind].astype(np.float32)
    order = np.sort(np.abs(x))
    _core.set_isa(level)
    for k in (1, 2, n // 64, n // 2, n * 9 // 10, n - 1, n):
        assert _core.kth_magnitude(x, k, 2) == order[k - 1]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("drop", [0, 1, 49_999, 50_000, 99_999, 100_000])
def test_ties_go_by_lowest_index(rng, level, drop):
    x = rng.choice(np.array([1.0, -1.0, 0.5, 2.0], np.float32), 100_000)
    mask = np.empty(x.size, np.uint8)
    wanted = prune.mask_oracle({"x": x, "drop": drop})["mask"]
    _core.set_isa(level)
    for threads in (1, 2, 3, 5):
        mask[:] = 7
        _core.magnitude_mask(x, drop, mask, threads)
        assert np.array_equal(mask, wanted)
        assert int((mask == 0).sum()) == drop


def test_ranks_outside_the_array_are_refused():
    x = np.ones(5, np.float32)
    for k in (0, -1, 6):
        with pytest.raises(ValueError, match="k: expected"):
            _core.kth_magnitude(x, k)
    for drop in (-1, 6):
        with pytest.raises(ValueError, match="drop: expected"):
            _core.magnitude_mask(x, drop, np.empty(5, np.uint8))
    with pytest.raises(ValueError, match="k: expected"):
        _core.kth_magnitude(np.empty(0, np.float32), 1)


def test_magnitudes_check_their_arrays():
    x = np.ones((4, 8), np.float32)
    with pytest.raises(TypeError):
        _core.kth_magnitude(None, 1)
    with pytest.raises(TypeError):
        _core.kth_magnitude(np.ones(4), 1)
    with pytest.raises(ValueError, match="shape"):
        _core.kth_magnitude(x, 1)
    with pytest.raises(TypeError):
        _core.magnitude_mask(x.reshape(-1), 1, np.empty(32, bool))
    with pytest.raises(ValueError, match="shape"):
        _core.magnitude_mask(x.reshape(-1), 1, np.empty(31, np.uint8))
    frozen = np.empty(32, np.uint8)
    frozen.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        _core.magnitude_mask(x.reshape(-1), 1, frozen)
    with pytest.raises(ValueError, match="shape"):
        _core.block_magnitudes(x, (1, 4), np.empty((4, 8), np.float32))
    for block in ((3, 4), (1, 3), (0, 4), (1, -4)):
        with pytest.raises(ValueError, match="tile"):
            _core.block_magnitudes(x, block, np.empty((4, 2), np.float32))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["alike", "scaled", "ties"])
def test_many_vectors_count_as_one(rng, level, kind):
    """Whatever the vectors are, one mask over all of them is what the mask of their concatenation is, at any thread count."""
    sizes = (300_001, 0, 17, 120_000, 1, 40_000)
    scale = {"alike": np.ones(6), "scaled": np.array([1, 1, 5, 100, 1, 1e-3]), "ties": np.ones(6)}[kind]
    x = [(rng.standard_normal(n) * by).astype(np.float32) for n, by in zip(sizes, scale, strict=True)]
    if kind == "ties":
        x = [np.rint(8 * part).astype(np.float32) for part in x]
    whole = np.concatenate(x)
    _core.set_isa(level)
    for drop in (0, 5, len(whole) // 2, len(whole) * 9 // 10, len(whole)):
        wanted = prune.mask_oracle({"x": whole, "drop": drop})["mask"]
        assert drop == 0 or _core.kth_magnitude(x, drop, 2) == np.sort(np.abs(whole))[drop - 1]
        for threads in (1, 2, 3):
            masks = [np.full(n, 7, np.uint8) for n in sizes]
            _core.magnitude_mask(x, drop, masks, threads)
            assert np.array_equal(np.concatenate(masks), wanted)


@pytest.mark.parametrize("level", LEVELS)
def test_nan_is_refused_by_rows_and_groups(rng, level):
    x = rng.standard_normal((9, 132)).astype(np.float32)
    x[7, 130] = np.nan
    mask = np.empty(x.shape, np.uint8)
    _core.set_isa(level)
    for refused in (
        lambda: _core.magnitude_mask_rows(x, 3, mask, 2),
        lambda: _core.n_of_m_mask(x, 2, 4, mask, 2),
        lambda: _core.n_of_m_mask(x, 1, 12, mask),
    ):
        with pytest.raises(ValueError, match="NaN"):
            refused()


def test_what_does_not_fit_is_refused():
    x, mask = np.ones((4, 8), np.float32), np.empty((4, 8), np.uint8)
    for keep, of in ((2, 3), (5, 4), (-1, 4), (1, 0), (1, 128)):
        with pytest.raises(ValueError, match="cannot be kept"):
            _core.n_of_m_mask(x, keep, of, mask)
    for drop in (-1, 9):
        with pytest.raises(ValueError, match="drop: expected"):
            _core.magnitude_mask_rows(x, drop, mask)
    with pytest.raises(ValueError, match="shape"):
        _core.n_of_m_mask(x, 2, 4, mask[:3])
    with pytest.raises(ValueError, match="expected 2 arrays"):
        _core.magnitude_mask([x[0], x[1]], 3, [mask[0]])
    with pytest.raises(ValueError, match="shape"):
        _core.channel_magnitudes(x, np.ones(7, np.float32), np.empty_like(x))
    with pytest.raises(ValueError, match="shape"):
        _core.block_magnitudes(x, (1, 4), np.empty((4, 2), np.float32), 1, np.ones(2, np.float32))
    with pytest.raises(ValueError, match="tile"):
        _core.apply_mask(x.copy(), mask, (3, 4))
    x.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        _core.apply_mask(x, mask, (1, 1))
