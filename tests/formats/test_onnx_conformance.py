"""The conformance suite of the onnx project: nothing fails, and what is supported does not silently shrink."""

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("ml_dtypes")

from formats import onnx_suite

# What passes with onnx 1.23. A newer onnx has more tests; fewer that pass than here is a regression.
PASSED = {
    "NodeModel": 1750,
    "SimpleModel": 7,
    "PyTorchOperatorModel": 35,
    "PyTorchConvertedModel": 82,
    "RealModel": 9,
}
# Draws of a random generator cannot be compared; the onnx project leaves them out too. Their own test is below.
RANDOM = "test_bernoulli"
# Everything that the suite may be refused for, by what the loader says.
BEYOND = (
    "control flow", "a condition that is not constant", "element type string", "input of type sequence", "input of type optional",
    "Sequence", "Optional", "SplitToSequence", "ConcatFromSequence", "ImageDecoder", "TfIdfVectorizer", "ai.onnx.ml::",
    "ai.onnx.preview.training::",
)  # fmt: skip


@pytest.fixture(scope="module")
def results():
    return onnx_suite.run_suite(f"^(?!{RANDOM})")


@pytest.mark.parametrize("category", PASSED)
def test_nothing_fails_and_enough_passes(results, category):
    failed = {name: error for name, error in results[category].items() if onnx_suite.verdict(error) == "failed"}
    assert not failed, "\n".join(f"{name}: {type(error).__name__} {str(error)[:300]}" for name, error in failed.items())
    counts, _ = onnx_suite.table(results)
    assert counts[category]["passed"] >= PASSED[category]


def test_what_is_unsupported_is_so_by_decision(results):
    counts, missing = onnx_suite.table(results)
    print(f"\n{'suite':22}{'passed':>8}{'unsupported':>13}{'failed':>8}")
    for category, count in counts.items():
        print(f"{category:22}{count['passed']:8}{count['unsupported']:13}{count['failed']:8}")
    for what, number in missing.most_common():
        print(f"  {number:4} x {what}")
    unforeseen = [what for what in missing if not any(word in what for word in BEYOND)]
    assert not unforeseen


def test_a_random_operator_draws_what_it_says():
    helper = onnx_suite.onnx.helper
    node = helper.make_node("Bernoulli", ["p"], ["y"], seed=1.0)
    kind = helper.make_tensor_value_info("p", 1, [2000])
    graph = helper.make_graph([node], "g", [kind], [helper.make_tensor_value_info("y", 1, [2000])])
    prepared = onnx_suite.Gristmill.prepare(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)]))
    (drawn,) = prepared.run([np.full(2000, 0.25, np.float32)])
    assert set(np.unique(drawn)) == {0.0, 1.0}
    assert abs(drawn.mean() - 0.25) < 0.05
