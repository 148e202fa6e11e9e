"""Every variant of every kernel, checkasm style.

Each instruction set is forced in turn; a case runs at a level only if one of its slots got a new variant there, so nothing is
tested twice and nothing is passed off as tested. The harness itself is tested with deliberately broken answers.
"""

import numpy as np
import pytest

from gristmill import _core
from kernels import harness
from kernels.cases import CASES

LEVELS = ("scalar", "avx2", "avx512")


def variants_at(level):
    _core.set_isa(level)
    table = {slot: variant for slot, (variant, _, _) in _core.slots().items()}
    _core.set_isa(None)
    return table


def new_slots(level):
    table = variants_at(level)
    if level == "scalar":
        return set(table)
    below = variants_at(LEVELS[LEVELS.index(level) - 1])
    return {slot for slot, variant in table.items() if variant != below[slot]}


PAIRS = [(case, level) for level in LEVELS for case in CASES if set(case.slots) & new_slots(level)]


@pytest.mark.parametrize(("case", "level"), PAIRS, ids=[f"{case.name}-{level}" for case, level in PAIRS])
def test_variant(case, level):
    for number, size in enumerate(case.sizes):
        inputs = harness.make_inputs(case, size, seed=number)
        _core.set_isa("scalar")
        scalar = harness.call(case, inputs)
        _core.set_isa(level)
        got = harness.call(case, inputs)
        problem = harness.disagreement(case, inputs, got, scalar)
        assert problem is None, f"{case.name} at {level}, size {size}: {problem}"
        for threads in (2, 3):
            again = harness.call(case, inputs, threads)
            for name in got:
                assert harness.same_bits(again[name], got[name]), f"{case.name}: {name} depends on the thread count at {size}"


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_harness_catches_broken_variants(case):
    size = max(case.sizes, key=np.prod)
    inputs = harness.make_inputs(case, size, seed=1)
    good = harness.call(case, inputs)
    assert harness.disagreement(case, inputs, good, good) is None
    name, value = next((name, value) for name, value in good.items() if value.size)
    flat = value.reshape(-1)
    last = np.array(flat)
    last[-1] = last[-1] + 3 if last.dtype.kind != "f" or np.isfinite(last[-1]) else 0
    for broken in (last, np.full_like(flat, 0x55)):
        answer = {**good, name: broken.reshape(value.shape)}
        assert harness.disagreement(case, inputs, answer, good) is not None


def test_every_slot_has_a_case():
    covered = {slot for case in CASES for slot in case.slots}
    assert covered == set(_core.slots())


def test_levels_report_what_they_add():
    """A level that adds nothing on this CPU is said so rather than counted as passed."""
    added = {level: len(new_slots(level)) for level in LEVELS}
    print("new variants by level:", added)
    assert added["scalar"] == len(_core.slots())
