# The int4 family's part of the border.

cdef extern from "int4/int4.h" nogil:
    enum:
        FC_INT4_MAX_GROUP
    ctypedef struct fc_int4_weight:
        const uint32_t *words
        const void *scales
        int64_t n, k, group
        int wide
    ctypedef struct fc_packed_int4:
        int64_t n, k, group, nbytes
    ctypedef struct fc_pack_int4_args:
        const fc_int4_weight *weight
        const fc_packed_int4 *packed
    ctypedef struct fc_quantize_groups_args:
        const float *x
        int64_t m, k, group
        int8_t *codes
        float *scales
        int32_t *offsets
    ctypedef struct fc_linear_int4_args:
        const int8_t *codes
        const float *scales
        const int32_t *offsets
        const fc_packed_int4 *weight
        const float *gain
        const float *bias
        const float *residual
        float *out
        int64_t m
        fc_activation activation
    int64_t fc_int4_octets(int64_t k)
    int64_t fc_int4_groups(int64_t k, int64_t group)
    int64_t fc_packed_int4_nbytes(const fc_int4_weight *weight)
    fc_status fc_packed_int4_init(fc_packed_int4 *packed, const fc_int4_weight *weight)
    void fc_packed_int4_free(fc_packed_int4 *packed)
    void fc_pack_int4(const void *args, int rank, int size) noexcept
    void fc_quantize_groups(const void *args, int rank, int size) noexcept
    void fc_linear_int4(const void *args, int rank, int size) noexcept


cdef int check_group(int64_t group) except -1:
    if group % 8 or not 8 <= group <= FC_INT4_MAX_GROUP:
        raise ValueError(f"a group is a multiple of 8 and at most {FC_INT4_MAX_GROUP}, got {group}")
    return 0


cdef class Int4Weight:
    """An [n, k] matrix of 4-bit codes in memory that the caller owns, with a scale for each group of k in a row.

    words: int32 [n, ceil(k / 8)], code plus 8, low bits first; scale: float16 or float32 [n, ceil(k / group)].
    """
    cdef fc_int4_weight view
    cdef tuple held
    cdef readonly tuple shape

    def __cinit__(self, words not None, tuple shape, scale not None, int64_t group):
        cdef int64_t n, k
        n, k = shape
        check_group(group)
        if n < 0 or k < 0:
            raise ValueError(f"a weight cannot have shape {shape}")
        self.shape = (n, k)
        self.held = (words, scale)
        self.view.n, self.view.k, self.view.group = n, k, group
        self.view.words = <const uint32_t *>pointer(words, "words", "i", (n, fc_int4_octets(k)))
        self.view.wide = memoryview(scale).format != "e"
        self.view.scales = pointer(scale, "scale", "f" if self.view.wide else "e", (n, fc_int4_groups(k, group)))


cdef class PackedInt4:
    """A constant int4 weight in the order the product reads it; made by pack_int4."""
    cdef fc_packed_int4 packed
    cdef readonly tuple shape
    cdef readonly int64_t group, nbytes

    def __cinit__(self):
        memset(&self.packed, 0, sizeof(self.packed))
        self.shape = (0, 0)

    def __dealloc__(self):
        fc_packed_int4_free(&self.packed)


def pack_int4(Int4Weight weight not None, int threads=1):
    """Return the PackedInt4 of an Int4Weight."""
    cdef PackedInt4 result = PackedInt4()
    cdef fc_pack_int4_args args
    check(fc_packed_int4_init(&result.packed, &weight.view))
    result.shape, result.group, result.nbytes = weight.shape, weight.view.group, result.packed.nbytes
    args.weight = &weight.view
    args.packed = &result.packed
    run_now(fc_pack_int4, &args, threads)
    return result


def int4_packed_nbytes(Int4Weight weight not None):
    """Return the bytes of the PackedInt4 of a weight."""
    return fc_packed_int4_nbytes(&weight.view)


def quantize_groups(Program program not None, x not None, int64_t group, codes, scales, offsets):
    """Append: quantise float32 x[M,K] to int8, symmetric with a scale for each group of a row: int8 codes [M * 8 ceil(K / 8)],
    float32 scales and int32 offsets [M * ceil(K / group)], all flat, in the order that linear_int4 reads.

    A group with a value that is not finite has scale NaN, and so has every output computed from it.
    """
    cdef fc_quantize_groups_args args
    check_group(group)
    args.x = <const float *>pointer(x, "x", "f", (None, None))
    args.m, args.k = x.shape
    args.group = group
    count = args.m * fc_int4_groups(args.k, group)
    args.codes = <int8_t *>pointer(codes, "codes", "b", (args.m * fc_int4_octets(args.k) * 8,), True)
    args.scales = <float *>pointer(scales, "scales", "f", (count,), True)
    args.offsets = <int32_t *>pointer(offsets, "offsets", "i", (count,), True)
    program.add(fc_quantize_groups, &args, sizeof(args), (x, codes, scales, offsets))


def linear_int4(
    Program program not None, codes, scales, offsets, int64_t m, PackedInt4 weight not None, gain, out, bias, activation, residual
):
    """Append: out[M,N] = activation((x @ weight.T) * gain[N] + bias[N]) + residual, x as quantize_groups made it of M rows with
    the weight's group. `residual` may be `out` itself. gain, if any, is read at every run.
    """
    cdef fc_linear_int4_args args
    n, k = weight.shape
    count = m * fc_int4_groups(k, weight.group)
    args.codes = <const int8_t *>pointer(codes, "codes", "b", (m * fc_int4_octets(k) * 8,))
    args.scales = <const float *>pointer(scales, "scales", "f", (count,))
    args.offsets = <const int32_t *>pointer(offsets, "offsets", "i", (count,))
    args.weight = &weight.packed
    args.gain = <const float *>optional_pointer(gain, "gain", "f", (n,))
    args.bias = <const float *>optional_pointer(bias, "bias", "f", (n,))
    args.residual = <const float *>optional_pointer(residual, "residual", "f", (m, n))
    args.out = <float *>pointer(out, "out", "f", (m, n), True)
    args.m = m
    args.activation = activation_of(activation)
    program.add(fc_linear_int4, &args, sizeof(args), (codes, scales, offsets, weight, gain, out, bias, residual))
