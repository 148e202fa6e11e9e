# The aggregate family's part of the border.
from libc.math cimport isfinite

cdef extern from "aggregate/aggregate.h" nogil:
    ctypedef struct fc_sgd:
        float learning_rate, weight_decay, clip
    ctypedef struct fc_momentum:
        float learning_rate, weight_decay, clip, momentum, gain
        int nesterov
    ctypedef struct fc_adam:
        pass
    ctypedef struct fc_weighted_sum_args:
        const float *const *inputs
        const float *weights
        int64_t count, length
        float *out
        double *partials
        float *scratch
    ctypedef struct fc_sum_of_squares_args:
        const float *x
        int64_t length
        double *partials
    ctypedef struct fc_sgd_args:
        float *params
        const float *grads
        int64_t length
        fc_sgd sgd
    ctypedef struct fc_momentum_args:
        float *params
        const float *grads
        float *velocity
        int64_t length
        fc_momentum momentum
    ctypedef struct fc_adam_args:
        float *params
        const float *grads
        float *first
        float *second
        int64_t length
        fc_adam adam
    void fc_weighted_sum(const void *args, int rank, int size) noexcept
    void fc_sum_of_squares(const void *args, int rank, int size) noexcept
    void fc_sgd_step(const void *args, int rank, int size) noexcept
    void fc_momentum_step(const void *args, int rank, int size) noexcept
    void fc_adam_step(const void *args, int rank, int size) noexcept
    int64_t fc_aggregate_blocks(int64_t length)
    int fc_aggregate_threads(int64_t length, int threads)
    int64_t fc_weighted_sum_scratch(int64_t count)
    double fc_sum_partials(const double *partials, int64_t blocks)
    fc_adam fc_adam_constants(
        double learning_rate, double beta1, double beta2, double epsilon, double weight_decay, int decoupled, int64_t step,
        double clip,
    )


cdef float *floats(object array, str name, length, bint writable=False) except? NULL:
    """Return the address of a flat float32 vector, aligned to its items; `length` None admits any."""
    if array is None:
        raise TypeError(f"{name}: expected a float32 vector, got None")
    cdef void *address = pointer(array, name, "f", (length,), writable)
    if <uintptr_t>address % sizeof(float):
        raise ValueError(f"{name}: not aligned to its items")
    return <float *>address


cdef bint overlap(const float *a, const float *b, int64_t length):
    cdef uintptr_t p = <uintptr_t>a, q = <uintptr_t>b, size = length * sizeof(float)
    return p < q + size and q < p + size


cdef int check_disjoint(const float *params, const float *grads, const float *a, const float *b, int64_t length) except -1:
    """Refuse vectors that share memory; `a` and `b` are an optimiser's own, NULL where it has none."""
    cdef const float **vectors = [params, grads, a, b]
    for i in range(4):
        for j in range(i):
            if vectors[i] != NULL and overlap(vectors[i], vectors[j], length):
                raise ValueError("params, grads and the optimiser's state share memory")
    return 0


# A square of a finite float32 is at most 2**256, so a sum of squares in float64 is finite if and only if every element is.
cdef tuple norm_of(const double *partials, int64_t blocks):
    cdef double squares = fc_sum_partials(partials, blocks)
    return squares, bool(isfinite(squares))


def weighted_sum(inputs, weights, out, int threads=1):
    """Add weights[i] * inputs[i] into out, in the fixed binary tree; return (sum of squares of out, all finite).

    `out` may be one of the inputs; a partial overlap is refused.
    """
    cdef fc_weighted_sum_args args
    cdef const float **sources = NULL
    cdef float *factors = NULL
    cdef int64_t i
    memset(&args, 0, sizeof(args))
    inputs = tuple(inputs)  # held while C reads them, whatever kind of sequence made them
    args.out = floats(out, "out", None, True)
    args.length, args.count = len(out), len(inputs)
    if args.count < 1 or len(weights) != args.count:
        raise ValueError(f"expected as many weights as inputs, at least one; got {len(weights)} and {args.count}")
    threads = fc_aggregate_threads(args.length, threads)
    try:
        sources = <const float **>malloc(args.count * sizeof(float *))
        factors = <float *>malloc(args.count * sizeof(float))
        args.partials = <double *>malloc(max(1, fc_aggregate_blocks(args.length)) * sizeof(double))
        args.scratch = <float *>malloc(max(1, threads * fc_weighted_sum_scratch(args.count)) * sizeof(float))
        if sources == NULL or factors == NULL or args.partials == NULL or args.scratch == NULL:
            raise MemoryError("fastcore could not allocate memory")
        for i in range(args.count):
            sources[i] = floats(inputs[i], f"inputs[{i}]", args.length)
            factors[i] = weights[i]
            if sources[i] != args.out and overlap(sources[i], args.out, args.length):
                raise ValueError(f"out overlaps a part of inputs[{i}]")
        args.inputs, args.weights = sources, factors
        run_now(fc_weighted_sum, &args, threads)
        return norm_of(args.partials, fc_aggregate_blocks(args.length))
    finally:
        free(sources)
        free(factors)
        free(args.partials)
        free(args.scratch)


def sum_of_squares(x, int threads=1):
    """Return (sum of squares of x in float64, all finite)."""
    cdef fc_sum_of_squares_args args
    args.x = floats(x, "x", None)
    args.length = len(x)
    args.partials = <double *>malloc(max(1, fc_aggregate_blocks(args.length)) * sizeof(double))
    if args.partials == NULL:
        raise MemoryError("fastcore could not allocate memory")
    try:
        run_now(fc_sum_of_squares, &args, fc_aggregate_threads(args.length, threads))
        return norm_of(args.partials, fc_aggregate_blocks(args.length))
    finally:
        free(args.partials)


def sgd_step(params, grads, double learning_rate, double weight_decay, double clip, int threads=1):
    """Set g = clip * grads + weight_decay * params and params -= learning_rate * g."""
    cdef fc_sgd_args args
    args.params = floats(params, "params", None, True)
    args.length = len(params)
    args.grads = floats(grads, "grads", args.length)
    check_disjoint(args.params, args.grads, NULL, NULL, args.length)
    args.sgd.learning_rate, args.sgd.weight_decay, args.sgd.clip = learning_rate, weight_decay, clip
    run_now(fc_sgd_step, &args, fc_aggregate_threads(args.length, threads))


def momentum_step(
    params, grads, velocity, double learning_rate, double momentum, double dampening, bint nesterov, double weight_decay,
    double clip, int threads=1,
):
    """Set velocity = momentum * velocity + (1 - dampening) * g and take it (or g + momentum * velocity) from params.

    torch starts the velocity as the undamped gradient: pass zeros and dampening 0 at the first step for that.
    """
    cdef fc_momentum_args args
    args.params = floats(params, "params", None, True)
    args.length = len(params)
    args.grads = floats(grads, "grads", args.length)
    args.velocity = floats(velocity, "velocity", args.length, True)
    check_disjoint(args.params, args.grads, args.velocity, NULL, args.length)
    args.momentum.learning_rate, args.momentum.weight_decay, args.momentum.clip = learning_rate, weight_decay, clip
    args.momentum.momentum, args.momentum.gain, args.momentum.nesterov = momentum, 1 - dampening, nesterov
    run_now(fc_momentum_step, &args, fc_aggregate_threads(args.length, threads))


def adam_step(
    params, grads, first, second, double learning_rate, double beta1, double beta2, double epsilon, double weight_decay,
    bint decoupled, int64_t step, double clip, int threads=1,
):
    """Take the step-th step (from 1) of Adam, or of AdamW where the decay is decoupled."""
    cdef fc_adam_args args
    args.params = floats(params, "params", None, True)
    args.length = len(params)
    args.grads = floats(grads, "grads", args.length)
    args.first = floats(first, "first", args.length, True)
    args.second = floats(second, "second", args.length, True)
    check_disjoint(args.params, args.grads, args.first, args.second, args.length)
    if step < 1:
        raise ValueError(f"step: expected 1 or more, got {step}")
    args.adam = fc_adam_constants(learning_rate, beta1, beta2, epsilon, weight_decay, decoupled, step, clip)
    run_now(fc_adam_step, &args, fc_aggregate_threads(args.length, threads))
