"""The least time that an encoder of the BERT family can take on this machine: every operation at the rate measured for it."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gristmill.bench import limits
from gristmill.bench.rows import Row

PRODUCTS = {"fp32": "fma", "bf16": "bf16", "int8": "vnni"}
ATTENTION = {"fp32": "fma", "bf16": "bf16", "int8": "bf16"}  # products of two activations stay out of int8
BACKWARD = 3  # a training step multiplies three times: forward, and gradients of inputs and of weights


@dataclass(frozen=True)
class Sizes:
    """The numbers of a config.json that say how much work a token is."""

    layers: int
    width: int
    hidden: int
    heads: int

    @classmethod
    def read(cls, source: Path) -> "Sizes | None":
        """Return the sizes of a Hugging Face directory, or None if it does not state them."""
        config = source / "config.json"
        names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
        found = json.loads(config.read_text()) if config.exists() else {}
        return cls(*[int(found[name]) for name in names]) if all(name in found for name in names) else None


def work(sizes: Sizes, row: Row) -> dict[str, float]:
    """Return the operations or elements of each limit that a row asks for."""
    tokens = row.batch * row.length
    per_layer = 4 * sizes.width**2 + 2 * sizes.width * sizes.hidden
    percent = int(row.pruned.partition("-")[2] or 0)
    products = 2.0 * tokens * sizes.layers * per_layer * (1 - percent / 100)
    attention = 4.0 * tokens * row.length * sizes.width * sizes.layers
    times = BACKWARD if row.train else 1
    amounts: dict[str, float] = {
        "exp": row.batch * sizes.heads * row.length**2 * sizes.layers,
        "gelu": tokens * sizes.hidden * sizes.layers,
        "norm": tokens * sizes.width * (2 * sizes.layers + 1),
        "quantize": tokens * (3 * sizes.width + sizes.hidden) * sizes.layers if row.precision == "int8" else 0,
    }
    for limit, amount in ((PRODUCTS[row.precision], products), (ATTENTION[row.precision], attention)):
        amounts[limit] = amounts.get(limit, 0) + times * amount
    return {name: amount for name, amount in amounts.items() if amount}


peak = cache(limits.peak)


def floor(sizes: Sizes, row: Row) -> dict[str, float]:
    """Return the seconds of each kind of operation, spread evenly over the row's threads; their sum is the floor."""
    return {limit: amount / peak(limit) / row.threads for limit, amount in work(sizes, row).items()}
