"""From the tensors of a file to those that they stand for: weights in parts are put together, and checked against config.json."""

from collections.abc import Iterator, Mapping

import numpy as np

from gristmill.errors import FormatError
from gristmill.formats.compressed_tensors.codes import (
    FP8,
    Codes,
    Masked,
    Packed,
    Plain,
    check_row_offsets,
    masked,
    numbers,
    packed,
    stored_shape,
)
from gristmill.formats.compressed_tensors.scheme import DENSE, DENSE_PACKING, Arguments, Scheme
from gristmill.formats.compressed_tensors.weight import Scales, Weight
from gristmill.formats.folder import BF16
from gristmill.tensor.parts import Array

# What layers have for their activations, whose scales are found at run time here, and for caches of keys and values.
ACTIVATIONS = tuple(
    f"{of}_{what}" for of in ("input", "output", "q", "k", "v") for what in ("scale", "zero_point", "global_scale")
)
SCALING = ("weight_scale", "weight_zero_point", "weight_g_idx")
FLOATS = (np.float16, np.float32, np.float64)


def assemble(arrays: Mapping[str, Array], scheme: Scheme) -> dict[str, Array | Weight]:
    """Return the tensors of a model by name, those that were compressed as weights that are not unpacked yet.

    Raises:
        FormatError: parts are missing, or disagree with one another or with the scheme.
    """
    loose = dict(arrays)
    made: dict[str, Array | Weight] = {}
    for name, weight in _sparse(loose, scheme):
        made[name] = weight
    for layer in [name.removesuffix("weight_packed") for name in loose if _last(name) == "weight_packed"]:
        _add(made, _packed(layer, loose, scheme))
    for name in [name for name in loose if _last(name) == "weight" and f"{name}_scale" in loose]:
        scaled = _scaled(name, Plain(loose[name]), loose[name].shape, loose, scheme)
        if scaled is not None:
            del loose[name]
            _add(made, scaled)
    for name, found in list(made.items()):
        if isinstance(found, Weight) and found.scales is None and f"{name}_scale" in loose:
            made[name] = _scaled(name, found.codes, found.shape, loose, scheme) or found
    _check(made)
    for name in [name for name in loose if _last(name) in ACTIVATIONS]:
        del loose[name]
    for name, array in loose.items():
        if name in made:
            raise FormatError(f"tensor '{name}' is stored twice, once compressed")
        if _last(name) in SCALING:
            raise FormatError(f"tensor '{name}' belongs to a quantised weight, which is missing")
        made[name] = array
    return made


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _add(made: dict[str, Array | Weight], weight: Weight) -> None:
    if weight.name in made:
        raise FormatError(f"tensor '{weight.name}' is stored twice, in two formats")
    made[weight.name] = weight


def _check(made: Mapping[str, Array | Weight]) -> None:
    for name, weight in made.items():
        if isinstance(weight, Weight) and weight.scales is None and weight.codes.whole:
            raise FormatError(f"tensor '{name}' holds integers but '{name}_scale' is missing")


# ---- sparse ----


def _sparse(loose: dict[str, Array], scheme: Scheme) -> Iterator[tuple[str, Weight]]:
    """Take all parts of sparse weights out of `loose`."""
    stems = [name.removesuffix(".compressed") for name in loose if name.endswith(".compressed")]
    stems = [stem for stem in stems if f"{stem}.bitmask" in loose or scheme.sparse is not None]
    # Files of the first releases name the parts after the tensor, those of later ones after its layer.
    by_tensor = any(_last(stem) == "weight" for stem in stems)
    for stem in stems:
        parts = {part: loose.pop(f"{stem}.{part}", None) for part in ("compressed", "bitmask", "shape", "row_offsets")}
        name = stem if by_tensor else f"{stem}.weight"
        yield name, Weight(name, *_unmasked(stem, parts, scheme), None)


def _unmasked(stem: str, parts: Mapping[str, Array | None], scheme: Scheme) -> tuple[tuple[int, ...], Masked]:
    values, mask, sizes, offsets = parts["compressed"], parts["bitmask"], parts["shape"], parts["row_offsets"]
    assert values is not None
    for part in ("bitmask", "shape"):
        if parts[part] is None:
            raise FormatError(f"tensor '{stem}.compressed' lacks '{stem}.{part}'")
    assert mask is not None
    assert sizes is not None
    paired = offsets is None
    if scheme.sparse is not None and (scheme.sparse == "sparse-24-bitmask") != paired:
        has = "has no" if paired else "has"
        raise FormatError(f"tensor '{stem}.compressed' {has} row_offsets, but config.json says that the file is {scheme.sparse}")
    shape = stored_shape(f"{stem}.shape", sizes)
    if values.dtype != np.int8 and values.dtype not in (BF16, FP8) and values.dtype.type not in FLOATS:
        raise FormatError(f"tensor '{stem}.compressed' is {values.dtype}, which no weight is")
    if paired and (len(shape) != 2 or shape[1] % 2):
        raise FormatError(f"tensor '{stem}.shape' holds {list(shape)}, but 2:4 sparse weights are matrices of an even width")
    made = masked(stem, values, mask, shape, paired)
    if offsets is not None:
        check_row_offsets(stem, offsets, mask)
    return shape, made


# ---- quantised ----


def _packed(layer: str, loose: dict[str, Array], scheme: Scheme) -> Weight:
    name, words = f"{layer}weight", loose.pop(f"{layer}weight_packed")
    arguments = _arguments(layer, scheme)
    sizes = loose.pop(f"{name}_shape", None)
    if sizes is None:
        raise FormatError(f"tensor '{name}_packed' lacks '{name}_shape'")
    shape = stored_shape(f"{name}_shape", sizes)
    if len(shape) != 2:
        raise FormatError(f"tensor '{name}_shape' holds {list(shape)}: packed weights that are no matrices are not read")
    if arguments.kind != "int":
        raise FormatError(f"tensor '{name}_packed' is packed, but config.json says that it holds floats")
    crossing = scheme.version is not None and scheme.version >= DENSE_PACKING
    codes = packed(f"{name}_packed", words, arguments.bits, (shape[0], shape[1]), crossing)
    return Weight(name, shape, codes, _scales(name, codes, arguments, loose))


def _scaled(name: str, codes: Codes, shape: tuple[int, ...], loose: dict[str, Array], scheme: Scheme) -> Weight | None:
    """Return a weight of int8 or FP8 with scales; None for a float one, whose scales are those that it was trained with."""
    arguments = _arguments(name.removesuffix("weight"), scheme)
    dtype = codes.values.dtype if isinstance(codes, Masked) else codes.array.dtype if isinstance(codes, Plain) else None
    if scheme.format in DENSE and dtype != np.int8 and dtype != FP8:
        for part in SCALING:
            loose.pop(name.removesuffix("weight") + part, None)
        return None
    wanted = np.dtype(np.int8) if arguments.kind == "int" else FP8
    if dtype != wanted:
        raise FormatError(
            f"tensor '{name}' is {dtype} but config.json says that it holds {arguments.kind} values of {arguments.bits} bits"
        )
    if len(shape) != 2 or 0 in shape:
        raise FormatError(f"tensor '{name}' is {list(shape)}: quantised weights that are no matrices are not read")
    return Weight(name, shape, codes, _scales(name, codes, arguments, loose))


def _arguments(layer: str, scheme: Scheme) -> Arguments:
    if not scheme.groups:
        raise FormatError(f"layer '{layer[:-1]}' is quantised, but no config.json with config_groups says how")
    group = scheme.group_of(layer.removesuffix("."))
    if group.weights is None:
        raise FormatError(f"layer '{layer[:-1]}' is quantised, but its group {group.name[:80]!r} in config.json has no weights")
    return group.weights


def _scales(name: str, codes: Codes, arguments: Arguments, loose: dict[str, Array]) -> Scales:
    n, k = codes.shape
    scale, zero, order = (loose.pop(f"{name}{part}", None) for part in ("_scale", "_zero_point", "_g_idx"))
    if scale is None:
        raise FormatError(f"tensor '{name}' is quantised but '{name}_scale' is missing")
    if scale.dtype != BF16 and scale.dtype.type not in FLOATS:
        raise FormatError(f"tensor '{name}_scale' is {scale.dtype}; scales must be floats")
    shape, row, column, group = _grid(name, n, k, arguments, order)
    by_tensor = arguments.strategy == "tensor" and scale.size == 1 and scale.ndim <= 2
    if scale.shape != shape and not by_tensor:
        raise FormatError(
            f"tensor '{name}_scale' is {list(scale.shape)} but scales by {arguments.strategy} of {n} x {k} are {list(shape)}"
        )
    scale = scale.reshape(shape)
    if not np.isfinite(numbers(scale)).all():
        raise FormatError(f"tensor '{name}_scale' holds scales that are not finite")
    if zero is None and not arguments.symmetric:
        raise FormatError(f"tensor '{name}' is not symmetric but '{name}_zero_point' is missing")
    return Scales(scale, _zeros(name, zero, shape, arguments, codes), row, column, group)


def _grid(
    name: str, n: int, k: int, arguments: Arguments, order: Array | None
) -> tuple[tuple[int, int], Array | None, Array | None, int]:
    """Return the shape of the scales, the row and the column of them for each row and column of the weight, and how many
    columns after one another share one."""
    match arguments.strategy:
        case "tensor":
            return (1, 1), None, None, 0
        case "channel":
            return (n, 1), np.arange(n), None, 0
        case "group":
            rows, columns = 1, arguments.group
            if k % columns:
                raise FormatError(f"tensor '{name}' has {k} columns, which groups of {columns} do not divide")
        case _:
            rows, columns = arguments.block
    shape = (-(-n // rows), -(-k // columns))
    row = np.arange(n) // rows
    if shape[1] == 1:
        return shape, row, None, 0
    column = np.arange(k) // columns
    own = None if order is None or arguments.strategy != "group" else _ordered(name, order, shape[1], columns)
    return (shape, row, column, columns) if own is None else (shape, row, own, 0)


def _ordered(name: str, order: Array, groups: int, size: int) -> Array | None:
    """Return the group of each column as `weight_g_idx` has it; None where a -1 in it stands for the usual order."""
    if order.dtype not in (np.int32, np.int64) or order.shape != (groups * size,):
        raise FormatError(f"tensor '{name}_g_idx' is {order.dtype} {list(order.shape)} but must have a group for each column")
    if (order == -1).any():
        return None
    if order.min() < 0 or order.max() >= groups or (np.bincount(order, minlength=groups) != size).any():
        raise FormatError(f"tensor '{name}_g_idx' does not give each of {groups} groups {size} columns")
    return None if (order[:-1] <= order[1:]).all() else order.astype(np.int64)


def _zeros(name: str, zero: Array | None, shape: tuple[int, int], arguments: Arguments, codes: Codes) -> Array | None:
    """Return zero points in the shape of the scales; None where all are 0."""
    if zero is None:
        return None
    at = f"{name}_zero_point"
    if isinstance(codes, Packed) and zero.dtype == np.int32 and arguments.strategy in ("channel", "group"):
        # Packed down the rows; releases up to 0.9.0 kept them as int8, which the shape below fits.
        zero = packed(at, zero.T, codes.bits, (shape[1], shape[0]), codes.crossing).rows(0, shape[1]).T
    if zero.dtype == FP8:
        zero = numbers(zero)
        if (zero != 0).any():
            raise FormatError(f"tensor '{at}' holds zero points of float values, which are not read")
    elif zero.dtype.kind not in "iu":
        raise FormatError(f"tensor '{at}' is {zero.dtype}; zero points must be integers")
    if zero.size != shape[0] * shape[1] or (zero.shape != shape and arguments.strategy != "tensor"):
        raise FormatError(f"tensor '{at}' is {list(zero.shape)} but the scales are {list(shape)}")
    if zero.min() < -128 or zero.max() > 127:
        raise FormatError(f"tensor '{at}' holds zero points beyond -128 and 127")
    return zero.reshape(shape).astype(np.int16) if zero.any() else None
