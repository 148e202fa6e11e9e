"""The compiled border: kernels, programs, and which instruction set serves what.

Shapes are checked, layouts are not converted. "rows" is a float32 [M, N] array; "lanes" is the same matrix stored [N, M], so
that the M rows lie side by side in vector lanes. Functions whose first argument is a `Program` append a step; the others run
at once.
`activation` is one of None, "relu", "gelu", "gelu_tanh", "tanh", "sigmoid", "silu". Results never depend on `threads`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

ACTIVATIONS: dict[str | None, int]

class Program:
    def __len__(self) -> int: ...
    def overlap(self) -> None:
        """Let the next step start before all threads are done with the last one."""
    def run(self, threads: int = 1) -> None: ...

def run_map(
    programs: list[Program], inputs: list[tuple[Array, list[Array]]], outputs: list[tuple[Array, list[Array]]], items: int
) -> None:
    """Run programs[rank] for each of `items` slices along the leading axis of (array, [one rank's array for a slice])."""

class Weight:
    shape: tuple[int, int]
    def __init__(
        self,
        values: Array,
        shape: tuple[int, int],
        scale: Array | None = None,
        row_offsets: Array | None = None,
        index: Array | None = None,
        bitmask: Array | None = None,
        group_scales: Array | None = None,
        group: int = 0,
    ) -> None:
        """`values` are float32, int8 with a `scale`, or, dense, uint16 for bf16.

        Blocks have int32 `row_offsets` [n / r + 1] and `index`. Under a `bitmask`, uint8 [n, ceil(k / 8)], `row_offsets` are
        int64 [n + 1] and count its bits; values may be int4 then, pairs in uint8, with `group_scales`, float16 or float32 [n,
        ceil(k / group)], and perhaps a factor `scale` for each row.
        """

class Int4Weight:
    """An [n, k] matrix of 4-bit codes: int32 words[n, ceil(k / 8)], float16 or float32 scale[n, ceil(k / group)]."""

    shape: tuple[int, int]
    def __init__(self, words: Array, shape: tuple[int, int], scale: Array, group: int) -> None: ...

def set_isa(cap: str | None = None) -> None: ...
def isa_generation() -> int: ...
def slots() -> dict[str, tuple[str, str, str]]: ...
def has_threads() -> bool: ...
def packed_nbytes(pack: Callable[..., Any], weight: Weight | Int4Weight) -> int:
    """Bytes that pack_dense, pack_bf16, pack_int4, pack_int8, pack_sparse or a ConvolutionPacker will make of a weight."""

# ---- aggregate: flat float32 vectors ----

def weighted_sum(inputs: Sequence[Array], weights: Sequence[float], out: Array, threads: int = 1) -> tuple[float, bool]:
    """out = sum of weights[i] * inputs[i] in the fixed binary tree; returns (sum of squares of out in float64, all finite).

    Every product is rounded, then n inputs are added by splitting at the largest power of two below n. So if all aligned groups
    of 2**k inputs (the last may be shorter) were added beforehand, their sums with weights of 1 give the same bits. `out` may be
    one of the inputs; a partial overlap is refused. The sum of squares has the same bits on every instruction set too.
    """

def sum_of_squares(x: Array, threads: int = 1) -> tuple[float, bool]:
    """(sum of squares in float64, all finite), with the bits that weighted_sum returns for the same array."""

def sgd_step(params: Array, grads: Array, learning_rate: float, weight_decay: float, clip: float, threads: int = 1) -> None:
    """g = clip * grads + weight_decay * params; params -= learning_rate * g. `clip` is the factor that the global norm gave.

    The vectors of this and the other steps must not overlap.
    """

def momentum_step(
    params: Array,
    grads: Array,
    velocity: Array,
    learning_rate: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    clip: float,
    threads: int = 1,
) -> None:
    """velocity = momentum * velocity + (1 - dampening) * g; params -= learning_rate * velocity, or with `nesterov` times
    (g + momentum * velocity).

    torch starts the velocity as the undamped gradient: for the same, pass zeros and dampening = 0 at the first step.
    """

def adam_step(
    params: Array,
    grads: Array,
    first: Array,
    second: Array,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    decoupled: bool,
    step: int,
    clip: float,
    threads: int = 1,
) -> None:
    """Adam (decoupled=False: decay added to the gradient) or AdamW (decoupled=True); `step` counts from 1, as torch does."""

# ---- attention: softmax(scale q k^T) v for each of `heads` heads that lie side by side in the columns, float32 ----

def attention_scratch(keys: int, width: int, threads: int, grad: bool = False) -> int:
    """Bytes of scratch for at most `keys` keys in a sequence, of heads of `width`; with less, attention runs on fewer threads."""

def masked_attention(
    program: Program,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    heads: int,
    scale: float,
    out: Array,
    scratch: Array,
    precision: str = "float32",
) -> None:
    """q, out [B,L,C], k, v [B,S,C], mask [B,S] int64 or bool: keys whose mask is 0 do not count, unless that leaves none.

    precision "bf16" rounds q, k, v and the probabilities to bf16 and adds in float32; slow where the slot
    attention_product_bf16 is scalar.
    """

def masked_attention_grad(
    program: Program,
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    heads: int,
    scale: float,
    dq: Array,
    dk: Array,
    dv: Array,
    scratch: Array,
) -> None: ...
def packed_attention(
    program: Program,
    q: Array,
    k: Array,
    v: Array,
    offsets: Array,
    heads: int,
    scale: float,
    out: Array,
    scratch: Array,
    precision: str = "float32",
) -> None:
    """q, k, v, out [M,C]: rows offsets[s] to offsets[s + 1] (int64) attend to each other, other rows of out are 0.

    Offsets are read at every run; each is taken as no less than the one before and as within [0, M].
    """

def packed_attention_grad(
    program: Program,
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    offsets: Array,
    heads: int,
    scale: float,
    dq: Array,
    dk: Array,
    dv: Array,
    scratch: Array,
) -> None: ...

# ---- bitmask: weights of which single elements are stored; rows ----

def unpack_bitmask(weight: Weight, out: Array, threads: int = 1) -> None:
    """out[n, k] = the dense float32 matrix, scales applied, but for the gain of int4 rows."""

class PackedBitmask:
    shape: tuple[int, int]
    nbytes: int

def pack_bitmask(weight: Weight, threads: int = 1) -> PackedBitmask:
    """Codes in the order of the kernels, the same on every instruction set; int4's scales of groups are copied."""

def pack_elements(weight: Weight, threads: int = 1) -> PackedBlocks:
    """float32 values as blocks of 1x1, for sparse_linear; refers to them."""

def bitmask_linear(
    program: Program, x: Array, weight: Weight, out: Array, bias: Array | None, activation: str | None, residual: Array | None
) -> None:
    """out[M,N] = activation(x[M,K] @ weight[N,K].T + bias[N]) + residual[M,N], float32 values in place; out may be residual."""

def bitmask_linear_int(
    program: Program,
    codes: Array,
    scales: Array,
    zeros: Array,
    m: int,
    weight: PackedBitmask,
    weight_scale: Array | None,
    out: Array,
    bias: Array | None,
    activation: str | None,
    residual: Array | None,
) -> None:
    """The same from a "tile" panel of m rows; weight_scale [N] is int8's scales, or gains on int4's rows (None for 1)."""

# ---- dense: matrix products in float32 and bf16 ----

class PackedDense:
    """A constant [n, k] weight in the tile layout of this ISA, in float32 or, by pack_bf16, in bf16."""

    shape: tuple[int, int]
    nbytes: int
    bf16: bool

def pack_dense(weight: Weight, threads: int = 1) -> PackedDense: ...
def pack_bf16(weight: Weight, threads: int = 1) -> PackedDense:
    """A weight of any form, rounded half to even to bf16, for linear_bf16."""

def has_bf16() -> bool:
    """Whether bf16 products run on an instruction for them; elsewhere they are right but slower than float32."""

def linear_scratch(m: int, n: int, k: int, threads: int) -> int:
    """Bytes of scratch that any of the three dense products of these sizes needs; with less, they run on fewer threads."""

def panels_nbytes(depth: int, cols: int, bf16: bool) -> int:
    """Bytes of `panels`, where a product packs its second operand [depth, cols], which must be dense float32, at every run.

    Reused by many rows: the weight in `linear` ([K,N]) and `linear_grad_input` ([N,K]), x in `linear_grad_weight` ([M,K]).
    The result has the same bits without.
    """

def linear(
    program: Program,
    x: Array,
    weight: PackedDense | Weight,
    out: Array,
    bias: Array | None,
    activation: str | None,
    residual: Array | None,
    scratch: Array,
    panels: Array | None = None,
) -> None:
    """out[M,N] = activation(x[M,K] @ weight[N,K].T + bias[N]) + residual[M,N]; a Weight is read in place at every run."""

def linear_bf16(
    program: Program,
    x: Array,
    weight: PackedDense | Weight,
    out: Array,
    bias: Array | None,
    activation: str | None,
    residual: Array | None,
    scratch: Array,
    panels: Array | None = None,
) -> None:
    """`linear` with x and the weight rounded to bf16 and float32 sums; the weight is of pack_bf16, or dense float32 in place."""

def linear_grad_input_bf16(
    program: Program, dy: Array, weight: Weight, dx: Array, scratch: Array, panels: Array | None = None
) -> None:
    """`linear_grad_input` with both operands rounded to bf16; the weight is dense float32."""

def linear_grad_weight_bf16(
    program: Program, dy: Array, x: Array, weight: Weight, grad: Array, scratch: Array, panels: Array | None = None
) -> None:
    """`linear_grad_weight` with both operands rounded to bf16; the weight is dense float32."""

def linear_grad_input(
    program: Program, dy: Array, weight: Weight, dx: Array, scratch: Array, panels: Array | None = None
) -> None:
    """dx[M,K] = dy[M,N] @ weight[N,K]; blocks and int8 are expanded tile by tile."""

def linear_grad_weight(
    program: Program, dy: Array, x: Array, weight: Weight, grad: Array, scratch: Array, panels: Array | None = None
) -> None:
    """dW = dy[M,N].T @ x[M,K], stored as `weight` stores its trainable part.

    Dense float32: grad[N,K]. Blocks float32: grad[blocks,r,c], the packed positions only. int8 of either: grad[N], the gradient
    of the scales, sum over k of dW[n,k] * codes[n,k].
    """

# ---- nn: elementwise (any shape), normalisation, losses (float32 rows) ----
# `out` or `dx` may be an input itself, except in column_sum, transpose, distillation_grad, and layer_norm_grad with dgamma or
# dbeta.

def activate(program: Program, kind: str, x: Array, out: Array) -> None: ...
def activate_grad(program: Program, kind: str, dy: Array, x: Array, dx: Array) -> None:
    """dx = dy * activation'(x), from the activation's input x."""

def add(program: Program, a: Array, b: Array, out: Array) -> None: ...
def multiply(program: Program, a: Array, b: Array, out: Array) -> None: ...
def scale(program: Program, x: Array, factor: float, out: Array) -> None: ...
def column_sum(program: Program, x: Array, out: Array) -> None:
    """out[N] = sum over M of x[M,N], in a fixed order."""

def layer_norm(program: Program, x: Array, gamma: Array | None, beta: Array | None, epsilon: float, out: Array) -> None: ...
def layer_norm_grad(
    program: Program,
    dy: Array,
    x: Array,
    gamma: Array | None,
    epsilon: float,
    dx: Array,
    dgamma: Array | None,
    dbeta: Array | None,
) -> None: ...
def softmax(program: Program, x: Array, out: Array) -> None: ...
def softmax_grad(program: Program, dy: Array, y: Array, dx: Array) -> None: ...
def cross_entropy(program: Program, logits: Array, labels: Array, loss: Array) -> None:
    """loss[()] = mean over M of -log softmax(logits)[label]; labels int64 [M]; a label outside [0, C) makes the loss NaN."""

def cross_entropy_grad(program: Program, dloss: Array, logits: Array, labels: Array, dlogits: Array) -> None: ...
def mean_squared_error(program: Program, x: Array, target: Array, loss: Array) -> None: ...
def mean_squared_error_grad(program: Program, dloss: Array, x: Array, target: Array, dx: Array) -> None: ...
def distillation(
    program: Program, logits: Array, teacher: Array, labels: Array, temperature: float, alpha: float, loss: Array
) -> None:
    """loss = alpha T^2 mean KL(softmax(teacher/T) || softmax(logits/T)) + (1 - alpha) mean cross entropy (Hinton et al. 2015).

    A term of weight 0 is not evaluated: alpha = 1 reads no labels.
    """

def distillation_grad(
    program: Program,
    dloss: Array,
    logits: Array,
    teacher: Array,
    labels: Array,
    temperature: float,
    alpha: float,
    dlogits: Array,
) -> None: ...
def transpose(program: Program, x: Array, out: Array) -> None:
    """Convert rows [M,N] to lanes [N,M], or back."""

# ---- quant: int8 ----

def quantize_weight(weight: Array, codes: Array, scale: Array, threads: int = 1) -> None:
    """Per output channel: scale[n] = max|w[n]| / 127 (1 where the row is 0), codes[n,k] = round half even(w / scale)."""

def quantize_blocks(values: Array, row_offsets: Array, codes: Array, scale: Array, threads: int = 1) -> None:
    """The same for block values [blocks,r,c] and their row_offsets."""

def codes_nbytes(m: int, k: int, layout: str) -> int:
    """Bytes of an activation panel: layout "tile" for the dense product, "lanes" for the sparse one."""

def quantize_activations(
    program: Program,
    x: Array,
    lanes: bool,
    layout: str,
    codes: Array,
    scales: Array,
    zeros: Array | None = None,
    scale: float | None = None,
    zero_point: int = 128,
    symmetric: bool = False,
) -> None:
    """Quantise float32 x per row m (rows [M,K], or lanes [K,M] if `lanes`): a uint8 panel of `layout`, scales[M], int32 zeros[M].

    A code stands for (code - zero) * scale. "tile" spreads 256 codes from min(0, min x) to max(0, max x); "lanes" is symmetric,
    has 128 for all zeros and needs no `zeros`; with `symmetric` "tile" has the same codes. With a static `scale`: codes =
    clip(round half even(x / scale) + zero_point, 0, 255), all scales and zeros are these; "tile" panels only.
    """

class PackedInt8:
    """A constant [n, k] int8 weight in the tile layout of this ISA, with its row sums."""

    shape: tuple[int, int]
    nbytes: int

def pack_int8(weight: Weight, threads: int = 1) -> PackedInt8: ...
def linear_int8(
    program: Program,
    codes: Array,
    scales: Array,
    zeros: Array,
    m: int,
    weight: PackedInt8,
    weight_scale: Array,
    out: Array,
    bias: Array | None,
    activation: str | None,
    residual: Array | None,
) -> None:
    """out[M,N] = activation(acc * (scales[m] * weight_scale[n]) + bias[n]) + residual; weight_scale is read at every run.

    acc = sum over k of (codes - zeros[m]) * weight.
    """

# ---- sparse ----

def kth_magnitude(x: Array, k: int, threads: int = 1) -> float:
    """The exact k-th smallest |x| (k from 1) of a flat float32 array, by a histogram of the bits; NaN is refused."""

def block_magnitudes(weight: Array, block: tuple[int, int], out: Array, threads: int = 1) -> None:
    """out[n/r, k/c] = sum of squares of each block of weight[n,k], float32."""

def magnitude_mask(x: Array, drop: int, mask: Array, threads: int = 1) -> None:
    """mask (uint8, same length) = 0 for exactly the `drop` smallest |x| (ties: the lowest index goes first), 1 for the rest.

    NaN is refused.
    """

def pack_blocks(weight: Array, mask: Array, block: tuple[int, int]) -> tuple[Array, Array, Array]:
    """(values [blocks,r,c], row_offsets int32, index int32) of the blocks where mask[n/r, k/c] is not 0."""

def unpack_blocks(weight: Weight, out: Array, threads: int = 1) -> None:
    """out[n,k] float32 = the dense matrix, scales applied."""

class PackedBlocks:
    """A block-sparse weight (float32 or int8) with where its rows cross K blocks and the row sums of int8.

    It refers to the weight's arrays, which are what the kernels read. Blocks of 1x1 (float32 only), 1x4, 2x4 and 4x4.
    """

    shape: tuple[int, int]
    nbytes: int

def pack_sparse(weight: Weight, threads: int = 1) -> PackedBlocks: ...
def sparse_linear(
    program: Program,
    x: Array,
    weight: PackedBlocks | Weight,
    out: Array,
    bias: Array | None,
    activation: str | None,
    residual: Array | None,
) -> None:
    """Lanes in, lanes out: out[N,M] = activation(weight[N,K] @ x[K,M] + bias) + residual[N,M], float32 blocks [r, c].

    The values of a Weight are read at every run. out may be residual; it must not overlap x. A column's bits do not depend on M.
    """

def sparse_linear_int8(
    program: Program,
    codes: Array,
    scales: Array,
    m: int,
    weight: PackedBlocks,
    weight_scale: Array,
    out: Array,
    bias: Array | None,
    activation: str | None,
    residual: Array | None,
) -> None:
    """The same from a "lanes" panel of quantised activations; blocks [r, 4]; weight_scale is read at every run.

    codes: uint8, flat, of [K / 4][M rounded up to 16][4]: q + 128, padded with 128; K < 131072.
    """

# ---- int4: 4-bit codes in groups ----

class PackedInt4:
    """A constant int4 weight in the order that the product reads it."""

    shape: tuple[int, int]
    group: int
    nbytes: int

def pack_int4(weight: Int4Weight, threads: int = 1) -> PackedInt4: ...
def quantize_groups(program: Program, x: Array, group: int, codes: Array, scales: Array, offsets: Array) -> None:
    """Quantise float32 x[M,K] to int8, symmetric, with a scale for each group of a row, for linear_int4.

    All flat: int8 codes [M * 8 ceil(K / 8)], float32 scales and int32 offsets [M * ceil(K / group)]. A group with a value that is
    not finite has scale NaN.
    """

def linear_int4(
    program: Program,
    codes: Array,
    scales: Array,
    offsets: Array,
    m: int,
    weight: PackedInt4,
    gain: Array | None,
    out: Array,
    bias: Array | None,
    activation: str | None,
    residual: Array | None,
) -> None:
    """out[M,N] = activation((x @ weight.T) * gain[N] + bias[N]) + residual, x as quantize_groups made it."""

# ---- text: rows of tables by index, one vector for each sequence; float32 ----

def gather(program: Program, data: Array | Int4Weight, indices: Array, out: Array) -> None:
    """out[O,C,N] = data[O,P,N] by C indices (int64 or int32, any shape); a row of NaN stands for one outside of [-P, P).

    An Int4Weight [P,N] is data of O = 1.
    """

def gather_grad(program: Program, dy: Array, indices: Array, grad: Array) -> None:
    """grad[O,P,N] = sums of the rows of dy[O,C,N] where their indices lead; nothing is added for one outside."""

def lookups(program: Program, out: Array, *pairs: Array | Int4Weight) -> None:
    """out[C,N] = the sum of rows of 1 to 4 tables[P,N] by C indices each: table, indices, table, indices, ..."""

def masked_pool(program: Program, mode: str, x: Array, mask: Array, out: Array) -> None:
    """out[B,N] from x[B,S,N] and mask[B,S], int64 or bool; mode "mean", "sqrt", "weighted", "max" or "first"."""

def masked_pool_grad(program: Program, mode: str, dy: Array, x: Array, mask: Array, dx: Array) -> None: ...
def packed_pool(program: Program, mode: str, x: Array, offsets: Array, out: Array) -> None:
    """out[B,N] from x[R,N] whose sequences begin and end at offsets int64 [B+1]."""

def packed_pool_grad(program: Program, mode: str, dy: Array, x: Array, offsets: Array, dx: Array) -> None: ...
def normalize(program: Program, x: Array, out: Array) -> None:
    """out = x / norm along rows; rows of zeros stay zeros; out may be x."""

def normalize_grad(program: Program, dy: Array, x: Array, dx: Array) -> None: ...
def cosine(program: Program, x: Array, target: Array, loss: Array) -> None:
    """loss[()] = the mean over M of 1 - the cosine of x[M,N] and target[M,N]."""

def cosine_grad(program: Program, dloss: Array, x: Array, target: Array, dx: Array) -> None: ...

# ---- vision: float32 images [N, C, H, W] ----
# `geometry` is (kernel, strides, dilations, pads before), each (y, x); elements outside the image are padding.

_Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]

WINDOW_LIMITS: tuple[int, int]
"""The most of an extent of a kernel, stride or dilation, and of an extent of a dilated kernel or padding."""

class PackedConvolution:
    """A constant convolution weight in the tile layout of this ISA."""

    shape: tuple[int, int]
    group: int
    taps: int
    nbytes: int

class ConvolutionPacker:
    """Packs a Weight [filters, channels / group * taps]; equal ones pack alike."""

    group: int
    taps: int
    __name__: str
    def __init__(self, group: int, taps: int) -> None: ...
    def packed_nbytes(self, weight: Weight) -> int: ...
    def __call__(self, weight: Weight, threads: int = 1) -> PackedConvolution: ...

def convolution_scratch(
    image: tuple[int, int], out: tuple[int, int], geometry: _Geometry, channels: int, group: int, threads: int
) -> int:
    """Bytes of scratch of a convolution or, with channels = 0, a pool; with less, they run on fewer threads."""

def convolution(
    program: Program,
    x: Array,
    weight: PackedConvolution | Array,
    out: Array,
    geometry: _Geometry,
    group: int,
    bias: Array | None,
    addend: Array | None,
    low: float,
    high: float,
    activation: str | None,
    scratch: Array,
) -> None:
    """out[N,M,OH,OW] = activation(clip(convolution of x[N,C,H,W] + bias[M] + addend, low, high)).

    A weight that is an array [M,1,kh,kw] is read in place and makes the convolution depthwise: group == C. NaN passes the clip.
    """

def pool(
    program: Program,
    x: Array,
    out: Array,
    geometry: _Geometry,
    average: bool,
    include_pad: bool,
    pads_behind: tuple[int, int],
    scratch: Array,
) -> None:
    """out[N,C,OH,OW] = the maximum (NaN if one is) or the average over windows of x[N,C,H,W].

    Averages divide by the elements inside the image or, with `include_pad`, inside the image and its padding.
    """

def plane_means(program: Program, x: Array, out: Array) -> None:
    """out[P] = the mean of each row of x[P,n]."""

def scale_channels(program: Program, x: Array, factor: Array, offset: Array, out: Array) -> None:
    """out[N,C,n] = factor[C] * x[N,C,n] + offset[C], one rounding; out may be x."""
