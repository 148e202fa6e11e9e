"""Run a case in hostile surroundings: misaligned arrays, guard bytes around outputs, read-only inputs."""

import numpy as np

from kernels.case import Arrays, Case, Size

GUARD = 128
FILL = 0xA5


class Guarded:
    """An output array one element off alignment, with guard bytes on both sides."""

    def __init__(self, shape: tuple[int, ...], dtype) -> None:
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        self.raw = np.full(nbytes + 2 * GUARD + 64 + dtype.itemsize, FILL, np.uint8)
        base = (-self.raw.ctypes.data) % 64 + GUARD // 64 * 64 + dtype.itemsize
        self.begin, self.end = base, base + nbytes
        self.array = self.raw[base : base + nbytes].view(dtype).reshape(shape)

    def intact(self) -> bool:
        return bool((self.raw[: self.begin] == FILL).all() and (self.raw[self.end :] == FILL).all())


def misaligned(array: np.ndarray) -> np.ndarray:
    """Copy an array to an address that is a multiple of its item size and of nothing larger; read-only."""
    guarded = Guarded(array.shape, array.dtype)
    guarded.array[...] = array
    guarded.array.flags.writeable = False
    return guarded.array


def make_inputs(case: Case, size: Size, seed: int) -> Arrays:
    drawn = case.inputs(np.random.default_rng(seed), size)
    return {name: misaligned(value) if isinstance(value, np.ndarray) else value for name, value in drawn.items()}


def call(case: Case, inputs: Arrays, threads: int = 1) -> Arrays:
    """Run the case once; fail on a touched guard or a changed input."""
    before = {name: value.copy() for name, value in inputs.items() if isinstance(value, np.ndarray)}
    guarded = {name: Guarded(shape, dtype) for name, (shape, dtype) in case.outputs(inputs).items()}
    case.run(inputs, {name: guard.array for name, guard in guarded.items()}, threads)
    for name, guard in guarded.items():
        assert guard.intact(), f"{case.name}: wrote outside {name}"
    for name, value in before.items():
        assert np.array_equal(value.view(np.uint8), inputs[name].view(np.uint8)) if value.size else True, (
            f"{case.name}: changed {name}"
        )
    return {name: guard.array for name, guard in guarded.items()}


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit equality, except that any NaN equals any NaN (payloads are not part of a contract)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind == "f":
        nan = np.isnan(a) & np.isnan(b)
        bits = a.reshape(-1).view(f"u{a.itemsize}") == b.reshape(-1).view(f"u{b.itemsize}")
        return bool((bits.reshape(a.shape) | nan).all())
    return bool(np.array_equal(a, b))


def disagreement(case: Case, inputs: Arrays, got: Arrays, scalar: Arrays | None) -> str | None:
    """Say what is wrong with `got`, or None. `scalar` is the reference variant's answer, where there is one to compare."""
    wanted = case.oracle(inputs)
    bounds = case.bound(inputs, wanted)
    for name, value in got.items():
        if case.compare == "exact" and scalar is not None and not same_bits(value, scalar[name]):
            return f"{name} differs from the scalar variant"
        want = np.asarray(wanted[name])
        if value.dtype.kind != "f":
            off = np.abs(value.astype(np.int64) - want.astype(np.int64)) > np.asarray(bounds[name])
        else:
            both = (value == want) | (np.isnan(value) & np.isnan(want))
            with np.errstate(invalid="ignore"):
                off = ~both & ~(np.abs(value.astype(np.float64) - want) <= bounds[name])
        if off.any():
            where = tuple(int(i) for i in np.argwhere(off)[0])
            return f"{name}{list(where)} is {value[where]}, oracle {want[where]}, {int(off.sum())} of {off.size} wrong"
    return None
