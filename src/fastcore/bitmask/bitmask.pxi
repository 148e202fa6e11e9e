# The bitmask family's part of the border.

cdef extern from "bitmask/bitmask.h" nogil:
    ctypedef struct fc_bitmask_unpack:
        fc_weight weight
        float *out
    ctypedef struct fc_packed_bitmask:
        fc_weight_kind kind
        int64_t n, k, nbytes
    ctypedef struct fc_pack_bitmask_args:
        fc_weight weight
        const fc_packed_bitmask *packed
    ctypedef struct fc_bitmask_linear_args:
        const uint8_t *codes
        const float *scales
        const int32_t *zeros
        const fc_packed_bitmask *weight
        const float *weight_scale
        const float *bias
        const float *residual
        float *out
        int64_t m
        fc_activation activation
    ctypedef struct fc_bitmask_linear_f32_args:
        fc_weight weight
        const float *x
        const float *bias
        const float *residual
        float *out
        int64_t m
        fc_activation activation
    void fc_bitmask_expand(const void *unpack, int rank, int size) noexcept
    void fc_bitmask_index(const fc_weight *weight, int32_t *row_offsets, int32_t *index)
    int64_t fc_packed_bitmask_nbytes(const fc_weight *weight)
    fc_status fc_packed_bitmask_init(fc_packed_bitmask *packed, const fc_weight *weight)
    void fc_packed_bitmask_free(fc_packed_bitmask *packed)
    void fc_pack_bitmask(const void *args, int rank, int size) noexcept
    void fc_bitmask_linear_int(const void *args, int rank, int size) noexcept
    void fc_bitmask_linear_f32(const void *args, int rank, int size) noexcept


cdef int check_bitmask_codes(Weight weight) except -1:
    if weight.view.kind not in (FC_BITMASK_S8, FC_BITMASK_S4):
        raise TypeError("weight: expected int8 or int4 codes under a bitmask")
    check_depth(weight.view.k)
    return 0


def unpack_bitmask(Weight weight not None, out, int threads=1):
    """Write out[n, k] = the dense float32 matrix of a weight under a bitmask, scales applied, but for the gain of int4 rows."""
    cdef fc_bitmask_unpack unpack
    if weight.view.bitmask == NULL:
        raise TypeError("weight: expected elements under a bitmask")
    unpack.weight = weight.view
    unpack.out = <float *>pointer(out, "out", "f", weight.shape, True)
    run_now(fc_bitmask_expand, &unpack, threads)


cdef class PackedBitmask:
    """A constant weight of int8 or int4 codes under a bitmask in the order the kernels read it; made by pack_bitmask."""
    cdef fc_packed_bitmask packed
    cdef readonly tuple shape
    cdef readonly int64_t nbytes

    def __cinit__(self):
        memset(&self.packed, 0, sizeof(self.packed))
        self.shape = (0, 0)

    def __dealloc__(self):
        fc_packed_bitmask_free(&self.packed)


def pack_bitmask(Weight weight not None, int threads=1):
    """Return the PackedBitmask of int8 or int4 codes under a bitmask; the scales of groups are copied, those of rows are not."""
    cdef PackedBitmask result = PackedBitmask()
    cdef fc_pack_bitmask_args args
    cdef fc_status status
    check_bitmask_codes(weight)
    with nogil:
        status = fc_packed_bitmask_init(&result.packed, &weight.view)
    check(status)
    result.shape, result.nbytes = weight.shape, result.packed.nbytes
    args.weight = weight.view
    args.packed = &result.packed
    run_now(fc_pack_bitmask, &args, threads)
    return result


def bitmask_packed_nbytes(Weight weight not None):
    """Return the bytes of the PackedBitmask of a weight."""
    check_bitmask_codes(weight)
    return fc_packed_bitmask_nbytes(&weight.view)


cdef int check_bitmask_elements(Weight weight) except -1:
    if weight.view.kind != FC_BITMASK_F32:
        raise TypeError("weight: expected float32 values under a bitmask")
    if weight.view.row_starts[weight.view.n] > 0x7fffffff:
        raise ValueError("weight: its elements are more than an int32 index can count")
    return 0


def pack_elements(Weight weight not None, int threads=1):
    """Return the PackedBlocks of float32 values under a bitmask, as blocks of 1 x 1. It refers to the values."""
    cdef int32_t *offsets
    cdef int32_t *columns
    check_bitmask_elements(weight)
    import numpy

    count = weight.view.row_starts[weight.view.n]
    row_offsets, index = numpy.empty(weight.view.n + 1, numpy.int32), numpy.empty(count, numpy.int32)
    offsets = <int32_t *>pointer(row_offsets, "row_offsets", "i", (None,), True)
    columns = <int32_t *>pointer(index, "index", "i", (count,), True)
    with nogil:
        fc_bitmask_index(&weight.view, offsets, columns)
    values = numpy.asarray(weight.held[0]).reshape(count, 1, 1)
    return pack_sparse(Weight(values, weight.shape, None, row_offsets, index))


def elements_packed_nbytes(Weight weight not None):
    """Return the bytes that pack_elements adds to a weight."""
    cdef fc_weight blocks
    check_bitmask_elements(weight)
    blocks = weight.view
    blocks.kind, blocks.block_rows, blocks.block_cols = FC_BLOCKS_F32, 1, 1
    return 4 * (blocks.n + 1 + blocks.row_starts[blocks.n] + (fc_blocks_split_k(&blocks).count + 1) * blocks.n)


def bitmask_linear_int(
    Program program not None, codes, scales, zeros, int64_t m, PackedBitmask weight not None, weight_scale, out, bias, activation,
    residual,
):
    """Append: out[M, N] = activation(x @ weight.T + bias) + residual, from a "tile" panel of M rows of codes of x.

    `weight_scale` [N] is the scale of each row of int8 codes, or the gain of each row of int4 codes (None for 1); it is read at
    every run. `residual` may be `out` itself.
    """
    cdef fc_bitmask_linear_args args
    n, k = weight.shape
    if weight_scale is None and weight.packed.kind == FC_BITMASK_S8:
        raise TypeError("weight_scale: int8 codes need a scale for each row")
    args.codes = <const uint8_t *>pointer(codes, "codes", "B", (codes_nbytes(m, k, "tile"),))
    args.scales = <const float *>pointer(scales, "scales", "f", (m,))
    args.zeros = <const int32_t *>pointer(zeros, "zeros", "i", (m,))
    args.weight = &weight.packed
    args.weight_scale = <const float *>optional_pointer(weight_scale, "weight_scale", "f", (n,))
    args.bias = <const float *>optional_pointer(bias, "bias", "f", (n,))
    args.residual = <const float *>optional_pointer(residual, "residual", "f", (m, n))
    args.out = <float *>pointer(out, "out", "f", (m, n), True)
    args.m = m
    args.activation = activation_of(activation)
    program.add(
        fc_bitmask_linear_int, &args, sizeof(args), (codes, scales, zeros, weight, weight_scale, out, bias, residual)
    )


def bitmask_linear(Program program not None, x, Weight weight not None, out, bias, activation, residual):
    """Append: out[M, N] = activation(x[M, K] @ weight.T + bias) + residual, with float32 values in place under a bitmask.

    `residual` may be `out` itself, which must not overlap `x`.
    """
    cdef fc_bitmask_linear_f32_args args
    if weight.view.kind != FC_BITMASK_F32:
        raise TypeError("weight: expected float32 values under a bitmask")
    n, k = weight.shape
    args.m = len(x)
    args.weight = weight.view
    args.x = <const float *>pointer(x, "x", "f", (args.m, k))
    args.bias = <const float *>optional_pointer(bias, "bias", "f", (n,))
    args.residual = <const float *>optional_pointer(residual, "residual", "f", (args.m, n))
    args.out = <float *>pointer(out, "out", "f", (args.m, n), True)
    args.activation = activation_of(activation)
    refuse_overlap(out, x, "out and x")
    program.add(fc_bitmask_linear_f32, &args, sizeof(args), (x, weight, out, bias, residual))
