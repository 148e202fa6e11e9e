"""The border between Python and fastcore: buffer to pointer, GIL off, call, check. No loops over data, no policy.

Every array argument is checked here for dtype, shape, contiguity and writability, so that C may trust them. Functions that take
a `Program` append a step to it and keep the arrays alive; the others run at once on `threads` threads.
"""
import os

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint32_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset


cdef extern from "fastcore.h" nogil:
    ctypedef enum fc_status:
        FC_OK
        FC_BAD_ARGUMENT
        FC_NO_MEMORY
        FC_STALE
    ctypedef struct fc_slot_info:
        const char *name
        const char *variant
        const char *best
        const char *reason
    ctypedef struct fc_program:
        pass
    ctypedef void fc_step_fn(const void *args, int rank, int size) noexcept nogil
    fc_status fc_set_isa(const char *cap)
    unsigned fc_generation()
    int fc_slot_count()
    fc_slot_info fc_slot(int index)
    fc_program *fc_program_new()
    void fc_program_free(fc_program *program)
    fc_status fc_program_add(fc_program *program, fc_step_fn *run, const void *args, size_t size)
    void fc_program_overlap(fc_program *program)
    int64_t fc_program_length(const fc_program *program)
    fc_status fc_program_run(const fc_program *program, int threads)
    ctypedef struct fc_slices:
        char *outside
        char **inside
        size_t bytes
    ctypedef struct fc_map:
        fc_program **programs
        int ranks
        const fc_slices *inputs
        const fc_slices *outputs
        int input_count, output_count
        int64_t items
    fc_status fc_program_map(const fc_map *map)
    fc_status fc_run_step(fc_step_fn *run, const void *args, int threads)
    int fc_has_threads()

cdef extern from "weight.h" nogil:
    ctypedef enum fc_weight_kind:
        FC_DENSE_F32
        FC_DENSE_BF16
        FC_DENSE_S8
        FC_BLOCKS_F32
        FC_BLOCKS_S8
        FC_BITMASK_F32
        FC_BITMASK_S8
        FC_BITMASK_S4
    ctypedef struct fc_weight:
        fc_weight_kind kind
        int64_t n, k
        const void *values
        const float *scale
        const int32_t *row_offsets
        const int32_t *index
        int32_t block_rows, block_cols
        const uint8_t *bitmask
        const int64_t *row_starts
        int64_t group
        const void *group_scales
        int wide

cdef extern from "nn/activation.h" nogil:
    ctypedef enum fc_activation:
        FC_IDENTITY
        FC_RELU
        FC_GELU
        FC_GELU_TANH
        FC_TANH
        FC_SIGMOID
        FC_SILU

ACTIVATIONS = {
    None: FC_IDENTITY, "relu": FC_RELU, "gelu": FC_GELU, "gelu_tanh": FC_GELU_TANH, "tanh": FC_TANH, "sigmoid": FC_SIGMOID,
    "silu": FC_SILU,
}


cdef fc_activation activation_of(object kind) except *:
    if kind not in ACTIVATIONS:
        raise ValueError(f"unknown activation {kind!r}; choose one of {', '.join(map(str, ACTIVATIONS))}")
    return ACTIVATIONS[kind]


cdef int check(fc_status status) except -1:
    if status == FC_OK:
        return 0
    if status == FC_NO_MEMORY:
        raise MemoryError("fastcore could not allocate memory")
    if status == FC_STALE:
        raise RuntimeError("the program was bound under another instruction set; build the Session again after set_isa()")
    raise ValueError("fastcore refused an argument")


cdef void *pointer(object array, str name, str kind, tuple shape, bint writable=False) except? NULL:
    """Return the address of a C-contiguous buffer after checking its item kind (struct format) and shape.

    `kind` is one of f d b B h H i I q Q; None in `shape` admits any length.
    """
    cdef Py_buffer view
    cdef int i
    cdef void *address
    if array is None:
        raise TypeError(f"{name}: an array is needed, got None")
    PyObject_GetBuffer(array, &view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (PyBUF_WRITABLE if writable else 0))
    try:
        address = view.buf
        found = view.format.decode() if view.format != NULL else "B"
        if found == "l" and sizeof(long) == 8:
            found = "q"
        elif found == "L" and sizeof(long) == 8:
            found = "Q"
        if found != kind:
            raise TypeError(f"{name}: expected items of kind {kind!r}, got {found!r}")
        extents = tuple([view.shape[i] for i in range(view.ndim)])
        if len(extents) != len(shape) or any([want is not None and want != have for want, have in zip(shape, extents)]):
            raise ValueError(f"{name}: expected shape {shape}, got {extents}")
    finally:
        PyBuffer_Release(&view)
    return address


cdef void *optional_pointer(object array, str name, str kind, tuple shape, bint writable=False) except? NULL:
    """As `pointer`, but NULL for None."""
    return NULL if array is None else pointer(array, name, kind, shape, writable)


cdef class Program:
    """An array of bound steps that one team of threads runs without Python."""
    cdef fc_program *handle
    cdef list held

    def __cinit__(self):
        self.handle = fc_program_new()
        self.held = []
        if self.handle == NULL:
            raise MemoryError("fastcore could not allocate a program")

    def __dealloc__(self):
        fc_program_free(self.handle)

    def __len__(self):
        return fc_program_length(self.handle)

    cdef int add(self, fc_step_fn *run, const void *args, size_t size, tuple arrays) except -1:
        """Append a step; `arrays` are what its pointers point into."""
        check(fc_program_add(self.handle, run, args, size))
        self.held.append(arrays)
        return 0

    def overlap(self):
        """Let the next step start before all threads are done with the last one: neither may touch what the other writes."""
        fc_program_overlap(self.handle)

    def run(self, int threads=1):
        """Run every step on at most `threads` threads, without the GIL."""
        cdef fc_status status
        with nogil:
            status = fc_program_run(self.handle, threads)
        check(status)


cdef int fill_slices(fc_slices *slices, char **places, list arrays, int64_t items, int ranks, bint writable) except -1:
    """Fill one fc_slices for each (array outside, [array inside of each rank]); `places` has room for all ranks of all."""
    cdef Py_buffer view
    cdef int i, rank
    for i, (outside, inside) in enumerate(arrays):
        if len(inside) != ranks:
            raise ValueError(f"{ranks} ranks need an array each, got {len(inside)}")
        slices[i].inside = &places[i * ranks]
        for rank in range(ranks + 1):
            array = outside if rank == ranks else inside[rank]
            PyObject_GetBuffer(array, &view, PyBUF_C_CONTIGUOUS | (PyBUF_WRITABLE if writable == (rank == ranks) else 0))
            if rank == 0:
                slices[i].bytes = view.len
            if rank == ranks:
                slices[i].outside = <char *>view.buf
            else:
                places[i * ranks + rank] = <char *>view.buf
            fits = view.len == <Py_ssize_t>(slices[i].bytes * (items if rank == ranks else 1))
            PyBuffer_Release(&view)  # the caller's lists keep the arrays alive
            if not fits:
                raise ValueError(f"{items} items of {slices[i].bytes} bytes do not fit an array of {view.len}")
    return 0


def run_map(list programs, list inputs, list outputs, int64_t items):
    """Run programs[rank] for each of `items` slices, shared out to one thread for each program, without the GIL.

    `inputs` and `outputs` list (array, [array of each rank]): an item is copied from its slice of the first along the leading
    axis into the second of the rank that runs it, or back.
    """
    cdef fc_map plan
    cdef fc_status status
    cdef int ranks = len(programs), i
    cdef Py_ssize_t count = len(inputs) + len(outputs)
    if ranks == 0 or items < 0 or len({id(program) for program in programs}) != ranks:
        raise ValueError("a map needs a program of its own for each thread")
    cdef fc_slices *slices = <fc_slices *>malloc((count + 1) * sizeof(fc_slices))
    cdef char **places = <char **>malloc((count + 1) * ranks * sizeof(char *))
    cdef fc_program **handles = <fc_program **>malloc(ranks * sizeof(fc_program *))
    try:
        if slices == NULL or places == NULL or handles == NULL:
            raise MemoryError("fastcore could not allocate a map")
        for i in range(ranks):
            handles[i] = (<Program?>programs[i]).handle
        fill_slices(slices, places, inputs, items, ranks, False)
        fill_slices(slices + len(inputs), places + len(inputs) * ranks, outputs, items, ranks, True)
        plan.programs, plan.ranks, plan.items = handles, ranks, items
        plan.inputs, plan.input_count = slices, len(inputs)
        plan.outputs, plan.output_count = slices + len(inputs), len(outputs)
        with nogil:
            status = fc_program_map(&plan)
        check(status)
    finally:
        free(slices)
        free(places)
        free(handles)


cdef int run_now(fc_step_fn *run, const void *args, int threads) except -1:
    cdef fc_status status
    with nogil:
        status = fc_run_step(run, args, threads)
    return check(status)


cdef class Weight:
    """A canonical [n, k] weight in memory that the caller owns: dense, blocks, or elements under a bitmask.

    Values are float32 or int8 with a scale per row. Dense uint16 values are bf16. Under a bitmask, uint8 values are int4, two
    to a byte, with `group_scales` for each `group` columns of a row; `scale` is a factor on those of a row, or None.
    """
    cdef fc_weight view
    cdef tuple held
    cdef readonly tuple shape

    def __cinit__(
        self, values, tuple shape, scale=None, row_offsets=None, index=None, bitmask=None, group_scales=None,
        int64_t group=0
    ):
        cdef int64_t n, k, groups, blocks
        n, k = shape
        kind = "f" if scale is None else "b"
        self.shape = (n, k)
        self.held = (values, scale, row_offsets, index, bitmask, group_scales)
        self.view.n, self.view.k = n, k
        if bitmask is not None:
            fill_bitmask(&self.view, values, scale, row_offsets, bitmask, group_scales, group)
            return
        self.view.scale = <const float *>optional_pointer(scale, "scale", "f", (n,))
        if row_offsets is None:
            self.view.kind = FC_DENSE_F32 if scale is None else FC_DENSE_S8
            if scale is None and memoryview(values).format == "H":
                self.view.kind, kind = FC_DENSE_BF16, "H"
            self.view.values = pointer(values, "values", kind, (n, k))
            return
        self.view.kind = FC_BLOCKS_F32 if scale is None else FC_BLOCKS_S8
        blocks, self.view.block_rows, self.view.block_cols = values.shape
        if self.view.block_rows < 1 or self.view.block_cols < 1 or n % self.view.block_rows or k % self.view.block_cols:
            raise ValueError(f"blocks of {values.shape[1:]} do not tile a weight of shape {shape}")
        groups = n // self.view.block_rows
        self.view.values = pointer(values, "values", kind, (None, None, None))
        self.view.row_offsets = <const int32_t *>pointer(row_offsets, "row_offsets", "i", (groups + 1,))
        self.view.index = <const int32_t *>pointer(index, "index", "i", (blocks,))
        check_blocks(&self.view, blocks)


cdef extern from "bitmask/bitmask.h" nogil:
    enum:
        FC_BITMASK_GROUP
    fc_status fc_bitmask_validate(const fc_weight *weight)

cdef extern from "sparse/sparse.h" nogil:
    fc_status fc_blocks_validate(const fc_weight *weight, int64_t blocks)


cdef int check_blocks(const fc_weight *weight, int64_t blocks) except -1:
    if fc_blocks_validate(weight, blocks) != FC_OK:
        raise ValueError("row_offsets must rise from 0 to the number of blocks, and index must rise within each row below k")
    return 0


cdef int fill_bitmask(
    fc_weight *view, object values, object scale, object row_offsets, object bitmask, object group_scales, int64_t group
) except -1:
    """Check the arrays of a weight under a bitmask and point to them."""
    cdef int64_t n = view.n, k = view.k, count
    view.bitmask = <const uint8_t *>pointer(bitmask, "bitmask", "B", (n, (k + 7) // 8))
    view.row_starts = <const int64_t *>pointer(row_offsets, "row_offsets", "q", (n + 1,))
    count = view.row_starts[n]
    if fc_bitmask_validate(view) != FC_OK:
        raise ValueError("row_offsets must count the bits of the bitmask row by row, none of which may lie beyond column k")
    if group_scales is not None:
        if not 4 <= group <= FC_BITMASK_GROUP or group % 4:
            raise ValueError(f"group: expected a multiple of 4 up to {FC_BITMASK_GROUP}, got {group}")
        view.kind, view.group = FC_BITMASK_S4, group
        view.values = pointer(values, "values", "B", ((count + 1) // 2,))
        view.scale = <const float *>optional_pointer(scale, "scale", "f", (n,))
        view.wide = memoryview(group_scales).format == "f"
        shape = (n, (k + group - 1) // group)
        view.group_scales = pointer(group_scales, "group_scales", "f" if view.wide else "e", shape)
        return 0
    view.kind = FC_BITMASK_F32 if scale is None else FC_BITMASK_S8
    view.values = pointer(values, "values", "f" if scale is None else "b", (count,))
    view.scale = <const float *>optional_pointer(scale, "scale", "f", (n,))
    return 0


def set_isa(str cap=None):
    """Rebuild the kernel table with instruction sets up to `cap`: "scalar", "avx2", "avx512", or None for all."""
    cdef bytes name = b"" if cap is None else cap.encode()
    if fc_set_isa(name) != FC_OK:
        raise ValueError(f"unknown instruction set {cap!r}; choose scalar, avx2 or avx512 for GRISTMILL_ISA or set_isa")


def isa_generation():
    """Count the calls of set_isa; packed weights and programs are valid within one generation."""
    return fc_generation()


def slots():
    """Return {slot: (variant, best variant written, reason why best is not used)}."""
    cdef fc_slot_info info
    table = {}
    for i in range(fc_slot_count()):
        info = fc_slot(i)
        table[info.name.decode()] = (info.variant.decode(), info.best.decode(), info.reason.decode())
    return table


def has_threads():
    """Return whether the extension was built with OpenMP."""
    return bool(fc_has_threads())


include "aggregate/aggregate.pxi"
include "attention/attention.pxi"
include "bitmask/bitmask.pxi"
include "dense/dense.pxi"
include "int4/int4.pxi"
include "nn/nn.pxi"
include "quant/quant.pxi"
include "sparse/sparse.pxi"
include "text/text.pxi"
include "vision/vision.pxi"


def packed_nbytes(object pack, weight not None):
    """Return the bytes that a packing function or a packer will allocate for a weight, before any is."""
    if isinstance(pack, ConvolutionPacker):
        return pack.packed_nbytes(weight)
    sizes = {
        pack_dense: dense_packed_nbytes, pack_bf16: bf16_packed_nbytes, pack_int4: int4_packed_nbytes,
        pack_int8: int8_packed_nbytes, pack_sparse: blocks_packed_nbytes, pack_bitmask: bitmask_packed_nbytes,
        pack_elements: elements_packed_nbytes,
    }
    return sizes[pack](weight)


set_isa(os.environ.get("GRISTMILL_ISA"))
