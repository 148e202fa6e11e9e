# The vision family's part of the border.
cdef extern from "vision/vision.h" nogil:
    ctypedef struct fc_window:
        int64_t height, width, out_height, out_width
        int64_t kernel_height, kernel_width, stride_y, stride_x, dilation_y, dilation_x
        int64_t top, left
    ctypedef struct fc_convolution_args:
        fc_window window
        int64_t images, channels, filters, group
        const float *x
        const float *weight
        const float *bias
        const float *addend
        float low, high
        fc_activation activation
        float *out
        void *scratch
        int64_t scratch_bytes
    ctypedef struct fc_pack_convolution_args:
        int64_t filters, group, depth, taps
        const float *weight
        float *out
    ctypedef struct fc_window_pool_args:
        fc_window window
        int64_t planes
        int average, include_pad
        int64_t bottom, right
        const float *x
        float *out
        void *scratch
        int64_t scratch_bytes
    ctypedef struct fc_planes_args:
        int64_t planes, channels, n
        const float *x
        const float *factor
        const float *offset
        float *out
    int64_t fc_convolution_scratch(const fc_window *window, int64_t channels, int64_t group)
    int64_t fc_staging_scratch(const fc_window *window)
    void fc_convolution(const void *args, int rank, int size) noexcept
    void fc_depthwise(const void *args, int rank, int size) noexcept
    void fc_pack_convolution(const void *args, int rank, int size) noexcept
    void fc_window_pool(const void *args, int rank, int size) noexcept
    void fc_plane_means(const void *args, int rank, int size) noexcept
    void fc_scale_channels(const void *args, int rank, int size) noexcept

WINDOW_LIMITS = (4096, 65536)  # of a kernel's or stride's extent; of a dilated kernel's and of padding


cdef int window_of(fc_window *w, tuple image, tuple out, tuple geometry) except -1:
    """Fill a window from (height, width) of both images and (kernel, strides, dilations, pads), each (y, x); pads precede."""
    cdef int64_t reach_y, reach_x
    kernel, strides, dilations, pads = geometry
    w.height, w.width = image
    w.out_height, w.out_width = out
    w.kernel_height, w.kernel_width = kernel
    w.stride_y, w.stride_x = strides
    w.dilation_y, w.dilation_x = dilations
    w.top, w.left = pads
    if min(*kernel, *strides, *dilations) < 1 or min(pads) < 0:
        raise ValueError(f"kernel {kernel}, strides {strides}, dilations {dilations} must be positive, pads {pads} not negative")
    if max(*kernel, *strides, *dilations) > WINDOW_LIMITS[0]:
        raise ValueError(f"kernel {kernel}, strides {strides} or dilations {dilations} exceed {WINDOW_LIMITS[0]}")
    reach_y = (w.kernel_height - 1) * w.dilation_y + 1
    reach_x = (w.kernel_width - 1) * w.dilation_x + 1
    if max(reach_y, reach_x, w.top, w.left) > WINDOW_LIMITS[1]:
        raise ValueError(f"a dilated kernel of {reach_y} x {reach_x} or pads {pads} exceed {WINDOW_LIMITS[1]}")
    return 0


cdef class PackedConvolution:
    """A constant convolution weight in the tile layout of this instruction set."""
    cdef void *memory
    cdef float *tiles
    cdef unsigned generation
    cdef readonly tuple shape
    cdef readonly int64_t group, taps, nbytes

    def __init__(self):
        raise TypeError("use a ConvolutionPacker")

    def __dealloc__(self):
        PyMem_RawFree(self.memory)


cdef class ConvolutionPacker:
    """What packs a weight [filters, channels / group * taps]; equal ones pack alike."""
    cdef readonly int64_t group, taps
    cdef readonly str __name__

    def __init__(self, int64_t group, int64_t taps):
        if group < 1 or taps < 1:
            raise ValueError(f"group and taps must be positive, got {group} and {taps}")
        self.group, self.taps = group, taps
        self.__name__ = f"pack_convolution_{group}_{taps}"

    def __eq__(self, other):
        return isinstance(other, ConvolutionPacker) and self.__name__ == other.__name__

    def __hash__(self):
        return hash(self.__name__)

    def packed_nbytes(self, Weight weight not None):
        """Return the bytes of what this makes of a weight."""
        return weight.view.n * weight.view.k * sizeof(float)

    def __call__(self, Weight weight not None, int threads=1):
        """Pack a weight once; the result is valid until set_isa is called."""
        cdef fc_pack_convolution_args args
        cdef PackedConvolution packed = PackedConvolution.__new__(PackedConvolution)
        if weight.view.kind != FC_DENSE_F32 or weight.view.n % self.group or weight.view.k % self.taps:
            raise ValueError(f"a dense float32 weight of {self.group} groups and {self.taps} taps is needed, got {weight.shape}")
        packed.nbytes = self.packed_nbytes(weight)
        packed.memory = PyMem_RawMalloc(packed.nbytes + 64)
        if packed.memory == NULL:
            raise MemoryError(f"could not allocate {packed.nbytes} bytes for a packed weight of shape {weight.shape}")
        packed.tiles = <float *>((<uintptr_t>packed.memory + 63) // 64 * 64)
        packed.generation = fc_generation()
        packed.shape, packed.group, packed.taps = weight.shape, self.group, self.taps
        args.filters, args.group, args.depth, args.taps = weight.view.n, self.group, weight.view.k, self.taps
        args.weight, args.out = <const float *>weight.view.values, packed.tiles
        run_now(fc_pack_convolution, &args, threads)
        return packed


def convolution_scratch(tuple image, tuple out, tuple geometry, int64_t channels, int64_t group, int threads):
    """Return the bytes of scratch of a convolution, a depthwise one (group == channels) or, with channels = 0, a pool."""
    cdef fc_window w
    window_of(&w, image, out, geometry)
    if channels < 0 or group < 1 or threads < 1:
        raise ValueError(f"channels must not be negative, group and threads must be positive, got {channels}, {group}, {threads}")
    return threads * max(fc_staging_scratch(&w), fc_convolution_scratch(&w, channels, group))


cdef int64_t scratch_of(object scratch, int64_t need) except -1:
    """Return the bytes of a scratch array that serves one thread at least; more are used as far as it reaches."""
    cdef int64_t have = memoryview(scratch).nbytes
    if have < need:
        raise ValueError(f"scratch: {have} bytes given, {need} needed for one thread; see convolution_scratch")
    return have


def convolution(
    Program program not None, x, weight, out, tuple geometry not None, int64_t group, bias, addend, float low, float high,
    activation, scratch,
):
    """Append out[N,M,OH,OW] = activation(clip(convolution of x[N,C,H,W] + bias[M] + addend, low, high))."""
    cdef fc_convolution_args args
    cdef fc_step_fn *run = fc_convolution
    memset(&args, 0, sizeof(args))
    args.x = <const float *>pointer(x, "x", "f", (None, None, None, None))
    args.out = <float *>pointer(out, "out", "f", (len(x), None, None, None), True)
    args.images, args.channels = x.shape[:2]
    args.filters, args.group = out.shape[1], group
    window_of(&args.window, x.shape[2:], out.shape[2:], geometry)
    if group < 1 or args.channels % group or args.filters % group:
        raise ValueError(f"{args.channels} channels and {args.filters} filters do not make {group} groups")
    taps = args.window.kernel_height * args.window.kernel_width
    args.scratch = pointer(scratch, "scratch", "B", (None,), True)
    if isinstance(weight, PackedConvolution):
        if (<PackedConvolution>weight).generation != fc_generation():
            check(FC_STALE)
        wanted = (args.filters, args.channels // group * taps)
        if weight.shape != wanted or weight.group != group or weight.taps != taps:
            raise ValueError(f"weight: expected {wanted} of {group} groups and {taps} taps, got {weight.shape} of {weight.group} "
                             f"groups and {weight.taps} taps")
        args.weight = (<PackedConvolution>weight).tiles
        args.scratch_bytes = scratch_of(scratch, fc_convolution_scratch(&args.window, args.channels, group))
    else:
        if group != args.channels:
            raise TypeError(f"weight: expected PackedConvolution, got {type(weight).__name__}")
        shape = (args.filters, 1, args.window.kernel_height, args.window.kernel_width)
        args.weight = <const float *>pointer(weight, "weight", "f", shape)
        args.scratch_bytes = scratch_of(scratch, fc_staging_scratch(&args.window))
        run = fc_depthwise
    args.bias = <const float *>optional_pointer(bias, "bias", "f", (args.filters,))
    args.addend = <const float *>optional_pointer(addend, "addend", "f", tuple(out.shape))
    args.low, args.high, args.activation = low, high, activation_of(activation)
    refuse_overlap(out, x, "out and x")
    refuse_overlap(out, addend, "out and addend")
    program.add(run, &args, sizeof(args), (x, weight, out, bias, addend, scratch))


def pool(
    Program program not None, x, out, tuple geometry not None, bint average, bint include_pad, tuple pads_behind, scratch,
):
    """Append out[N,C,OH,OW] = the maximum or the average over the windows of x[N,C,H,W].

    Averages divide by the elements inside the image or, with `include_pad`, inside the image and its padding.
    """
    cdef fc_window_pool_args args
    memset(&args, 0, sizeof(args))
    args.x = <const float *>pointer(x, "x", "f", (None, None, None, None))
    args.out = <float *>pointer(out, "out", "f", (*x.shape[:2], None, None), True)
    args.planes = x.shape[0] * x.shape[1]
    window_of(&args.window, x.shape[2:], out.shape[2:], geometry)
    args.average, args.include_pad = average, include_pad
    args.bottom, args.right = pads_behind
    args.scratch = pointer(scratch, "scratch", "B", (None,), True)
    args.scratch_bytes = scratch_of(scratch, fc_staging_scratch(&args.window))
    refuse_overlap(out, x, "out and x")
    program.add(fc_window_pool, &args, sizeof(args), (x, out, scratch))


def plane_means(Program program not None, x, out):
    """Append out[P] = the mean of every row of x[P,n]."""
    cdef fc_planes_args args
    memset(&args, 0, sizeof(args))
    args.x = <const float *>pointer(x, "x", "f", (None, None))
    args.planes, args.n = x.shape
    args.out = <float *>pointer(out, "out", "f", (args.planes,), True)
    program.add(fc_plane_means, &args, sizeof(args), (x, out))


def scale_channels(Program program not None, x, factor, offset, out):
    """Append out[N,C,n] = factor[C] * x[N,C,n] + offset[C], one rounding; out may be x."""
    cdef fc_planes_args args
    memset(&args, 0, sizeof(args))
    args.x = <const float *>pointer(x, "x", "f", (None, None, None))
    args.channels, args.n = x.shape[1:]
    args.planes = len(x) * args.channels
    args.factor = <const float *>pointer(factor, "factor", "f", (args.channels,))
    args.offset = <const float *>pointer(offset, "offset", "f", (args.channels,))
    args.out = <float *>pointer(out, "out", "f", tuple(x.shape), True)
    program.add(fc_scale_channels, &args, sizeof(args), (x, factor, offset, out))
