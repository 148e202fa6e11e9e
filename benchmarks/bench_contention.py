"""Two processes running Sessions at once on the same cores: the latency of each, against one alone.

    python benchmarks/bench_contention.py [--seconds 5]

The model is a deep perceptron at batch 16: twenty steps and as many barriers, which is what a busy neighbour hurts most.
Every process asks for all cores. The figure to hold: p99 of two at once at most 5 times that of one alone.
"""

import argparse
import json
import subprocess
import sys
import time

import numpy as np

SIZES = [256] * 21
BATCH = 16


def measure(seconds: float) -> dict[str, float]:
    """Run one process's share and return its latencies in milliseconds."""
    import gristmill as gm

    session = gm.Session(gm.zoo.mlp(SIZES))
    x = np.random.default_rng(0).standard_normal((BATCH, SIZES[0])).astype(np.float32)
    for _ in range(50):
        session.run(x=x)
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        session.run(x=x)
        times.append(1e3 * (time.perf_counter() - begin))
    p50, p99 = np.percentile(times, [50, 99])
    return {"threads": session.threads, "runs": len(times), "p50": p50, "p99": p99, "mean": float(np.mean(times))}


def together(count: int, seconds: float) -> list[dict[str, float]]:
    """Start `count` processes at once and return what each measured."""
    command = [sys.executable, __file__, "--one", "--seconds", str(seconds)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    return [json.loads(process.communicate()[0]) for process in running]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--one", action="store_true", help="measure in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.seconds)))
        return
    rounds = []
    for _ in range(3):  # alone and together in turn: the machine's own speed drifts
        (alone,), pair = together(1, arguments.seconds), together(2, arguments.seconds)
        worst = max(each["p99"] for each in pair)
        rounds.append(worst / alone["p99"])
        print(f"alone   p50 {alone['p50']:.3f} p99 {alone['p99']:.3f} ms ({alone['threads']:.0f} threads)")
        for each in pair:
            print(f"of two  p50 {each['p50']:.3f} p99 {each['p99']:.3f} ms  mean {each['mean']:.3f}")
    print(f"p99 together / alone: {sorted(rounds)[1]:.2f} (median of {len(rounds)} rounds; 5 is the bound)")


if __name__ == "__main__":
    main()
