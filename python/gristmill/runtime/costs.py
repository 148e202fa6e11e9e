"""What products cost on this machine: measured once, when a plan first has a choice, and kept in a file.

The expected seconds of a product are the sum of its amounts of work (`Product.work`), each at a price that a few short runs on
one thread gave; of threads it is assumed how they share it. Where a model is larger than the last level of cache, reading its
weights from memory takes the time that it takes, whatever the kernel.

GRISTMILL_COSTS names the file, or is "off": then built-in prices are used and nothing is measured or written. By default it is
`gristmill/costs.json` in XDG_CACHE_HOME or ~/.cache. Prices are for one CPU, one set of installed kernels and one build of them;
a file that is damaged, or holds none for these, is measured anew, and one that cannot be written is done without. The choice
never changes a result: products that take one weight give the same bits.
"""

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from gristmill import _core
from gristmill.errors import ModelError
from gristmill.ops.products import PRODUCTS, Product
from gristmill.ops.products.product import Size
from gristmill.runtime.choice import Move, Way

FORMAT = 1
MOST_MACHINES = 16  # that a file holds prices for
SPEEDUP = 0.85  # the power of the number of threads that a product gains: two do the work of 1.8
BARRIER = 1.5e-6  # seconds that a team of threads spends on a step beyond its work
CACHE = 32 << 20  # bytes of the last level where the system does not say
MEMORY = {1: 20e9}  # built-in bytes per second of reading memory, by threads

# Of one core of a Zen 4 server with AVX-512 VNNI.
BUILT_IN: dict[str, tuple[float, ...]] = {
    "bitmask float32": (3.81e-07, 9.63e-11, 1.22e-11, 1.54e-09),
    "bitmask float32 in lanes": (0.0, 0.0, 6.21e-11, 0.0, 1.82e-09, 0.0),
    "bitmask int4": (7.01e-06, 0.0, 5.61e-12, 2.07e-09),
    "bitmask int8": (0.0, 2.42e-11, 3.01e-12, 6.64e-10),
    "blocks 1x1 float32": (0.0, 0.0, 6.06e-10, 0.0, 0.0, 0.0),
    "blocks 1x4 float32": (0.0, 0.0, 4.48e-10, 3.21e-09, 4.26e-09, 0.0),
    "blocks 1x4 int8": (0.0, 0.0, 1.02e-10, 4.1e-09, 5.64e-10, 2.82e-12),
    "blocks 2x4 float32": (0.0, 0.0, 4.07e-10, 0.0, 3.78e-11, 0.0),
    "blocks 2x4 int8": (0.0, 0.0, 6.45e-11, 3.39e-09, 2.31e-10, 0.0),
    "blocks 4x4 float32": (0.0, 0.0, 2.94e-10, 1.89e-09, 2.12e-09, 0.0),
    "blocks 4x4 int8": (0.0, 0.0, 4.82e-11, 2.78e-09, 5.78e-10, 0.0),
    "dense bf16": (0.0, 7.16e-12, 1.31e-11, 2.47e-10, 4.12e-10),
    "dense float32": (0.0, 1.52e-11, 2.34e-11, 0.0, 3.04e-10),
    "dense int4": (0.0, 2.84e-12, 6.78e-12, 6.66e-10, 5.39e-10),
    "dense int8": (0.0, 3.17e-12, 7.71e-12, 3e-10, 6.49e-11),
    "lanes to lanes codes": (1.65e-06, 9.44e-11),
    "lanes to rows": (6.18e-07, 1.89e-10),
    "lanes to tile codes": (1.62e-06, 4.09e-10),
    "rows to lanes": (1.59e-06, 1.87e-10),
    "rows to lanes codes": (6.43e-07, 1.23e-10),
    "rows to tile codes": (4.34e-07, 1.22e-10),
}


class Costs:
    """Prices of products and conversions by name, measured when they are first asked for.

    Args:
        path: the file to keep them in, or None to measure nothing and use built-in prices.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._prices: dict[str, tuple[float, ...] | None] = {}
        self._machine: str | None = None
        self._lock = threading.Lock()

    def seconds(self, item: Product | Move, size: Size, threads: int = 1) -> float:
        """Return the expected seconds of a product or a conversion; infinity for what has no price."""
        price = self._price(item)
        work = item.work(size)
        if price is None or len(price) != len(work):
            return math.inf
        one = sum(amount * each for amount, each in zip(work, price, strict=True))
        return one / threads**SPEEDUP + (BARRIER if threads > 1 else 0.0)

    def expected(self, way: Way, threads: int, resident: int) -> float:
        """Return the expected seconds of the product alone, in a model of `resident` bytes of weights."""
        seconds = self.seconds(way.product, way.size, threads)
        return max(seconds, way.nbytes / self._memory(threads)) if resident > last_level() else seconds

    def total(self, way: Way, threads: int, resident: int) -> float:
        """The same with the conversions that it causes."""
        moves = sum(part * self.seconds(move, size, threads) for move, size, part in way.moves)
        return self.expected(way, threads, resident) + moves

    def decide(self, ways: Sequence[Way], resident: int) -> Way:
        """Return the way of the least expected time on one thread, so that it does not depend on how many run it; of equals the
        first."""
        self._ready([way.product for way in ways], [move for way in ways for move, _, _ in way.moves])
        return min(ways, key=lambda way: self.total(way, 1, resident))

    # ---- inner ----

    def _price(self, item: Product | Move) -> tuple[float, ...] | None:
        self._ready([item])
        return self._prices.get(item.name)

    def _memory(self, threads: int) -> float:
        """Bytes per second that are read from memory."""
        if self.path is None:
            return MEMORY.get(threads, MEMORY[1])
        name = f"memory, {threads} threads"
        with self._lock:
            self._refresh()
            if name not in self._prices:
                from gristmill.runtime.calibrate import read_speed

                self._prices[name] = (read_speed(threads, 3 * last_level()),)
                self._save()
            (speed,) = self._prices[name] or (MEMORY[1],)
        return speed

    def _ready(self, *groups: Iterable[Product | Move]) -> None:
        """Measure what has no price yet. Plans of other threads wait."""
        items = {item.name: item for group in groups for item in group}
        with self._lock:
            self._refresh()
            missing = [item for name, item in items.items() if name not in self._prices]
            if not missing:
                return
            if self.path is None:
                self._prices.update({item.name: BUILT_IN.get(item.name) for item in missing})
                return
            from gristmill.runtime.calibrate import prices  # which plans, as what asks for prices does

            self._prices.update({item.name: prices(item) for item in missing})
            self._save()

    def _refresh(self) -> None:
        """Take what the file holds for the kernels that are installed now."""
        machine = digest(_core.isa_generation())
        if machine != self._machine:
            self._machine, self._prices = machine, {}
            if self.path is not None:
                self._prices.update(read(self.path).get(machine, {}))

    def _save(self) -> None:
        """Add these prices to the file, next to what other processes put there meanwhile."""
        from gristmill.formats.atomic import replacing

        assert self.path is not None
        assert self._machine is not None
        machines = read(self.path)
        known = {**machines.pop(self._machine, {}), **self._prices}
        machines = dict([*machines.items(), (self._machine, known)][-MOST_MACHINES:])
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps({"format": FORMAT, "machines": machines}, indent=1))


def read(path: Path) -> dict[str, dict[str, tuple[float, ...] | None]]:
    """Return the prices of a file by machine; nothing for a file that is absent or is not one of these, whole."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            return {}
        return {str(machine): {str(n): _checked(p) for n, p in found.items()} for machine, found in content["machines"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _checked(prices: Any) -> tuple[float, ...] | None:
    if prices is None:
        return None
    numbers = tuple(float(price) for price in prices)
    if not numbers or not all(math.isfinite(price) and price >= 0 for price in numbers) or not any(numbers):
        raise ValueError(f"{prices} are no prices")
    return numbers


@cache
def digest(generation: int) -> str:
    """Return what prices hold for: the CPU, the kernels installed, and the build of them."""
    core = Path(_core.__file__).stat()
    slots = sorted((slot, variant) for slot, (variant, _, _) in _core.slots().items())
    facts = [FORMAT, cpu(), os.cpu_count(), slots, core.st_size, core.st_mtime_ns]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def cpu() -> str:
    """Return the name of the CPU, or of its kind."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = [line for line in lines if line.startswith(("model name", "cpu family", "model\t", "stepping", "Features"))]
        if named:
            return "\n".join(dict.fromkeys(named))
    import platform

    return f"{platform.machine()} {platform.processor()}"


@cache
def last_level() -> int:
    """Return the bytes of the last level of cache."""
    with suppress(OSError, ValueError):
        sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        return max(int(size.removesuffix("K")) << 10 for size in sizes)
    return CACHE


def where() -> Path | None:
    """Return the file that prices are kept in, None where GRISTMILL_COSTS is "off"."""
    named = os.environ.get("GRISTMILL_COSTS", "")
    if named == "off":
        return None
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path(os.path.expanduser("~")) / ".cache") / "gristmill" / "costs.json"


_costs: dict[Path | None, Costs] = {}
_lock = threading.Lock()


def costs() -> Costs:
    """Return the costs of this machine, as the environment says where they are kept."""
    path = where()
    with _lock:
        return _costs.setdefault(path, Costs(path))


def break_even(k: int, n: int, m: int, pattern: str = "4x4", dtype: str = "int8", threads: int = 1) -> float | None:
    """Return the sparsity from which a layer runs faster sparse than dense on this machine, conversions from and to rows
    included; None where it never does.

    Args:
        k: inputs of the layer.
        n: outputs.
        m: rows of a batch.
        pattern: what is stored, such as "1x4" or "4x4".
        dtype: of both the sparse and the dense weight, such as "int8" or "float32".
        threads: that run the layer.

    Raises:
        ModelError: there is no product for such a weight.

    Example:
        >>> even = break_even(768, 3072, 128, "4x4", "int8")
        >>> even is None or 0 <= even < 1
        True
    """
    sparse, dense = _products(f"{pattern} {dtype}"), _products(f"dense {dtype}")
    prices = costs()

    def seconds(product: Product, stored: float) -> float:
        return prices.total(_alone(product, Size(m, k, n, stored)), threads, 0)

    least = min(seconds(product, k * n) for product in dense)
    evens = []
    for product in sparse:
        empty, full = seconds(product, 0.0), seconds(product, k * n)
        if empty < least:
            evens.append(0.0 if full <= least else 1.0 - (least - empty) / (full - empty))
    return min(evens, default=None)


def _products(form: str) -> list[Product]:
    found = [product for product in PRODUCTS if product.form == form]
    if not found:
        known = sorted({product.form for product in PRODUCTS if product.form})
        raise ModelError(f"no product has weights of form '{form}'; there are {', '.join(known)}")
    return found


def _alone(product: Product, size: Size) -> Way:
    """A layer that finds its input in rows and leaves its output in rows."""
    moves = [] if product.layout == "rows" else [(Move("rows", product.layout), size, 1.0)]
    if product.out == "lanes":
        moves.append((Move(product.out, "rows"), Size(size.m, size.n, 0, 0), 1.0))
    return Way(product, size, 0, tuple(moves))
