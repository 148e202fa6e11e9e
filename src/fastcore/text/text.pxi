# The text family's part of the border.
cdef extern from "text/text.h" nogil:
    enum:
        FC_TABLES
    ctypedef enum fc_pooling:
        FC_POOL_MEAN
        FC_POOL_SQRT
        FC_POOL_WEIGHTED
        FC_POOL_MAX
        FC_POOL_FIRST
    ctypedef struct fc_indices:
        const void *values
        int wide
    ctypedef struct fc_gather:
        int64_t outer, places, inner, count
        fc_indices indices
        const float *data
        const fc_int4_weight *table
        float *out
    ctypedef struct fc_lookups:
        int64_t tables, count, n
        int64_t places[4]
        fc_indices indices[4]
        const float *data[4]
        const fc_int4_weight *packed[4]
        float *out
    ctypedef struct fc_token_pool:
        fc_pooling mode
        int64_t segments, length, rows, n
        const float *x
        const float *dy
        const void *mask
        int mask_bytes
        const int64_t *offsets
        float *out
    void fc_text_gather(const void *args, int rank, int size) noexcept
    void fc_text_gather_grad(const void *args, int rank, int size) noexcept
    void fc_text_lookups(const void *args, int rank, int size) noexcept
    void fc_text_pool(const void *args, int rank, int size) noexcept
    void fc_text_pool_grad(const void *args, int rank, int size) noexcept
    void fc_text_normalize(const void *args, int rank, int size) noexcept
    void fc_text_normalize_grad(const void *args, int rank, int size) noexcept
    void fc_text_cosine(const void *args, int rank, int size) noexcept
    void fc_text_cosine_grad(const void *args, int rank, int size) noexcept

POOLINGS = {
    "mean": FC_POOL_MEAN, "sqrt": FC_POOL_SQRT, "weighted": FC_POOL_WEIGHTED, "max": FC_POOL_MAX, "first": FC_POOL_FIRST,
}


cdef str kind_of(object array):
    """Return the struct format of a buffer's items."""
    return memoryview(array).format


cdef int indices_of(fc_indices *indices, object array, int64_t count) except -1:
    """Fill in `count` int64 or int32 indices."""
    shape = tuple(array.shape)
    if items(shape) != count:
        raise ValueError(f"indices: expected {count} of them, got shape {shape}")
    indices.wide = kind_of(array) in "ql" and memoryview(array).itemsize == 8
    indices.values = pointer(array, "indices", "q" if indices.wide else "i", shape)
    return 0


def gather(Program program, data not None, indices not None, out not None):
    """Append out[O,C,N] = data[O,P,N] by C indices along the middle axis; a row of NaN stands for an index outside of it.

    Data may be an Int4Weight [P,N], of which O is 1.
    """
    cdef fc_gather g
    memset(&g, 0, sizeof(g))
    if isinstance(data, Int4Weight):
        g.table = &(<Int4Weight>data).view
        g.outer, g.places, g.inner = 1, g.table.n, g.table.k
    else:
        g.data = <const float *>pointer(data, "data", "f", (None, None, None))
        g.outer, g.places, g.inner = data.shape
    g.count = items(tuple(indices.shape))
    indices_of(&g.indices, indices, g.count)
    g.out = <float *>pointer(out, "out", "f", (g.outer, g.count, g.inner), True)
    program.add(fc_text_gather, &g, sizeof(g), (data, indices, out))


def gather_grad(Program program, dy not None, indices not None, grad not None):
    """Append grad[O,P,N] = the sum of the rows of dy[O,C,N] where their indices lead, in the order of the indices."""
    cdef fc_gather g
    memset(&g, 0, sizeof(g))
    g.out = <float *>pointer(grad, "grad", "f", (None, None, None), True)
    g.outer, g.places, g.inner = grad.shape
    g.count = items(tuple(indices.shape))
    indices_of(&g.indices, indices, g.count)
    g.data = <const float *>pointer(dy, "dy", "f", (g.outer, g.count, g.inner))
    program.add(fc_text_gather_grad, &g, sizeof(g), (dy, indices, grad))


def lookups(Program program, out not None, *pairs):
    """Append out[C,N] = the sum of rows of tables[P,N] by C indices each, given as table, indices, table, indices, ...

    A table may be an Int4Weight.
    """
    cdef fc_lookups a
    cdef int t
    memset(&a, 0, sizeof(a))
    a.out = <float *>pointer(out, "out", "f", (None, None), True)
    a.count, a.n = out.shape
    a.tables = len(pairs) // 2
    if len(pairs) % 2 or not 1 <= a.tables <= FC_TABLES:
        raise ValueError(f"lookups take 1 to {FC_TABLES} tables, each with its indices")
    for t in range(a.tables):
        table, indices = pairs[2 * t], pairs[2 * t + 1]
        a.places[t] = table.shape[0]
        if isinstance(table, Int4Weight):
            a.packed[t] = &(<Int4Weight>table).view
            if a.packed[t].k != a.n:
                raise ValueError(f"table: expected rows of {a.n}, got {table.shape}")
        else:
            a.data[t] = <const float *>pointer(table, "table", "f", (None, a.n))
        indices_of(&a.indices[t], indices, a.count)
    program.add(fc_text_lookups, &a, sizeof(a), (out, pairs))


cdef int add_pool(Program program, fc_step_fn *run, str mode, x, mask, offsets, dy, out) except -1:
    """Append a pooling of x, or its gradient where there is a dy."""
    cdef fc_token_pool p
    memset(&p, 0, sizeof(p))
    if mode not in POOLINGS:
        raise ValueError(f"unknown pooling {mode!r}; choose one of {', '.join(POOLINGS)}")
    p.mode = POOLINGS[mode]
    if offsets is None:
        p.x = <const float *>pointer(x, "x", "f", (None, None, None))
        p.segments, p.length, p.n = x.shape
        p.rows = p.segments * p.length
        kind = "?" if kind_of(mask) == "?" else "q"
        p.mask = pointer(mask, "mask", kind, (p.segments, p.length))
        p.mask_bytes = 1 if kind == "?" else 8
    else:
        p.x = <const float *>pointer(x, "x", "f", (None, None))
        p.rows, p.n = x.shape
        p.offsets = <const int64_t *>pointer(offsets, "offsets", "q", (None,))
        p.segments = offsets.shape[0] - 1
        if p.segments < 0:
            raise ValueError("offsets: expected at least one")
    p.dy = <const float *>optional_pointer(dy, "dy", "f", (p.segments, p.n))
    shape = (p.segments, p.n) if dy is None else tuple(x.shape)
    p.out = <float *>pointer(out, "out", "f", shape, True)
    return program.add(run, &p, sizeof(p), (x, mask, offsets, dy, out))


def masked_pool(Program program, str mode, x not None, mask not None, out not None):
    """Append out[B,N] = one vector for each sequence of x[B,S,N] from the tokens where mask[B,S], int64 or bool, is not 0."""
    add_pool(program, fc_text_pool, mode, x, mask, None, None, out)


def masked_pool_grad(Program program, str mode, dy not None, x not None, mask not None, dx not None):
    """Append the gradient of masked_pool in x."""
    add_pool(program, fc_text_pool_grad, mode, x, mask, None, dy, dx)


def packed_pool(Program program, str mode, x not None, offsets not None, out not None):
    """Append out[B,N] = one vector for each sequence of x[R,N], whose rows begin and end at offsets[B+1]."""
    add_pool(program, fc_text_pool, mode, x, None, offsets, None, out)


def packed_pool_grad(Program program, str mode, dy not None, x not None, offsets not None, dx not None):
    """Append the gradient of packed_pool in x."""
    add_pool(program, fc_text_pool_grad, mode, x, None, offsets, dy, dx)


def normalize(Program program, x not None, out not None):
    """Append out = x / norm along the rows of x[M,N]; rows of zeros stay zeros; out may be x."""
    cdef fc_rows a
    rows_of(&a, x)
    a.out = <float *>pointer(out, "out", "f", (a.m, a.n), True)
    program.add(fc_text_normalize, &a, sizeof(a), (x, out))


def normalize_grad(Program program, dy not None, x not None, dx not None):
    """Append the gradient of normalize; dx may be dy or x."""
    cdef fc_rows a
    rows_of(&a, x)
    a.dy = <const float *>pointer(dy, "dy", "f", (a.m, a.n))
    a.out = <float *>pointer(dx, "dx", "f", (a.m, a.n), True)
    program.add(fc_text_normalize_grad, &a, sizeof(a), (dy, x, dx))


cdef int rows_pair_of(fc_loss *a, x, target) except -1:
    """Start an argument block for two matrices of one shape."""
    memset(a, 0, sizeof(fc_loss))
    a.x = <const float *>pointer(x, "x", "f", (None, None))
    a.m, a.n = x.shape
    a.target = <const float *>pointer(target, "target", "f", (a.m, a.n))
    a.count = a.m
    return 0


def cosine(Program program, x not None, target not None, loss not None):
    """Append loss[()] = the mean over M of 1 - the cosine of x[M,N] and target[M,N]; a row of zeros has cosine 0."""
    cdef fc_loss a
    rows_pair_of(&a, x, target)
    add_loss(program, fc_text_cosine, &a, FC_LOSS_ROWS, a.m, (x, target), loss)


def cosine_grad(Program program, dloss not None, x not None, target not None, dx not None):
    """Append the gradient of cosine in x; dx may be x or target."""
    cdef fc_loss a
    rows_pair_of(&a, x, target)
    add_loss_grad(program, fc_text_cosine_grad, &a, dloss, (x, target), dx, "dx")
