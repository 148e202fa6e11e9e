# The dense family's part of the border.
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc

cdef extern from "dense/dense.h" nogil:
    ctypedef struct fc_pack_dense_args:
        fc_weight weight
        float *out
    ctypedef struct fc_linear_args:
        int64_t m, n, k
        const float *x
        const float *packed
        fc_weight weight
        float *out
        const float *bias
        const float *residual
        fc_activation activation
        void *scratch
        int64_t scratch_bytes
    ctypedef struct fc_linear_grad_args:
        int64_t m
        const float *dy
        const float *x
        fc_weight weight
        float *to
        void *scratch
        int64_t scratch_bytes
    int64_t fc_dense_packed_size(int64_t n, int64_t k)
    int64_t fc_linear_scratch(int64_t m, int64_t n, int64_t k, int threads)
    void fc_pack_dense(const void *args, int rank, int size) noexcept
    void fc_linear(const void *args, int rank, int size) noexcept
    void fc_linear_grad_input(const void *args, int rank, int size) noexcept
    void fc_linear_grad_weight(const void *args, int rank, int size) noexcept


cdef class PackedDense:
    """A constant [n, k] float32 weight in the tile layout of this instruction set."""
    cdef void *memory
    cdef float *panels
    cdef unsigned generation
    cdef readonly tuple shape
    cdef readonly int64_t nbytes

    def __init__(self):
        raise TypeError("use pack_dense")

    def __dealloc__(self):
        PyMem_RawFree(self.memory)


def pack_dense(Weight weight not None, int threads=1):
    """Expand and pack a weight once; the result is valid until set_isa is called."""
    cdef fc_pack_dense_args args
    cdef PackedDense packed = PackedDense.__new__(PackedDense)
    cdef int64_t nbytes = fc_dense_packed_size(weight.view.n, weight.view.k) * sizeof(float)
    packed.memory = PyMem_RawMalloc(nbytes + 64)
    if packed.memory == NULL:
        raise MemoryError(f"could not allocate {nbytes} bytes for a packed weight of shape {weight.shape}")
    packed.panels = <float *>((<uintptr_t>packed.memory + 63) // 64 * 64)
    packed.generation = fc_generation()
    packed.shape, packed.nbytes = weight.shape, nbytes
    args.weight, args.out = weight.view, packed.panels
    run_now(fc_pack_dense, &args, threads)
    return packed


def dense_packed_nbytes(Weight weight not None):
    """Return the bytes of the PackedDense of a weight."""
    return fc_dense_packed_size(weight.view.n, weight.view.k) * sizeof(float)


def linear_scratch(int64_t m, int64_t n, int64_t k, int threads):
    """Return the bytes of scratch that any of the three dense products of these sizes needs on `threads` threads."""
    if min(m, n, k) < 0 or threads < 1:
        raise ValueError(f"sizes must not be negative and threads must be positive, got {m}, {n}, {k} and {threads}")
    return fc_linear_scratch(m, n, k, threads)


cdef int64_t scratch_size(object scratch, int64_t m, int64_t n, int64_t k) except -1:
    """Return the bytes of a scratch array that serves one thread at least; more are used as far as it reaches."""
    cdef int64_t have = memoryview(scratch).nbytes, need = fc_linear_scratch(m, n, k, 1)
    if have < need:
        raise ValueError(f"scratch: {have} bytes given, {need} needed for one thread; see linear_scratch")
    return have


cdef int refuse_overlap(object out, object other, str names) except -1:
    """Raise if two contiguous arrays share memory: a product writes its output while it still reads its inputs."""
    if other is None or out.nbytes == 0 or other.nbytes == 0:
        return 0
    cdef uintptr_t a = out.ctypes.data, b = other.ctypes.data
    if a < b + <uintptr_t>other.nbytes and b < a + <uintptr_t>out.nbytes:
        raise ValueError(f"{names} overlap in memory")
    return 0


def linear(Program program not None, x, weight, out, bias, activation, residual, scratch):
    """Append out[M,N] = activation(x[M,K] @ weight[N,K].T + bias[N]) + residual[M,N]."""
    cdef fc_linear_args args
    memset(&args, 0, sizeof(args))
    if isinstance(weight, PackedDense):
        if (<PackedDense>weight).generation != fc_generation():
            check(FC_STALE)
        args.packed = (<PackedDense>weight).panels
    elif isinstance(weight, Weight):
        args.weight = (<Weight>weight).view
    else:
        raise TypeError(f"weight: expected PackedDense or Weight, got {type(weight).__name__}")
    args.n, args.k = weight.shape
    args.m = len(x)
    args.x = <const float *>pointer(x, "x", "f", (args.m, args.k))
    args.out = <float *>pointer(out, "out", "f", (args.m, args.n), True)
    args.bias = <const float *>optional_pointer(bias, "bias", "f", (args.n,))
    args.residual = <const float *>optional_pointer(residual, "residual", "f", (args.m, args.n))
    args.activation = activation_of(activation)
    args.scratch = pointer(scratch, "scratch", "B", (None,), True)
    args.scratch_bytes = scratch_size(scratch, args.m, args.n, args.k)
    refuse_overlap(out, x, "out and x")
    refuse_overlap(out, residual, "out and residual")
    program.add(fc_linear, &args, sizeof(args), (x, weight, out, bias, residual, scratch))


def linear_grad_input(Program program not None, dy, Weight weight not None, dx, scratch):
    """Append dx[M,K] = dy[M,N] @ weight[N,K]."""
    cdef fc_linear_grad_args args
    memset(&args, 0, sizeof(args))
    args.weight = weight.view
    args.m = len(dy)
    args.dy = <const float *>pointer(dy, "dy", "f", (args.m, args.weight.n))
    args.to = <float *>pointer(dx, "dx", "f", (args.m, args.weight.k), True)
    args.scratch = pointer(scratch, "scratch", "B", (None,), True)
    args.scratch_bytes = scratch_size(scratch, args.m, args.weight.n, args.weight.k)
    refuse_overlap(dx, dy, "dx and dy")
    program.add(fc_linear_grad_input, &args, sizeof(args), (dy, weight, dx, scratch))


cdef tuple grad_shape(Weight weight):
    if weight.view.kind == FC_DENSE_S8 or weight.view.kind == FC_BLOCKS_S8:
        return (weight.shape[0],)
    return weight.shape if weight.view.kind == FC_DENSE_F32 else tuple(memoryview(weight.held[0]).shape)


def linear_grad_weight(Program program not None, dy, x, Weight weight not None, grad, scratch):
    """Append dW = dy[M,N].T @ x[M,K] in the form that `weight` trains in."""
    cdef fc_linear_grad_args args
    memset(&args, 0, sizeof(args))
    args.weight = weight.view
    args.m = len(dy)
    args.dy = <const float *>pointer(dy, "dy", "f", (args.m, args.weight.n))
    args.x = <const float *>pointer(x, "x", "f", (args.m, args.weight.k))
    args.to = <float *>pointer(grad, "grad", "f", grad_shape(weight), True)
    args.scratch = pointer(scratch, "scratch", "B", (None,), True)
    args.scratch_bytes = scratch_size(scratch, args.m, args.weight.n, args.weight.k)
    refuse_overlap(grad, dy, "grad and dy")
    refuse_overlap(grad, x, "grad and x")
    program.add(fc_linear_grad_weight, &args, sizeof(args), (dy, x, weight, grad, scratch))
