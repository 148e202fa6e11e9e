# The quant family's part of the border.

cdef extern from "quant/quant.h" nogil:
    enum:
        FC_LANES_MAX_K
        FC_TILE_MAX_K
    ctypedef enum fc_panel_layout:
        FC_PANEL_TILE
        FC_PANEL_LANES
    ctypedef struct fc_quantize_weight_args:
        const float *values
        const int32_t *row_offsets
        int64_t n, k, block_rows, block_columns
        int8_t *codes
        float *scale
    ctypedef struct fc_quantize_activations_args:
        const float *x
        int x_lanes
        int64_t m, k
        fc_panel_layout layout
        uint8_t *codes
        float *scales
        int32_t *zeros
        int symmetric
        float scale
        int zero_point
    ctypedef struct fc_packed_int8:
        int64_t n, k, nbytes
    ctypedef struct fc_pack_int8_args:
        fc_weight weight
        const fc_packed_int8 *packed
    ctypedef struct fc_linear_int8_args:
        const uint8_t *codes
        const float *scales
        const int32_t *zeros
        const fc_packed_int8 *weight
        const float *weight_scale
        const float *bias
        const float *residual
        float *out
        int64_t m
        fc_activation activation
    int64_t fc_codes_nbytes(int64_t m, int64_t k, fc_panel_layout layout)
    fc_status fc_row_offsets_validate(const int32_t *row_offsets, int64_t groups, int64_t blocks)
    int64_t fc_packed_int8_nbytes(int64_t n, int64_t k)
    fc_status fc_packed_int8_init(fc_packed_int8 *packed, int64_t n, int64_t k)
    void fc_packed_int8_free(fc_packed_int8 *packed)
    void fc_quantize_weight(const void *args, int rank, int size) noexcept
    void fc_quantize_blocks(const void *args, int rank, int size) noexcept
    void fc_quantize_activations(const void *args, int rank, int size) noexcept
    void fc_pack_int8(const void *args, int rank, int size) noexcept
    void fc_linear_int8(const void *args, int rank, int size) noexcept

PANEL_LAYOUTS = {"tile": FC_PANEL_TILE, "lanes": FC_PANEL_LANES}


cdef int check_depth(int64_t k, str layout) except -1:
    """Refuse a k at which an int32 sum of products could overflow."""
    cdef int64_t most = FC_LANES_MAX_K if layout == "lanes" else FC_TILE_MAX_K
    if not 0 <= k <= most:
        raise ValueError(f"int8 products sum at most {most} terms, got {k}")
    return 0


def quantize_weight(weight, codes, scale, int threads=1):
    """Quantise float32 weight[n, k] per row: scale[n] = max|w| / 127 (1 where the row is 0), codes = round half even(w / scale).

    A row with a value that is not finite gets scale NaN and codes 0.
    """
    cdef fc_quantize_weight_args args
    memset(&args, 0, sizeof(args))
    args.values = <const float *>pointer(weight, "weight", "f", (None, None))
    args.n, args.k = weight.shape
    args.codes = <int8_t *>pointer(codes, "codes", "b", (args.n, args.k), True)
    args.scale = <float *>pointer(scale, "scale", "f", (args.n,), True)
    run_now(fc_quantize_weight, &args, threads)


def quantize_blocks(values, row_offsets, codes, scale, int threads=1):
    """Quantise block values[blocks, r, c] per row of the matrix; row_offsets[n / r + 1] say which blocks a row group owns."""
    cdef fc_quantize_weight_args args
    cdef int64_t blocks, groups
    memset(&args, 0, sizeof(args))
    args.values = <const float *>pointer(values, "values", "f", (None, None, None))
    blocks, args.block_rows, args.block_columns = values.shape
    args.row_offsets = <const int32_t *>pointer(row_offsets, "row_offsets", "i", (None,))
    groups = len(row_offsets) - 1
    if groups < 0 or args.block_rows < 1 or args.block_columns < 1:
        raise ValueError("row_offsets needs at least one entry, and blocks at least one value")
    args.n = groups * args.block_rows
    args.codes = <int8_t *>pointer(codes, "codes", "b", (blocks, args.block_rows, args.block_columns), True)
    args.scale = <float *>pointer(scale, "scale", "f", (args.n,), True)
    if fc_row_offsets_validate(args.row_offsets, groups, blocks) != FC_OK:
        raise ValueError("row_offsets must rise from 0 to the number of blocks")
    run_now(fc_quantize_blocks, &args, threads)


def codes_nbytes(int64_t m, int64_t k, str layout):
    """Return the bytes of a panel of m quantised rows of k values, in layout "tile" (dense product) or "lanes" (sparse)."""
    if layout not in PANEL_LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose tile or lanes")
    check_depth(k, layout)
    if not 0 <= m < 2**31:
        raise ValueError(f"a panel holds 0 to 2**31 - 1 rows, got {m}")
    return fc_codes_nbytes(m, k, PANEL_LAYOUTS[layout])


cdef int check_static(float scale, int zero_point, str layout) except -1:
    """Refuse a static scale or zero point that the kernels cannot take."""
    if not 2.0**-100 <= scale <= 2.0**100 or not 0 <= zero_point <= 255:
        raise ValueError(
            f"a static scale lies within 2**-100 and 2**100, a zero point within 0 and 255; got {scale}, {zero_point}"
        )
    if layout != "tile":
        raise ValueError("static scales are for the dense product, layout tile")
    return 0


def quantize_activations(
    Program program not None, x, bint lanes, str layout, codes, scales, zeros=None, scale=None, int zero_point=128,
    bint symmetric=False,
):
    """Append: quantise float32 x per row m (rows [M, K], or lanes [K, M] if `lanes`): a uint8 panel, scales[M], int32 zeros[M].

    A code stands for (code - zero) * scale. Layout "tile" spreads the 256 codes from min(0, min x) to max(0, max x); layout
    "lanes" is symmetric, has 128 for all zeros and needs no `zeros`; with `symmetric` "tile" has these codes too. A row of zeros
    (or below 2^-119) has scale 1; a row with a value that is not finite has scale NaN, and so has every output computed from it.

    With a static `scale`, codes = clip(round half even(x / scale) + zero_point, 0, 255), and all scales and zeros are these; NaN
    counts as 0.
    """
    cdef fc_quantize_activations_args args
    args.x = <const float *>pointer(x, "x", "f", (None, None))
    args.m, args.k = x.shape[::-1] if lanes else x.shape
    args.x_lanes = lanes
    args.codes = <uint8_t *>pointer(codes, "codes", "B", (codes_nbytes(args.m, args.k, layout),), True)
    args.scales = <float *>pointer(scales, "scales", "f", (args.m,), True)
    args.layout = PANEL_LAYOUTS[layout]
    if zeros is None and layout == "tile":
        raise ValueError("layout tile needs zeros")
    args.zeros = <int32_t *>optional_pointer(zeros, "zeros", "i", (args.m,), True)
    args.symmetric = symmetric
    args.scale, args.zero_point = 0.0, zero_point
    if scale is not None:
        check_static(scale, zero_point, layout)
        args.scale = scale
    program.add(fc_quantize_activations, &args, sizeof(args), (x, codes, scales, zeros))


cdef class PackedInt8:
    """A constant [n, k] int8 weight in the order the dense product reads it, with its row sums; made by pack_int8."""
    cdef fc_packed_int8 packed
    cdef readonly tuple shape
    cdef readonly int64_t nbytes

    def __cinit__(self):
        memset(&self.packed, 0, sizeof(self.packed))
        self.shape = (0, 0)

    def __dealloc__(self):
        fc_packed_int8_free(&self.packed)


def pack_int8(Weight weight not None, int threads=1):
    """Return the PackedInt8 of an int8 Weight of any form."""
    cdef PackedInt8 result = PackedInt8()
    cdef fc_pack_int8_args args
    if weight.view.kind not in (FC_DENSE_S8, FC_BLOCKS_S8, FC_BITMASK_S8):
        raise TypeError("pack_int8 takes an int8 Weight with scales")
    check_depth(weight.view.k, "tile")
    check(fc_packed_int8_init(&result.packed, weight.view.n, weight.view.k))
    result.shape, result.nbytes = weight.shape, result.packed.nbytes
    args.weight = weight.view
    args.packed = &result.packed
    run_now(fc_pack_int8, &args, threads)
    return result


def int8_packed_nbytes(Weight weight not None):
    """Return the bytes of the PackedInt8 of a weight."""
    return fc_packed_int8_nbytes(weight.view.n, weight.view.k)


def linear_int8(
    Program program not None, codes, scales, zeros, int64_t m, PackedInt8 weight not None, weight_scale, out, bias, activation,
    residual,
):
    """Append: out[M,N] = activation(acc * (scales[m] * weight_scale[n]) + bias[n]) + residual, from a "tile" panel of M rows.

    acc = sum over k of (codes - zeros[m]) * weight. `residual` may be `out` itself. weight_scale is read at every run.
    """
    cdef fc_linear_int8_args args
    n, k = weight.shape
    args.codes = <const uint8_t *>pointer(codes, "codes", "B", (codes_nbytes(m, k, "tile"),))
    args.scales = <const float *>pointer(scales, "scales", "f", (m,))
    args.zeros = <const int32_t *>pointer(zeros, "zeros", "i", (m,))
    args.weight = &weight.packed
    args.weight_scale = <const float *>pointer(weight_scale, "weight_scale", "f", (n,))
    args.bias = <const float *>optional_pointer(bias, "bias", "f", (n,))
    args.residual = <const float *>optional_pointer(residual, "residual", "f", (m, n))
    args.out = <float *>pointer(out, "out", "f", (m, n), True)
    args.m = m
    args.activation = activation_of(activation)
    program.add(fc_linear_int8, &args, sizeof(args), (codes, scales, zeros, weight, weight_scale, out, bias, residual))
