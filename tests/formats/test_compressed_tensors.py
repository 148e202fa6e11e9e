"""Files of compressed-tensors: every format against the library's own values, models of them, and what is refused."""

import copy
import json
import re
import resource
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import gristmill as gm
from formats.hf_folders import BERT, SHAPE, batch, model_of, tensors_of, write
from gristmill import _core
from gristmill.errors import FormatError
from gristmill.formats.compressed_tensors import read
from gristmill.formats.compressed_tensors.codes import E4M3
from gristmill.formats.compressed_tensors.layers import assemble
from gristmill.formats.compressed_tensors.patterns import Budget, Pattern
from gristmill.formats.compressed_tensors.scheme import read_scheme
from gristmill.formats.compressed_tensors.weight import Weight
from gristmill.formats.container import map_file
from gristmill.formats.container import read as read_container
from gristmill.model import Model
from gristmill.ops import OWN, Node, TensorType
from gristmill.tensor import BFloat16

GOLDEN = Path(__file__).parents[1] / "fixtures" / "compressed_tensors"
CASES = sorted(path.name for path in GOLDEN.iterdir())
TOKENS = replace(SHAPE, pooling=None, normalize=False, output="last_hidden_state")
LAYER = "encoder.layer.0.intermediate.dense"
SLOW = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def bits_of(array):
    assert array.dtype == np.float32
    return array.view(np.uint32)


# ---- every format as the library reads it ----


def test_every_format_has_a_case():
    forms = {json.loads((GOLDEN / case / "config.json").read_text())["quantization_config"].get("format") for case in CASES}
    assert forms == {None, "int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "mixed-precision"}
    assert len(CASES) == 45


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_library(case):
    golden = np.load(GOLDEN / case / "values.npz")
    found = read(GOLDEN / case)
    for name in golden.files:
        assert found.shape(name) == golden[name].shape
        np.testing.assert_array_equal(bits_of(found[name]), bits_of(golden[name]), err_msg=name)
    compressed = [name for name, stored in found.stored.items() if isinstance(stored, Weight)]
    assert len(compressed) == (3 if case == "embedding" else 2)
    assert {*golden.files} | {"first.bias", "head.weight", "head.bias"} == set(found)
    assert read(GOLDEN / case / "model.safetensors").keys() == found.keys()


def rounded(values, like):
    """Round as torch does in the type of the scales."""
    if like == "BF16":
        return BFloat16.from_dense(values).dense()
    return values.astype(np.float16).astype(np.float32) if like == "F16" else values


@pytest.mark.parametrize("case", CASES)
def test_kinds_hold_codes_and_scales_exactly(case):
    found = read(GOLDEN / case)
    header = (GOLDEN / case / "model.safetensors").read_bytes()
    entries = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    for name, stored in found.stored.items():
        if not isinstance(stored, Weight):
            continue
        tensor, scale = stored.tensor(), entries.get(f"{name}_scale")
        dense = tensor.dense()
        if tensor.kind != "dense" and scale is not None:
            dense = rounded(dense, scale["dtype"])  # the product of code and scale, not rounded until here
        np.testing.assert_array_equal(bits_of(dense), bits_of(found[name]), err_msg=name)


@pytest.mark.parametrize(
    ("case", "kinds"),
    {
        "bitmask": ("bitmask", "bitmask"), "paired_bf16": ("bitmask", "bitmask"), "bitmask_int8": ("bitmask", "bitmask"),
        "paired_int8": ("quantized", "bitmask"), "bitmask_int8_asymmetric": ("dense", "dense"),
        "int8": ("quantized", "quantized"), "int8_tensor": ("quantized", "quantized"), "int8_group": ("dense", "dense"),
        "int4_in_int8": ("quantized", "quantized"), "naive": ("quantized", "quantized"), "fp8": ("dense", "dense"),
        "pack4": ("int4", "int4"), "pack4_bf16": ("int4", "int4"), "pack4_channel": ("int4", "int4"),
        "pack4_order": ("dense", "dense"), "pack4_asymmetric": ("dense", "dense"), "pack8": ("dense", "dense"),
    }.items(),
)  # fmt: skip
def test_kinds(case, kinds):
    found = read(GOLDEN / case)
    tensors = tuple(found.stored[name].tensor() for name in ("first.weight", "second.weight"))
    assert tuple(tensor.kind for tensor in tensors) == kinds


def test_codes_of_int8_are_taken_over():
    arrays, _ = read_container(map_file(GOLDEN / "int8" / "model.safetensors"), aligned=False)
    tensor = read(GOLDEN / "int8").stored["first.weight"].tensor()
    np.testing.assert_array_equal(tensor.codes, arrays["first.weight"])
    np.testing.assert_array_equal(tensor.scale, arrays["first.weight_scale"][:, 0])
    assert tensor.codes.min() == -128


def test_words_of_int4_are_taken_over():
    arrays, _ = read_container(map_file(GOLDEN / "pack4_f16" / "model.safetensors"), aligned=False)
    tensor = read(GOLDEN / "pack4_f16").stored["first.weight"].tensor()
    np.testing.assert_array_equal(tensor.words, arrays["first.weight_packed"])
    np.testing.assert_array_equal(tensor.scale, arrays["first.weight_scale"])
    assert (tensor.group, tensor.scale.dtype) == (8, np.float16)


def test_int8_values_of_four_bits_in_groups_are_packed():
    codes = np.random.default_rng(0).integers(-8, 8, (3, 24)).astype(np.int8)
    scale = np.array([[1, 2, -0.5]] * 3, np.float32)
    config = config_of({"num_bits": 4, "strategy": "group", "group_size": 8}, "int-quantized")
    arrays = {"a.weight": codes, "a.weight_scale": scale}
    tensor = assemble(arrays, read_scheme(config))["a.weight"].tensor()
    assert tensor.kind == "int4"
    np.testing.assert_array_equal(tensor.dense(), codes * np.repeat(scale, 8, 1))
    arrays["a.weight"] = with_element(codes, (0, 0), 8)
    weight = assemble(arrays, read_scheme(config))["a.weight"]
    assert weight.obstacle == "several scales in a row"
    assert weight.tensor().dense()[0, 0] == 8


def test_float8_codes():
    assert E4M3[[0x00, 0x38, 0xB8, 0x01, 0x7E, 0x08]].tolist() == [0.0, 1.0, -1.0, 2.0**-9, 448.0, 2.0**-6]
    assert np.isnan(E4M3[[0x7F, 0xFF]]).all()
    assert np.isfinite(E4M3).sum() == 254


# ---- folders of compressed encoders ----


def packed(codes, bits, crossing=True):
    """Integers as rows of int32 words, lowest bits first; bit by bit."""
    raised = codes.astype(np.int64) + 2 ** (bits - 1)
    if not crossing:
        each = 32 // bits
        raised = np.pad(raised, ((0, 0), (0, -raised.shape[1] % each))).reshape(len(raised), -1, each)
        return (raised << (bits * np.arange(each))).sum(axis=2).astype(np.uint32).view(np.int32)
    stream = (raised[:, :, None] >> np.arange(bits) & 1).reshape(len(raised), -1).astype(np.uint8)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.ascontiguousarray(np.packbits(stream, axis=1, bitorder="little")).view("<i4")


def masked(name, dense, paired=False):
    """The parts of a sparse weight."""
    mask = dense != 0
    counts = mask.sum(axis=-1)
    parts = {"compressed": dense[mask], "bitmask": np.packbits(mask, axis=-1, bitorder="little"), "shape": np.array(dense.shape)}
    if paired:
        parts |= {"compressed": dense[mask].reshape(len(dense), -1), "shape": np.array(dense.shape)[:, None]}
    else:
        parts["row_offsets"] = np.asarray(np.cumsum(counts, axis=0) - counts, np.int64).reshape(counts.shape)
    return {f"{name}.{part}": array for part, array in parts.items()}


def config_of(weights=None, form="int-quantized", sparsity=None, **rest):
    values = {"quant_method": "compressed-tensors", "version": "0.14.0", "format": form, "ignore": ["pooler.dense"], **rest}
    if weights is not None:
        values["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    if sparsity is not None:
        values["sparsity_config"] = {"format": sparsity, "targets": ["Linear"], "sparsity_structure": "unstructured"}
    return {**BERT, "quantization_config": values}


def linear(name, array):
    return name.startswith("encoder.") and name.endswith("weight") and array.ndim == 2


def int8_folder(folder):
    stored, dense = {}, {}
    rng = np.random.default_rng(1)
    for name, array in tensors_of(SHAPE).items():
        if not linear(name, array):
            stored[f"bert.{name}"] = dense[name] = array
            continue
        codes = rng.integers(-128, 128, array.shape).astype(np.int8)
        scale = rng.uniform(0.001, 0.004, (len(array), 1)).astype(np.float32)
        stored |= {f"bert.{name}": codes, f"bert.{name}_scale": scale, f"bert.{name[:-6]}input_scale": np.ones(1, np.float32)}
        dense[name] = codes * scale
    return write(folder, config_of({"num_bits": 8, "strategy": "channel"}), stored), dense


def float_folder(folder, by_tensor=False, paired=False):
    """By tensor: as the first releases name the parts, which compressed all tensors."""
    stored, dense = {}, {}
    rng = np.random.default_rng(2)
    for name, array in tensors_of(SHAPE).items():
        dense[name] = array
        if not linear(name, array) and not by_tensor:
            stored[f"bert.{name}"] = array
            continue
        if linear(name, array):
            keep = np.arange(array.size).reshape(array.shape) % 4 < 2 if paired else rng.random(array.shape) < 0.2
            dense[name] = np.where(keep, array, np.float32(0))
        stored |= masked(f"bert.{name}" if by_tensor else f"bert.{name.removesuffix('.weight')}", dense[name], paired)
    return write(folder, config_of(sparsity="sparse-24-bitmask" if paired else "sparse-bitmask", form="dense"), stored), dense


def outputs(model):
    return model.run(**{name: batch()[name] for name in model.inputs})["last_hidden_state"]


def same_outputs(model, dense, atol):
    wanted = outputs(model_of(TOKENS, dense))
    np.testing.assert_allclose(outputs(model), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("level", ["scalar", "avx2", None])
def test_an_int8_encoder_runs_with_its_codes(tmp_path, level):
    folder, dense = int8_folder(tmp_path / "m")
    model = gm.load(folder)
    tensor = model.tensors[f"{LAYER}.weight"]
    assert tensor.kind == "quantized"
    assert model.meta["source"]["compression"] == {
        "format": "int-quantized", "sparsity": "dense", "version": "0.14", "expanded": {},
        "groups": [{"format": "int-quantized", "bits": 8, "type": "int", "strategy": "channel", "symmetric": True}],
    }  # fmt: skip
    _core.set_isa(level)
    try:
        same_outputs(model, dense, 0.1)  # activations are rounded to int8
    finally:
        _core.set_isa(None)
    gm.save(model, tmp_path / "m.safetensors")
    again = gm.load(tmp_path / "m.safetensors").tensors[f"{LAYER}.weight"]
    np.testing.assert_array_equal(again.codes, tensor.codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_encoder_with_tables_of_integers_runs(tmp_path, bits):
    weights = {"num_bits": bits, "strategy": "channel"}
    config = config_of(weights, "pack-quantized")
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Linear", "Embedding"]
    rng, stored, dense = np.random.default_rng(4), {}, {}
    for name, array in tensors_of(SHAPE).items():
        if array.ndim == 1:
            stored[name] = dense[name] = array
            continue
        codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), array.shape).astype(np.int8)
        scale = rng.uniform(0.5, 1, (len(array), 1)).astype(np.float32) / np.float32(2**bits)
        stored |= {f"{name}_packed": packed(codes, bits), f"{name}_scale": scale, f"{name}_shape": np.array(codes.shape)}
        dense[name] = codes * scale
    model = gm.load(write(tmp_path / "m", config, stored))
    kinds = {model.tensors[f"{name}.weight"].kind for name in ("embeddings.word_embeddings", LAYER)}
    assert kinds == {"int4" if bits == 4 else "quantized"}
    same_outputs(model, dense, 0.15)
    gm.save(model, tmp_path / "m.safetensors")
    np.testing.assert_array_equal(outputs(gm.load(tmp_path / "m.safetensors")), outputs(model))


@pytest.mark.parametrize(("by_tensor", "paired"), [(False, False), (True, False), (False, True)])
def test_a_sparse_encoder_runs(tmp_path, by_tensor, paired):
    folder, dense = float_folder(tmp_path / "m", by_tensor, paired)
    model = gm.load(folder)
    assert model.tensors[f"{LAYER}.weight"].kind == "bitmask"
    np.testing.assert_array_equal(model.tensors[f"{LAYER}.weight"].dense(), dense[f"{LAYER}.weight"])
    assert model.tensors[f"{LAYER}.weight"].sparsity > 0.4
    same_outputs(model, dense, 2e-5)


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("kind", ["quantized", "bitmask"])
@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512", None])
def test_the_lowest_code_multiplies_exactly(level, kind, rows):
    rng = np.random.default_rng(rows)
    codes = rng.choice(np.array([-128, -128, 127, 3], np.int8), (21, 96))
    if kind == "bitmask":
        codes = np.where(rng.random(codes.shape) < 0.3, codes, np.int8(0))
    parts = masked("a", codes) if kind == "bitmask" else {"a.weight": codes}
    arrays = {**parts, "a.weight_scale": np.full((21, 1), 0.5, np.float32)}
    tensor = assemble(arrays, read_scheme(config_of({"num_bits": 8, "strategy": "channel"})))["a.weight"].tensor()
    assert tensor.kind == kind
    np.testing.assert_array_equal(tensor.dense(), codes * np.float32(0.5))
    x = rng.choice(np.array([0, 255], np.float32), (rows, 96))
    x[:, 0] = 255  # the largest: 0 and 255 have codes that stand for them, with a zero point and without
    node = Node("Linear", ("x", "w"), ("y",), {}, OWN)
    model = Model((node,), {"w": tensor}, {"x": TensorType(np.dtype(np.float32), ("m", 96))}, ("y",))
    _core.set_isa(level)
    try:
        made = model.run(x=x)["y"]
    finally:
        _core.set_isa(None)
    bound = 8 * np.finfo(np.float32).eps * (x @ np.abs(tensor.dense()).T)  # of the scales and their product
    assert (np.abs(made - x @ tensor.dense().T) <= bound).all()


def test_inspect_shows_the_compression(tmp_path):
    from typer.testing import CliRunner

    from gristmill.cli.app import app

    folder, _ = float_folder(tmp_path / "m")
    shown = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    assert shown.exit_code == 0, shown.output
    facts = json.loads(shown.output)
    assert facts["meta"]["source"]["compression"]["sparsity"] == "sparse-bitmask"
    assert {row["kind"] for row in facts["tensors"]} == {"dense", "bitmask float32"}


def test_older_places_of_the_configuration(tmp_path):
    folder, dense = float_folder(tmp_path / "m")
    sparsity = {"format": "sparse-bitmask"}
    for config in (
        {"compression_config": {"sparsity_config": sparsity}},
        {"sparsity_config": sparsity},
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "sparse-bitmask"}},
    ):
        (folder / "config.json").write_text(json.dumps({**BERT, **config}))
        found = gm.load(folder).tensors[f"{LAYER}.weight"]
        np.testing.assert_array_equal(found.dense(), dense[f"{LAYER}.weight"])


def test_what_was_never_compressed_loads_as_before(tmp_path):
    plain = write(tmp_path / "m", {**BERT, "quantization_config": None}, tensors_of(SHAPE))
    assert "compression" not in gm.load(plain).meta["source"]
    left = config_of({"num_bits": 8, "strategy": "channel"}, form="dense", sparsity="dense")
    extra = {f"{LAYER}.weight_scale": np.ones((20, 1), np.float32), f"{LAYER}.input_scale": np.ones(1, np.float32)}
    folder = write(tmp_path / "m", left, {**tensors_of(SHAPE), **extra})
    np.testing.assert_array_equal(gm.load(folder).tensors[f"{LAYER}.weight"].dense(), tensors_of(SHAPE)[f"{LAYER}.weight"])


# ---- packing ----


@given(
    bits=st.integers(1, 8), n=st.integers(1, 5), groups=st.integers(1, 4), size=st.sampled_from([1, 3, 8, 11]),
    crossing=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None)
def test_packed_integers_of_every_width(bits, n, groups, size, crossing, seed):
    rng = np.random.default_rng(seed)
    low, k = -(2 ** (bits - 1)), groups * size
    codes = rng.integers(low, -low, (n, k)).astype(np.int8)
    zeros = rng.integers(low, -low, (n, groups)).astype(np.int8)
    scale = rng.random((n, groups)).astype(np.float32)
    weights = {"num_bits": bits, "strategy": "group", "group_size": size, "symmetric": False}
    config = config_of(weights, "pack-quantized", version="0.17.0" if crossing else "0.16.9")
    arrays = {
        "a.weight_packed": packed(codes, bits, crossing), "a.weight_shape": np.array([n, k]), "a.weight_scale": scale,
        "a.weight_zero_point": packed(zeros.T, bits, crossing).T,
    }  # fmt: skip
    wanted = (codes.astype(np.float32) - np.repeat(zeros, size, 1)) * np.repeat(scale, size, 1)
    np.testing.assert_array_equal(assemble(arrays, read_scheme(config))["a.weight"].values(), wanted)
    arrays["a.weight_zero_point"] = zeros  # as releases up to 0.9.0 had it
    np.testing.assert_array_equal(assemble(arrays, read_scheme(config))["a.weight"].values(), wanted)


def test_large_weights_are_unpacked_in_pieces():
    rng = np.random.default_rng(0)
    codes = rng.integers(-4, 4, (1500, 1000)).astype(np.int8)
    scale = rng.random((1500, 1)).astype(np.float32)
    config = config_of({"num_bits": 3, "strategy": "channel"}, "pack-quantized", version="0.18.0")
    arrays = {"a.weight_packed": packed(codes, 3), "a.weight_shape": np.array(codes.shape), "a.weight_scale": scale}
    np.testing.assert_array_equal(assemble(arrays, read_scheme(config))["a.weight"].values(), codes * scale)
    sparse = np.where(rng.random(codes.shape) < 0.1, rng.random(codes.shape), 0).astype(np.float16)
    found = assemble(masked("a", sparse), read_scheme(config_of(sparsity="sparse-bitmask")))["a.weight"]
    np.testing.assert_array_equal(found.values(), sparse.astype(np.float32))
    np.testing.assert_array_equal(found.tensor().dense(), sparse.astype(np.float32))


# ---- patterns ----


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (".*self_attn.*", "model.layers.0.self_attn.q_proj"), (r"model\.layers\.([0-9]|1[0-2])\..*", "model.layers.12.mlp"),
        (r"model\.layers\.([0-9]|1[0-2])\..*", "model.layers.13.mlp"), (".*(q|k|v)_proj$", "a.k_proj"),
        (".*(q|k|v)_proj$", "a.k_proj.lora"), ("lm_head", "lm_head.extra"), ("^lm$|^x", "lm"), ("a{2,3}b?c+", "aaacc"),
        ("[^a-c\\d]+$", "xyz"), ("[^a-c\\d]+$", "xy1"), ("a$", "a\n"), ("", "anything"), (r"\w+\.\d+\S", "ab.12x"),
        ("a{0}b", "b"),
        ("(?:ab|c)*?d", "ababcd"), ("x|", "q"), ("[]a]b", "]b"), ("[a-]b", "-b"), ("((a)|b)+c", "abac"), ("a$b", "a\nb"),
    ],
)  # fmt: skip
def test_patterns_match_as_those_of_python(pattern, name):
    assert Pattern(pattern).matches(name) == (re.match(pattern, name) is not None)


PIECES = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\d", "(a|b)", "(ab|)", "(a|(b|c))", "^", "$", "x", "(b.)"])
REPEATED = st.tuples(PIECES, st.sampled_from(["", "*", "+", "?", "{2}", "{0,2}", "{1,}", "*?"])).map(
    lambda each: each[0] + (each[1] if each[0] not in "^$" else "")
)


@settings(max_examples=400, deadline=None)
@given(st.lists(REPEATED, max_size=6).map("".join), st.lists(REPEATED, max_size=3).map("".join), st.text("abcx1\n", max_size=8))
@example("a*a*a*", "", "aaab")
def test_random_patterns_match_as_those_of_python(left, right, name):
    pattern = f"{left}|{right}" if right else left
    assert Pattern(pattern).matches(name) == (re.match(pattern, name) is not None)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(?!a)b", r"\(\?! is not known"), ("(?i)a", "not known"), (r"(a)\1", r"\\1 is not known"), (r"a\b", "not known"),
        ("a**", "repetition"), ("*a", "repeats nothing"), ("(a", "has no"), ("a)", "has no"), ("[a", "ends too early"),
        ("a{3,1}", "do not rise"), ("a{x}", "counts"), ("a{99999}", "counts"), ("a{9999}", "states"), ("(a{99}){99}", "states"),
        ("(((){9999}){9999}){9999}", "states"), ("(" * 40 + ")" * 40, "deep"), ("a" * 1001, "longer"), ("[b-a]", "range"),
        (r"[\d-x]", "range"), ("\\", "ends too early"), ("^*", "cannot be repeated"),
    ],
)  # fmt: skip
def test_patterns_that_are_refused(pattern, message):
    with pytest.raises(FormatError, match=message):
        Pattern(pattern)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*b", ".*a.*a.*a.*a.*a.*a.*a.*b", "(.*)*(.*)*(.*)*b", "(a|b|ab)*c", "(a?){300}b"]
)
def test_no_pattern_takes_long(pattern):
    budget = Budget()
    begin = time.perf_counter()
    assert not Pattern(pattern, budget).matches("a" * 999 + "!")
    assert budget.steps > 40_000_000
    assert time.perf_counter() - begin < 5


def test_the_steps_of_all_patterns_are_bounded():
    pattern = Pattern(".*b", Budget(2000))
    for _ in range(3):
        assert not pattern.matches("a" * 500)
    with pytest.raises(FormatError, match="take too long"):
        pattern.matches("a" * 500)
    with pytest.raises(FormatError, match="too many to match"):
        Pattern("a").matches("a" * 1001)


def test_names_come_before_patterns_and_patterns_before_classes():
    def group(bits, *targets):
        return {"targets": list(targets), "weights": {"num_bits": bits, "strategy": "channel"}, "format": "int-quantized"}

    groups = {"a": group(2, "Linear"), "b": group(3, "re:.*up"), "c": group(4, "x.up"), "d": group(5, "Embedding")}
    values = {"format": "mixed-precision", "config_groups": groups, "ignore": ["re:.*head", "last"]}
    scheme = read_scheme({"quantization_config": values})
    bits = {name: scheme.group_of(name).weights.bits for name in ("x.down", "y.up", "x.up", "embed_tokens")}
    assert bits == {"x.down": 2, "y.up": 3, "x.up": 4, "embed_tokens": 5}
    for name in ("lm_head", "last"):
        with pytest.raises(FormatError, match="ignored"):
            scheme.group_of(name)


# ---- what is refused ----


def parts_of(name, *parts):
    return {f"{name}.{part}" for part in parts}


def good(kind):
    """A configuration and the tensors of one layer "a" that fit it."""
    rng = np.random.default_rng(3)
    sparse = np.where(rng.random((6, 16)) < 0.4, 1 + rng.random((6, 16)), 0).astype(np.float32)
    codes = rng.integers(-8, 8, (6, 16)).astype(np.int8)
    match kind:
        case "bitmask":
            return config_of(sparsity="sparse-bitmask"), masked("a", sparse)
        case "paired":
            return config_of(sparsity="sparse-24-bitmask"), masked("a", np.tile(np.float32([1, 0, 0, 2]), (6, 4)), True)
        case "int8":
            scale = rng.random((6, 1)).astype(np.float32)
            return config_of({"num_bits": 8, "strategy": "channel"}), {"a.weight": codes, "a.weight_scale": scale}
        case "sparse int8":
            config = config_of({"num_bits": 8, "strategy": "channel"}, sparsity="sparse-bitmask")
            return config, {**masked("a", codes), "a.weight_scale": rng.random((6, 1)).astype(np.float32)}
    weights = {"num_bits": 4, "strategy": "group", "group_size": 8, "symmetric": False, "actorder": "group"}
    return config_of(weights, "pack-quantized"), {
        "a.weight_packed": packed(codes, 4), "a.weight_shape": np.array([6, 16]),
        "a.weight_scale": rng.random((6, 2)).astype(np.float32), "a.weight_zero_point": packed(codes[:, :2].T, 4).T,
        "a.weight_g_idx": rng.permutation(16).astype(np.int32) // 8,
    }  # fmt: skip


KINDS = ("bitmask", "paired", "int8", "sparse int8", "pack4")


def with_element(array, at, value):
    array = array.copy()
    array[at] = value
    return array


# What is wrong: (kind, tensor, what it becomes (None: it is missing), words of the message)
DAMAGE = {
    "no bitmask": ("bitmask", "a.bitmask", None, "lacks 'a.bitmask'"),
    "no shape": ("bitmask", "a.shape", None, "lacks 'a.shape'"),
    "no row_offsets": ("bitmask", "a.row_offsets", None, "has no row_offsets, but"),
    "no values": ("bitmask", "a.compressed", None, None),
    "late row_offsets": ("bitmask", "a.row_offsets", lambda a: with_element(a, 1, 99), "disagrees with the bitmask"),
    "short row_offsets": ("bitmask", "a.row_offsets", lambda a: a[:-1], "disagrees with the bitmask"),
    "row_offsets of int32": ("bitmask", "a.row_offsets", lambda a: a.astype(np.int32), "disagrees with the bitmask"),
    "one value too many": ("bitmask", "a.compressed", lambda a: np.append(a, a[:1]), r"its bitmask marks \d+ elements"),
    "one value too few": ("bitmask", "a.compressed", lambda a: a[:-1], r"its bitmask marks \d+ elements"),
    "values of int64": ("bitmask", "a.compressed", lambda a: a.astype(np.int64), "which no weight is"),
    "integers without scales": ("bitmask", "a.compressed", lambda a: a.astype(np.int8), "'a.weight_scale' is missing"),
    "mask of int8": ("bitmask", "a.bitmask", lambda a: a.view(np.int8), "takes uint8"),
    "narrow mask": ("bitmask", "a.bitmask", lambda a: a[:, :1].copy(), "takes uint8"),
    "huge shape": ("bitmask", "a.shape", lambda a: np.array([2**31 - 1, 2**22]), "takes uint8"),
    "wide shape": ("bitmask", "a.shape", lambda a: np.array([6, 2**22 + 1]), "rows of more than"),
    "shape beyond all": ("bitmask", "a.shape", lambda a: np.array([2**40, 16]), "positive sizes"),
    "shape of a product too large": ("bitmask", "a.shape", lambda a: np.array([2**31 - 1, 2**31 - 1, 16]), "too large"),
    "negative shape": ("bitmask", "a.shape", lambda a: np.array([-6, 16]), "positive sizes"),
    "empty shape": ("bitmask", "a.shape", lambda a: np.array([0, 16]), "positive sizes"),
    "shape of floats": ("bitmask", "a.shape", lambda a: a.astype(np.float32), "positive sizes"),
    "no sizes": ("bitmask", "a.shape", lambda a: a[:0], "positive sizes"),
    "shape as a matrix": ("bitmask", "a.shape", lambda a: a[None, :], "positive sizes"),
    "shape of other size": ("bitmask", "a.shape", lambda a: np.array([6, 13]), "beyond the last column"),
    "not two of four": ("paired", "a.bitmask", lambda a: with_element(a, (2, 1), 0b11110000), "two of every four"),
    "flat values": ("paired", "a.compressed", lambda a: a.reshape(-1), "its bitmask marks"),
    "odd width": ("paired", "a.shape", lambda a: np.array([[6], [15]]), "even width"),
    "no matrix of pairs": ("paired", "a.shape", lambda a: np.array([[6]]), "even width"),
    "no scale": ("pack4", "a.weight_scale", None, "'a.weight_scale' is missing"),
    "int scale": ("int8", "a.weight_scale", lambda a: a.astype(np.int32), "scales must be floats"),
    "scale of another shape": ("int8", "a.weight_scale", lambda a: a[:-1], r"scales by channel of 6 x 16 are \[6, 1\]"),
    "scale as a vector": ("int8", "a.weight_scale", lambda a: a[:, 0], "scales by channel"),
    "NaN scale": ("int8", "a.weight_scale", lambda a: with_element(a, 0, np.nan), "not finite"),
    "infinite scale": ("pack4", "a.weight_scale", lambda a: with_element(a, 0, np.inf), "not finite"),
    "int16 codes": ("int8", "a.weight", lambda a: a.astype(np.int16), "int values of 8 bits"),
    "float codes": ("int8", "a.weight", lambda a: a.astype(np.float32), "int values of 8 bits"),
    "a vector of codes": ("int8", "a.weight", lambda a: a[0], "no matrices are not read"),
    "nothing": ("int8", "a.weight", lambda a: a[:0], "no matrices are not read"),
    "no codes": ("int8", "a.weight", None, "belongs to a quantised weight, which is missing"),
    "no shape of words": ("pack4", "a.weight_shape", None, "lacks 'a.weight_shape'"),
    "other rows": ("pack4", "a.weight_shape", lambda a: np.array([7, 16]), r"take \[7, 2\]"),
    "more columns": ("pack4", "a.weight_shape", lambda a: np.array([6, 24]), r"take \[6, 3\]"),
    "three dimensions": ("pack4", "a.weight_shape", lambda a: np.array([1, 6, 16]), "no matrices are not read"),
    "huge packed shape": ("pack4", "a.weight_shape", lambda a: np.array([6, 2**22]), "take"),
    "words of int64": ("pack4", "a.weight_packed", lambda a: a.astype(np.int64), "int32 matrix"),
    "flat words": ("pack4", "a.weight_packed", lambda a: a.reshape(-1), "int32 matrix"),
    "too many words": ("pack4", "a.weight_packed", lambda a: np.repeat(a, 2, 1), "take"),
    "no zero points": ("pack4", "a.weight_zero_point", None, "not symmetric"),
    "float zero points": ("pack4", "a.weight_zero_point", lambda a: a.astype(np.float32), "must be integers"),
    "zero points along the columns": ("pack4", "a.weight_zero_point", lambda a: a.T.copy(), "a.weight_zero_point"),
    "int8 zero points of another shape": ("pack4", "a.weight_zero_point", lambda a: a.astype(np.int8), "but the scales are"),
    "zero points out of range": ("pack4", "a.weight_zero_point", lambda a: np.full((6, 2), 300, np.int16), "beyond -128 and 127"),
    "short g_idx": ("pack4", "a.weight_g_idx", lambda a: a[:-1], "a group for each column"),
    "float g_idx": ("pack4", "a.weight_g_idx", lambda a: a.astype(np.float32), "a group for each column"),
    "g_idx out of range": ("pack4", "a.weight_g_idx", lambda a: with_element(a, 0, 2), "does not give each of 2 groups 8"),
    "negative g_idx": ("pack4", "a.weight_g_idx", lambda a: with_element(a, 0, -2), "does not give each"),
    "uneven g_idx": ("pack4", "a.weight_g_idx", lambda a: np.zeros_like(a), "does not give each"),
    "a weight beside the codes": ("pack4", "a.weight", lambda a: np.ones((6, 16), np.float32), "stored twice"),
}  # fmt: skip


def damaged(kind, name, change):
    config, arrays = good(kind)
    if change is None:
        del arrays[name]
    else:
        arrays[name] = change(arrays.get(name))
    return assemble(arrays, read_scheme(config))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_damaged_below_was_good(kind):
    config, arrays = good(kind)
    found = assemble(arrays, read_scheme(config))
    assert found.keys() == {"a.weight"}
    assert found["a.weight"].values().shape == (6, 16)


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(what):
    kind, name, change, message = DAMAGE[what]
    if message is None:  # nothing refers to the rest: it stays for the model to refuse
        assert damaged(kind, name, change).keys() == parts_of("a", "bitmask", "shape", "row_offsets")
        return
    with pytest.raises(FormatError, match=message) as caught:
        damaged(kind, name, change)
    assert "'a." in str(caught.value)


def test_a_negative_scale_or_none_gives_values(monkeypatch):
    config, arrays = good("int8")
    arrays["a.weight_scale"][:2] = [[-1], [0]]
    weight = assemble(arrays, read_scheme(config))["a.weight"]
    assert weight.obstacle == "scales that are not positive"
    np.testing.assert_array_equal(weight.tensor().dense(), arrays["a.weight"] * arrays["a.weight_scale"])


def test_minus_one_in_g_idx_stands_for_the_order_of_columns():
    config, arrays = good("pack4")
    arrays["a.weight_g_idx"][:] = -1
    values = assemble(arrays, read_scheme(config))["a.weight"].values()
    del arrays["a.weight_g_idx"]
    np.testing.assert_array_equal(values, assemble(arrays, read_scheme(config))["a.weight"].values())


CONFIGURATIONS = {
    "marlin": ({"format": "marlin-24"}, "marlin-24 is not read: .* as pack-quantized"),
    "nvfp4": ({"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized is not read: .* decompressed"),
    "mxfp4": ({"format": "mxfp4-pack-quantized"}, "mxfp4-pack-quantized is not read"),
    "unknown": ({"format": "zip"}, "format 'zip' is not known; what is read: int-quantized"),
    "no text": ({"format": 3}, "format '3' is not known"),
    "another library": ({"quant_method": "gptq", "config_groups": {}}, "quantised by 'gptq'"),
    "no library": ({"quant_method": None, "bits": 4}, "quantised by 'None'"),
    "version": ({"version": "new"}, "version must be a release"),
    "version as a number": ({"version": 1.5}, "version must be a release"),
    "groups": ({"config_groups": [1]}, "config_groups must be an object"),
    "preset": ({"config_groups": {"W8A8": ["Linear"]}}, "spells out its scheme"),
    "targets": ({"config_groups": {"g": {"targets": "Linear"}}}, "targets must be a list"),
    "pattern": ({"config_groups": {"g": {"targets": ["re:(?!x)"]}}}, "is not known; list the layers by name"),
    "ignore": ({"ignore": [1]}, "ignore must be a list"),
    "sparsity": ({"sparsity_config": []}, "sparsity_config must be an object"),
    "sparse format": ({"sparsity_config": {"format": "pack-quantized"}}, "is not one of sparse-bitmask"),
    "transforms": ({"transform_config": {"config_groups": {"u": {}}}}, "rotate their inputs"),
    "transforms as text": ({"transform_config": "x"}, "transform_config must be an object"),
}
ARGUMENTS = {
    "bits": ({"num_bits": 9}, "int weights of 9 bits are not read"),
    "no bits": ({"num_bits": 0}, "num_bits must be"),
    "bits as text": ({"num_bits": "8"}, "num_bits must be"),
    "float of 4 bits": ({"num_bits": 4, "type": "float"}, "float weights of 4 bits are not read"),
    "type": ({"type": "complex"}, "type must be int or float"),
    "strategy": ({"strategy": "tensor_group", "group_size": 16}, "by 'tensor_group' are not read"),
    "no group size": ({"strategy": "group"}, "group_size must be"),
    "group size": ({"strategy": "group", "group_size": 0}, "group_size must be"),
    "huge group size": ({"strategy": "group", "group_size": 2**40}, "group_size must be"),
    "no block": ({"strategy": "block"}, "block_structure must be"),
    "block": ({"strategy": "block", "block_structure": "8x0"}, "block_structure must be"),
    "symmetric": ({"symmetric": 1}, "symmetric must be"),
}


@pytest.mark.parametrize("what", [*CONFIGURATIONS, *ARGUMENTS])
def test_configurations_that_are_refused(tmp_path, what):
    if what in CONFIGURATIONS:
        changes, message = CONFIGURATIONS[what]
        config = config_of()
        config["quantization_config"] |= changes
    else:
        changes, message = ARGUMENTS[what]
        config = config_of(changes)
    folder = write(tmp_path / "m", config, tensors_of(SHAPE))
    with pytest.raises(FormatError, match=message):
        gm.load(folder)


def test_groups_that_do_not_divide_the_columns():
    config, arrays = good("pack4")
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 5
    with pytest.raises(FormatError, match=r"'a.weight' has 16 columns, which groups of 5 do not divide"):
        assemble(arrays, read_scheme(config))


def test_the_release_decides_how_words_are_filled():
    codes = np.ones((2, 24), np.int8)
    arrays = {"a.weight_packed": packed(codes, 5, crossing=False), "a.weight_shape": np.array([2, 24])}
    arrays["a.weight_scale"] = np.ones((2, 1), np.float32)
    weights = {"num_bits": 5, "strategy": "channel"}
    for version, same in (("0.16.0", True), (None, True), ("0.17.0", False)):  # four words in either case
        config = config_of(weights, "pack-quantized", version=version)
        found = assemble(arrays, read_scheme(config))["a.weight"].values()
        assert (found == 1).all() == same
    arrays["a.weight_packed"] = packed(np.ones((2, 60), np.int8), 5)
    arrays["a.weight_shape"] = np.array([2, 60])
    assert (assemble(arrays, read_scheme(config))["a.weight"].values() == 1).all()
    config["quantization_config"]["version"] = "0.16.0"
    arrays["a.weight_packed"] = packed(np.ones((2, 70), np.int8), 5)
    arrays["a.weight_shape"] = np.array([2, 70])
    with pytest.raises(FormatError, match=r"is `version` in config.json right"):
        assemble(arrays, read_scheme(config))


def test_float_types_that_are_stored_plainly(tmp_path):
    """BF16 and FP8 without scales, float64 scales, and what is no float."""
    data = np.array([0x3FC0, 0xC000], "<u2").tobytes() + bytes([0x38, 0xB8]) + np.arange(3).tobytes()
    entries = {"b": ("BF16", 2, 0, 4), "c": ("F8_E4M3", 2, 4, 6), "d": ("I64", 3, 6, 30)}
    header = json.dumps(
        {name: {"dtype": code, "shape": [size], "data_offsets": [a, b]} for name, (code, size, a, b) in entries.items()}
    )
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    found = read(path)
    assert {name: found[name].tolist() for name in found} == {"b": [1.5, -2.0], "c": [1.0, -1.0], "d": [0, 1, 2]}
    config, arrays = good("int8")
    arrays["a.weight_scale"] = arrays["a.weight_scale"].astype(np.float64) / 3
    weight = assemble(arrays, read_scheme(config))["a.weight"]
    assert weight.obstacle == "float64 scales"
    np.testing.assert_array_equal(weight.values(), (arrays["a.weight"] * arrays["a.weight_scale"]).astype(np.float32))


def test_a_file_alone_has_its_sparse_weights_read(tmp_path):
    _, arrays = good("bitmask")
    save_file(arrays, tmp_path / "x.safetensors")
    assert read(tmp_path / "x.safetensors")["a.weight"].shape == (6, 16)
    _, arrays = good("int8")
    save_file(arrays, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match=r"x.safetensors: layer 'a' is quantised, but no config.json"):
        read(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.safetensors")
    config, arrays = good("int8")
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Conv2d"]
    with pytest.raises(FormatError, match=r"no group of config.json"):
        assemble(arrays, read_scheme(config))


# ---- hostile files ----

SHAPES = st.sampled_from(
    [[], [0], [1], [2, 1], [6, 16], [1, 2], [96], [2**31], [2**20, 2**20], [3, 2, 16], [0, 2**40], [2**40, 0]]
)
NUMBERS = st.sampled_from([-1, 0, 1, 2, 6, 8, 15, 16, 17, 255, 2**31 - 1, 2**31, 2**40, 2**62, -(2**63)])


def harmless(config, arrays):
    """Whatever is damaged: tensors of bounded size come out, or a FormatError."""
    with suppress(FormatError):
        found = assemble(arrays, read_scheme(config))
        for stored in found.values():
            if isinstance(stored, Weight):
                held = sum(array.nbytes for array in arrays.values())
                assert stored.values().nbytes <= 32 * held + 64
                stored.tensor()


@SLOW
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_random_damage_of_tensors(kind, data):
    config, arrays = good(kind)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(arrays)))
        array = arrays[name]
        match data.draw(st.integers(0, 5)):
            case 0:
                dtypes = [np.int8, np.uint8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64, np.bool_]
                with np.errstate(all="ignore"):
                    arrays[name] = array.astype(data.draw(st.sampled_from(dtypes)))
            case 1:
                size = data.draw(SHAPES.filter(lambda shape: np.prod(shape, dtype=object) <= 4096))
                arrays[name] = np.resize(array, size) if array.size else np.zeros(size, array.dtype)
            case 2 if array.size and array.dtype.kind in "iu":
                info = np.iinfo(array.dtype)
                value = min(max(data.draw(NUMBERS), info.min), info.max)
                arrays[name] = with_element(array.reshape(-1), data.draw(st.integers(0, array.size - 1)), value).reshape(
                    array.shape
                )
            case 3:
                arrays[name] = array[: data.draw(st.integers(0, 6))] if array.ndim else array
            case 4:
                arrays[
                    data.draw(st.sampled_from(["a.weight", "b.weight_scale", "a.weight_g_idx", "a.compressed", "a.shape"]))
                ] = array
            case 5:
                del arrays[name]
                if not arrays:
                    return
    harmless(config, arrays)


JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=6)
    | st.sampled_from(["Linear", "re:.*", "re:(", "group", "channel", "block", "int", "pack-quantized", "sparse-bitmask"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["format", "targets", "weights"]), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip


@SLOW
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_random_configurations(kind, data):
    config, arrays = good(kind)
    config = copy.deepcopy(config)
    for _ in range(data.draw(st.integers(1, 3))):
        at = config["quantization_config"]
        for key in ("config_groups", "group_0", "weights")[: data.draw(st.integers(0, 3))]:
            if isinstance(at.get(key), dict):
                at = at[key]
        known = ["format", "version", "ignore", "sparsity_config", "transform_config", "group_size", "block_structure", "type"]
        at[data.draw(st.sampled_from(sorted({*at, *known})))] = data.draw(JUNK)
    harmless(config, arrays)


@SLOW
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_random_damage_of_files(tmp_path_factory, kind, data):
    """Headers that lie, and files that end early."""
    config, arrays = good(kind)
    folder = tmp_path_factory.mktemp("files")
    write(folder, config, {name: np.ascontiguousarray(array) for name, array in arrays.items()}, tokenizer=None)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    if data.draw(st.booleans()):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    else:
        header = json.loads(whole[8 : 8 + length])
        entry = header[data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))]
        if data.draw(st.booleans()):
            entry["shape"] = data.draw(SHAPES)
        if data.draw(st.booleans()):
            entry["dtype"] = data.draw(st.sampled_from(["I8", "U8", "I32", "I64", "F32", "BF16", "F8_E4M3", "F8_E5M2", "F16"]))
        if data.draw(st.booleans()):
            entry["data_offsets"] = data.draw(st.lists(NUMBERS, min_size=2, max_size=2))
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    with suppress(FormatError):
        found = read(folder)
        for name in found:
            found[name]


def test_lies_about_sizes_allocate_nothing():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for what in ("huge shape", "shape beyond all", "huge packed shape", "shape of a product too large", "more columns"):
        kind, name, change, _ = DAMAGE[what]
        with pytest.raises(FormatError):
            damaged(kind, name, change)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
