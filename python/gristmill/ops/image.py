"""Resampling and rearranging of images: Resize, GridSample, AffineGrid, and moves between depth and space."""

from collections.abc import Callable, Sequence
from itertools import product
from math import ceil, floor, prod
from typing import Any

import numpy as np

from gristmill.ops.op import Dim, Node, Op, TensorType, Undetermined, fresh_dim, need, same_dim
from gristmill.ops.window import taps, window
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array


def vector(node: Node, tensor: Tensor, kinds: str = "iu") -> Array:
    """Return the value of an input that must be a vector of integers, or of other kinds of numbers."""
    need(len(tensor.shape) == 1 and tensor.dtype.kind in kinds, node, f"a vector of numbers is needed, got {tensor.shape}")
    return tensor.dense()


# ---- Resize ----

POLICIES: dict[str, Callable[..., float]] = {"not_larger": min, "not_smaller": max}
NEAREST: dict[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda at: np.ceil(at - 0.5),
    "round_prefer_ceil": lambda at: np.floor(at + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def linear_weight(distance: Array, a: float) -> Array:
    return np.maximum(1 - np.abs(distance), 0)


def cubic_weight(distance: Array, a: float) -> Array:
    """Keys 1981, Cubic convolution interpolation, with its parameter a."""
    d = np.abs(distance)
    near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0))


KERNELS: dict[str, tuple[Callable[[Array, float], Array], int]] = {"linear": (linear_weight, 1), "cubic": (cubic_weight, 2)}


class Resize(Op):
    """ONNX Resize (opset 19): nearest, linear or cubic resampling, separable over axes.

    Inputs: x, the region of interest (for "tf_crop_and_resize"), and either scales or sizes.
    """

    name = "Resize"
    arity = (1, 4)
    attributes = {
        "antialias": int, "axes": tuple, "coordinate_transformation_mode": str, "cubic_coeff_a": float, "exclude_outside": int,
        "extrapolation_value": float, "keep_aspect_ratio_policy": str, "mode": str, "nearest_mode": str,
    }  # fmt: skip

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = types[0]
        assert x is not None
        for key, known in (("mode", ("nearest", *KERNELS)), ("nearest_mode", NEAREST)):
            need(node.attributes.get(key) in (None, *known), node, f"unknown {key} {node.attributes.get(key)!r}")
        scales, sizes = (*constants, None, None, None)[2:4]
        if (node.input(2) and scales is None) or (node.input(3) and sizes is None):
            raise Undetermined
        given = [None if scales is None else vector(node, scales, "f"), None if sizes is None else vector(node, sizes)]
        axes = axes_of(node, len(x.shape))
        shape: list[Dim] = list(x.shape)
        if any(isinstance(shape[axis], str) for axis in axes):
            need(all(v is None or v.size in (0, len(axes)) for v in given), node, f"{len(axes)} scales or sizes are needed")
            for i, axis in enumerate(axes):
                said = given[1] is not None and given[1].size and node.attributes.get("keep_aspect_ratio_policy") is None
                if said:
                    shape[axis] = int(given[1][i])  # type: ignore[index]
                elif given[0] is None or not given[0].size or given[0][i] != 1:
                    shape[axis] = fresh_dim(node, axis)
        else:
            for axis, (_, out) in zip(axes, extents(node, [int(shape[a]) for a in axes], *given), strict=True):
                shape[axis] = out
        return [TensorType(x.dtype, tuple(shape))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, region, scales, sizes = (*inputs, None, None, None)[:4]
        axes = axes_of(node, x.ndim)
        plan = extents(node, [x.shape[axis] for axis in axes], scales, sizes)
        crops = node.attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize"
        y = x if x.dtype.kind == "f" and x.dtype.itemsize >= 4 else x.astype(np.float64)
        outside = np.zeros((), bool)
        for i, (axis, (scale, out)) in enumerate(zip(axes, plan, strict=True)):
            edges = (float(region[i]), float(region[i + len(axes)])) if crops else (0.0, 1.0)
            at = positions(node, x.shape[axis], scale, out, edges)
            if crops:
                beyond = (at < 0) | (at > x.shape[axis] - 1)
                outside = outside | beyond.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
            if out != x.shape[axis] or scale != 1 or crops:
                y = resample(node, y, axis, at, scale)
        if outside.any():
            y = np.where(outside, node.attributes.get("extrapolation_value", 0.0), y)
        if x.dtype.kind in "iu":
            y = np.clip(np.rint(y), np.iinfo(x.dtype).min, np.iinfo(x.dtype).max)
        return [np.asarray(y).astype(x.dtype)]


def axes_of(node: Node, rank: int) -> list[int]:
    axes = [axis % rank for axis in node.attributes.get("axes", range(rank)) if -rank <= axis < rank]
    need(len(set(axes)) == len(node.attributes.get("axes", range(rank))), node, f"axes {node.attributes.get('axes')} of {rank}")
    return axes


def extents(node: Node, shape: Sequence[int], scales: Array | None, sizes: Array | None) -> list[tuple[float, int]]:
    """Return (scale, output extent) for each resized axis."""
    if sizes is not None and sizes.size:
        need(sizes.shape == (len(shape),), node, f"{sizes.size} sizes for {len(shape)} axes")
        ratios = [float(size) / max(extent, 1) for size, extent in zip(sizes, shape, strict=True)]
        policy = POLICIES.get(node.attributes.get("keep_aspect_ratio_policy", "stretch"))
        if policy is None:
            return [(ratio, int(size)) for ratio, size in zip(ratios, sizes, strict=True)]
        ratio = policy(ratios)
        return [(ratio, floor(ratio * extent + 0.5)) for extent in shape]
    need(scales is not None and scales.shape == (len(shape),), node, f"scales or sizes for {len(shape)} axes are needed")
    assert scales is not None
    need(bool((scales > 0).all()), node, f"scales must be positive, got {scales}")
    return [(float(scale), floor(extent * float(scale))) for scale, extent in zip(scales, shape, strict=True)]


def positions(node: Node, extent: int, scale: float, out: int, region: tuple[float, float]) -> Array:
    """Return where on an input axis each output element lies."""
    mode = node.attributes.get("coordinate_transformation_mode", "half_pixel")
    at, length = np.arange(out, dtype=np.float64), scale * extent
    if mode == "align_corners":
        return at * ((extent - 1) / (length - 1)) if length != 1 else at * 0
    if mode == "asymmetric":
        return at / scale
    if mode == "tf_crop_and_resize":
        first, last = region[0] * (extent - 1), region[1] * (extent - 1)
        return first + at * ((last - first) / (length - 1)) if length != 1 else at * 0 + (first + last) / 2
    if mode == "pytorch_half_pixel" and length == 1:
        return at * 0 - 0.5
    if mode == "half_pixel_symmetric":
        return extent / 2 * (1 - out / length) + (at + 0.5) / scale - 0.5
    need(mode in ("half_pixel", "pytorch_half_pixel"), node, f"unknown coordinate_transformation_mode {mode!r}")
    return (at + 0.5) / scale - 0.5


def resample(node: Node, x: Array, axis: int, at: Array, scale: float) -> Array:
    """Return x sampled at positions along one axis; the edge continues outside."""
    mode, extent = node.attributes.get("mode", "nearest"), x.shape[axis]
    if mode == "nearest":
        index = NEAREST[node.attributes.get("nearest_mode", "round_prefer_floor")](at)
        return x.take(np.clip(index, 0, extent - 1).astype(np.int64), axis)
    weight, radius = KERNELS[mode]
    shrink = min(scale, 1.0) if node.attributes.get("antialias", 0) else 1.0
    half = ceil(radius / shrink)
    index = np.floor(at).astype(np.int64)[:, None] + np.arange(1 - half, 1 + half)
    weights = weight((index - at[:, None]) * shrink, node.attributes.get("cubic_coeff_a", -0.75))
    if node.attributes.get("exclude_outside", 0):
        weights = weights * ((index >= 0) & (index < extent))
    if node.attributes.get("exclude_outside", 0) or shrink < 1:
        weights = weights / weights.sum(1, keepdims=True)
    index = np.clip(index, 0, extent - 1)
    weights = weights.astype(x.dtype).reshape(*weights.shape, *(1,) * (x.ndim - 1 - axis))
    y = x.take(index[:, 0], axis) * weights[:, 0]
    for tap in range(1, index.shape[1]):
        y += x.take(index[:, tap], axis) * weights[:, tap]
    return y


# ---- sampling at given places ----


class GridSample(Op):
    """ONNX GridSample (opset 22): x [N, C, D1, ...] sampled at a grid [N, out..., axes] of places in [-1, 1], innermost first."""

    name = "GridSample"
    arity = (2, 2)
    attributes = {"align_corners": int, "mode": str, "padding_mode": str}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, grid = types
        assert x is not None
        assert grid is not None
        fits = len(x.shape) == len(grid.shape) >= 3 and same_dim(grid.shape[-1], len(x.shape) - 2)
        need(fits and same_dim(x.shape[0], grid.shape[0]), node, f"x is {x} but the grid is {grid}")
        mode, padding = node.attributes.get("mode", "linear"), node.attributes.get("padding_mode", "zeros")
        need(mode in ("nearest", *KERNELS), node, f"unknown mode {mode!r}")
        need(padding in ("zeros", "border", "reflection"), node, f"unknown padding_mode {padding!r}")
        return [TensorType(x.dtype, (*x.shape[:2], *grid.shape[1:-1]))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, grid = inputs
        mode, corners = node.attributes.get("mode", "linear"), bool(node.attributes.get("align_corners", 0))
        spatial = x.shape[2:]
        choices = []  # for each axis: (index [N, out], weight or None where it is outside) of every neighbour
        for axis, extent in enumerate(spatial):
            place = grid[..., len(spatial) - 1 - axis].reshape(len(x), -1).astype(np.float64)
            at = (place + 1) / 2 * (extent - 1) if corners else ((place + 1) * extent - 1) / 2
            at = inside(node, np.rint(at) if mode == "nearest" else at, extent, corners)
            choices.append(neighbours(node, at, extent, corners))
        flat = x.reshape(*x.shape[:2], -1)
        y = np.zeros((*x.shape[:2], prod(grid.shape[1:-1])), np.float64)
        for chosen in product(*choices):
            index, weight = np.zeros(y[:, 0].shape, np.int64), np.ones(y[:, 0].shape)
            for (i, w), extent in zip(chosen, spatial, strict=True):
                index, weight = index * extent + i, weight * w
            y += np.take_along_axis(flat, index[:, None], 2) * weight[:, None]
        return [y.reshape(*x.shape[:2], *grid.shape[1:-1]).astype(x.dtype)]


def reflected(at: Array, extent: int, corners: bool) -> Array:
    """Mirror positions at the borders until they lie inside."""
    low, high = (0.0, extent - 1.0) if corners else (-0.5, extent - 0.5)
    if high == low:
        return np.zeros_like(at)
    turn = np.mod(at - low, 2 * (high - low))
    mirrored = low + np.where(turn > high - low, 2 * (high - low) - turn, turn)
    return np.where((at < low) | (at > high), mirrored, at)


def inside(node: Node, at: Array, extent: int, corners: bool) -> Array:
    """Bring positions into the image as `padding_mode` says; zeros leaves them."""
    padding = node.attributes.get("padding_mode", "zeros")
    if padding == "reflection":
        return reflected(at, extent, corners)
    low, high = (0.0, extent - 1.0) if corners else (-0.5, extent - 0.5)
    return np.where((at < low) | (at > high), np.clip(at, 0, extent - 1), at) if padding == "border" else at


def neighbours(node: Node, at: Array, extent: int, corners: bool) -> list[tuple[Array, Array]]:
    """Return (index, weight) of all elements that a sample along one axis reads."""
    mode, padding = node.attributes.get("mode", "linear"), node.attributes.get("padding_mode", "zeros")
    at = np.clip(at, -(2.0**31), 2.0**31)
    if mode == "nearest":
        pairs = [(np.rint(at), np.ones_like(at))]
    else:
        weight, radius = KERNELS[mode]
        pairs = [(np.floor(at) + i, weight(np.floor(at) + i - at, -0.75)) for i in range(1 - radius, 1 + radius)]
    found = []
    for place, share in pairs:
        if padding == "reflection":
            place = np.trunc(reflected(place, extent, corners))
        if padding == "zeros":
            share = share * ((place >= 0) & (place < extent))
        found.append((np.clip(place, 0, extent - 1).astype(np.int64), share))
    return found


class AffineGrid(Op):
    """ONNX AffineGrid (opset 20): an affine map theta [N, r, r + 1] of the places of an image of `size` [N, C, ...]."""

    name = "AffineGrid"
    arity = (2, 2)
    attributes = {"align_corners": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        theta, size = types[0], constants[1]
        assert theta is not None
        if size is None:
            raise Undetermined
        n, _, *spatial = (*(int(d) for d in vector(node, size)), 0, 0)[: max(2, size.shape[0])]
        fits = len(theta.shape) == 3 and all(map(same_dim, theta.shape, (n, len(spatial), len(spatial) + 1)))
        need(fits, node, f"theta is {theta} but the size is {size.dense()}")
        return [TensorType(theta.dtype, (n, *spatial, len(spatial)))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        theta, size = inputs
        spatial = [int(d) for d in size[2:]]
        lines = [places(extent, bool(node.attributes.get("align_corners", 0))) for extent in spatial]
        grid = np.meshgrid(*lines, indexing="ij")[::-1]
        homogeneous = np.stack([*grid, np.ones(spatial)], axis=-1)
        moved = homogeneous.reshape(-1, len(spatial) + 1) @ theta.astype(np.float64).transpose(0, 2, 1)
        return [moved.reshape(len(theta), *spatial, len(spatial)).astype(theta.dtype)]


def places(extent: int, corners: bool) -> Array:
    """The centres of `extent` pixels in [-1, 1]; with `corners` the outer ones lie at -1 and 1."""
    return np.linspace(-1, 1, extent) if corners else (2 * np.arange(extent) + 1) / max(extent, 1) - 1


# ---- rearranging ----


def block_size(node: Node, x: TensorType | None) -> tuple[TensorType, int]:
    assert x is not None
    block, mode = node.attributes.get("blocksize", 0), node.attributes.get("mode", "DCR")
    need(len(x.shape) == 4 and block >= 1, node, f"blocks of {block} of {x}, [N, C, H, W] is needed")
    need(mode in ("DCR", "CRD"), node, f"unknown mode {mode!r}")
    return x, block


class DepthToSpace(Op):
    """ONNX DepthToSpace (opset 28): channels become blocks of pixels."""

    name = "DepthToSpace"
    arity = (1, 1)
    attributes = {"blocksize": int, "mode": str}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, block = block_size(node, types[0])
        n, c, *spatial = x.shape
        need(isinstance(c, str) or c % block**2 == 0, node, f"{c} channels do not make blocks of {block} x {block}")
        channels = fresh_dim(node, 1) if isinstance(c, str) else c // block**2
        return [TensorType(x.dtype, (n, channels, *(times(node, i + 2, d, block) for i, d in enumerate(spatial))))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, block = inputs[0], node.attributes["blocksize"]
        n, c, h, w = x.shape
        depth = c // block**2
        if node.attributes.get("mode", "DCR") == "DCR":
            y = x.reshape(n, block, block, depth, h, w).transpose(0, 3, 4, 1, 5, 2)
        else:
            y = x.reshape(n, depth, block, block, h, w).transpose(0, 1, 4, 2, 5, 3)
        return [y.reshape(n, depth, h * block, w * block)]


def times(node: Node, axis: int, dim: Dim, factor: int) -> Dim:
    return fresh_dim(node, axis) if isinstance(dim, str) else dim * factor


class SpaceToDepth(Op):
    """ONNX SpaceToDepth (opset 28): blocks of pixels become channels."""

    name = "SpaceToDepth"
    arity = (1, 1)
    attributes = {"blocksize": int, "mode": str}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, block = block_size(node, types[0])
        n, c, *spatial = x.shape
        need(all(isinstance(d, str) or d % block == 0 for d in spatial), node, f"{x} is not made of blocks of {block}")
        cut = (fresh_dim(node, i + 2) if isinstance(d, str) else d // block for i, d in enumerate(spatial))
        return [TensorType(x.dtype, (n, times(node, 1, c, block**2), *cut))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, block = inputs[0], node.attributes["blocksize"]
        n, c, h, w = x.shape
        y = x.reshape(n, c, h // block, block, w // block, block)
        order = (0, 3, 5, 1, 2, 4) if node.attributes.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
        return [y.transpose(order).reshape(n, c * block**2, h // block, w // block)]


class CenterCropPad(Op):
    """ONNX CenterCropPad (opset 18): the middle of x, cut or padded with zeros to a shape along some axes."""

    name = "CenterCropPad"
    arity = (2, 2)
    attributes = {"axes": tuple}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, shape = types[0], constants[1]
        assert x is not None
        if shape is None:
            raise Undetermined
        axes = axes_of(node, len(x.shape))
        need(shape.shape == (len(axes),), node, f"a shape of {len(axes)} extents is needed, got {shape.shape}")
        made = list(x.shape)
        for axis, extent in zip(axes, vector(node, shape), strict=True):
            need(extent >= 0, node, f"a shape of {shape.dense()}")
            made[axis] = int(extent)
        return [TensorType(x.dtype, tuple(made))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, wanted = inputs
        shape, source, target = list(x.shape), [slice(None)] * x.ndim, [slice(None)] * x.ndim
        for axis, extent in zip(axes_of(node, x.ndim), wanted, strict=True):
            have, shape[axis] = shape[axis], int(extent)
            if extent < have:
                source[axis] = slice((have - int(extent)) // 2, (have - int(extent)) // 2 + int(extent))
            else:
                target[axis] = slice((int(extent) - have) // 2, (int(extent) - have) // 2 + have)
        y = np.zeros(shape, x.dtype)
        y[tuple(target)] = x[tuple(source)]
        return [y]


class Col2Im(Op):
    """ONNX Col2Im (opset 18): columns [N, C * block, L] added up where their windows lie in an image."""

    name = "Col2Im"
    arity = (3, 3)
    attributes = {"dilations": tuple, "pads": tuple, "strides": tuple}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, (image, block) = types[0], constants[1:]
        assert x is not None
        if image is None or block is None:
            raise Undetermined
        kernel, spatial = [int(d) for d in vector(node, block)], tuple(int(d) for d in vector(node, image))
        size, axes = prod(kernel), window(node, spatial, kernel)
        fits = len(x.shape) == 3 and size > 0 and (isinstance(x.shape[1], str) or x.shape[1] % size == 0)
        need(fits and same_dim(x.shape[2], prod(axis.out for axis in axes)), node, f"{x} are not the columns of {spatial}")
        channels = fresh_dim(node, 1) if isinstance(x.shape[1], str) else x.shape[1] // size
        return [TensorType(x.dtype, (x.shape[0], channels, *spatial))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, image, block = inputs
        axes = window(node, [int(d) for d in image], [int(d) for d in block])
        size = prod(int(d) for d in block)
        columns = x.reshape(len(x), x.shape[1] // size, size, *(axis.out for axis in axes))
        y = np.zeros((*columns.shape[:2], *(axis.before + axis.extent + axis.after for axis in axes)), x.dtype)
        for number, (_, cuts) in enumerate(taps(axes)):
            y[cuts] += columns[:, :, number]
        kept: list[Any] = [..., *(slice(axis.before, axis.before + axis.extent) for axis in axes)]
        return [y[tuple(kept)]]


OPERATORS = (Resize, GridSample, AffineGrid, DepthToSpace, SpaceToDepth, CenterCropPad, Col2Im)
