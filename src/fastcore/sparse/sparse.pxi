# The sparse family's part of the border.

cdef extern from "sparse/sparse.h" nogil:
    ctypedef struct fc_unpack:
        fc_weight weight
        float *out
    ctypedef struct fc_blocks_split:
        int64_t columns, count
    ctypedef struct fc_sparse_linear:
        fc_weight weight
        const int32_t *cuts
        const int32_t *sums
        const void *x
        int64_t m
        const float *scales
        const float *weight_scale
        const int32_t *zeros
        const float *bias
        const float *residual
        float *out
        int to_rows
        fc_activation activation
        fc_quantize_activations_args codes
        int64_t tiles
    int64_t fc_blocks_count(const uint8_t *mask, int64_t count)
    void fc_blocks_pack(
        const float *weight, const uint8_t *mask, int64_t n, int64_t k, int32_t block_rows, int32_t block_cols, float *values,
        int32_t *row_offsets, int32_t *index)
    void fc_blocks_unpack(const void *unpack, int rank, int size) noexcept
    fc_blocks_split fc_blocks_split_k(const fc_weight *weight)
    void fc_blocks_prepare(const fc_weight *weight, int32_t *cuts, int32_t *sums)
    void fc_sparse_linear_run(const void *linear, int rank, int size) noexcept


def pack_blocks(object weight not None, object mask not None, tuple block not None):
    """Return (values [blocks, r, c], row_offsets, index) of the blocks of weight[n, k] where mask[n/r, k/c] is not 0."""
    cdef const float *dense = <const float *>pointer(weight, "weight", "f", (None, None))
    cdef tuple grid = block_shape(weight.shape, block)
    cdef const uint8_t *keep = <const uint8_t *>pointer(mask, "mask", "B", grid)
    cdef int64_t n, k, entries, blocks
    cdef int32_t r, c
    n, k = weight.shape
    r, c = block
    entries = grid[0] * grid[1]
    with nogil:
        blocks = fc_blocks_count(keep, entries)
    if blocks > 0x7fffffff:
        raise ValueError(f"{blocks} blocks are more than an int32 index can count")
    import numpy  # here, so that loading the extension does not load NumPy

    values = numpy.empty((blocks, r, c), numpy.float32)
    row_offsets, index = numpy.empty(grid[0] + 1, numpy.int32), numpy.empty(blocks, numpy.int32)
    cdef float *packed = <float *>pointer(values, "values", "f", (blocks, r, c), True)
    cdef int32_t *offsets = <int32_t *>pointer(row_offsets, "row_offsets", "i", (grid[0] + 1,), True)
    cdef int32_t *columns = <int32_t *>pointer(index, "index", "i", (blocks,), True)
    with nogil:
        fc_blocks_pack(dense, keep, n, k, r, c, packed, offsets, columns)
    return values, row_offsets, index


def unpack_blocks(Weight weight not None, object out not None, int threads=1):
    """Write out[n, k] = the dense float32 matrix of a block weight, scales applied."""
    cdef fc_unpack unpack
    if weight.view.kind not in (FC_BLOCKS_F32, FC_BLOCKS_S8):
        raise ValueError("weight: expected blocks, got a dense weight")
    unpack.weight = weight.view
    unpack.out = <float *>pointer(out, "out", "f", weight.shape, True)
    run_now(fc_blocks_unpack, &unpack, threads)


cdef int check_kernel(const fc_weight *view) except -1:
    """Refuse a weight that is not in blocks, or in blocks that no kernel multiplies."""
    if view.kind not in (FC_BLOCKS_F32, FC_BLOCKS_S8):
        raise ValueError("weight: expected blocks, got a dense weight")
    block = (view.block_rows, view.block_cols)
    known = [(1, 4), (2, 4), (4, 4)]
    if view.kind == FC_BLOCKS_F32:
        known.append((1, 1))
    if block not in known:
        raise ValueError(f"weight: no kernel for blocks of {block}; choose one of {sorted(known)}")
    if view.kind == FC_BLOCKS_S8 and view.k >= 1 << 17:
        raise ValueError(f"weight: int32 sums hold fewer than {1 << 17} products of int8, got {view.k}")
    return 0


cdef class PackedBlocks:
    """A block weight with what its kernel wants to know beforehand: where rows cross K blocks, and the sums of int8 rows.

    It refers to the weight's arrays. Values of float32 blocks may change; an index or int8 values may not.
    """
    cdef fc_weight view
    cdef const int32_t *cuts
    cdef const int32_t *sums
    cdef tuple held
    cdef readonly tuple shape
    cdef readonly int64_t nbytes

    def __cinit__(self, Weight weight not None):
        cdef fc_weight *view = &weight.view
        cdef int64_t groups
        cdef int32_t *cuts
        cdef int32_t *sums = NULL
        check_kernel(view)
        groups = view.n // view.block_rows
        import numpy

        cut_array = numpy.empty((fc_blocks_split_k(view).count + 1, groups), numpy.int32)
        cuts = <int32_t *>pointer(cut_array, "cuts", "i", (None, groups), True)
        sum_array = None
        if view.kind == FC_BLOCKS_S8:
            sum_array = numpy.empty(2 * view.n, numpy.int32)
            sums = <int32_t *>pointer(sum_array, "sums", "i", (2 * view.n,), True)
        with nogil:
            fc_blocks_prepare(view, cuts, sums)
        self.view, self.cuts, self.sums = view[0], cuts, sums
        self.shape = weight.shape
        self.held = (weight, cut_array, sum_array)
        arrays = [*weight.held, cut_array, sum_array]
        self.nbytes = sum([memoryview(array).nbytes for array in arrays if array is not None])


def blocks_packed_nbytes(Weight weight not None):
    """Return the bytes that a PackedBlocks adds to a weight."""
    check_kernel(&weight.view)
    groups = weight.view.n // weight.view.block_rows
    sums = 2 * weight.view.n if weight.view.kind == FC_BLOCKS_S8 else 0
    return 4 * ((fc_blocks_split_k(&weight.view).count + 1) * groups + sums)


def pack_sparse(Weight weight not None, int threads=1):
    """Return a PackedBlocks of a weight in blocks."""
    return PackedBlocks(weight)


cdef int bind_epilogue(fc_sparse_linear *a, object out, object bias, object activation, object residual) except -1:
    """Fill what both products share; a.weight, a.m and a.to_rows are set."""
    cdef tuple shape = (a.m, a.weight.n) if a.to_rows else (a.weight.n, a.m)
    a.activation = activation_of(activation)
    a.out = <float *>pointer(out, "out", "f", shape, True)
    a.bias = <const float *>optional_pointer(bias, "bias", "f", (a.weight.n,))
    a.residual = <const float *>optional_pointer(residual, "residual", "f", shape)
    return 0


def sparse_linear(
    Program program not None, object x not None, object weight not None, object out not None, object bias, object activation,
    object residual, bint to_rows=False,
):
    """Append out[N, M] = activation(weight[N, K] @ x[K, M] + bias) + residual; out may be residual, must not overlap x.

    With `to_rows`, out and residual are [M, N].
    """
    cdef fc_sparse_linear a
    cdef PackedBlocks packed = weight if isinstance(weight, PackedBlocks) else PackedBlocks(weight)
    if packed.view.kind != FC_BLOCKS_F32:
        raise ValueError("weight: expected float32 blocks, got int8; quantised activations go through sparse_linear_int8")
    memset(&a, 0, sizeof(a))
    a.weight, a.cuts = packed.view, packed.cuts
    a.x = pointer(x, "x", "f", (packed.view.k, None))
    a.m, a.to_rows = x.shape[1], to_rows
    bind_epilogue(&a, out, bias, activation, residual)
    program.add(fc_sparse_linear_run, &a, sizeof(a), (x, packed, out, bias, residual))


def sparse_linear_int8(
    Program program not None, object codes not None, object scales not None, int64_t m, PackedBlocks weight not None,
    object weight_scale not None, object out not None, object bias, object activation, object residual, object zeros=None,
    bint to_rows=False,
):
    """Append the same product from a "lanes" panel of codes, uint8, with scales[m].

    A code stands for (code - zeros[m]) * scales[m]; without `zeros` (int32) all are 128. With `to_rows`, out and residual are
    [M, N].
    """
    cdef fc_sparse_linear a
    if weight.view.kind != FC_BLOCKS_S8:
        raise ValueError("weight: expected int8 blocks, got float32")
    if m < 0:
        raise ValueError(f"m: expected at least 0, got {m}")
    memset(&a, 0, sizeof(a))
    a.weight, a.cuts, a.sums, a.m, a.to_rows = weight.view, weight.cuts, weight.sums, m, to_rows
    a.x = pointer(codes, "codes", "B", (weight.view.k * ((m + 15) // 16 * 16),))
    a.scales = <const float *>pointer(scales, "scales", "f", (m,))
    a.weight_scale = <const float *>pointer(weight_scale, "weight_scale", "f", (weight.view.n,))
    a.zeros = <const int32_t *>optional_pointer(zeros, "zeros", "i", (m,))
    if zeros is not None:
        check_depth(weight.view.k)  # codes reach 255 from a zero point, not 127
    bind_epilogue(&a, out, bias, activation, residual)
    program.add(fc_sparse_linear_run, &a, sizeof(a), (codes, scales, weight, weight_scale, out, bias, residual, zeros))


def sparse_linear_to_codes(
    Program program not None, object codes not None, object scales not None, object zeros not None, int64_t m,
    PackedBlocks weight not None, object weight_scale not None, object bias, object activation, object out_codes not None,
    object out_scales not None, object out_zeros not None, object scratch not None, object scale=None, int zero_point=128,
):
    """Append activation(weight[N, K] @ x + bias) quantised as quantize_activations does it, from one "lanes" panel to another.

    `scratch`, uint8, holds 256 * N bytes for each thread: with less, fewer work.
    """
    cdef fc_sparse_linear a
    cdef int64_t n = weight.view.n
    if weight.view.kind != FC_BLOCKS_S8:
        raise ValueError("weight: expected int8 blocks, got float32")
    memset(&a, 0, sizeof(a))
    a.weight, a.cuts, a.sums, a.m = weight.view, weight.cuts, weight.sums, m
    a.x = pointer(codes, "codes", "B", (codes_nbytes(m, weight.view.k, "lanes"),))
    a.scales = <const float *>pointer(scales, "scales", "f", (m,))
    a.zeros = <const int32_t *>pointer(zeros, "zeros", "i", (m,))
    a.weight_scale = <const float *>pointer(weight_scale, "weight_scale", "f", (n,))
    a.activation = activation_of(activation)
    a.bias = <const float *>optional_pointer(bias, "bias", "f", (n,))
    a.out = <float *>pointer(scratch, "scratch", "B", (None,), True)
    a.tiles = len(scratch) // (256 * n) if n else 1
    if a.tiles < 1:
        raise ValueError(f"scratch: expected at least {256 * n} bytes, got {len(scratch)}")
    a.codes.m, a.codes.k, a.codes.x_lanes, a.codes.layout = m, n, True, FC_PANEL_LANES
    a.codes.codes = <uint8_t *>pointer(out_codes, "out_codes", "B", (codes_nbytes(m, n, "lanes"),), True)
    a.codes.scales = <float *>pointer(out_scales, "out_scales", "f", (m,), True)
    a.codes.zeros = <int32_t *>pointer(out_zeros, "out_zeros", "i", (m,), True)
    bind_scale(&a.codes, scale, zero_point)
    held = (codes, scales, zeros, weight, weight_scale, bias, out_codes, out_scales, out_zeros, scratch)
    program.add(fc_sparse_linear_run, &a, sizeof(a), held)
