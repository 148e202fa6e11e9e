"""Sessions: shapes, errors, in-place outputs, kernels bound, threads, memory."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gristmill as gm
from gristmill import _core, autodiff, losses
from gristmill.errors import BudgetError, ModelError
from gristmill.ops import Node, TensorType
from gristmill.runtime.arena import Buffer, Memory, place
from gristmill.runtime.fuse import fuse
from gristmill.runtime.plan import weight_view
from gristmill.runtime.session import Session
from gristmill.tensor import Quantized, Sparse


@pytest.fixture
def model():
    return gm.zoo.mlp([64, 48, 32, 10], activation="gelu", layer_norm=True, seed=3)


def batch(m, k=64, seed=0):
    return np.random.default_rng(seed).standard_normal((m, k)).astype(np.float32)


@pytest.mark.parametrize("m", [0, 1, 2, 11, 12, 13, 64, 257])
def test_any_batch_agrees_with_the_reference(model, m):
    x = batch(m)
    want = Session(model, reference=True).run(x=x)["logits"]
    got = Session(model, threads=2).run(x=x)["logits"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_same_bits_for_any_thread_count(model):
    x = batch(100)
    answers = [Session(model, threads=n).run(x=x)["logits"] for n in (1, 2, 3, 4)]
    for other in answers[1:]:
        assert np.array_equal(answers[0], other)


def test_a_row_does_not_depend_on_its_batch_mates(model):
    x = batch(40)
    session = Session(model, threads=1)
    whole = session.run(x=x)["logits"]
    np.testing.assert_allclose(session.run(x=x[7:8])["logits"], whole[7:8], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "missing \\['x'\\]"),
        ({"y": batch(2)}, "unknown \\['y'\\]"),
        ({"x": batch(2).astype(np.float64)}, "float64; convert it"),
        ({"x": [[0.0] * 64]}, "got list"),
        ({"x": batch(2, 63)}, "\\(2, 63\\)"),
        ({"x": batch(2)[0]}, "\\(64,\\)"),
    ],
)
def test_wrong_inputs_are_named(model, inputs, message):
    with pytest.raises(ModelError, match=message):
        model.run(**inputs)


def test_symbols_must_agree():
    training = losses.attach(gm.zoo.mlp([4, 3]), "cross_entropy")
    with pytest.raises(ModelError, match="batch"):
        Session(training).run(x=batch(3, 4), labels=np.zeros(2, np.int64))


def test_strided_and_read_only_inputs_work(model):
    x = batch(8, 128)[:, ::2]
    x.flags.writeable = False
    np.testing.assert_array_equal(model.run(x=x)["logits"], model.run(x=np.ascontiguousarray(x))["logits"])


def test_outputs_are_the_callers_own(model):
    session = Session(model)
    first = session.run(x=batch(3))["logits"]
    kept = first.copy()
    session.run(x=batch(3, seed=1))
    np.testing.assert_array_equal(first, kept)


def test_bound_outputs_are_written_in_place(model):
    out = np.zeros((3, 10), np.float32)
    session = Session(model)
    assert session.execute({"x": batch(3)}, {"logits": out})["logits"] is out
    np.testing.assert_array_equal(out, session.run(x=batch(3))["logits"])
    with pytest.raises(ModelError, match="cannot be written"):
        session.execute({"x": batch(4)}, {"logits": out})


def test_the_same_memory_in_another_shape_is_not_mistaken_for_the_first(model):
    memory = np.zeros(30, np.float32)
    session = Session(model)
    session.execute({"x": batch(3)}, {"logits": memory.reshape(3, 10)})
    with pytest.raises(ModelError, match="cannot be written"):
        session.execute({"x": batch(3)}, {"logits": memory.reshape(10, 3)})


def test_a_prepared_run_takes_new_values_and_writes_its_outputs(model):
    out = np.zeros((3, 10), np.float32)
    session = Session(model)
    run = session.prepare({"x": TensorType(np.dtype(np.float32), (3, 64))}, {"logits": out})
    for seed in (1, 2):
        assert run({"x": batch(3, seed=seed)})["logits"] is out
        np.testing.assert_array_equal(out, session.run(x=batch(3, seed=seed))["logits"])
    session.run(x=batch(300))  # a larger arena takes the place of the one that the run holds
    run({"x": batch(3, seed=3)})
    np.testing.assert_array_equal(out, session.run(x=batch(3, seed=3))["logits"])
    with pytest.raises(ModelError, match="shape"):
        session.prepare({"x": TensorType(np.dtype(np.float32), (3, 63))})


def test_preparing_waits_for_a_run_to_end(model):
    """It may replace the arena that the run is using."""
    session = Session(model)
    types = {"x": TensorType(np.dtype(np.float32), (300, 64))}
    with session._lock:
        preparing = threading.Thread(target=session.prepare, args=(types,))
        preparing.start()
        preparing.join(0.3)
        assert preparing.is_alive()
    preparing.join()


def test_what_only_looks_like_an_array_is_refused_whatever_was_run_before(model):
    class Lookalike:
        shape, dtype = (3, 64), np.dtype(np.float32)

    session = Session(model)
    session.run(x=batch(3))
    with pytest.raises(ModelError, match="Lookalike"):
        session.run(x=Lookalike())


def test_trainable_tensors_are_read_at_every_run(model):
    weights = {"layer0.weight": np.array(model.tensors["layer0.weight"].array)}
    session = Session(model, trainable=weights)
    before = session.run(x=batch(3))["logits"]
    np.testing.assert_allclose(before, model.run(x=batch(3))["logits"], rtol=1e-5, atol=1e-6)
    weights["layer0.weight"] *= 2
    assert not np.allclose(before, session.run(x=batch(3))["logits"])
    with pytest.raises(ModelError, match="shape"):
        Session(model, trainable={"layer0.weight": np.zeros((1, 1), np.float32)})
    with pytest.raises(ModelError, match="no tensor"):
        Session(model, trainable={"nothing": np.zeros(1, np.float32)})


def test_in_place_gives_the_same_answer(model):
    np.testing.assert_allclose(
        Session(model, in_place=True).run(x=batch(20))["logits"], model.run(x=batch(20))["logits"], rtol=1e-5, atol=1e-6
    )


def test_fusion_leaves_one_node_per_layer():
    fused = fuse(gm.zoo.mlp([8, 7, 6], activation="tanh"))
    assert [node.op for node in fused.nodes] == ["Linear", "Linear"]
    assert fused.nodes[0].attributes["activation"] == "tanh"


def test_residuals_fuse():
    model = gm.zoo.mlp([8, 8])
    model = model.replace(nodes=(*model.nodes, Node("Add", ("logits", "x"), ("y",))), outputs=("y",))
    fused = fuse(model)
    assert [node.op for node in fused.nodes] == ["Linear"]
    x = batch(5, 8)
    want = Session(model, reference=True).run(x=x)["y"]
    np.testing.assert_allclose(model.run(x=x)["y"], want, rtol=1e-5, atol=1e-6)


def test_a_value_that_is_also_an_output_is_not_fused_away():
    model = gm.zoo.mlp([8, 7, 6])
    model = model.replace(outputs=("layer0", "logits"))
    out = model.run(x=batch(3, 8))
    assert (out["layer0"] < 0).any()


def test_int8_precision_binds_int8_kernels_and_stays_close(model):
    session = Session(model, precision="int8")
    kernels = {row["kernel"] for row in session.explain() if row["weight"]}
    assert kernels == {"linear_int8"}
    assert session.explain()[1]["weight"] == "quantized 48x64"
    want, got = model.run(x=batch(50))["logits"], session.run(x=batch(50))["logits"]
    assert np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)
    with pytest.raises(ModelError, match="precision"):
        Session(model, precision="int3")


def test_explain_names_kernels(model):
    rows = Session(model).explain(x=(32, 64))
    assert [row["kernel"] for row in rows if row["weight"]] == ["linear"] * 3
    assert rows[0]["weight"] == "dense 48x64"
    assert all(row["kernel"] != "numpy" for row in rows)


def test_changing_the_instruction_set_rebuilds_plans(model):
    session = Session(model)
    best = session.run(x=batch(30))["logits"]
    try:
        _core.set_isa("scalar")
        np.testing.assert_allclose(session.run(x=batch(30))["logits"], best, rtol=1e-4, atol=1e-5)
    finally:
        _core.set_isa(None)
    np.testing.assert_array_equal(session.run(x=batch(30))["logits"], best)


def test_threads_may_share_a_session_or_clone_it(model):
    session = Session(model, threads=2)
    want = {m: session.run(x=batch(m))["logits"] for m in range(1, 9)}
    wrong = []

    def work(mine):
        for _ in range(20):
            for m, answer in want.items():
                if not np.array_equal(mine.run(x=batch(m))["logits"], answer):
                    wrong.append(m)

    workers = [threading.Thread(target=work, args=(s,)) for s in (session, session, session.clone(), session.clone())]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_budget_is_kept_and_named(model):
    memory = Memory(limit=1000)
    with pytest.raises(BudgetError) as caught:
        Session(model, memory=memory).run(x=batch(64))
    assert caught.value.needed_bytes > 1000
    memory = Memory()
    Session(model, memory=memory).run(x=batch(64))
    assert 0 < memory.used <= memory.peak


@given(st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 9), st.integers(0, 9)), max_size=30))
def test_placed_buffers_never_overlap_in_space_and_time(rows):
    buffers = []
    for nbytes, a, b in rows:
        buffer = Buffer((nbytes,), np.uint8)
        buffer.touch(min(a, b))
        buffer.touch(max(a, b))
        buffers.append(buffer)
    total = place(buffers)
    for i, a in enumerate(buffers):
        assert a.offset % 64 == 0
        assert a.offset + a.nbytes <= total
        for b in buffers[:i]:
            apart_in_time = a.last < b.first or b.last < a.first
            assert apart_in_time or a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset


def test_gradients_of_a_whole_network_agree_with_the_reference(model):
    graph = autodiff.gradients(losses.attach(model, "cross_entropy"), "loss", model.tensors)
    inputs = {"x": batch(33), "labels": np.random.default_rng(0).integers(0, 10, 33)}
    values = {name: np.array(tensor.trainable) for name, tensor in model.tensors.items()}
    want = Session(graph, trainable=values, reference=True).run(**inputs)
    for threads in (1, 2):
        got = Session(graph, threads=threads, trainable=values).run(**inputs)
        for name, value in want.items():
            scale = max(float(np.abs(value).max()), 1e-6)
            np.testing.assert_allclose(got[name], value, rtol=0, atol=3e-5 * scale, err_msg=name)


def test_only_the_needed_backward_graph_is_built(model):
    training = losses.attach(model, "cross_entropy")
    whole = autodiff.gradients(training, "loss", model.tensors)
    last = autodiff.gradients(training, "loss", ["layer2.bias"])
    assert len(last.nodes) < len(whole.nodes) / 2
    assert not [node for node in last.nodes if node.op in ("LinearGradInput", "LinearGradWeight")]


def test_a_view_of_a_bound_output_is_not_taken_for_it(model):
    session, out = Session(model), np.zeros((3, 10), np.float32)
    session.execute({"x": batch(3)}, {"logits": out})
    for view in (out[:2], out.T, out.view(np.int32), out[:, :5]):
        with pytest.raises(ModelError, match="cannot be written"):
            session.execute({"x": batch(3)}, {"logits": view})
    out.flags.writeable = False
    with pytest.raises(ModelError, match="cannot be written"):
        session.execute({"x": batch(3)}, {"logits": out})


def test_a_tensor_can_be_an_output_but_not_a_bound_one(model):
    name = "layer2.bias"
    wide = model.replace(outputs=("logits", name, "x"))
    got = Session(wide).run(x=batch(3))
    np.testing.assert_array_equal(got[name], model.tensors[name].array)
    np.testing.assert_array_equal(got["x"], batch(3))
    with pytest.raises(ModelError, match="cannot be written"):
        Session(wide).execute({"x": batch(3)}, {name: np.zeros(10, np.float32)})


def test_a_refused_arena_leaves_the_books_straight(model):
    memory = Memory()
    session = Session(model, threads=1, memory=memory)
    session.run(x=batch(2))
    used, memory.limit = memory.used, memory.used + 1000
    for _ in range(2):
        with pytest.raises(BudgetError):
            session.run(x=batch(1000))
        assert 0 <= memory.used <= used
    memory.limit = None
    want = Session(model, threads=1).run(x=batch(2))["logits"]
    np.testing.assert_array_equal(session.run(x=batch(2))["logits"], want)
    assert memory.used == used


def test_clones_that_start_together_pack_once(model):
    memory = Memory()
    Session(model, threads=1, memory=memory).run(x=batch(2))
    alone = memory.used
    arena = Session(model, threads=1).layout({"x": TensorType(np.dtype(np.float32), (2, 64))}).nbytes
    together = Memory()
    first = Session(model, threads=1, memory=together)
    sessions = [first, *(first.clone() for _ in range(3))]
    gate = threading.Barrier(4)

    def run(session):
        gate.wait()
        session.run(x=batch(2))

    threads = [threading.Thread(target=run, args=(session,)) for session in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together.used == alone + 3 * arena


@pytest.mark.parametrize("block", [(1, 1), (1, 4)])
def test_sparse_weights_that_train_count_what_their_kernel_adds(model, block):
    weight = model.tensors["layer0.weight"].array
    mask = np.arange(weight.size // block[1]).reshape(weight.shape[0], -1) % 3 == 0
    pruned = model.replace(tensors={"layer0.weight": Sparse.from_dense(weight, mask.astype(np.uint8), block)})
    values = np.array(pruned.tensors["layer0.weight"].trainable)
    memory = Memory()
    session = Session(pruned, threads=1, trainable={"layer0.weight": values}, in_place=True, memory=memory)
    layout = session.layout({"x": TensorType(np.dtype(np.float32), (2, 64))})
    before = session.run(x=batch(2))["logits"]
    packed = sum(_core.packed_nbytes(p.pack, weight_view(pruned.tensors[p.name])) for p in layout.packs)
    assert memory.used == layout.nbytes + packed
    assert packed >= 2 * 4 * weight.shape[0]
    values[...] = np.roll(values, 1)
    assert not np.allclose(before, session.run(x=batch(2))["logits"])


def test_a_compressed_tensor_that_trains_is_no_operand(model):
    weight = Quantized.from_dense(model.tensors["layer0.weight"].array)
    wide = model.replace(tensors={"layer0.weight": weight}, outputs=("logits", "layer0.weight"))
    session = Session(wide, trainable={"layer0.weight": np.array(weight.trainable)})
    with pytest.raises(ModelError, match="nothing but a Linear"):
        session.run(x=batch(2))


FORK = """
import os, sys
import numpy as np
import gristmill as gm

session = gm.Session(gm.zoo.mlp([256, 1024, 1024, 10]), threads=2)
x = np.ones((64, 256), np.float32)
want = session.run(x=x)["logits"]
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(session.run(x=x)["logits"], want) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_runs_alone_and_gives_the_same_bits():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=60)


def test_steps_that_do_not_meet_share_a_group():
    """Three products of one input need no barrier between them; what reads them does, and so does memory used anew."""
    from gristmill.model import Model
    from gristmill.ops import OWN, Node, TensorType
    from gristmill.tensor import Dense

    rng = np.random.default_rng(0)
    weights = {name: Dense(rng.standard_normal((64, 64)).astype(np.float32)) for name in "abcd"}
    nodes = [Node("Linear", ("x", name), (f"y{name}",), domain=OWN) for name in "abc"]
    nodes += [Node("Add", ("ya", "yb"), ("s",)), Node("Add", ("s", "yc"), ("t",)), Node("Linear", ("t", "d"), ("z",), domain=OWN)]
    model = Model(tuple(nodes), weights, {"x": TensorType(np.dtype(np.float32), (96, 64))}, ("z", "ya", "yb", "yc"))
    session = gm.Session(model, threads=3, precision="int8")
    layout = session.layout(model.inputs)
    groups = {}
    for group, step in zip(layout.groups, layout.steps, strict=True):
        groups.setdefault(step.node.name, set()).add(group)
    assert groups["yb"] == groups["yc"] < groups["ya"]
    assert not groups["z"] & (groups["ya"] | groups["t"] | groups["s"])
    x = rng.standard_normal((96, 64)).astype(np.float32)
    wanted = gm.Session(model, threads=1, precision="int8").run(x=x)["z"]
    for _ in range(50):
        np.testing.assert_array_equal(session.run(x=x)["z"], wanted)


def test_more_tokens_than_positions_are_refused_by_name():
    model = gm.zoo.bert(layers=1, hidden=8, heads=2, vocabulary=9, positions=4)
    ids = np.ones((1, 5), np.int64)
    with pytest.raises(ModelError, match=r"^Positions '\S+': 'input_ids' has 5 tokens in a sequence, the model takes 4 at most"):
        model.run(input_ids=ids, attention_mask=ids, token_type_ids=0 * ids)


def test_a_value_that_no_memory_holds_is_refused_before_it_is_made():
    kinds = {"a": TensorType(np.dtype(np.float32), ("n", 1)), "b": TensorType(np.dtype(np.float32), ("m",))}
    model = gm.Model((Node("Add", ("a", "b"), ("y",)),), {}, kinds, ("y",))
    a, b = np.zeros((1 << 22, 1), np.float32), np.zeros(1 << 22, np.float32)
    with pytest.raises(BudgetError, match=r"Add 'y' would make float32\[4194304, 4194304\].*this machine has") as caught:
        model.run(a=a, b=b)
    assert caught.value.needed_bytes == 4 << 44
