# The dense family's part of the border.
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc

cdef extern from "dense/dense.h" nogil:
    ctypedef struct fc_pack_dense_args:
        fc_weight weight
        float *out
    ctypedef struct fc_pack_operand_args:
        int64_t depth, cols
        int bf16
        const float *values
        float *out
    ctypedef struct fc_linear_args:
        int64_t m, n, k
        int bf16
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
        int bf16
        const float *dy
        const float *x
        const float *packed
        fc_weight weight
        float *to
        void *scratch
        int64_t scratch_bytes
    int64_t fc_dense_packed_size(int64_t n, int64_t k)
    int64_t fc_bf16_packed_size(int64_t n, int64_t k)
    int fc_has_bf16()
    int64_t fc_linear_scratch(int64_t m, int64_t n, int64_t k, int threads)
    void fc_pack_dense(const void *args, int rank, int size) noexcept
    void fc_pack_bf16(const void *args, int rank, int size) noexcept
    void fc_pack_operand(const void *args, int rank, int size) noexcept
    void fc_linear(const void *args, int rank, int size) noexcept
    void fc_linear_grad_input(const void *args, int rank, int size) noexcept
    void fc_linear_grad_weight(const void *args, int rank, int size) noexcept


cdef class PackedDense:
    """A constant [n, k] weight in the tile layout of this instruction set, in float32 or, by pack_bf16, in bf16."""
    cdef void *memory
    cdef float *panels
    cdef unsigned generation
    cdef readonly bint bf16
    cdef readonly tuple shape
    cdef readonly int64_t nbytes

    def __init__(self):
        raise TypeError("use pack_dense")

    def __dealloc__(self):
        PyMem_RawFree(self.memory)


cdef PackedDense new_packed(Weight weight, int64_t nbytes, bint bf16):
    cdef PackedDense packed = PackedDense.__new__(PackedDense)
    packed.memory = PyMem_RawMalloc(nbytes + 64)
    if packed.memory == NULL:
        raise MemoryError(f"could not allocate {nbytes} bytes for a packed weight of shape {weight.shape}")
    packed.panels = <float *>((<uintptr_t>packed.memory + 63) // 64 * 64)
    packed.generation = fc_generation()
    packed.shape, packed.nbytes, packed.bf16 = weight.shape, nbytes, bf16
    return packed


def pack_dense(Weight weight not None, int threads=1):
    """Expand and pack a weight once; the result is valid until set_isa is called."""
    cdef fc_pack_dense_args args
    cdef PackedDense packed = new_packed(weight, dense_packed_nbytes(weight), False)
    args.weight, args.out = weight.view, packed.panels
    run_now(fc_pack_dense, &args, threads)
    return packed


def pack_bf16(Weight weight not None, int threads=1):
    """Expand a weight, round it to bf16 and pack it once, for linear_bf16; valid until set_isa is called."""
    cdef fc_pack_dense_args args
    cdef PackedDense packed = new_packed(weight, bf16_packed_nbytes(weight), True)
    args.weight, args.out = weight.view, packed.panels
    run_now(fc_pack_bf16, &args, threads)
    return packed


def has_bf16():
    """Return whether bf16 products run on an instruction for them; elsewhere they are right but slower than float32."""
    return bool(fc_has_bf16())


def dense_packed_nbytes(Weight weight not None):
    """Return the bytes of the PackedDense of a weight."""
    return fc_dense_packed_size(weight.view.n, weight.view.k) * sizeof(float)


def bf16_packed_nbytes(Weight weight not None):
    """Return the bytes of the bf16 PackedDense of a weight."""
    return fc_bf16_packed_size(weight.view.n, weight.view.k) * sizeof(float)


def linear_scratch(int64_t m, int64_t n, int64_t k, int threads):
    """Return the bytes of scratch that any dense product of these sizes needs on `threads` threads."""
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


cdef int must_be_float(Weight weight) except -1:
    """Refuse a weight that bf16 kernels cannot read in place."""
    if weight.view.kind != FC_DENSE_F32:
        raise TypeError("weight: a bf16 product reads dense float32 in place; pack any other with pack_bf16")
    return 0


def panels_nbytes(int64_t depth, int64_t cols, bint bf16):
    """Return the bytes of the `panels` of a product whose second operand is [depth, cols]."""
    if min(depth, cols) < 0:
        raise ValueError(f"sizes must not be negative, got {depth} and {cols}")
    return (fc_bf16_packed_size(cols, depth) if bf16 else fc_dense_packed_size(cols, depth)) * sizeof(float)


cdef float *panels_pointer(object panels, int64_t depth, int64_t cols, bint bf16, object operand, object out) except? NULL:
    """Return where to pack an operand, after checks."""
    cdef float *to = <float *>pointer(panels, "panels", "B", (None,), True)
    cdef int64_t have = memoryview(panels).nbytes, need = panels_nbytes(depth, cols, bf16)
    if have < need:
        raise ValueError(f"panels: {have} bytes given, {need} needed; see panels_nbytes")
    refuse_overlap(panels, operand, "panels and what is packed there")
    refuse_overlap(panels, out, "panels and the result")
    return to


cdef const float *add_operand(Program program, object panels, int64_t depth, int64_t cols, bint bf16, object operand,
                              object out) except? NULL:
    """Append the packing of [depth, cols] for the step that follows."""
    cdef fc_pack_operand_args args
    args.depth, args.cols, args.bf16 = depth, cols, bf16
    args.values = <const float *>pointer(operand, "operand", "f", (depth, cols))
    args.out = panels_pointer(panels, depth, cols, bf16, operand, out)
    program.add(fc_pack_operand, &args, sizeof(args), (operand, panels))
    return args.out


cdef object dense_values(Weight weight):
    """The array of a weight whose panels are made at every run."""
    if weight.view.kind != FC_DENSE_F32:
        raise TypeError("panels: only dense float32 weights are packed at every run")
    return weight.held[0]


cdef int add_linear(
    Program program, x, weight, out, bias, activation, residual, scratch, panels, bint bf16
) except -1:
    cdef fc_pack_dense_args pack
    cdef fc_linear_args args
    memset(&args, 0, sizeof(args))
    args.bf16 = bf16
    if isinstance(weight, PackedDense):
        if (<PackedDense>weight).generation != fc_generation():
            check(FC_STALE)
        if (<PackedDense>weight).bf16 != bf16:
            raise TypeError("weight: pack_dense is for linear, pack_bf16 for linear_bf16")
        args.packed = (<PackedDense>weight).panels
    elif isinstance(weight, Weight):
        args.weight = (<Weight>weight).view
        if bf16:
            must_be_float(weight)
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
    if panels is not None:
        if isinstance(weight, PackedDense):
            raise TypeError("panels: the weight is packed already")
        pack.weight = args.weight
        pack.out = panels_pointer(panels, args.k, args.n, bf16, dense_values(weight), out)
        program.add(fc_pack_bf16 if bf16 else fc_pack_dense, &pack, sizeof(pack), (weight, panels))
        args.packed = pack.out
    return program.add(fc_linear, &args, sizeof(args), (x, weight, out, bias, residual, scratch))


def linear(Program program not None, x, weight, out, bias, activation, residual, scratch, panels=None):
    """Append out[M,N] = activation(x[M,K] @ weight[N,K].T + bias[N]) + residual[M,N]."""
    add_linear(program, x, weight, out, bias, activation, residual, scratch, panels, False)


def linear_bf16(Program program not None, x, weight, out, bias, activation, residual, scratch, panels=None):
    """Append the same with x and the weight rounded to bf16, half to even; sums, and what is added to them, stay float32."""
    add_linear(program, x, weight, out, bias, activation, residual, scratch, panels, True)


cdef int add_grad_input(Program program, dy, Weight weight, dx, scratch, panels, bint bf16) except -1:
    cdef fc_linear_grad_args args
    memset(&args, 0, sizeof(args))
    args.bf16, args.weight = bf16, weight.view
    if bf16:
        must_be_float(weight)
    args.m = len(dy)
    args.dy = <const float *>pointer(dy, "dy", "f", (args.m, args.weight.n))
    args.to = <float *>pointer(dx, "dx", "f", (args.m, args.weight.k), True)
    args.scratch = pointer(scratch, "scratch", "B", (None,), True)
    args.scratch_bytes = scratch_size(scratch, args.m, args.weight.n, args.weight.k)
    refuse_overlap(dx, dy, "dx and dy")
    if panels is not None:
        args.packed = add_operand(program, panels, args.weight.n, args.weight.k, bf16, dense_values(weight), dx)
    return program.add(fc_linear_grad_input, &args, sizeof(args), (dy, weight, dx, scratch))


def linear_grad_input(Program program not None, dy, Weight weight not None, dx, scratch, panels=None):
    """Append dx[M,K] = dy[M,N] @ weight[N,K]."""
    add_grad_input(program, dy, weight, dx, scratch, panels, False)


def linear_grad_input_bf16(Program program not None, dy, Weight weight not None, dx, scratch, panels=None):
    """Append the same with both operands rounded to bf16; the weight is dense float32."""
    add_grad_input(program, dy, weight, dx, scratch, panels, True)


cdef tuple grad_shape(Weight weight):
    if weight.view.kind == FC_DENSE_BF16:
        raise TypeError("weight: bf16 values train as float32; pass those")
    if weight.view.kind in (FC_DENSE_S8, FC_BLOCKS_S8, FC_BITMASK_S8, FC_BITMASK_S4):
        return (weight.shape[0],)
    return weight.shape if weight.view.kind == FC_DENSE_F32 else tuple(memoryview(weight.held[0]).shape)


cdef int add_grad_weight(Program program, dy, x, Weight weight, grad, scratch, panels, bint bf16) except -1:
    cdef fc_linear_grad_args args
    memset(&args, 0, sizeof(args))
    args.bf16, args.weight = bf16, weight.view
    if bf16:
        must_be_float(weight)
    args.m = len(dy)
    args.dy = <const float *>pointer(dy, "dy", "f", (args.m, args.weight.n))
    args.x = <const float *>pointer(x, "x", "f", (args.m, args.weight.k))
    args.to = <float *>pointer(grad, "grad", "f", grad_shape(weight), True)
    args.scratch = pointer(scratch, "scratch", "B", (None,), True)
    args.scratch_bytes = scratch_size(scratch, args.m, args.weight.n, args.weight.k)
    refuse_overlap(grad, dy, "grad and dy")
    refuse_overlap(grad, x, "grad and x")
    if panels is not None:
        args.packed = add_operand(program, panels, args.m, args.weight.k, bf16, x, grad)
    return program.add(fc_linear_grad_weight, &args, sizeof(args), (dy, x, weight, grad, scratch))


def linear_grad_weight(Program program not None, dy, x, Weight weight not None, grad, scratch, panels=None):
    """Append dW = dy[M,N].T @ x[M,K] in the form that `weight` trains in."""
    add_grad_weight(program, dy, x, weight, grad, scratch, panels, False)


def linear_grad_weight_bf16(Program program not None, dy, x, Weight weight not None, grad, scratch, panels=None):
    """Append the same with dy and x rounded to bf16; the weight is dense float32."""
    add_grad_weight(program, dy, x, weight, grad, scratch, panels, True)
