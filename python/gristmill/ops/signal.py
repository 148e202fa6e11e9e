"""Fourier transforms, the windows and the filter bank that go with them; and the determinant."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from gristmill.ops.axes import at, axis_of, first, integer, value, with_dim
from gristmill.ops.dtypes import dtype_of, narrow, wide
from gristmill.ops.op import Dim, Node, Op, TensorType, Undetermined, fresh_dim, need
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array


def _complex(x: Array) -> Array:
    """Numbers whose last dimension is the real part alone or both parts."""
    x = wide(x)
    return x[..., 0] + np.complex64(1j) * x[..., 1] if x.shape[-1] == 2 else x[..., 0]


def _parts(x: Array, dtype: np.dtype[Any], count: int = 2) -> Array:
    return narrow(np.stack([x.real, x.imag][:count], axis=-1), dtype)


class DFT(Op):
    """The discrete Fourier transform along an axis, of a signal cut or padded to `dft_length`, the second input.

    The last dimension of x holds the real part, or real and imaginary. The one-sided form keeps the non-negative frequencies; its
    inverse gives a real signal.
    """

    name = "DFT"
    arity = (1, 3)
    attributes = {"inverse": int, "onesided": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = first(types)
        rank = len(x.shape)
        need(rank >= 2 and x.shape[-1] in (1, 2), node, f"takes a signal whose last dimension is 1 or 2, got {x}")
        onesided, inverse = node.attributes.get("onesided", 0), node.attributes.get("inverse", 0)
        parts = 1 if onesided and inverse else 2
        axis = self._axis(node, rank, value(2, types, constants))
        length: Dim
        try:
            given = integer(value(1, types, constants))
            length = self._extent(x.shape[axis], onesided and inverse) if given is None else given
        except Undetermined:
            length = fresh_dim(node, axis)
        if isinstance(length, str):
            length = fresh_dim(node, axis) if onesided else length
        elif onesided and not inverse:
            length = length // 2 + 1
        return [TensorType(x.dtype, (*with_dim(x.shape, axis, length)[:-1], parts))]

    def _axis(self, node: Node, rank: int, axis: Any) -> int:
        found = axis_of(node, -2 if axis is None else integer(axis) or 0, rank)
        need(found != rank - 1, node, "the last dimension holds the parts of numbers")
        return found

    def _extent(self, dim: Dim, halved: int) -> Dim:
        return dim if isinstance(dim, str) or not halved else 2 * (dim - 1)

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, dtype = _complex(inputs[0]), inputs[0].dtype
        axis = self._axis(node, inputs[0].ndim, at(inputs, 2))
        length = integer(at(inputs, 1))
        onesided, inverse = node.attributes.get("onesided", 0), node.attributes.get("inverse", 0)
        if inverse and onesided:
            return [narrow(np.fft.irfft(x, length, axis)[..., None], dtype)]
        if inverse:
            return [_parts(np.fft.ifft(x, length, axis), dtype)]
        y = np.fft.fft(x, length, axis)
        if onesided:
            y = np.take(y, np.arange(y.shape[axis] // 2 + 1), axis)
        return [_parts(y, dtype)]


class STFT(Op):
    """The Fourier transform of windowed frames of a signal [batch, length, parts], every `frame_step` samples."""

    name = "STFT"
    arity = (2, 4)
    attributes = {"onesided": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, window = first(types), at(types, 2)
        need(len(x.shape) == 3 and x.shape[2] in (1, 2), node, f"takes a signal [batch, length, 1 or 2], got {x}")
        frames: Dim = fresh_dim(node, 1)
        bins: Dim = fresh_dim(node, 2)
        try:
            step, length = integer(value(1, types, constants)), integer(value(3, types, constants))
            size = length if length is not None else window.shape[0] if window is not None else x.shape[1]
            if isinstance(size, int):
                bins = size // 2 + 1 if node.attributes.get("onesided", 1) else size
                if isinstance(x.shape[1], int) and step:
                    need(0 < size <= x.shape[1] and step > 0, node, f"{x} has no frames of {size} every {step}")
                    frames = 1 + (x.shape[1] - size) // step
        except Undetermined:
            pass
        return [TensorType(x.dtype, (x.shape[0], frames, bins, 2))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, step, window = _complex(inputs[0]), integer(inputs[1]), at(inputs, 2)
        length = integer(at(inputs, 3))
        size = length if length is not None else x.shape[1] if window is None else window.shape[0]
        frames = np.lib.stride_tricks.sliding_window_view(x, size, axis=1)[:, ::step]
        y = np.fft.fft(frames if window is None else frames * wide(window), axis=-1)
        return [_parts(y[..., : size // 2 + 1] if node.attributes.get("onesided", 1) else y, inputs[0].dtype)]


class Window(Op):
    """One row of a table: cosines of rising frequency over `size` samples, periodic by default."""

    arity = (1, 1)
    attributes = {"output_datatype": str, "periodic": int}
    terms: ClassVar[tuple[float, ...]]

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        length: Dim
        try:
            length = integer(value(0, types, constants)) or 0
        except Undetermined:
            length = fresh_dim(node, 0)
        return [TensorType(dtype_of(node.attributes.get("output_datatype", "float32")), (length,))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        size = integer(inputs[0]) or 0
        period = size if node.attributes.get("periodic", 1) else max(size - 1, 1)
        angle = 2 * np.pi * np.arange(size) / max(period, 1)
        window = sum((-1) ** order * term * np.cos(order * angle) for order, term in enumerate(self.terms))
        return [narrow(window, dtype_of(node.attributes.get("output_datatype", "float32")))]


WINDOWS = {"HannWindow": (0.5, 0.5), "HammingWindow": (25 / 46, 21 / 46), "BlackmanWindow": (0.42, 0.5, 0.08)}


class MelWeightMatrix(Op):
    """A matrix [dft_length // 2 + 1, num_mel_bins] of triangular filters, evenly spaced in mel = 2595 log10(1 + hertz / 700)."""

    name = "MelWeightMatrix"
    arity = (5, 5)
    attributes = {"output_datatype": str}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        shape: tuple[Dim, ...]
        try:
            bins, length = (integer(value(index, types, constants)) or 0 for index in (0, 1))
            need(bins > 0 and length >= 0, node, f"{bins} bins of a transform of {length}")
            shape = (length // 2 + 1, bins)
        except Undetermined:
            shape = (fresh_dim(node, 0), fresh_dim(node, 1))
        return [TensorType(dtype_of(node.attributes.get("output_datatype", "float32")), shape)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        bins, length, rate = (integer(item) or 0 for item in inputs[:3])
        low, high = (2595 * np.log10(1 + float(item.reshape(-1)[0]) / 700) for item in inputs[3:])
        mel = low + np.arange(bins + 2) * (high - low) / (bins + 2)
        edges = ((length + 1) * (700 * (10 ** (mel / 2595) - 1)) // rate).astype(np.int64)
        y = np.zeros((length // 2 + 1, bins))
        for column in range(bins):
            left, centre, right = edges[column : column + 3]
            if left == centre:
                y[centre, column] = 1
            rise, fall = np.arange(left, centre + 1), np.arange(centre, right)
            if left != centre:
                y[rise, column] = (rise - left) / (centre - left)
            y[fall, column] = (right - fall) / max(right - centre, 1)
        return [narrow(y, dtype_of(node.attributes.get("output_datatype", "float32")))]


class Det(Op):
    """The determinants of square matrices."""

    name = "Det"
    arity = (1, 1)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = first(types)
        fits = len(x.shape) >= 2 and (x.shape[-1] == x.shape[-2] or any(isinstance(dim, str) for dim in x.shape[-2:]))
        need(fits, node, f"takes square matrices, got {x}")
        return [TensorType(x.dtype, x.shape[:-2])]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [narrow(np.linalg.det(wide(inputs[0])), inputs[0].dtype)]


def _window(name: str, terms: tuple[float, ...]) -> type[Window]:
    return type(name, (Window,), {"name": name, "terms": terms})


OPERATORS = (DFT, STFT, *(_window(name, terms) for name, terms in WINDOWS.items()), MelWeightMatrix, Det)
