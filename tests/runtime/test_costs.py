"""Prices: fitted, kept in a file, and what follows from them; the choice of a product, which never changes a result."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

import gristmill as gm
from gristmill import _core
from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.ops import OWN, Node, TensorType
from gristmill.ops.products import PRODUCTS
from gristmill.ops.products.product import Size
from gristmill.runtime import calibrate, costs
from gristmill.runtime.arena import Memory
from gristmill.runtime.choice import Move
from gristmill.runtime.session import Session
from gristmill.tensor import Dense, Quantized, Sparse

LEVELS = ("scalar", "avx2", "avx512")
BY_NAME = {product.name: product for product in PRODUCTS}
DENSE, BLOCKS = BY_NAME["dense int8"], BY_NAME["blocks 4x4 int8"]


def rows(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def sparse(n, k, block, dtype, share=0.3, seed=0):
    mask = np.random.default_rng(seed).random((n // block[0], k // block[1])) < share
    tensor = Sparse.from_dense(rows(n, k, seed=seed), mask, block)
    return tensor.quantized() if dtype == "int8" else tensor


def layer(weight, activation=None, residual=False, **attributes):
    n, k = weight.shape
    kinds = {"x": TensorType(np.dtype(np.float32), ("batch", k)), "r": TensorType(np.dtype(np.float32), ("batch", n))}
    attributes |= {"activation": activation} if activation else {}
    node = Node("Linear", ("x", "w", "b", *(["r"] if residual else [])), ("y",), attributes, OWN)
    inputs = kinds if residual else {"x": kinds["x"]}
    return Model((node,), {"w": weight, "b": Dense(rows(n, seed=9))}, inputs, ("y",))


def bound(session, m):
    return [row["product"] for row in session.explain(x=(m, session.model.inputs["x"].shape[1])) if row["weight"]]


def forced(model, index, threads=1):
    """A session that takes the way of this index where there is one."""
    session = Session(model, threads)
    session.options = replace(session.options, decide=lambda ways, threads, resident: ways[index])
    return session


@pytest.fixture(params=LEVELS)
def level(request):
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(None)


FORMS = [(block, dtype) for dtype in ("float32", "int8") for block in ((1, 1), (1, 4), (2, 4), (4, 4))]


@pytest.mark.parametrize(("block", "dtype"), FORMS)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_products_of_a_weight_give_the_same_bits(level, block, dtype, activation):
    model = layer(sparse(36, 140, block, dtype), activation, residual=True)
    for m in (1, 2, 5, 16, 33, 70):
        given = {"x": rows(m, 140, seed=m), "r": rows(m, 36, seed=1)}
        own = forced(model, 0).run(**given)["y"]
        np.testing.assert_array_equal(own, forced(model, -1, threads=2).run(**given)["y"])


def test_products_agree_where_blocks_of_k_end():
    """Sums over several blocks of k stay one chain."""
    for dtype in ("float32", "int8"):
        model, x = layer(sparse(8, 3072, (4, 4), dtype)), rows(19, 3072)
        np.testing.assert_array_equal(forced(model, 0).run(x=x)["y"], forced(model, -1).run(x=x)["y"])


def test_every_sparse_form_has_an_alternative_but_portable_float32(level):
    for block, dtype in FORMS:
        ways = Session(layer(sparse(8, 16, block, dtype))).explain()
        others = [other["product"] for row in ways if row["weight"] for other in row["alternatives"]]
        own = [row["product"] for row in ways if row["weight"]]
        expected = [f"dense {dtype}"] if dtype == "int8" or level != "scalar" else []
        assert [name for name in own + others if name.startswith("dense")] == expected


def test_few_rows_run_dense_and_many_run_sparse():
    session = Session(layer(sparse(768, 768, (4, 4), "int8", 0.2)), threads=1)
    assert bound(session, 1) == ["dense int8"]
    assert bound(session, 128) == ["blocks 4x4 int8"]
    x = rows(128, 768)
    np.testing.assert_array_equal(session.run(x=x)["y"][:1], session.run(x=x[:1])["y"])


def test_dense_weights_stay_dense():
    weight = np.zeros((64, 64), np.float32)
    for tensor in (Dense(weight), Quantized.from_dense(weight)):
        (row,) = (row for row in Session(layer(tensor)).explain(x=(128, 64)) if row["weight"])
        assert row["product"].startswith("dense")
        assert row["alternatives"] == []


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_own_forms_where_no_copy_may_be_made(dtype):
    model = layer(sparse(768, 768, (4, 4), dtype, 0.9))
    trained = {"w": np.array(model.tensors["w"].trainable)}
    for options in ({"trainable": trained}, {"in_place": True}, {"memory": Memory(1 << 30)}):
        assert bound(Session(model, 1, **options), 1) == [f"blocks 4x4 {dtype}"]
    assert bound(Session(model, 1), 1) == [f"dense {dtype}"]


def test_a_static_scale_is_served_by_a_kernel():
    model = layer(sparse(8, 16, (4, 4), "int8"), input_scale=0.02, input_zero_point=100)
    x = rows(5, 16)
    session = Session(model)
    assert all(row["kernel"] != "numpy" for row in session.explain())
    np.testing.assert_allclose(session.run(x=x)["y"], Session(model, reference=True).run(x=x)["y"], rtol=1e-5, atol=1e-5)


# ---- fitting ----


def test_fit_finds_prices_and_none_below_zero():
    rng = np.random.default_rng(0)
    work, wanted = rng.random((30, 4)) * [1, 1e3, 1e6, 1e9], np.array([1e-6, 0, 3e-12, 5e-15])
    seconds = work @ wanted
    np.testing.assert_allclose(calibrate.fit(work / seconds[:, None]), wanted, rtol=1e-6, atol=1e-20)
    slope = np.array([[1.0, 2.0], [1.0, 4.0], [1.0, 8.0]])  # time falls where work grows: the price is 0, not negative
    assert (calibrate.fit(slope / np.array([3.0, 2.0, 1.0])[:, None]) >= 0).all()


@pytest.mark.parametrize("item", [DENSE, BY_NAME["blocks 4x4 float32"], Move("rows", "lanes"), Move("lanes", "tile codes")])
def test_prices_are_measured(item, monkeypatch):
    monkeypatch.setattr(calibrate, "WEIGHTS", ((96, 64, 0.5), (64, 96, 0.1)))
    monkeypatch.setattr(calibrate, "MOST_ROWS", 130)
    found = calibrate.prices(item)
    assert len(found) == len(item.work(Size(1, 4, 4, 16)))
    assert min(found) >= 0 < max(found)


def test_what_cannot_be_measured_has_no_price(monkeypatch):
    monkeypatch.setattr(type(DENSE), "example", lambda *args: None)
    assert calibrate.prices(DENSE) is None


def test_every_product_has_built_in_prices_and_bytes():
    for product in PRODUCTS:
        assert len(costs.BUILT_IN[product.name]) == len(product.work(Size(3, 32, 32, 100.0)))
        assert product.nbytes(product.example(32, 32, 0.5, 0), 3) > 0


# ---- the file ----


@pytest.fixture
def measured(monkeypatch):
    """Count what is measured, at made-up prices."""
    names = []

    def prices(item):
        names.append(item.name)
        return tuple(1e-9 * (i + 1) for i in range(len(item.work(Size(1, 4, 4, 16)))))

    monkeypatch.setattr(calibrate, "prices", prices)
    return names


def decide(found):
    ways = [costs._alone(product, Size(4, 64, 64, 100.0)) for product in (DENSE, BLOCKS)]
    return found.decide(ways, 1, 0)


def test_prices_are_measured_once_and_kept(tmp_path, measured):
    path = tmp_path / "deep" / "costs.json"
    first = costs.Costs(path)
    way = decide(first)
    wanted = ["dense int8", "blocks 4x4 int8", "rows to tile codes", "rows to lanes codes", "lanes to rows"]
    assert sorted(measured) == sorted(wanted)
    assert decide(first) == decide(costs.Costs(path)) == way
    assert len(measured) == len(wanted)
    assert os.listdir(path.parent) == [path.name]
    costs.Costs(path).seconds(Move("rows", "lanes"), Size(1, 4, 0, 0))
    assert len(costs.read(path)[costs.digest(_core.isa_generation())]) == len(wanted) + 1


DAMAGED = [
    "",
    "{",
    "[]",
    "null",
    '{"format": 1}',
    '{"format": 99, "machines": {}}',
    '{"format": 1, "machines": [1]}',
    "\0\xff",
    "[" * 9000,
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_is_measured_anew(tmp_path, measured, text):
    path = tmp_path / "costs.json"
    path.write_text(text, encoding="latin-1")
    decide(costs.Costs(path))
    assert measured
    assert costs.read(path)


@pytest.mark.parametrize("prices", [["x"], [-1.0], [float("nan")], [float("inf")], [], [0.0], 3, {"a": 1}, [None]])
def test_prices_that_cannot_be_are_measured_anew(tmp_path, measured, prices):
    path, machine = tmp_path / "costs.json", costs.digest(_core.isa_generation())
    path.write_text(json.dumps({"format": costs.FORMAT, "machines": {machine: {"dense int8": prices}}}))
    decide(costs.Costs(path))
    assert "dense int8" in measured


def test_prices_of_another_number_of_terms_choose_nothing(tmp_path, measured):
    path, machine = tmp_path / "costs.json", costs.digest(_core.isa_generation())
    path.write_text(json.dumps({"format": costs.FORMAT, "machines": {machine: {"dense int8": [1e-30]}}}))
    assert decide(costs.Costs(path)).product == BLOCKS


def test_prices_of_another_machine_stay_and_serve_nobody_here(tmp_path, measured):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"format": costs.FORMAT, "machines": {"elsewhere": {"dense int8": [1.0] * 5}}}))
    decide(costs.Costs(path))
    assert "dense int8" in measured
    assert costs.read(path)["elsewhere"] == {"dense int8": (1.0,) * 5}


def test_a_file_that_cannot_be_written_is_done_without(tmp_path, measured):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "costs.json", tmp_path):
        found = costs.Costs(path)
        assert decide(found) == decide(found)


def test_another_instruction_set_has_prices_of_its_own(tmp_path, measured):
    found = costs.Costs(tmp_path / "costs.json")
    decide(found)
    count = len(measured)
    try:
        _core.set_isa("scalar")
        decide(found)
        assert len(measured) == 2 * count
    finally:
        _core.set_isa(None)
    decide(found)
    assert len(measured) == 2 * count


def test_where_prices_are_kept(monkeypatch, tmp_path):
    assert costs.where() is None  # tests run so
    monkeypatch.setenv("GRISTMILL_COSTS", str(tmp_path / "c"))
    assert costs.where() == tmp_path / "c"
    monkeypatch.delenv("GRISTMILL_COSTS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert costs.where() == tmp_path / "gristmill" / "costs.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert str(costs.where()).endswith(os.path.join(".cache", "gristmill", "costs.json"))


def test_nothing_is_measured_where_there_is_no_choice(monkeypatch, tmp_path, measured):
    monkeypatch.setenv("GRISTMILL_COSTS", str(tmp_path / "costs.json"))
    gm.zoo.mlp([8, 4]).run(x=rows(3, 8))
    assert not measured
    Session(layer(sparse(8, 16, (4, 4), "int8"))).run(x=rows(3, 16))
    assert "blocks 4x4 int8" in measured


def test_memory_is_the_limit_of_a_model_beyond_the_cache(monkeypatch):
    monkeypatch.setattr(costs, "last_level", lambda: 1000)
    way = replace(costs._alone(DENSE, Size(1, 64, 64, 4096.0)), nbytes=int(20e9))
    assert costs.Costs(None).expected(way, 1, 2000) == pytest.approx(1.0)
    assert costs.Costs(None).expected(way, 1, 500) < 1e-3


# ---- where sparse begins to pay ----


def test_break_even_is_where_both_take_as_long(monkeypatch):
    prices = {"dense int8": (0.0, 1e-9, 0.0, 0.0, 0.0), "blocks 4x4 int8": (0.0, 0.0, 4e-8, 0.0, 0.0, 0.0)}
    free = dict.fromkeys(("rows to tile codes", "rows to lanes codes", "lanes to rows"), (0.0, 1e-30))
    monkeypatch.setattr(costs, "BUILT_IN", {**prices, **free})
    monkeypatch.setattr(costs, "_costs", {})
    # a stored element costs 4e-8 for 16 rows; a dense one 1e-9 for each of 16
    assert costs.break_even(64, 32, 16) == pytest.approx(1 - 16e-9 / 4e-8)
    assert costs.break_even(64, 32, 64) == pytest.approx(1 - 16e-9 / 4e-8)
    prices["blocks 4x4 int8"] = (1.0, 0.0, 4e-8, 0.0, 0.0, 0.0)
    monkeypatch.setattr(costs, "BUILT_IN", {**prices, **free})
    monkeypatch.setattr(costs, "_costs", {})
    assert costs.break_even(64, 32, 16) is None
    prices["blocks 4x4 int8"] = (0.0, 0.0, 1e-12, 0.0, 0.0, 0.0)
    monkeypatch.setattr(costs, "BUILT_IN", {**prices, **free})
    monkeypatch.setattr(costs, "_costs", {})
    assert costs.break_even(64, 32, 16) == 0.0


def test_break_even_agrees_with_the_plan():
    for m in (4, 16, 128):
        even = costs.break_even(768, 768, m, "4x4", "int8", threads=1)
        for step in (-0.05, 0.05):
            share = 1 - (even + step)
            session = Session(layer(sparse(768, 768, (4, 4), "int8", share)), threads=1)
            assert bound(session, m) == ["blocks 4x4 int8" if step > 0 else "dense int8"]


def test_break_even_refuses_unknown_patterns():
    with pytest.raises(ModelError, match="3x3 int8"):
        costs.break_even(64, 64, 1, "3x3")


# ---- explanations ----


def test_an_explanation_prints_and_is_rows():
    model = layer(sparse(768, 384, (4, 4), "int8", 0.2))
    rows_of = Session(model, threads=1).explain(x=(64, 384))
    (row,) = (row for row in rows_of if row["weight"])
    assert row["weight"] == "sparse 768x384"
    assert row["bytes"] == model.tensors["w"].nbytes
    assert row["rows"] == 64
    assert row["product"] == "blocks 4x4 int8"
    assert row["layout"] == "lanes codes"
    assert row["reads"] > 64 * 384
    assert 0 < row["expected_ms"] < row["alternatives"][0]["expected_ms"]
    assert row["alternatives"][0]["product"] == "dense int8"
    assert row["measured_ms"] is None
    text = str(rows_of)
    assert "blocks 4x4 int8" in text
    assert len(text.splitlines()) == len(rows_of) + 2
    json.dumps(rows_of)


@pytest.mark.parametrize("threads", [1, 2])
def test_steps_are_measured(threads):
    session = Session(gm.zoo.mlp([16, 8, 3], layer_norm=True), threads)
    x = rows(5, 16)
    for measure in (True, {"x": x}):
        found = session.explain(measure=measure, x=(5, 16)) if measure is True else session.explain(measure=measure)
        assert found
        assert all(row["measured_ms"] > 0 for row in found)
    assert [row["kernel"] for row in found] == [row["kernel"] for row in session.explain(x=(5, 16))]
    with pytest.raises(ModelError):
        session.explain(measure={"x": rows(5, 17)})


def test_python_steps_are_measured():
    found = Session(gm.zoo.mlp([16, 3]), reference=True).explain(measure=True)
    assert [row["kernel"] for row in found] == ["numpy"]
    assert found[0]["measured_ms"] > 0
    assert found[0]["weight"] == "dense 3x16"
