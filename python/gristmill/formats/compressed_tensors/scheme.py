"""What config.json says about compressed tensors: formats, groups of layers, and how their weights are quantised."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gristmill.errors import FormatError
from gristmill.formats.compressed_tensors.patterns import Budget, Pattern
from gristmill.formats.folder import Fields

KEYS = ("quantization_config", "compression_config")  # the second is that of files from before release 0.7
METHOD = "compressed-tensors"
LISTED = 100_000  # groups, targets and ignored layers
SPARSE = ("sparse-bitmask", "sparse-24-bitmask")
QUANTIZED = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized")
DENSE = ("dense", "fakequant")  # the second is that of the first releases
MIXED = "mixed-precision"
_MINIFLOAT = (
    "its values are floats of 4 to 8 bits in blocks, which no kernel here takes; "
    "have compressed-tensors write the model decompressed, and load that"
)
REFUSED = {
    "marlin-24": "its values are shuffled for one GPU kernel, and no release of compressed-tensors could put them back; "
    "compress the original model again, as pack-quantized",
    "nvfp4-pack-quantized": _MINIFLOAT,
    "mxfp4-pack-quantized": _MINIFLOAT,
    "mxfp6-pack-quantized": _MINIFLOAT,
    "mxfp8-quantized": _MINIFLOAT,
}
STRATEGIES = ("tensor", "channel", "group", "block")
DENSE_PACKING = (0, 17)  # the first release whose 3-, 5-, 6- and 7-bit values cross the borders of words


@dataclass(frozen=True)
class Arguments:
    """How the weights of a group are quantised.

    Args:
        bits: 1 to 8.
        kind: "int" or "float" (8 bits: E4M3).
        symmetric: without zero points.
        strategy: what shares a scale: "tensor", "channel" (a row), "group" (columns of a row) or "block".
        group: columns of a group.
        block: rows and columns of a block.
    """

    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group: int = 0
    block: tuple[int, int] = (0, 0)

    def described(self) -> dict[str, Any]:
        """Return what `gristmill inspect` shows."""
        shown: dict[str, Any] = {"bits": self.bits, "type": self.kind, "strategy": self.strategy, "symmetric": self.symmetric}
        if self.strategy == "group":
            shown["group_size"] = self.group
        if self.strategy == "block":
            shown["block"] = list(self.block)
        return shown


@dataclass(frozen=True)
class Targets:
    """Names of layers, classes of layers, and patterns of names."""

    names: frozenset[str]
    patterns: tuple[Pattern, ...]

    def match(self, layer: str) -> bool:
        return layer in self.names or any(pattern.matches(layer) for pattern in self.patterns)


@dataclass(frozen=True)
class Group:
    """Layers that are quantised alike; `weights` is None where only their activations are."""

    name: str
    format: str
    targets: Targets
    weights: Arguments | None


@dataclass(frozen=True)
class Scheme:
    """All of it.

    Args:
        version: release of the library that wrote the file; None where it does not say.
        format: of the quantised weights; "dense" where there are none.
        sparse: the format of the sparse weights, or None.
        groups: of layers.
        ignored: layers that are in no group.
        transformed: whether layers multiply by matrices that are not part of their weights.
    """

    version: tuple[int, int] | None = None
    format: str = "dense"
    sparse: str | None = None
    groups: tuple[Group, ...] = ()
    ignored: Targets = field(default_factory=lambda: Targets(frozenset(), ()))
    transformed: bool = False

    @cached_property
    def _named(self) -> dict[str, Group]:
        """The first group of each name or class."""
        return {name: group for group in reversed(self.groups) for name in group.targets.names}

    @cached_property
    def _patterns(self) -> list[tuple[Pattern, Group]]:
        return [(pattern, group) for group in self.groups for pattern in group.targets.patterns]

    def group_of(self, layer: str) -> Group:
        """Return the group of a quantised layer: one that names it, before one that has a pattern for it, before its class.

        Raises:
            FormatError: there is none, or the layer is ignored.
        """
        kind = "Embedding" if "embed" in layer.rpartition(".")[2] else "Linear"
        if self.ignored.match(layer):
            raise FormatError(f"layer '{layer}' is quantised in the file but ignored in config.json")
        if layer in self._named:
            return self._named[layer]
        for pattern, group in self._patterns:
            if pattern.matches(layer):
                return group
        if kind in self._named:
            return self._named[kind]
        raise FormatError(f"layer '{layer}' is quantised in the file, but no group of config.json has it or the class {kind}")

    def described(self) -> dict[str, Any]:
        """Return what `gristmill inspect` shows."""
        shown: dict[str, Any] = {"format": self.format, "sparsity": self.sparse or "dense"}
        if self.version is not None:
            shown["version"] = ".".join(map(str, self.version))
        shown["groups"] = [{"format": group.format, **group.weights.described()} for group in self.groups if group.weights]
        return shown


def read_scheme(config: Mapping[str, Any]) -> Scheme | None:
    """Return what config.json says; None if it describes no compression.

    Raises:
        FormatError: it is damaged, or names a format that is not read.
    """
    key = next((key for key in KEYS if config.get(key) not in (None, {})), None)
    if key is None:
        # Files of the first releases have the sparsity beside the model's own fields.
        sparse = _sparse(config.get("sparsity_config"))
        return None if sparse is None else Scheme(sparse=sparse)
    values = config[key]
    if not isinstance(values, Mapping):
        raise FormatError(f"config.json: {key} must be an object")
    fields = Fields(f"config.json: {key}", values)
    _check_method(fields, key)
    form = _format(fields, "format", "dense")
    sparse = _sparse(values.get("sparsity_config"))
    form = "dense" if form in DENSE else form
    if form in SPARSE:  # a file without quantisation may say it here
        form, sparse = "dense", form
    budget = Budget()
    groups = tuple(_groups(fields, form, budget))
    formats = {group.format for group in groups if group.weights is not None}
    return Scheme(
        version=_version(fields),
        format=formats.pop() if len(formats) == 1 else form,
        sparse=sparse,
        groups=groups,
        ignored=_targets(fields, "ignore", values.get("ignore") or [], budget),
        transformed=_transformed(fields),
    )


def _check_method(fields: Fields, key: str) -> None:
    ours = fields.values.keys() & {"config_groups", "sparsity_config"}
    method = fields.values.get("quant_method", METHOD if ours or key != KEYS[0] else None)
    if method not in (METHOD, "sparseml"):
        raise FormatError(f"the model was quantised by {str(method)[:80]!r}, which is not read; what is read: {METHOD}")


def _format(fields: Fields, name: str, default: str) -> str:
    form = fields.values.get(name)
    form = default if form is None else form
    if isinstance(form, str) and form in REFUSED:
        raise FormatError(f"{fields.what}: the format {form} is not read: {REFUSED[form]}")
    known = (*QUANTIZED, *SPARSE, *DENSE, MIXED)
    if not isinstance(form, str) or form not in known:
        raise FormatError(f"{fields.what}: the format {str(form)[:80]!r} is not known; what is read: {', '.join(known)}")
    return form


def _sparse(values: Any) -> str | None:
    """Return the sparse format; models that were never sparse carry such an entry too, with the format dense."""
    if values is None or values == {}:
        return None
    if not isinstance(values, Mapping):
        raise FormatError("config.json: sparsity_config must be an object")
    form = _format(Fields("config.json: sparsity_config", values), "format", "dense")
    if form in DENSE:
        return None
    if form not in SPARSE:
        raise FormatError(f"config.json: sparsity_config: the format {form} is not one of {', '.join(SPARSE)}, dense")
    return form


def _version(fields: Fields) -> tuple[int, int] | None:
    version = fields.values.get("version")
    if version is None:
        return None
    found = re.match(r"(\d{1,4})\.(\d{1,4})(?!\d)", version, re.ASCII) if isinstance(version, str) else None
    if found is None:
        raise fields.fault("version", "a release such as 0.14.0")
    return int(found[1]), int(found[2])


def _transformed(fields: Fields) -> bool:
    values = fields.values.get("transform_config")
    if values is not None and not isinstance(values, Mapping):
        raise fields.fault("transform_config", "an object")
    return bool(values and values.get("config_groups"))


def _groups(fields: Fields, form: str, budget: Budget) -> Iterable[Group]:
    groups = fields.values.get("config_groups")
    groups = {} if groups is None else groups
    if not isinstance(groups, Mapping) or len(groups) > LISTED:
        raise fields.fault("config_groups", "an object")
    for name, values in groups.items():
        what = f"{fields.what}: group {name[:80]!r}"
        if not isinstance(values, Mapping):
            raise FormatError(f"{what} must be an object that spells out its scheme")
        group = Fields(what, values)
        own = _format(group, "format", form)
        weights = values.get("weights")
        if weights is not None and not isinstance(weights, Mapping):
            raise group.fault("weights", "an object")
        targets = _targets(group, "targets", values.get("targets"), budget)
        yield Group(name, own, targets, None if weights is None else _arguments(Fields(f"{what}: weights", weights)))


def _targets(fields: Fields, key: str, values: Any, budget: Budget) -> Targets:
    if not isinstance(values, list) or len(values) > LISTED or not all(isinstance(value, str) for value in values):
        raise fields.fault(key, "a list of layers")
    patterns = tuple(Pattern(value.removeprefix("re:"), budget) for value in values if value.startswith("re:"))
    return Targets(frozenset(value for value in values if not value.startswith("re:")), patterns)


def _arguments(fields: Fields) -> Arguments:
    kind = _lowered(fields, "type", "int")
    if kind not in ("int", "float"):
        raise fields.fault("type", "int or float")
    bits = fields.integer("num_bits", 1, 16, 8)
    if bits > 8 or (kind == "float" and bits != 8):
        raise FormatError(f"{fields.what}: {kind} weights of {bits} bits are not read; what is read: int of 1 to 8, float of 8")
    size = fields.values.get("group_size")
    if size is not None and (type(size) is not int or not (size == -1 or 0 < size < 2**31)):
        raise fields.fault("group_size", "a positive number of columns")
    strategy = _lowered(fields, "strategy", "tensor" if size is None else "channel" if size == -1 else "group")
    if strategy not in STRATEGIES:
        raise FormatError(
            f"{fields.what}: weights with scales by {strategy[:80]!r} are not read; what is read: {', '.join(STRATEGIES)}"
        )
    if strategy == "group" and (size is None or size < 1):
        raise fields.fault("group_size", "a positive number of columns")
    block = _block(fields) if strategy == "block" else (0, 0)
    symmetric = fields.flag("symmetric", True)
    return Arguments(bits, kind, symmetric, strategy, size if strategy == "group" and size else 0, block)


def _lowered(fields: Fields, key: str, default: str) -> str:
    value = fields.values.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise fields.fault(key, "a text")
    return value.lower()


def _block(fields: Fields) -> tuple[int, int]:
    """Return rows and columns of a block, written [128, 128] or, by older releases, "128x128"."""
    value = fields.values.get("block_structure")
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", value, re.ASCII):
        value = [int(size) for size in value.split("x")]
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and 0 < size < 2**31 for size in value):
        raise fields.fault("block_structure", "rows and columns of a block")
    return value[0], value[1]
