# The attention family's part of the border.
cdef extern from "attention/attention.h" nogil:
    ctypedef struct fc_attention_args:
        int64_t batch, queries, keys, heads, width
        float scale
        int is_bf16
        const float *q
        const float *k
        const float *v
        const int64_t *mask
        const uint8_t *mask_bool
        const int64_t *offsets
        float *out
        const float *dout
        float *dq
        float *dk
        float *dv
        void *scratch
        int64_t scratch_bytes
    void fc_attention(const void *args, int rank, int size) noexcept
    void fc_attention_grad(const void *args, int rank, int size) noexcept
    int64_t fc_attention_scratch(int64_t keys, int64_t width, int threads)
    int64_t fc_attention_grad_scratch(int64_t keys, int64_t width, int threads)


def attention_scratch(int64_t keys, int64_t width, int threads, bint grad=False):
    """Return the bytes of scratch of attention or its gradient for at most `keys` keys a sequence; with less, fewer threads."""
    return fc_attention_grad_scratch(keys, width, threads) if grad else fc_attention_scratch(keys, width, threads)


cdef int attended_of(fc_attention_args *a, q, k, v, mask, offsets, int64_t heads, float scale, scratch) except -1:
    """Start an argument block: q [batch, queries, columns] with an optional mask, or q [rows, columns] with offsets."""
    cdef int64_t columns
    memset(a, 0, sizeof(fc_attention_args))
    if heads < 1 or not 0 < scale < float("inf"):
        raise ValueError(f"heads must be at least 1 and scale positive and finite, got {heads} and {scale}")
    if offsets is None:
        a.q = <const float *>pointer(q, "q", "f", (None, None, None))
        a.batch, a.queries, columns = q.shape
        a.k = <const float *>pointer(k, "k", "f", (a.batch, None, columns))
        a.keys = k.shape[1]
        a.v = <const float *>pointer(v, "v", "f", (a.batch, a.keys, columns))
    else:
        a.q = <const float *>pointer(q, "q", "f", (None, None))
        a.queries, columns = q.shape
        a.keys = a.queries
        a.k = <const float *>pointer(k, "k", "f", (a.queries, columns))
        a.v = <const float *>pointer(v, "v", "f", (a.queries, columns))
        a.offsets = <const int64_t *>pointer(offsets, "offsets", "q", (None,))
        a.batch = max(offsets.shape[0] - 1, 0)
    if columns % heads:
        raise ValueError(f"q has {columns} columns, which do not divide by {heads} heads")
    if mask is not None and mask.dtype.kind == "b":
        a.mask_bool = <const uint8_t *>pointer(mask, "mask", "?", (a.batch, a.keys))
    elif mask is not None:
        a.mask = <const int64_t *>pointer(mask, "mask", "q", (a.batch, a.keys))
    a.heads, a.width, a.scale = heads, columns // heads, scale
    a.scratch = pointer(scratch, "scratch", "B", (None,), True)
    a.scratch_bytes = scratch.shape[0]
    return 0


cdef int is_bf16(str precision) except -1:
    if precision not in ("float32", "bf16"):
        raise ValueError(f"precision must be float32 or bf16, got {precision!r}")
    return precision == "bf16"


cdef int add_attention(Program program, fc_attention_args *a, out, tuple inputs) except -1:
    if a.scratch_bytes < fc_attention_scratch(a.keys, a.width, 1):
        raise ValueError("scratch: too small for one thread")
    a.out = <float *>pointer(out, "out", "f", tuple(inputs[0].shape), True)
    return program.add(fc_attention, a, sizeof(fc_attention_args), (*inputs, out))


cdef int add_attention_grad(Program program, fc_attention_args *a, dout, dq, dk, dv, tuple inputs) except -1:
    if a.scratch_bytes < fc_attention_grad_scratch(a.keys, a.width, 1):
        raise ValueError("scratch: too small for one thread")
    a.dout = <const float *>pointer(dout, "dout", "f", tuple(inputs[0].shape))
    a.dq = <float *>pointer(dq, "dq", "f", tuple(inputs[0].shape), True)
    a.dk = <float *>pointer(dk, "dk", "f", tuple(inputs[1].shape), True)
    a.dv = <float *>pointer(dv, "dv", "f", tuple(inputs[1].shape), True)
    return program.add(fc_attention_grad, a, sizeof(fc_attention_args), (*inputs, dout, dq, dk, dv))


def masked_attention(
    Program program, q not None, k not None, v not None, mask, int64_t heads, float scale, out not None, scratch not None,
    str precision="float32",
):
    """Append out[B,L,H*W] = softmax(scale q k^T) v per head; keys whose mask[B,S] is 0 do not count.

    precision "bf16" rounds q, k, v and the probabilities; sums are float32.
    """
    cdef fc_attention_args a
    attended_of(&a, q, k, v, mask, None, heads, scale, scratch)
    a.is_bf16 = is_bf16(precision)
    add_attention(program, &a, out, (q, k, v, mask, scratch))


def packed_attention(
    Program program, q not None, k not None, v not None, offsets not None, int64_t heads, float scale, out not None,
    scratch not None, str precision="float32",
):
    """Append the same within each segment offsets[s] to offsets[s + 1] of q, k, v [rows, H*W]."""
    cdef fc_attention_args a
    attended_of(&a, q, k, v, None, offsets, heads, scale, scratch)
    a.is_bf16 = is_bf16(precision)
    add_attention(program, &a, out, (q, k, v, offsets, scratch))


def masked_attention_grad(
    Program program, dout not None, q not None, k not None, v not None, mask, int64_t heads, float scale, dq not None,
    dk not None, dv not None, scratch not None,
):
    """Append the gradients of masked_attention."""
    cdef fc_attention_args a
    attended_of(&a, q, k, v, mask, None, heads, scale, scratch)
    add_attention_grad(program, &a, dout, dq, dk, dv, (q, k, v, mask, scratch))


def packed_attention_grad(
    Program program, dout not None, q not None, k not None, v not None, offsets not None, int64_t heads, float scale,
    dq not None, dk not None, dv not None, scratch not None,
):
    """Append the gradients of packed_attention."""
    cdef fc_attention_args a
    attended_of(&a, q, k, v, None, offsets, heads, scale, scratch)
    add_attention_grad(program, &a, dout, dq, dk, dv, (q, k, v, offsets, scratch))
