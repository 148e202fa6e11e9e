"""Products of one row with weights under a bitmask, against dense weights of the same precision and against reading memory.

python benchmarks/bench_bitmask.py [--threads 1 2] [--rows 1] [--shape 4096 11008] [--seconds 8] [--json FILE]

Every weight is larger than the last level of cache, or several take turns. Engines run in turn within a round; figures are
medians of rounds, ratios medians of the rounds' own. Quantising the row counts.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from statistics import median

import numpy as np

from gristmill import _core

ZEROS = (50, 60, 70, 80)
COLD = 96 << 20  # bytes of weights that take turns


class Contest:
    """Programs by name, each over a few weights, the bytes that one of them reads, and the dense rival of each."""

    def __init__(self, rows: int, n: int, k: int) -> None:
        self.rows, self.n, self.k = rows, n, k
        self.rng = np.random.default_rng(0)
        self.x = self.rng.standard_normal((rows, k), np.float32)
        self.programs: dict[str, list[_core.Program]] = {}
        self.nbytes: dict[str, int] = {}
        self.dense: dict[str, str] = {}

    def enter(self, name: str, dense: str, nbytes: int, add: Callable[[_core.Program, np.ndarray], None]) -> None:
        """Bind one product a few times: `add` appends it, with a weight of its own, to a program that writes an output."""
        programs = []
        for _ in range(-(-COLD // nbytes)):
            program = _core.Program()
            add(program, np.empty((self.rows, self.n), np.float32))
            programs.append(program)
        self.programs[name], self.nbytes[name], self.dense[name] = programs, nbytes, dense

    def codes(self, program: _core.Program) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        codes = np.empty(_core.codes_nbytes(self.rows, self.k, "tile"), np.uint8)
        scales, zeros = np.empty(self.rows, np.float32), np.empty(self.rows, np.int32)
        _core.quantize_activations(program, self.x, False, "tile", codes, scales, zeros)
        return codes, scales, zeros, self.rows

    def bits(self, zeros: int) -> tuple[np.ndarray, np.ndarray]:
        keep = self.rng.random((self.n, self.k), np.float32) >= zeros / 100
        offsets = np.concatenate([[0], np.cumsum(keep.sum(axis=1, dtype=np.int64))])
        return np.packbits(keep, axis=1, bitorder="little"), offsets

    def group_scales(self, group: int) -> np.ndarray:
        return self.rng.uniform(0.5, 1, (self.n, -(-self.k // group))).astype(np.float16)


def enter_int4(contest: Contest, group: int) -> None:
    rows, n, k, rng = contest.rows, contest.n, contest.k, contest.rng
    words = rng.integers(-(2**31), 2**31, (n, -(-k // 8)), np.int32)
    view = _core.Int4Weight(words, (n, k), contest.group_scales(group), group)

    def add_dense(program: _core.Program, out: np.ndarray) -> None:
        count = rows * -(-k // group)
        codes, scales = np.empty(rows * -(-k // 8) * 8, np.int8), np.empty(count, np.float32)
        offsets = np.empty(count, np.int32)
        _core.quantize_groups(program, contest.x, group, codes, scales, offsets)
        _core.linear_int4(program, codes, scales, offsets, rows, _core.pack_int4(view, 2), None, out, None, None, None)

    contest.enter(f"dense int4 g{group}", f"dense int4 g{group}", _core.packed_nbytes(_core.pack_int4, view), add_dense)
    for zeros in ZEROS:
        bitmask, offsets = contest.bits(zeros)
        values = rng.integers(0, 256, -(-int(offsets[-1]) // 2)).astype(np.uint8)
        scales = contest.group_scales(group)
        weight = _core.Weight(values, (n, k), None, offsets, bitmask=bitmask, group_scales=scales, group=group)
        enter_codes(contest, f"bitmask int4 g{group} {zeros} %", f"dense int4 g{group}", weight, None)


def enter_codes(contest: Contest, name: str, dense: str, weight: _core.Weight, scale: np.ndarray | None) -> None:
    def add(program: _core.Program, out: np.ndarray) -> None:
        packed = _core.pack_bitmask(weight, 2)
        _core.bitmask_linear_int(program, *contest.codes(program), packed, scale, out, None, None, None)

    contest.enter(name, dense, _core.packed_nbytes(_core.pack_bitmask, weight), add)


def enter_int8(contest: Contest) -> None:
    n, k, rng = contest.n, contest.k, contest.rng
    scale = rng.uniform(0.5, 1, n).astype(np.float32)
    view = _core.Weight(rng.integers(-127, 128, (n, k), np.int8), (n, k), scale)

    def add_dense(program: _core.Program, out: np.ndarray) -> None:
        _core.linear_int8(program, *contest.codes(program), _core.pack_int8(view, 2), scale, out, None, None, None)

    contest.enter("dense int8", "dense int8", _core.packed_nbytes(_core.pack_int8, view), add_dense)
    for zeros in ZEROS:
        bitmask, offsets = contest.bits(zeros)
        values = rng.integers(-127, 128, int(offsets[-1]), np.int8)
        weight = _core.Weight(values, (n, k), scale, offsets, bitmask=bitmask)
        enter_codes(contest, f"bitmask int8 {zeros} %", "dense int8", weight, scale)


def enter_float(contest: Contest) -> None:
    rows, n, k, rng = contest.rows, contest.n, contest.k, contest.rng
    view = _core.Weight(rng.standard_normal((n, k), np.float32), (n, k))

    def add_dense(program: _core.Program, out: np.ndarray) -> None:
        scratch = np.empty(_core.linear_scratch(rows, n, k, 2), np.uint8)
        _core.linear(program, contest.x, _core.pack_dense(view, 2), out, None, None, None, scratch)

    contest.enter("dense float32", "dense float32", 4 * n * k, add_dense)
    for zeros in ZEROS:
        bitmask, offsets = contest.bits(zeros)
        values = rng.standard_normal(int(offsets[-1]), np.float32)
        weight = _core.Weight(values, (n, k), None, offsets, bitmask=bitmask)

        def add(program: _core.Program, out: np.ndarray, weight: _core.Weight = weight) -> None:
            _core.bitmask_linear(program, contest.x, weight, out, None, None, None)

        contest.enter(f"bitmask float32 {zeros} %", "dense float32", bitmask.nbytes + values.nbytes, add)


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def rounds(contest: Contest, threads: int, limit: float) -> Iterator[dict[str, float]]:
    """Yield the seconds of each product in turn, and of reading a byte of memory as "read"."""
    memory = np.ones(64 << 20, np.float32)
    start = time.perf_counter()
    while time.perf_counter() - start < limit:
        taken = {"read": seconds(lambda: _core.sum_of_squares(memory, threads)) / memory.nbytes}
        for name, programs in contest.programs.items():
            programs[-1].run(threads)  # wakes the team
            taken[name] = seconds(lambda programs=programs: [p.run(threads) for p in programs]) / len(programs)
        yield taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 11008])
    parser.add_argument("--precisions", nargs="+", default=["int4", "int8", "float32"], choices=["int4", "int8", "float32"])
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--json")
    options = parser.parse_args()
    contest = Contest(options.rows, *options.shape)
    if "int4" in options.precisions:
        enter_int4(contest, 32)
        enter_int4(contest, 128)
    if "int8" in options.precisions:
        enter_int8(contest)
    if "float32" in options.precisions:
        enter_float(contest)
    results = []
    for threads in options.threads:
        found = list(rounds(contest, threads, options.seconds))
        speed = 1 / median(each["read"] for each in found)
        print(
            f"{threads} thread(s), {options.rows} row(s) x {options.shape}, {len(found)} rounds; memory is read at {speed / 1e9:.1f} GB/s"
        )
        for name, dense in contest.dense.items():
            middle = median(each[name] for each in found)
            share = median(contest.nbytes[name] * each["read"] / each[name] for each in found)
            ratio = median(each[dense] / each[name] for each in found)
            bound = contest.nbytes[dense] / contest.nbytes[name]
            print(
                f"  {name:26s} {middle * 1e3:7.3f} ms {contest.nbytes[name] / middle / 1e9:6.1f} GB/s"
                f" {share:6.0%} of memory  {ratio:5.2f}x dense ({bound:.2f}x by bytes)"
            )
            results.append({"threads": threads, "product": name, "seconds": middle, "of_memory": share, "over_dense": ratio})
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"shape": options.shape, "rows": options.rows, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
