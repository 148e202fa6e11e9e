# The prune family's part of the border.

from libc.string cimport memcpy

cdef extern from "prune/prune.h" nogil:
    ctypedef struct fc_vectors:
        const float **x
        const int64_t *n
        int64_t count, total
    ctypedef struct fc_selection:
        uint32_t bits
        int64_t below, equal
    ctypedef struct fc_block_grid:
        float *weight
        int64_t n, k, block_rows, block_cols
        const float *norms
        const uint8_t *mask
        float *out
    fc_status fc_select_magnitude(const fc_vectors *x, int64_t k, int threads, fc_selection *found)
    fc_status fc_magnitude_mask(const fc_vectors *x, int64_t drop, int threads, uint8_t **masks)
    fc_status fc_magnitude_mask_rows(const float *x, int64_t rows, int64_t columns, int64_t drop, int threads, uint8_t *mask)
    fc_status fc_n_of_m_mask(const float *x, int64_t n, int64_t keep, int64_t of, int threads, uint8_t *mask)
    void fc_block_magnitudes(const void *grid, int rank, int size) noexcept
    void fc_channel_magnitudes(const void *grid, int rank, int size) noexcept
    void fc_apply_mask(const void *grid, int rank, int size) noexcept


cdef int check_magnitudes(fc_status status) except -1:
    if status == FC_BAD_ARGUMENT:
        raise ValueError("x holds a NaN, which has no place among magnitudes")
    return check(status)


cdef class Vectors:
    """Flat float32 arrays that count as one, and a mask for each of them or none."""
    cdef fc_vectors view
    cdef void *memory
    cdef uint8_t **masks

    def __cinit__(self, list arrays, list masks=None):
        cdef int64_t i, count = len(arrays)
        if masks is not None and len(masks) != count:
            raise ValueError(f"mask: expected {count} arrays, got {len(masks)}")
        self.memory = malloc((3 * count + 1) * 8)
        if self.memory == NULL:
            raise MemoryError("fastcore could not allocate memory")
        cdef const float **x = <const float **>self.memory
        cdef int64_t *n = <int64_t *>self.memory + count
        self.masks = <uint8_t **>self.memory + 2 * count
        for i in range(count):
            x[i] = <const float *>pointer(arrays[i], "x", "f", (None,))
            n[i] = arrays[i].shape[0]
            self.view.total += n[i]
            if masks is not None:
                self.masks[i] = <uint8_t *>pointer(masks[i], "mask", "B", (n[i],), True)
        self.view.x, self.view.n, self.view.count = x, n, count

    def __dealloc__(self):
        free(self.memory)


cdef list as_list(object arrays):
    return list(arrays) if isinstance(arrays, (list, tuple)) else [arrays]


def kth_magnitude(object x not None, int64_t k, int threads=1):
    """Return the exact k-th smallest |x| (k from 1) of flat float32 arrays taken as one; ValueError if x holds a NaN."""
    cdef Vectors vectors = Vectors(as_list(x))
    cdef fc_selection found
    cdef fc_status status
    cdef float kth
    if not 1 <= k <= vectors.view.total:
        raise ValueError(f"k: expected 1 to {vectors.view.total}, got {k}")
    with nogil:
        status = fc_select_magnitude(&vectors.view, k, threads, &found)
    check_magnitudes(status)
    memcpy(&kth, &found.bits, sizeof(kth))
    return kth


def magnitude_mask(object x not None, int64_t drop, object mask not None, int threads=1):
    """Write mask (uint8): 0 for exactly the `drop` smallest |x|, ties by lowest index, 1 for the rest; NaN is a ValueError."""
    cdef Vectors vectors = Vectors(as_list(x), as_list(mask))
    cdef fc_status status
    if not 0 <= drop <= vectors.view.total:
        raise ValueError(f"drop: expected 0 to {vectors.view.total}, got {drop}")
    with nogil:
        status = fc_magnitude_mask(&vectors.view, drop, threads, vectors.masks)
    check_magnitudes(status)


def magnitude_mask_rows(object x not None, int64_t drop, object mask not None, int threads=1):
    """Write mask[n, k]: in each row 0 for exactly the `drop` smallest |x[n, k]|, as magnitude_mask does."""
    cdef const float *values = <const float *>pointer(x, "x", "f", (None, None))
    cdef int64_t rows, columns
    cdef fc_status status
    rows, columns = x.shape
    cdef uint8_t *out = <uint8_t *>pointer(mask, "mask", "B", (rows, columns), True)
    if not 0 <= drop <= columns:
        raise ValueError(f"drop: expected 0 to {columns}, got {drop}")
    with nogil:
        status = fc_magnitude_mask_rows(values, rows, columns, drop, threads, out)
    check_magnitudes(status)


def n_of_m_mask(object x not None, int64_t keep, int64_t of, object mask not None, int threads=1):
    """Write mask[n, k]: 1 for the `keep` largest |x[n, k]| of each `of` neighbours in a row, 0 for the rest."""
    cdef const float *values = <const float *>pointer(x, "x", "f", (None, None))
    cdef int64_t rows, columns
    cdef fc_status status
    rows, columns = x.shape
    cdef uint8_t *out = <uint8_t *>pointer(mask, "mask", "B", (rows, columns), True)
    if not 1 <= of <= 64 or columns % of or not 0 <= keep <= of:
        raise ValueError(f"{keep} of {of} cannot be kept in rows of {columns}")
    with nogil:
        status = fc_n_of_m_mask(values, rows * columns, keep, of, threads, out)
    check_magnitudes(status)


cdef tuple block_shape(object shape, tuple block):
    """Return (n / r, k / c) after checking that blocks of [r, c] tile an [n, k] matrix."""
    cdef int64_t n, k, r, c
    n, k = shape
    r, c = block
    if r < 1 or c < 1 or n % r or k % c:
        raise ValueError(f"blocks of {block} do not tile a weight of shape {tuple(shape)}")
    return (n // r, k // c)


def block_magnitudes(object weight not None, tuple block not None, object out not None, int threads=1, object norms=None):
    """Write out[n/r, k/c] = the sum of squares of each block of weight[n, k], column j times norms[j] where they are given."""
    cdef fc_block_grid grid
    grid.weight = <float *>pointer(weight, "weight", "f", (None, None))
    grid.out = <float *>pointer(out, "out", "f", block_shape(weight.shape, block), True)
    grid.n, grid.k = weight.shape
    grid.norms = <const float *>optional_pointer(norms, "norms", "f", (grid.k,))
    grid.block_rows, grid.block_cols = block
    run_now(fc_block_magnitudes, &grid, threads)


def channel_magnitudes(object weight not None, object norms not None, object out not None, int threads=1):
    """Write out[n, k] = |weight[n, k]| * norms[k]."""
    cdef fc_block_grid grid
    grid.weight = <float *>pointer(weight, "weight", "f", (None, None))
    grid.n, grid.k = weight.shape
    grid.norms = <const float *>pointer(norms, "norms", "f", (grid.k,))
    grid.out = <float *>pointer(out, "out", "f", (grid.n, grid.k), True)
    run_now(fc_channel_magnitudes, &grid, threads)


def apply_mask(object weight not None, object mask not None, tuple block not None, int threads=1):
    """Set the blocks of weight[n, k] to 0 where mask[n/r, k/c] is 0, in place."""
    cdef fc_block_grid grid
    grid.weight = <float *>pointer(weight, "weight", "f", (None, None), True)
    grid.n, grid.k = weight.shape
    grid.mask = <const uint8_t *>pointer(mask, "mask", "B", block_shape(weight.shape, block))
    grid.block_rows, grid.block_cols = block
    run_now(fc_apply_mask, &grid, threads)
