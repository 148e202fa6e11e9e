"""The kinds of tensor that a model can hold. All have the same members, so that compression replaces tensors and not nodes."""

from typing import Any

from gristmill.errors import FormatError
from gristmill.tensor.bf16 import BFloat16
from gristmill.tensor.bitmask import Bitmask
from gristmill.tensor.dense import Dense
from gristmill.tensor.int4 import Int4
from gristmill.tensor.quantized import Quantized
from gristmill.tensor.sparse import Sparse

Tensor = Dense | BFloat16 | Quantized | Int4 | Sparse | Bitmask

KINDS: dict[str, type[Dense] | type[BFloat16] | type[Quantized] | type[Int4] | type[Sparse] | type[Bitmask]] = {
    kind.kind: kind for kind in (Dense, BFloat16, Quantized, Int4, Sparse, Bitmask)
}

__all__ = [
    "KINDS", "BFloat16", "Bitmask", "Dense", "Int4", "Quantized", "Sparse", "Tensor", "from_parts", "has_gains", "is_int8",
]  # fmt: skip


def is_int8(tensor: Tensor) -> bool:
    """Whether a tensor holds int8 codes and scales."""
    if isinstance(tensor, Bitmask):
        return tensor.precision == "int8"
    return isinstance(tensor, Quantized) or (isinstance(tensor, Sparse) and tensor.scale is not None)


def has_gains(tensor: Tensor) -> bool:
    """Whether a tensor holds codes, so that what trains is a gain on each of its rows."""
    return isinstance(tensor, (Quantized, Int4)) or (isinstance(tensor, (Sparse, Bitmask)) and tensor.scale is not None)


def from_parts(spec: dict[str, Any], parts: dict[str, Any]) -> Tensor:
    """Rebuild a tensor from its `spec()` and its `parts()`, both untrusted.

    Raises:
        FormatError: the kind is unknown, a part is missing, or a part has the wrong dtype, shape or content.
    """
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise FormatError(f"unknown tensor kind {kind!r}; this version knows {', '.join(KINDS)}")
    if kind == "sparse" and "_bitmask" in parts:  # what files had before bitmasks were a kind
        return Bitmask.from_blocks_of_one(spec, parts)
    return KINDS[kind].from_parts(spec, parts)
