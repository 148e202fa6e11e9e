"""Operators of vision networks: kernels against references in random geometry, and properties that references must have.

That the references are ONNX's is for the conformance suite to say.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.ops import OPS, OWN, Node, TensorType
from gristmill.ops.op import Undetermined
from gristmill.runtime.session import Session
from gristmill.tensor import Dense

F32 = np.dtype(np.float32)


def draw(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def run(node, x, tensors, reference=False, threads=2):
    types = {node.inputs[0]: TensorType(F32, ("n", *x.shape[1:]))}
    model = Model((node,), {name: Dense(value) for name, value in tensors.items()}, types, node.outputs)
    session = Session(model, threads=threads, reference=reference)
    plan = session.explain(**{node.inputs[0]: x.shape})
    return session.run(**{node.inputs[0]: x})[node.outputs[0]], plan


def compute(op, *inputs, outputs=1, domain="", **attributes):
    """Infer and compare the reference's outputs with what was inferred."""
    names = tuple(f"i{i}" if value is not None else "" for i, value in enumerate(inputs))
    node = Node(op, names, tuple(f"o{i}" for i in range(outputs)), attributes, domain)
    types = [None if value is None else TensorType(value.dtype, value.shape) for value in inputs]
    inferred = OPS[domain, op].infer(node, types, [None if value is None else Dense(value) for value in inputs])
    made = OPS[domain, op].reference(node, *inputs)
    assert [(t.dtype, t.shape) for t in inferred] == [(value.dtype, value.shape) for value in made]
    return made if outputs > 1 else made[0]


windows = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 2),
        "extent": st.integers(1, 19),
        "kernel": st.integers(1, 4),
        "stride": st.integers(1, 3),
        "dilation": st.integers(1, 2),
        "pads": st.tuples(st.integers(0, 3), st.integers(0, 3)),
        "auto_pad": st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]),
    }
)


def attributes_of(w):
    """The window's attributes with the last axis as drawn and the first a little different."""
    rank = w["rank"]
    return {
        "kernel_shape": (max(1, w["kernel"] - 1), w["kernel"])[-rank:],
        "strides": (max(1, w["stride"] - 1), w["stride"])[-rank:],
        "dilations": (1, w["dilation"])[-rank:],
        "pads": ((0, w["pads"][0])[-rank:] + (1, w["pads"][1])[-rank:]) if w["auto_pad"] == "NOTSET" else (0,) * 2 * rank,
        "auto_pad": w["auto_pad"],
    }


def agree(node, x, tensors):
    try:
        want, _ = run(node, x, tensors, reference=True)
    except ModelError as error:
        if "a kernel of" in str(error):
            return  # the window does not fit the image
        raise
    got, plan = run(node, x, tensors)
    assert plan[0]["kernel"] != "numpy"
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(windows, st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.integers(0, 3))
def test_convolution_kernels_agree_with_the_reference(w, n, channels, filters, biased, kind):
    group = (1, 2, 3, channels)[kind]
    x = draw(n, channels * (group if kind < 3 else 1), *(w["extent"] + 2, w["extent"])[-w["rank"] :])
    attributes = {**attributes_of(w), "group": group}
    tensors = {"w": draw(filters * group, x.shape[1] // group, *attributes["kernel_shape"], seed=1)}
    if biased:
        tensors["b"] = draw(filters * group, seed=2)
    agree(Node("Conv", ("x", *tensors), ("y",), attributes), x, tensors)


@settings(max_examples=60, deadline=None)
@given(windows, st.integers(1, 2), st.sampled_from(["MaxPool", "AveragePool"]), st.booleans(), st.booleans())
def test_pooling_kernels_agree_with_the_reference(w, n, op, ceil, include_pad):
    attributes = {**attributes_of(w), "ceil_mode": int(ceil)}
    if op == "AveragePool":
        attributes["count_include_pad"] = int(include_pad)
    x = draw(n, 3, *(w["extent"] + 2, w["extent"])[-w["rank"] :])
    agree(Node(op, ("x",), ("y",), attributes), x, {})


@pytest.mark.parametrize("options", [{}, {"low": 0.0}, {"low": 0.0, "high": 1.5}, {"activation": "silu"}])
@pytest.mark.parametrize("group", [1, 6])
def test_what_follows_a_convolution(options, group):
    x = draw(2, 6, 9, 8)
    tensors = {"w": draw(12, 6 // group, 3, 3, seed=1), "b": draw(12, seed=2), "r": draw(2, 12, 7, 6, seed=3)}
    for names in (("x", "w", "b"), ("x", "w", "", "r"), ("x", "w", "b", "r")):
        node = Node("Convolution", names, ("y",), {**options, "group": group}, OWN)
        types, used = {"x": TensorType(F32, x.shape)}, {name: Dense(value) for name, value in tensors.items() if name in names}
        model = Model((node,), used, types, ("y",))
        want, got = (Session(model, reference=flag).run(x=x)["y"] for flag in (True, False))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", ["GlobalAveragePool", "BatchNormalization"])
def test_whole_planes_agree_with_the_reference(op):
    x = draw(3, 5, 7, 9)
    tensors = {}
    if op == "BatchNormalization":
        tensors = {"s": draw(5), "b": draw(5, seed=1), "m": draw(5, seed=2), "v": np.abs(draw(5, seed=3))}
    agree(Node(op, ("x", *tensors), ("y",)), x, tensors)


def test_weights_that_train_or_follow_from_inputs_run_the_reference():
    x, w = draw(1, 2, 5, 5), draw(3, 2, 3, 3, seed=1)
    types = {"x": TensorType(F32, x.shape), "w": TensorType(F32, w.shape)}
    model = Model((Node("Conv", ("x", "w"), ("y",)),), {}, types, ("y",))
    made = Session(model).run(x=x, w=w)["y"]
    np.testing.assert_allclose(made, compute("Conv", x, w), rtol=1e-5, atol=1e-5)


def test_transposed_convolution_is_the_gradient_of_convolution():
    """<Conv(x), y> = <x, ConvTranspose(y)> where nothing of the image is left over."""
    attributes = {"strides": (2, 3), "pads": (1, 0, 1, 2), "dilations": (1, 2), "group": 2}
    w = draw(6, 2, 3, 2, seed=1)
    x = draw(2, 4, 9, 10)
    y = draw(*compute("Conv", x, w, **attributes).shape, seed=2)
    back = compute("ConvTranspose", y, w, **attributes)
    whole = x[:, :, : back.shape[2], : back.shape[3]]
    np.testing.assert_allclose(np.vdot(compute("Conv", whole, w, **attributes), y), np.vdot(whole, back), rtol=1e-4)


def test_deformable_convolution_without_offsets_is_convolution():
    x, w, attributes = draw(2, 4, 6, 7), draw(6, 2, 3, 3, seed=1), {"group": 2, "pads": (1, 1, 1, 1), "strides": (2, 1)}
    plain = compute("Conv", x, w, **attributes)
    offset = np.zeros((2, 18, *plain.shape[2:]), np.float32)
    np.testing.assert_allclose(compute("DeformConv", x, w, offset, **attributes), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage_order", [0, 1])
def test_places_of_maxima(storage_order):
    x = draw(2, 3, 6, 5)
    attributes = {"kernel_shape": (2, 2), "strides": (2, 2), "pads": (0, 1, 0, 0), "storage_order": storage_order}
    y, places = compute("MaxPool", x, outputs=2, **attributes)
    flat = x if storage_order == 0 else x.transpose(0, 1, 3, 2)
    np.testing.assert_array_equal(flat.reshape(-1)[places], y)
    if storage_order == 0:
        exact = {"kernel_shape": (2, 2), "strides": (2, 2)}
        y, places = compute("MaxPool", x[:, :, :, :4].copy(), outputs=2, **exact)
        back = compute("MaxUnpool", y, places, **exact)
        np.testing.assert_array_equal(back.reshape(-1)[places], y)
        assert np.count_nonzero(back) == y.size


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_and_space_are_inverse(mode):
    x = draw(2, 8, 3, 5)
    y = compute("DepthToSpace", x, blocksize=2, mode=mode)
    np.testing.assert_array_equal(compute("SpaceToDepth", y, blocksize=2, mode=mode), x)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("place", ["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel", "half_pixel_symmetric"])
def test_resize_keeps_a_constant_and_its_own_size(mode, place):
    attributes = {"mode": mode, "coordinate_transformation_mode": place}
    scales = np.array([1, 1, 2.3, 0.6], np.float32)
    flat = compute("Resize", np.full((1, 2, 5, 6), 3, np.float32), None, scales, **attributes)
    np.testing.assert_allclose(flat, 3, rtol=1e-6)
    x = draw(1, 2, 5, 6)
    np.testing.assert_allclose(compute("Resize", x, None, None, np.array(x.shape), **attributes), x, atol=1e-6)


def test_an_identity_grid_samples_the_image():
    x, theta = draw(2, 3, 4, 5), np.tile(np.eye(2, 3, dtype=np.float32), (2, 1, 1))
    for corners in (0, 1):
        grid = compute("AffineGrid", theta, np.array([2, 3, 4, 5]), align_corners=corners)
        for mode in ("nearest", "linear", "cubic"):
            sampled = compute("GridSample", x, grid, align_corners=corners, mode=mode)
            np.testing.assert_allclose(sampled, x, atol=1e-5)


def test_regions_of_whole_pixels():
    x = draw(1, 2, 8, 8)
    pooled = compute("MaxRoiPool", x, np.array([[0, 0, 0, 7, 7]], np.float32), pooled_shape=(4, 4))
    np.testing.assert_array_equal(pooled, compute("MaxPool", x, kernel_shape=(2, 2), strides=(2, 2)))
    with pytest.raises(ModelError, match="of image 3"):
        compute("MaxRoiPool", x, np.array([[3, 0, 0, 7, 7]], np.float32), pooled_shape=(4, 4))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
def test_codes_come_back(dtype):
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    codes = np.random.default_rng(0).integers(low, high + 1, (4, 6)).astype(dtype)
    scale, zero = np.array([0.5, 0.25, 2, 1], np.float32), np.array([3, 0, 1, 7]).astype(dtype)
    values = compute("DequantizeLinear", codes, scale, zero, axis=0)
    np.testing.assert_array_equal(compute("QuantizeLinear", values, scale, zero, axis=0), codes)
    far = np.array([[-1e30, 1e30, np.inf, -np.inf]], np.float32)
    ends = compute("QuantizeLinear", far, np.float32(1) * np.ones((), np.float32), np.zeros((), dtype))
    np.testing.assert_array_equal(ends, [[low, high, high, low]])


def test_integer_products_are_exact():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (3, 5, 2000)).astype(np.uint8), rng.integers(-128, 128, (2000, 7)).astype(np.int8)
    zero = np.array([0, 255, 7, 128, 9], np.uint8)
    want = (a.astype(np.int64) - zero.astype(np.int64)[:, None]) @ (b.astype(np.int64) - 5)
    np.testing.assert_array_equal(compute("MatMulInteger", a, b, zero, np.array(5, np.int8)), want)
    x, w = rng.integers(0, 256, (1, 30, 5, 5)).astype(np.uint8), rng.integers(-128, 128, (4, 30, 3, 3)).astype(np.int8)
    want = compute("Conv", x.astype(np.float64) - 200, w.astype(np.float64), pads=(1, 1, 1, 1))
    got = compute("ConvInteger", x, w, np.array(200, np.uint8), pads=(1, 1, 1, 1))
    np.testing.assert_array_equal(got, want)


def test_training_statistics_of_batch_normalization():
    x, scale, shift = draw(4, 3, 5), draw(3, seed=1), draw(3, seed=2)
    mean, variance = draw(3, seed=3), np.abs(draw(3, seed=4))
    y, m, v = compute("BatchNormalization", x, scale, shift, mean, variance, outputs=3, training_mode=1, momentum=0.8)
    np.testing.assert_allclose(m, 0.8 * mean + 0.2 * x.mean((0, 2)), rtol=1e-5)
    np.testing.assert_allclose(v, 0.8 * variance + 0.2 * x.var((0, 2)), rtol=1e-5)
    np.testing.assert_allclose((y.mean((0, 2)) - shift) / scale, 0, atol=1e-5)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "message"),
    [
        ("Conv", [(1, 4, 5, 5), (2, 3, 3, 3)], {}, "in 1 groups"),
        ("Conv", [(1, 4, 5, 5), (2, 4, 3)], {}, "the weight is"),
        ("Conv", [(1, 4, 5, 5), (2, 4, 3, 3), (3,)], {}, "the bias must be"),
        ("Conv", [(1, 4, 5, 5), (2, 4, 7, 3)], {}, "a kernel of 7"),
        ("Conv", [(1, 4, 5, 5), (2, 4, 3, 3)], {"kernel_shape": (3, 2)}, "kernel_shape"),
        ("Conv", [(1, 4, 5, 5), (2, 4, 3, 3)], {"strides": (0, 1)}, "strides"),
        ("Conv", [(1, 4, 5, 5), (2, 4, 3, 3)], {"pads": (0, 1)}, "pads"),
        ("Conv", [(1, 4, 5, 5), (2, 4, 3, 3)], {"auto_pad": "SAME"}, "auto_pad"),
        ("MaxPool", [(1, 4, 5, 5)], {}, "kernel_shape is needed"),
        ("MaxPool", [(1, 4)], {"kernel_shape": (1,)}, "is needed"),
        ("DepthToSpace", [(1, 6, 2, 2)], {"blocksize": 2}, "blocks of 2 x 2"),
        ("SpaceToDepth", [(1, 6, 3, 2)], {"blocksize": 2}, "blocks of 2"),
        ("GroupNormalization", [(1, 6, 2), (6,), (6,)], {"num_groups": 4}, "4 groups"),
        ("BatchNormalization", [(1, 6, 2), (6,), (6,), (6,), (5,)], {}, "its channels"),
        ("GridSample", [(1, 1, 4, 4), (1, 2, 2, 3)], {}, "the grid is"),
        ("MatMulInteger", [(2, 3), (4, 5)], {}, "but b is"),
        ("RMSNormalization", [(2, 3), (4,)], {}, "does not broadcast"),
    ],
)
def test_misfits_are_named(op, inputs, attributes, message):
    with pytest.raises(ModelError, match=message):
        compute(op, *(draw(*shape) for shape in inputs), **attributes)


def test_shapes_that_depend_on_values_are_undetermined():
    x, sizes = TensorType(F32, (1, 2, 4, 4)), TensorType(np.dtype(np.int64), (4,))
    node = Node("Resize", ("x", "", "", "s"), ("y",))
    with pytest.raises(Undetermined):
        OPS["", "Resize"].infer(node, [x, None, None, sizes], [None] * 4)


def test_symbolic_images_give_symbols():
    x, w = TensorType(F32, ("n", 3, "h", "w")), TensorType(F32, (8, 3, 3, 3))
    out = OPS["", "Conv"].infer(Node("Conv", ("x", "w"), ("y",)), [x, w], [None, None])[0]
    assert out.shape == ("n", 8, "y.2", "y.3")
