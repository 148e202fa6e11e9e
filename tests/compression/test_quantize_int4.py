"""int4: tables and weights, in groups, on the kernels that read them; what it costs, and what is refused."""

import numpy as np
import pytest

import gristmill as gm
from gristmill.compression.quantize import tables_of
from gristmill.compression.recipe import Context
from gristmill.errors import DataError, ModelError
from gristmill.formats import native
from gristmill.model import Model
from gristmill.ops import OWN, Node, TensorType
from gristmill.runtime.session import Session
from gristmill.tensor import Dense

I64 = np.dtype(np.int64)


def apply(model, *settings, **named):
    return gm.Quantize("int4", *settings, **named).apply(model, Context(model, None, 0, 1, False))


@pytest.fixture(scope="module")
def encoder():
    return gm.zoo.bert(layers=1, hidden=64, heads=2, vocabulary=50, positions=24)


def ids(shape=(3, 7)):
    return {
        "input_ids": np.random.default_rng(0).integers(0, 50, shape),
        "attention_mask": np.ones(shape, np.int64),
        "token_type_ids": np.zeros(shape, np.int64),
    }


def kinds(model):
    return {name: tensor.kind for name, tensor in model.tensors.items() if len(tensor.shape) == 2}


def test_weights_are_quantised_and_tables_where_asked(encoder):
    tables = set(tables_of(encoder))
    assert len(tables) == 3
    assert set(encoder.weights).isdisjoint(tables)
    for settings, chosen in (
        ({}, set(encoder.weights)),
        ({"tables": True}, {*encoder.weights, *tables}),
        ({"tables": "only"}, tables),
        ({"tables": "only", "names": "*word*"}, {name for name in tables if "word" in name}),
        ({"tables": True, "skip": "*attention*"}, {n for n in (*encoder.weights, *tables) if "attention" not in n}),
    ):
        made = kinds(apply(encoder, **settings))
        assert {name for name, kind in made.items() if kind == "int4"} == chosen


def test_a_fused_lookup_takes_int4_tables_beside_others(encoder):
    exact = Session(encoder).run(**ids())
    for names in ("*word*", "*position*", "*"):
        small = apply(encoder, tables="only", names=names)
        plain = small.replace(tensors={n: Dense(small.tensors[n].dense()) for n in tables_of(small)})
        found, wanted = Session(small, threads=2).run(**ids()), Session(plain, threads=2).run(**ids())
        for name, value in found.items():
            np.testing.assert_allclose(value, wanted[name], rtol=0, atol=2e-6 * np.abs(value).max())
            assert np.abs(value - exact[name]).max() > 0
    explained = Session(small).explain(**{name: value.shape for name, value in ids().items()})
    assert explained[0]["kernel"] == "lookups"


@pytest.mark.parametrize("axis", [0, 1])
def test_gather_of_an_int4_table(axis):
    table = Dense(np.random.default_rng(1).standard_normal((20, 48)).astype(np.float32))
    node = Node("Gather", ("table", "ids"), ("y",), {"axis": axis})
    model = Model((node,), {"table": table}, {"ids": TensorType(I64, ("a", "b"))}, ("y",))
    assert tables_of(model) == (("table",) if axis == 0 else ())
    quantized = model.replace(tensors={"table": gm.tensor.Int4.from_dense(table.array)})
    given = np.array([[1, -1, 0], [19, 5, 5]])
    np.testing.assert_array_equal(quantized.run(ids=given)["y"], np.take(quantized.tensors["table"].dense(), given, axis=axis))
    if axis == 0:
        assert np.isnan(quantized.run(ids=np.array([[20]]))["y"]).all()


def test_products_agree_with_the_dequantised_weight_at_every_batch():
    model = gm.zoo.mlp([70, 96, 40])
    for group in (32, 128, 16):
        small = apply(model, group=group)
        session, exact = (
            Session(small, threads=2),
            small.replace(tensors={n: Dense(small.tensors[n].dense()) for n in small.weights}),
        )
        for rows in (0, 1, 2, 5, 6, 7, 40):
            x = np.random.default_rng(rows).standard_normal((rows, 70)).astype(np.float32)
            found, wanted = session.run(x=x)["logits"], exact.run(x=x)["logits"]
            assert np.linalg.norm(found - wanted) <= 0.02 * np.linalg.norm(wanted)
        assert {row["kernel"] for row in session.explain(x=(4, 70)) if row["weight"]} == {"linear_int4"}


def test_the_file_shrinks_and_reads_back_the_same(encoder):
    small = apply(encoder, tables=True)
    data = native.to_bytes(small)
    assert len(data) < len(native.to_bytes(encoder)) / 3
    again = native.from_bytes(data)
    for name, value in Session(small).run(**ids()).items():
        np.testing.assert_array_equal(Session(again).run(**ids())[name], value)


def test_clipping_and_calibration_lower_the_error():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 96)).astype(np.float32) * 10.0 ** rng.uniform(-1.5, 0.5, 96).astype(np.float32)
    model = gm.zoo.mlp([96, 80])
    exact = model.run(x=x[200:])["logits"]
    errors = []
    for settings in ({"clip": False}, {}, {"calibration": x[:200]}):
        small = apply(model, **settings)
        plain = small.replace(tensors={n: Dense(small.tensors[n].dense()) for n in small.weights})
        errors.append(np.linalg.norm(plain.run(x=x[200:])["logits"] - exact))
    assert errors[0] > errors[1] > errors[2]


def test_what_is_quantised_already_stays(encoder):
    first = gm.Quantize("int8").apply(encoder, Context(encoder, None, 0, 1, False))
    both = kinds(apply(first, tables=True))
    assert set(both.values()) == {"quantized", "int4"}
    assert apply(first).tensors == first.tensors


def test_fit_trains_gains_and_leaves_int4_tables_alone():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((200, 32)).astype(np.float32), rng.integers(0, 4, 200)
    small = apply(gm.zoo.mlp([32, 48, 4]))
    result = gm.fit(small, (x, y), optimizer=gm.Adam(1e-2), engine="inline", epochs=4)
    assert result.history["loss"][-1] < result.history["loss"][0]
    for name in small.weights:
        before, after = small.tensors[name], result.model.tensors[name]
        np.testing.assert_array_equal(after.words, before.words)
        assert (after.scale != before.scale).any()


def test_tables_that_are_int4_do_not_train(encoder):
    small = apply(encoder, tables=True)
    assert set(small.trainable) >= set(small.weights)
    assert set(small.trainable).isdisjoint(tables_of(small))
    table = Dense(np.ones((4, 8), np.float32))
    nodes = (Node("Gather", ("table", "ids"), ("x",)), Node("Linear", ("x", "w"), ("y",), domain=OWN))
    model = Model(nodes, {"table": table, "w": table}, {"ids": TensorType(I64, ("n",))}, ("y",))
    packed = apply(model, tables="only")
    data = np.zeros(6, np.int64), np.zeros(6, np.int64)
    with pytest.raises(ModelError, match="'table' is int4, which does not train"):
        gm.fit(packed, data, engine="inline", epochs=1, trainable=["table"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": 12}, "multiple of 8"),
        ({"group": 32.0}, "multiple of 8"),
        ({"tables": "all"}, "tables"),
        ({"precision": "int8", "tables": True}, "tables"),
        ({"precision": "bf16", "calibration": "data"}, "bf16 has none"),
        ({"precision": "int3"}, "int8, int4 and bf16"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ModelError, match=message):
        gm.Quantize(**{"precision": "int4", **settings})


def test_data_that_do_not_fit_are_refused():
    model = gm.zoo.mlp([8, 4])
    for calibration in (iter(()), "data"):
        with pytest.raises(DataError):
            apply(model, calibration=calibration)
    with pytest.raises(DataError, match="not finite"):
        apply(model, calibration=np.full((3, 8), np.nan, np.float32))
    with pytest.raises(ModelError, match="matches none"):
        apply(model, names="embedding*")
    with pytest.raises(ModelError, match="no weights are left"):
        apply(model, tables="only")
    broken = model.replace(tensors={"layer0.weight": Dense(np.full((4, 8), np.inf, np.float32))})
    with pytest.raises(ModelError, match=r"'layer0.weight' \[4, 8\] is not finite"):
        apply(broken)
