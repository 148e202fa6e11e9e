# The nn family's part of the border.
from cpython cimport array
import array


cdef extern from "nn/nn.h" nogil:
    enum:
        FC_LOSS_ROWS
        FC_LOSS_ITEMS
    ctypedef struct fc_elementwise:
        fc_activation kind
        float factor
        int64_t n, period
        const float *a
        const float *b
        float *out
    ctypedef struct fc_rows:
        int64_t m, n
        float epsilon
        const float *x
        const float *dy
        const float *gamma
        const float *beta
        float *out
        float *dgamma
        float *dbeta
        float *stats
    ctypedef struct fc_loss:
        int64_t m, n
        double temperature, alpha
        const float *x
        const float *target
        const int64_t *labels
        const float *dloss
        int64_t count, chunks
        double *partials
        float *out
    void fc_nn_activate(const void *args, int rank, int size) noexcept
    void fc_nn_activate_grad(const void *args, int rank, int size) noexcept
    void fc_nn_add(const void *args, int rank, int size) noexcept
    void fc_nn_multiply(const void *args, int rank, int size) noexcept
    void fc_nn_scale(const void *args, int rank, int size) noexcept
    void fc_nn_column_sum(const void *args, int rank, int size) noexcept
    void fc_nn_layer_norm(const void *args, int rank, int size) noexcept
    void fc_nn_layer_norm_lanes(const void *args, int rank, int size) noexcept
    void fc_nn_layer_norm_grad(const void *args, int rank, int size) noexcept
    void fc_nn_layer_norm_grad_columns(const void *args, int rank, int size) noexcept
    void fc_nn_softmax(const void *args, int rank, int size) noexcept
    void fc_nn_softmax_grad(const void *args, int rank, int size) noexcept
    void fc_nn_transpose(const void *args, int rank, int size) noexcept
    void fc_nn_cross_entropy(const void *args, int rank, int size) noexcept
    void fc_nn_cross_entropy_grad(const void *args, int rank, int size) noexcept
    void fc_nn_squared_error(const void *args, int rank, int size) noexcept
    void fc_nn_squared_error_grad(const void *args, int rank, int size) noexcept
    void fc_nn_distillation(const void *args, int rank, int size) noexcept
    void fc_nn_distillation_grad(const void *args, int rank, int size) noexcept
    void fc_nn_loss_mean(const void *args, int rank, int size) noexcept


cdef int64_t items(tuple shape):
    cdef int64_t count = 1
    for extent in shape:
        count *= extent
    return count


cdef int add_elementwise(
    Program program, fc_step_fn *run, str kind, float factor, tuple a, tuple b, tuple out, bint repeats=False,
) except -1:
    """Append an elementwise step; a, b, out are (array, name), all of one shape, b's array None where there is no second.

    Where `repeats`, b may have the last dimensions alone.
    """
    cdef fc_elementwise e
    memset(&e, 0, sizeof(e))
    shape = tuple(a[0].shape)
    of_b = shape[len(shape) - b[0].ndim:] if repeats and b[0] is not None and b[0].ndim <= len(shape) else shape
    e.kind, e.factor, e.n, e.period = activation_of(kind), factor, items(shape), items(of_b)
    e.a = <const float *>pointer(a[0], a[1], "f", shape)
    e.b = <const float *>optional_pointer(b[0], b[1], "f", of_b)
    e.out = <float *>pointer(out[0], out[1], "f", shape, True)
    return program.add(run, &e, sizeof(e), (a[0], b[0], out[0]))


def activate(Program program, str kind, x not None, out not None):
    """Append out = activation(x), elementwise; out may be x."""
    add_elementwise(program, fc_nn_activate, kind, 0, (x, "x"), (None, ""), (out, "out"))


def activate_grad(Program program, str kind, dy not None, x not None, dx not None):
    """Append dx = dy * activation'(x), from the activation's input x."""
    add_elementwise(program, fc_nn_activate_grad, kind, 0, (dy, "dy"), (x, "x"), (dx, "dx"))


def add(Program program, a not None, b not None, out not None):
    """Append out = a + b, b repeated where it has the last dimensions alone; out may be a or b."""
    add_elementwise(program, fc_nn_add, None, 0, (a, "a"), (b, "b"), (out, "out"), True)


def multiply(Program program, a not None, b not None, out not None):
    """Append out = a * b, b repeated where it has the last dimensions alone; out may be a or b."""
    add_elementwise(program, fc_nn_multiply, None, 0, (a, "a"), (b, "b"), (out, "out"), True)


def scale(Program program, x not None, float factor, out not None):
    """Append out = factor * x; out may be x."""
    add_elementwise(program, fc_nn_scale, None, factor, (x, "x"), (None, ""), (out, "out"))


cdef int rows_of(fc_rows *a, x) except -1:
    """Start an argument block for the float32 matrix x."""
    memset(a, 0, sizeof(fc_rows))
    a.x = <const float *>pointer(x, "x", "f", (None, None))
    a.m, a.n = x.shape
    return 0


def column_sum(Program program, x not None, out not None):
    """Append out[N] = the sum over M of x[M,N]."""
    cdef fc_rows a
    rows_of(&a, x)
    a.out = <float *>pointer(out, "out", "f", (a.n,), True)
    program.add(fc_nn_column_sum, &a, sizeof(a), (x, out))


def layer_norm(Program program, x not None, gamma, beta, float epsilon, out not None, bint lanes=False):
    """Append out = (x - mean) / sqrt(variance + epsilon) * gamma + beta along the rows of x[M,N]; out may be x.

    With `lanes`, x and out are [N,M]; the bits are the same.
    """
    cdef fc_rows a
    rows_of(&a, x)
    if lanes:
        a.m, a.n = a.n, a.m
    a.epsilon = epsilon
    a.gamma = <const float *>optional_pointer(gamma, "gamma", "f", (a.n,))
    a.beta = <const float *>optional_pointer(beta, "beta", "f", (a.n,))
    a.out = <float *>pointer(out, "out", "f", (a.n, a.m) if lanes else (a.m, a.n), True)
    program.add(fc_nn_layer_norm_lanes if lanes else fc_nn_layer_norm, &a, sizeof(a), (x, gamma, beta, out))


def layer_norm_grad(Program program, dy not None, x not None, gamma, float epsilon, dx not None, dgamma, dbeta):
    """Append the gradients of layer_norm; with dgamma or dbeta, dx must be neither dy nor x."""
    cdef fc_rows a
    cdef array.array stats = None
    rows_of(&a, x)
    a.epsilon = epsilon
    a.dy = <const float *>pointer(dy, "dy", "f", (a.m, a.n))
    a.gamma = <const float *>optional_pointer(gamma, "gamma", "f", (a.n,))
    a.out = <float *>pointer(dx, "dx", "f", (a.m, a.n), True)
    a.dgamma = <float *>optional_pointer(dgamma, "dgamma", "f", (a.n,), True)
    a.dbeta = <float *>optional_pointer(dbeta, "dbeta", "f", (a.n,), True)
    if dgamma is None and dbeta is None:
        program.add(fc_nn_layer_norm_grad, &a, sizeof(a), (dy, x, gamma, dx))
        return
    if a.out == a.dy or a.out == a.x:
        raise ValueError("dx: with dgamma or dbeta it must be neither dy nor x")
    stats = array.clone(array.array("f"), 2 * a.m, False)
    a.stats = stats.data.as_floats
    program.add(fc_nn_layer_norm_grad, &a, sizeof(a), (dy, x, gamma, dx, stats))
    program.add(fc_nn_layer_norm_grad_columns, &a, sizeof(a), (dgamma, dbeta))


def softmax(Program program, x not None, out not None):
    """Append out = softmax(x) along the rows of x[M,N]; out may be x."""
    cdef fc_rows a
    rows_of(&a, x)
    a.out = <float *>pointer(out, "out", "f", (a.m, a.n), True)
    program.add(fc_nn_softmax, &a, sizeof(a), (x, out))


def softmax_grad(Program program, dy not None, y not None, dx not None):
    """Append dx = y * (dy - sum of dy * y) along the rows, from the softmax's output y; dx may be dy or y."""
    cdef fc_rows a
    rows_of(&a, y)
    a.dy = <const float *>pointer(dy, "dy", "f", (a.m, a.n))
    a.out = <float *>pointer(dx, "dx", "f", (a.m, a.n), True)
    program.add(fc_nn_softmax_grad, &a, sizeof(a), (dy, y, dx))


def transpose(Program program, x not None, out not None):
    """Append out[N,M] = x[M,N] transposed; no overlap."""
    cdef fc_rows a
    rows_of(&a, x)
    a.out = <float *>pointer(out, "out", "f", (a.n, a.m), True)
    program.add(fc_nn_transpose, &a, sizeof(a), (x, out))


cdef int logits_of(fc_loss *a, logits, labels, teacher) except -1:
    """Start an argument block for logits[M,C], labels[M] and, unless None, the teacher's logits[M,C]."""
    memset(a, 0, sizeof(fc_loss))
    a.x = <const float *>pointer(logits, "logits", "f", (None, None))
    a.m, a.n = logits.shape
    a.count = a.m
    a.labels = <const int64_t *>pointer(labels, "labels", "q", (a.m,))
    a.target = <const float *>optional_pointer(teacher, "teacher", "f", (a.m, a.n))
    return 0


cdef int pair_of(fc_loss *a, x, target) except -1:
    """Start an argument block for the squared error of two arrays of one shape."""
    memset(a, 0, sizeof(fc_loss))
    shape = tuple(x.shape)
    a.x = <const float *>pointer(x, "x", "f", shape)
    a.target = <const float *>pointer(target, "target", "f", shape)
    a.m, a.n = 1, items(shape)
    a.count = a.n
    return 0


cdef int soften(fc_loss *a, double temperature, double alpha) except -1:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    a.temperature, a.alpha = temperature, alpha
    return 0


cdef int add_loss(Program program, fc_step_fn *run, fc_loss *a, int64_t chunk, int64_t length, tuple inputs, loss) except -1:
    """Append the partial sums of `length` rows or elements in chunks, and their mean."""
    cdef array.array partials
    a.chunks = (length + chunk - 1) // chunk
    a.out = <float *>pointer(loss, "loss", "f", (), True)
    partials = array.clone(array.array("d"), a.chunks, False)
    a.partials = partials.data.as_doubles
    program.add(run, a, sizeof(fc_loss), inputs)
    return program.add(fc_nn_loss_mean, a, sizeof(fc_loss), (partials, loss))


cdef int add_loss_grad(Program program, fc_step_fn *run, fc_loss *a, dloss, tuple inputs, dx, str name) except -1:
    a.dloss = <const float *>pointer(dloss, "dloss", "f", ())
    a.out = <float *>pointer(dx, name, "f", tuple(inputs[0].shape), True)
    return program.add(run, a, sizeof(fc_loss), (dloss, inputs, dx))


def cross_entropy(Program program, logits not None, labels not None, loss not None):
    """Append loss[()] = the mean over M of -log softmax(logits)[label]; a label outside [0, C) makes it NaN."""
    cdef fc_loss a
    logits_of(&a, logits, labels, None)
    add_loss(program, fc_nn_cross_entropy, &a, FC_LOSS_ROWS, a.m, (logits, labels), loss)


def cross_entropy_grad(Program program, dloss not None, logits not None, labels not None, dlogits not None):
    """Append the gradient of cross_entropy; the row of a label outside [0, C) is NaN. dlogits may be logits."""
    cdef fc_loss a
    logits_of(&a, logits, labels, None)
    add_loss_grad(program, fc_nn_cross_entropy_grad, &a, dloss, (logits, labels), dlogits, "dlogits")


def mean_squared_error(Program program, x not None, target not None, loss not None):
    """Append loss[()] = the mean of (x - target)^2 over all elements."""
    cdef fc_loss a
    pair_of(&a, x, target)
    add_loss(program, fc_nn_squared_error, &a, FC_LOSS_ITEMS, a.n, (x, target), loss)


def mean_squared_error_grad(Program program, dloss not None, x not None, target not None, dx not None):
    """Append dx = dloss * 2 (x - target) / elements; dx may be x or target."""
    cdef fc_loss a
    pair_of(&a, x, target)
    add_loss_grad(program, fc_nn_squared_error_grad, &a, dloss, (x, target), dx, "dx")


def distillation(
    Program program, logits not None, teacher not None, labels not None, double temperature, double alpha, loss not None,
):
    """Append Hinton's loss; a term of weight 0 (alpha = 0 or 1) is not evaluated, so that alpha = 1 needs no valid labels."""
    cdef fc_loss a
    logits_of(&a, logits, labels, teacher)
    soften(&a, temperature, alpha)
    add_loss(program, fc_nn_distillation, &a, FC_LOSS_ROWS, a.m, (logits, teacher, labels), loss)


def distillation_grad(
    Program program, dloss not None, logits not None, teacher not None, labels not None, double temperature, double alpha,
    dlogits not None,
):
    """Append the gradient of distillation with respect to the logits; dlogits must be neither input."""
    cdef fc_loss a
    logits_of(&a, logits, labels, teacher)
    soften(&a, temperature, alpha)
    add_loss_grad(program, fc_nn_distillation_grad, &a, dloss, (logits, teacher, labels), dlogits, "dlogits")
