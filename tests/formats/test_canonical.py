"""Exports of whole networks and small graphs by hand: the same answers, in the operators that kernels serve."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")

from gristmill.formats.onnx import reader
from gristmill.formats.onnx.canonical import PASSES, canonical
from gristmill.model import Model
from gristmill.ops import OWN, Node, TensorType
from gristmill.runtime.fuse import fuse
from gristmill.runtime.session import Session
from gristmill.tensor import Dense, Quantized

FILES = sorted((Path(__file__).parents[1] / "fixtures" / "onnx").glob("*.onnx"))
LAYERS = 2
LAYER = {"Linear": 6, "MaskedAttention": 1, "LayerNormalization": 2, "Gelu": 1}
SPELLED_OUT = {"MatMul", "Gemm", "Softmax", "Erf", "Tanh", "ReduceMean", "Where", "Transpose", "Sqrt", "Pow", "IsNaN", "GatherND"}
F, INT = np.float32, np.int64


def inputs_of(model, seed=0, batch=3, length=6):
    rng, given = np.random.default_rng(seed), {}
    for name, kind in model.inputs.items():
        shape = [dim if isinstance(dim, int) else batch if at == 0 else length for at, dim in enumerate(kind.shape)]
        if kind.dtype == F:
            given[name] = rng.standard_normal(shape).astype(F)
        elif "mask" in name:
            kept = np.array([length, 1, max(length - 2, 1)])[:batch]
            given[name] = (np.arange(length) < kept[:, None]).astype(kind.dtype)
        else:
            given[name] = rng.integers(0, 2 if "type" in name else 20, shape).astype(kind.dtype)
    return given


def run(model, given):
    return Session(model, reference=True).run(**given)


def compare(before, after, given, tolerance=2e-6):
    wanted, got = run(before, given), run(after, given)
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype
        np.testing.assert_allclose(got[name], value, rtol=tolerance, atol=tolerance * max(1.0, float(np.abs(value).max())))


def count(model):
    return Counter(node.op for node in model.nodes)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_export_gives_the_same_answers(path):
    model = reader.load(path)
    after = canonical(model)
    assert tuple(after.inputs) == tuple(model.inputs)
    assert after.outputs == model.outputs
    # Activations that a file rounds with one scale for all are rounded by row when Linear runs, and not at all in its reference.
    tolerance = 5e-3 if "dynamic" in path.stem else 2e-6
    compare(model, after, inputs_of(model), tolerance)
    if "encoder_ts" not in path.stem:
        compare(model, after, inputs_of(model, 1, 2, 4), tolerance)


ENCODERS = [path for path in FILES if not path.stem.startswith(("activations", "convnet", "bert_static"))]


@pytest.mark.parametrize("path", ENCODERS, ids=lambda path: path.stem)
def test_layers_of_encoders_are_found_whole(path):
    made = count(canonical(reader.load(path)))
    before = {"LayerNormalization": 0 if "encoder" in path.stem else 1, "Linear": 1 if path.stem.startswith("vit") else 0}
    for op, number in LAYER.items():
        assert made[op] == LAYERS * number + before.get(op, 0), made
    allowed = {"Transpose", "Where"} if "vit" in path.stem else set()
    assert not (made.keys() & SPELLED_OUT) - allowed, made


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.stem.startswith("bert_") and "static" not in p.stem], ids=lambda p: p.stem
)
def test_sentence_vectors_are_found(path):
    made = count(canonical(reader.load(path)))
    assert made["MaskedPool"] == made["LpNormalization"] == 1


def test_static_codes_become_attributes_of_linear():
    for name in ("bert_static_qdq", "bert_static_qop"):
        model = canonical(reader.load(next(path for path in FILES if path.stem == name)))
        linears = [node for node in model.nodes if node.op == "Linear"]
        assert len(linears) == LAYERS * LAYER["Linear"]
        assert all("input_scale" in node.attributes and 0 <= node.attributes["input_zero_point"] <= 255 for node in linears)
        assert all(isinstance(model.tensors[node.inputs[1]], Quantized) for node in linears)


@pytest.mark.parametrize("kind", ["s8", "s8_channel"])
def test_dynamic_int8_becomes_quantized_weights(kind):
    model = canonical(reader.load(next(path for path in FILES if path.stem == f"bert_dynamic_{kind}")))
    assert all(isinstance(model.tensors[name], Quantized) for name in model.weights)


def test_fused_files_answer_as_onnxruntime_does():
    runtime = pytest.importorskip("onnxruntime")
    for path in FILES:
        if path.stem.startswith("ort_") or path.stem in ("bert_ts11", "hf_bert_sdpa_dynamo20", "encoder_dynamo20"):
            model = canonical(reader.load(path))
            given = inputs_of(model)
            session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
            wanted = session.run(None, given)[0]
            np.testing.assert_allclose(run(model, given)[model.outputs[0]], wanted, rtol=1e-4, atol=1e-5, err_msg=path.stem)


@pytest.mark.parametrize("each", sorted(set(PASSES), key=lambda each: each.__name__), ids=lambda each: each.__name__)
def test_each_pass_alone_changes_no_answer(each):
    for path in FILES:
        if path.stem in ("bert_ts11", "hf_bert_sdpa_ts14", "encoder_dynamo20", "convnet_ts14", "bert_static_qdq"):
            model = reader.load(path)
            compare(model, each(model), inputs_of(model))


# ---- small graphs ----


def graph(nodes, tensors=None, inputs=None, outputs=("y",)):
    made = [node if isinstance(node, Node) else Node(*node) for node in nodes]
    types = {name: TensorType(np.dtype(dtype), shape) for name, (dtype, shape) in (inputs or {"x": (F, ("b", 4))}).items()}
    constants = {name: Dense(np.asarray(value)) for name, value in (tensors or {}).items()}
    return Model(tuple(made), constants, types, outputs)


def same(model, expected, given=None, tolerance=2e-6):
    after = canonical(model)
    assert count(after) == Counter(expected), count(after)
    compare(model, after, given or inputs_of(model), tolerance)
    return after


def draw(*shape, seed=3):
    return np.random.default_rng(seed).standard_normal(shape).astype(F)


def test_an_output_that_is_an_input_or_shared_keeps_its_name():
    after = canonical(
        graph([("Identity", ("x",), ("y",)), ("Relu", ("x",), ("z",)), ("Identity", ("z",), ("w",))], outputs=("y", "z", "w"))
    )
    assert after.outputs == ("y", "z", "w")
    compare(after, after, inputs_of(after))


def test_a_bias_is_taken_only_along_the_last_axis():
    weight = draw(4, 4)
    for bias, expected in (
        (draw(4), ["Linear"]),
        (draw(1, 4), ["Linear"]),
        (draw(4, 1), ["Linear", "Add"]),
        (draw(1, 1, 4), ["Linear", "Add"]),
        (np.float32(2), ["Linear"]),
    ):
        model = graph([("MatMul", ("x", "w"), ("m",)), ("Add", ("m", "c"), ("y",))], {"w": weight, "c": bias}, {"x": (F, (4, 4))})
        same(model, expected)


def test_gemm_in_all_its_forms():
    for attributes, w, c, expected in (
        ({"transB": 1}, draw(3, 4), draw(3), ["Linear"]),
        ({"alpha": 0.5, "beta": 2.0}, draw(4, 3), draw(1, 3), ["Linear"]),
        ({"beta": 0.0}, draw(4, 3), draw(3), ["Linear"]),
        ({}, draw(4, 3), draw(5, 3), ["Gemm"]),
        ({"transA": 1}, draw(5, 3), draw(3), ["Gemm"]),
    ):
        shape = (4, 5) if attributes.get("transA") is None and False else (5, 4)
        same(graph([Node("Gemm", ("x", "w", "c"), ("y",), attributes)], {"w": w, "c": c}, {"x": (F, shape)}), expected)


def test_a_product_of_computed_values_stays():
    model = graph([("MatMul", ("x", "z"), ("y",))], {}, {"x": (F, ("b", 4)), "z": (F, (4, 3))})
    same(model, ["MatMul"])


def test_a_reshape_that_must_fail_still_fails():
    """The target says 6 where the input has any length: putting -1 there would let wrong shapes pass."""
    nodes = [
        Node("Shape", ("x",), ("s",), {"start": 0, "end": 1}),
        ("Concat", ("six", "s", "four"), ("t",), {"axis": 0}),
        ("Reshape", ("x", "t"), ("y",)),
    ]
    tensors = {"six": np.array([6], INT), "four": np.array([4], INT)}
    model = graph(nodes, tensors, {"x": (F, ("b", "n", 4))})
    after = canonical(model)
    good = np.ones((2, 6, 4), F)
    np.testing.assert_array_equal(run(after, {"x": good})["y"], run(model, {"x": good})["y"])
    for wrong in (np.ones((2, 12, 4), F), np.ones((2, 3, 4), F)):
        with pytest.raises(Exception, match="reshape"):
            run(after, {"x": wrong})


def attention(mask_nodes, tensors, inputs, scores="scores", causal=None):
    """Attention of 2 heads of 3 over [b, n, 6], whose masked scores the nodes given compute from `product`."""
    cut, perm = np.array([0, 0, 2, 3], INT), (0, 2, 1, 3)
    nodes = []
    for name in "qkv":
        nodes += [("Reshape", (name, "cut"), (f"{name}c",)), Node("Transpose", (f"{name}c",), (f"{name}t",), {"perm": perm})]
    nodes += [
        Node("Transpose", ("kt",), ("kk",), {"perm": (0, 1, 3, 2)}),
        ("MatMul", ("qt", "kk"), ("product",)),
        *mask_nodes,
        Node("Softmax", (scores,), ("p",), {"axis": -1}),
        ("MatMul", ("p", "vt"), ("o",)),
        Node("Transpose", ("o",), ("ot",), {"perm": perm}),
        ("Reshape", ("ot", "join"), ("y",)),
    ]
    tensors = {**tensors, "cut": cut, "join": np.array([0, 0, 6], INT)}
    return graph(nodes, tensors, {**dict.fromkeys("qkv", (F, ("b", "n", 6))), **inputs})


MASK = {"mask": (INT, ("b", "n"))}
WIDE = [("Unsqueeze", ("mask", "axes"), ("m4",))]
AXES = {"axes": np.array([1, 2], INT)}


def test_attention_without_a_mask():
    same(attention([], {}, {}, "product"), ["MaskedAttention"])


@pytest.mark.parametrize("how", ["additive", "where", "where_not", "negated", "scaled_first"])
def test_masks_that_are_proven(how):
    zero, low = np.float32(0), np.float32(-np.inf)
    nodes = {
        "additive": [
            *WIDE,
            Node("Cast", ("m4",), ("mf",), {"to": "float32"}),
            ("Sub", ("one", "mf"), ("inv",)),
            ("Mul", ("inv", "big"), ("bias",)),
            ("Add", ("bias", "product"), ("scores",)),
        ],
        "where": [*WIDE, Node("Cast", ("m4",), ("mb",), {"to": "bool"}), ("Where", ("mb", "product", "low"), ("scores",))],
        "where_not": [*WIDE, ("Equal", ("m4", "none"), ("mb",)), ("Where", ("mb", "low", "product"), ("scores",))],
        "negated": [
            *WIDE,
            Node("Cast", ("m4",), ("mb",), {"to": "bool"}),
            ("Not", ("mb",), ("nb",)),
            ("Where", ("nb", "low", "zero"), ("bias",)),
            ("Add", ("product", "bias"), ("scores",)),
        ],
        "scaled_first": [
            *WIDE,
            Node("Cast", ("m4",), ("mb",), {"to": "bool"}),
            ("Div", ("product", "two"), ("half",)),
            ("Where", ("mb", "half", "low"), ("scores",)),
        ],
    }[how]
    tensors = {
        **AXES,
        "one": np.float32(1),
        "big": np.float32(-10000),
        "zero": zero,
        "low": low,
        "two": np.float32(2),
        "none": np.int64(0),
    }
    after = same(attention(nodes, tensors, MASK), ["MaskedAttention"])
    assert after.nodes[0].inputs[3] == "mask"
    assert after.nodes[0].attributes["scale"] == pytest.approx(0.5 if how == "scaled_first" else 1.0)


def test_a_mask_that_marks_padding_is_turned():
    nodes = [*WIDE, Node("Cast", ("m4",), ("mb",), {"to": "bool"}), ("Where", ("mb", "low", "product"), ("scores",))]
    model = attention(nodes, {**AXES, "low": np.float32(-np.inf)}, MASK)
    given = inputs_of(model)
    given["mask"] = 1 - given["mask"]
    same(model, ["Cast", "Not", "MaskedAttention"], given)


def test_a_token_that_marks_padding_is_compared():
    """ids == 1 says nothing of ids 0 and 2 that a mask of zeros and ones would."""
    nodes = [
        ("Equal", ("ids", "pad"), ("eq",)),
        ("Unsqueeze", ("eq", "axes"), ("mb",)),
        ("Where", ("mb", "low", "product"), ("scores",)),
    ]
    model = attention(nodes, {**AXES, "low": np.float32(-1e9), "pad": np.int64(1)}, {"ids": (INT, ("b", "n"))})
    given = inputs_of(model)
    given["ids"] = np.array([[0, 5, 2, 1, 1, 1], [3, 0, 1, 1, 1, 1], [7, 2, 0, 4, 9, 1]], INT)
    same(model, ["Equal", "Not", "MaskedAttention"], given)


@pytest.mark.parametrize("how", ["float", "causal", "weak", "per_query", "per_head", "positive"])
def test_masks_that_are_not_proven_stay(how):
    causal = np.triu(np.full((6, 6), -np.inf, F), 1)
    nodes = {
        "float": [("Unsqueeze", ("mask", "axes"), ("bias",)), ("Add", ("product", "bias"), ("scores",))],
        "causal": [("Add", ("product", "causal"), ("scores",))],
        "weak": [*WIDE, Node("Cast", ("m4",), ("mf",), {"to": "float32"}), ("Add", ("product", "mf"), ("scores",))],
        "per_query": [
            Node("Unsqueeze", ("mask", "query"), ("m4",)),
            Node("Cast", ("m4",), ("mb",), {"to": "bool"}),
            ("Where", ("mb", "product", "low"), ("scores",)),
        ],
        "per_head": [("Add", ("product", "heads"), ("scores",))],
        "positive": [
            *WIDE,
            Node("Cast", ("m4",), ("mf",), {"to": "float32"}),
            ("Mul", ("mf", "big"), ("bias",)),
            ("Add", ("product", "bias"), ("scores",)),
        ],
    }[how]
    tensors = {
        **AXES,
        "causal": causal,
        "query": np.array([1, 3], INT),
        "low": np.float32(-1e9),
        "heads": draw(1, 2, 1, 1),
        "big": np.float32(50000),
    }
    inputs = {"mask": (F, ("b", "n"))} if how == "float" else {} if how in ("causal", "per_head") else MASK
    after = canonical(model := attention(nodes, tensors, inputs))
    assert "MaskedAttention" not in count(after)
    compare(model, after, inputs_of(model))


def test_a_mask_of_another_batch_is_not_taken():
    nodes = [*WIDE, Node("Cast", ("m4",), ("mb",), {"to": "bool"}), ("Where", ("mb", "product", "low"), ("scores",))]
    model = attention(nodes, {**AXES, "low": np.float32(-1e9)}, {"mask": (INT, ("m", "n"))})
    assert "MaskedAttention" not in count(canonical(model))


def test_normalisation_needs_its_own_mean():
    axes = {"axes": np.array([-1], INT), "two": np.float32(2), "eps": np.float32(1e-5), "g": draw(4), "b": draw(4)}
    nodes = [
        ("ReduceMean", ("x", "axes"), ("m",)),
        ("Sub", ("x", "m"), ("c",)),
        ("Pow", ("c", "two"), ("s",)),
        ("ReduceMean", ("s", "axes"), ("v",)),
        ("Add", ("v", "eps"), ("e",)),
        ("Sqrt", ("e",), ("r",)),
        ("Div", ("c", "r"), ("n",)),
        ("Mul", ("n", "g"), ("k",)),
        ("Add", ("k", "b"), ("y",)),
    ]
    same(graph(nodes, axes), ["LayerNormalization"])
    other = [("Div", ("x", "r"), ("n",)) if node[2] == ("n",) else node for node in nodes]
    assert "LayerNormalization" not in count(canonical(graph(other, axes)))
    plain = [("ReduceMean", ("s", "axes"), ("v",)), *nodes[4:6], ("Div", ("x", "r"), ("n",)), ("Mul", ("n", "g"), ("y",))]
    same(graph([("Mul", ("x", "x"), ("s",)), *plain], axes), ["RMSNormalization"])


def test_batch_normalisation_and_padding_go_into_the_convolution():
    tensors = {
        "w": draw(3, 2, 3, 3),
        "g": draw(3),
        "s": draw(3),
        "m": draw(3),
        "v": np.abs(draw(3)) + 0.5,
        "pads": np.array([0, 0, 1, 0, 0, 0, 0, 2], INT),
    }
    nodes = [
        ("Pad", ("x", "pads"), ("p",)),
        Node("Conv", ("p", "w"), ("c",), {"pads": (1, 1, 1, 1)}),
        Node("BatchNormalization", ("c", "g", "s", "m", "v"), ("n",), {"epsilon": 1e-3}),
        ("Relu", ("n",), ("y",)),
    ]
    model = graph(nodes, tensors, {"x": (F, ("b", 2, 7, 7))})
    after = same(model, ["Conv", "Relu"], tolerance=1e-5)
    fused = fuse(after)
    assert count(fused) == {"Convolution": 1}
    compare(model, fused, inputs_of(model), 1e-5)


def test_a_residual_and_bounds_go_into_the_convolution():
    tensors = {"w": draw(2, 2, 1, 1), "low": np.float32(0), "high": np.float32(6)}
    nodes = [("Conv", ("x", "w"), ("c",)), ("Add", ("x", "c"), ("a",)), ("Clip", ("a", "low", "high"), ("y",))]
    model = graph(nodes, tensors, {"x": (F, ("b", 2, 4, 4))})
    assert count(fuse(model)) == {"Convolution": 1}
    compare(model, fuse(model), inputs_of(model))


def test_a_vector_goes_into_a_linear_without_bias():
    model = graph([Node("Linear", ("x", "w"), ("m",), {}, OWN), ("Add", ("v", "m"), ("y",))], {"w": draw(3, 4), "v": draw(3)})
    assert count(fuse(model)) == {"Linear": 1}
    compare(model, fuse(model), inputs_of(model))


@pytest.mark.parametrize(("dtype", "zero"), [(np.int8, 0), (np.uint8, 128), (np.uint8, 127), (np.int8, 3)])
@pytest.mark.parametrize("several", [False, True])
def test_dequantised_weights(dtype, zero, several):
    rng = np.random.default_rng(5)
    codes = (rng.integers(-100, 100, (4, 3)) + (128 if dtype == np.uint8 else 0)).astype(dtype)
    scale = (rng.random(3) if several else rng.random()).__mul__(0.1)
    zeros = np.full(3, zero, dtype) if several else np.asarray(zero, dtype)
    nodes = [
        Node("DequantizeLinear", ("c", "s", "z"), ("w",), {"axis": 1}),
        ("MatMul", ("x", "w"), ("m",)),
        ("Add", ("m", "b"), ("y",)),
    ]
    model = graph(nodes, {"c": codes, "s": np.asarray(scale, F), "z": zeros, "b": draw(3)})
    after = same(model, ["Linear"])
    symmetric = zero == (128 if dtype == np.uint8 else 0)
    assert isinstance(after.tensors[after.weights[0]], Quantized if symmetric else Dense)


def test_kernels_run_what_comes_out():
    for path in FILES:
        if path.stem in ("bert_ts11", "hf_bert_sdpa_dynamo20", "encoder_ts17"):
            model = reader.load(path)
            given = inputs_of(model)
            got, wanted = Session(canonical(model)).run(**given), run(model, given)
            for name, value in wanted.items():
                np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=2e-5, err_msg=path.stem)


@pytest.mark.parametrize(
    ("attributes", "dtype", "width"),
    [
        ({"left_window_size": 0, "right_window_size": 0}, F, 6),
        ({"left_window_size": 1}, F, 6),
        ({"softcap": 2.0}, F, 6),
        ({"is_causal": 1}, F, 6),
        ({"scale": 0.0}, F, 6),
        ({}, np.float16, 6),
        ({}, np.float64, 6),
        ({}, F, 4),
    ],
)
@pytest.mark.parametrize("rank", [3, 4])
def test_attention_that_kernels_do_not_serve_stays(attributes, dtype, width, rank):
    shapes = [(2, 5, 6), (2, 5, 6), (2, 5, width)]
    heads = {"q_num_heads": 2, "kv_num_heads": 2} if rank == 3 else {}
    if rank == 4:
        shapes = [(2, 2, 5, size // 2) for _, _, size in shapes]
    inputs = {name: TensorType(np.dtype(dtype), shape) for name, shape in zip("qkv", shapes, strict=True)}
    model = Model((Node("Attention", ("q", "k", "v"), ("y",), {**attributes, **heads}),), {}, inputs, ("y",))
    after = canonical(model)
    assert count(after) == {"Attention": 1}
    rng = np.random.default_rng(0)
    compare(model, after, {name: rng.standard_normal(kind.shape).astype(dtype) for name, kind in inputs.items()})


def test_constants_that_grow_are_left_to_the_run():
    nodes = [Node("Concat", (f"v{i}", f"v{i}"), (f"v{i + 1}",), {"axis": 0}) for i in range(24)]
    model = Model(
        (*nodes, Node("Add", ("v24", "x"), ("y",))),
        {"v0": Dense(np.ones(1 << 10, F))},
        {"x": TensorType(np.dtype(F), (1,))},
        ("y",),
    )
    assert canonical(model).nbytes < 64 << 20
