"""Where a window goes on its way over an image: strides, dilations, padding and ONNX's `auto_pad`.

Convolution and pooling share it. Spatial axes are all but the first two of a value [N, C, D1, D2, ...].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from gristmill import _core
from gristmill.ops.op import Binder, Dim, Node, TensorType, fresh_dim, need
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

ATTRIBUTES = {"auto_pad": str, "dilations": tuple, "kernel_shape": tuple, "pads": tuple, "strides": tuple}
AUTO_PADS = ("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a window: `before` and `after` are elements of padding, `out` counts its positions."""

    extent: int
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int
    out: int

    @property
    def overhang(self) -> int:
        """By how much the last window ends beyond the padding, where `ceil_mode` admits that."""
        return max(0, (self.out - 1) * self.stride + reach(self.kernel, self.dilation) - self.extent - self.before - self.after)

    def taps(self) -> slice:
        """The first tap's elements of a padded axis."""
        return slice(0, (self.out - 1) * self.stride + 1 if self.out else 0, self.stride)


def reach(kernel: int, dilation: int) -> int:
    """The extent of a dilated kernel."""
    return (kernel - 1) * dilation + 1


def per_axis(node: Node, key: str, rank: int, default: int, fewest: int = 1) -> tuple[int, ...]:
    """Return an attribute that holds one integer for each of `rank` axes."""
    value = tuple(node.attributes.get(key) or (default,) * rank)
    fits = len(value) == rank and all(isinstance(v, int) and v >= fewest for v in value)
    need(fits, node, f"{key} must be {rank} integers of at least {fewest}, got {value}")
    return value


def window(node: Node, spatial: Sequence[int], kernel: Sequence[int]) -> list[Axis]:
    """Resolve a node's attributes for concrete spatial extents.

    Raises:
        ModelError: the attributes do not fit, or the kernel is larger than the padded image.
    """
    rank = len(spatial)
    need(rank >= 1, node, "its input has no spatial axes")
    need(len(kernel) == rank and all(k >= 1 for k in kernel), node, f"kernel_shape {tuple(kernel)} of {rank} spatial axes")
    strides, dilations = per_axis(node, "strides", rank, 1), per_axis(node, "dilations", rank, 1)
    pads = per_axis(node, "pads", 2 * rank, 0, fewest=0)
    auto, ceil = node.attributes.get("auto_pad", "NOTSET"), bool(node.attributes.get("ceil_mode", 0))
    need(auto in AUTO_PADS, node, f"auto_pad must be one of {AUTO_PADS}, got {auto!r}")
    axes = []
    for extent, size, stride, dilation, before, after in zip(
        spatial, kernel, strides, dilations, pads[:rank], pads[rank:], strict=True
    ):
        if auto.startswith("SAME"):
            out = -(-extent // stride)
            total = max((out - 1) * stride + reach(size, dilation) - extent, 0)
            before = total // 2 if auto == "SAME_UPPER" else total - total // 2
            axes.append(Axis(extent, size, stride, dilation, before, total - before, out))
            continue
        if auto == "VALID":
            before = after = 0
        room = extent + before + after - reach(size, dilation)
        need(room >= 0, node, f"a kernel of {reach(size, dilation)} on an axis of {extent} padded by {before} and {after}")
        out = (room + stride - 1 if ceil else room) // stride + 1
        if ceil and (out - 1) * stride >= extent + before:
            out -= 1  # no window begins in the padding behind
        axes.append(Axis(extent, size, stride, dilation, before, after, out))
    return axes


def out_shape(node: Node, spatial: Sequence[Dim], kernel: Sequence[int]) -> tuple[Dim, ...]:
    """The spatial extents of the result; a symbolic axis gives a symbol of the node's own."""
    axes = window(node, [int(d) if not isinstance(d, str) else 2**30 for d in spatial], kernel)
    return tuple(
        fresh_dim(node, i + 2) if isinstance(d, str) else a.out for i, (d, a) in enumerate(zip(spatial, axes, strict=True))
    )


def spatial_input(node: Node, x: TensorType | None) -> TensorType:
    """Return the type of an input [N, C, D1, ...] after checking that it has spatial axes."""
    assert x is not None
    need(len(x.shape) >= 3, node, f"an input [N, C, D1, ...] is needed, got {x}")
    return x


def padded(x: Array, axes: Sequence[Axis], fill: Any) -> Array:
    """Return x with its spatial axes padded, the overhang included."""
    widths = [(axis.before, axis.after + axis.overhang) for axis in axes]
    if not any(map(any, widths)):
        return x
    return np.pad(x, [(0, 0)] * (x.ndim - len(axes)) + widths, constant_values=fill)


def taps(axes: Sequence[Axis]) -> Iterator[tuple[Any, Any]]:
    """For each tap of the kernel in row-major order: its index, and that of the elements of a padded image that it meets.

    Both begin with an ellipsis: they are of the last axes of any array.
    """
    for place in product(*(range(axis.kernel) for axis in axes)):
        cuts: list[Any] = [...]
        for at, axis in zip(place, axes, strict=True):
            first = axis.taps()
            cuts.append(slice(at * axis.dilation, at * axis.dilation + first.stop, first.step))
        yield (..., *place), tuple(cuts)


# ---- what kernels take ----

Pair = tuple[int, int]  # of y and x


@dataclass(frozen=True)
class Planar:
    """A window over one or two spatial axes as kernels take it: one axis is a height of 1."""

    image: Pair
    out: Pair
    geometry: tuple[Pair, Pair, Pair, Pair]  # kernel, strides, dilations, padding before
    behind: Pair  # padding after the image


def planar(axes: Sequence[Axis]) -> Planar | None:
    """Return the kernels' form of a window, or None where they have none."""
    most, widest = _core.WINDOW_LIMITS
    for axis in axes:
        if max(axis.kernel, axis.stride, axis.dilation) > most:
            return None
        if max(reach(axis.kernel, axis.dilation), axis.before, axis.after) > widest:
            return None
    if not 1 <= len(axes) <= 2:
        return None
    y, x = (Axis(1, 1, 1, 1, 0, 0, 1), *axes)[-2:]
    geometry = ((y.kernel, x.kernel), (y.stride, x.stride), (y.dilation, x.dilation), (y.before, x.before))
    return Planar((y.extent, x.extent), (y.out, x.out), geometry, (y.after, x.after))


def dense_constant(binder: Binder, name: str) -> Tensor | None:
    """Return a float32 tensor of the model that does not train, or None."""
    try:
        tensor = binder.tensor(name)
    except KeyError:
        return None
    return tensor if tensor.kind == "dense" and tensor.dtype == np.float32 and not binder.trains(name) else None


def only_first(split: Sequence[bool]) -> bool:
    """Whether the first input alone carries the examples of a batch."""
    return split[0] and not any(split[1:])
