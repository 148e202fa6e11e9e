"""The conformance suite of the onnx project (onnx.backend.test), run against the loader and the session."""

import contextlib
import io
import re
import warnings
from collections import Counter

import numpy as np
import onnx
from onnx.backend.base import Backend, BackendRep
from onnx.backend.test import BackendTest

from gristmill.errors import FormatError
from gristmill.formats.onnx import from_proto
from gristmill.formats.onnx.writer import to_proto_model
from gristmill.runtime.session import Session

PREFIX = "not supported: "


class Prepared(BackendRep):
    """A model that takes inputs by position, as the suite gives them."""

    def __init__(self, proto, again):
        self.model = from_proto(proto)
        if again:
            self.model = from_proto(to_proto_model(self.model))
        self.session = Session(self.model, threads=2)
        given = {tensor.name for tensor in proto.graph.initializer}
        self.names = [value.name for value in proto.graph.input if value.name not in given]

    def run(self, inputs, **kwargs):
        arrays = {name: np.asarray(array) for name, array in zip(self.names, inputs, strict=False)}
        made = self.session.execute(arrays)
        return [made[name] for name in self.model.outputs]


class Gristmill(Backend):
    again = False  # write the model and read that back before it runs

    @classmethod
    def prepare(cls, model, device="CPU", **kwargs):
        return Prepared(model, cls.again)

    @classmethod
    def supports_device(cls, device):
        return device == "CPU"


class Again(Gristmill):
    again = True


def run_suite(pattern="", categories=None, backend=Gristmill):
    """Return {category: {test: None or the exception}} of every test whose name matches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        items = BackendTest(backend, __name__)._test_items
        results = {}
        for category, tests in items.items():
            if categories and category not in categories:
                continue
            results[category] = {}
            for name, item in tests.items():
                if name.endswith("_cpu") and re.search(pattern, name):
                    results[category][name] = _outcome(item.func)
    return results


def _outcome(func):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            func(None)
    except Exception as error:
        return error
    return None


def verdict(error):
    """Say "passed", "unsupported" (the loader named what it lacks) or "failed"."""
    if error is None:
        return "passed"
    return "unsupported" if isinstance(error, FormatError) and str(error).startswith(PREFIX) else "failed"


def lacking(error):
    """Return what the loader said it lacks, without the nodes."""
    return [re.sub(r": \d+ \(.*", "", part) for part in str(error).removeprefix(PREFIX).split("; ")]


def table(results):
    """Return {category: Counter of verdicts} and a Counter of what is unsupported."""
    counts = {category: Counter(map(verdict, tests.values())) for category, tests in results.items()}
    missing = Counter()
    for tests in results.values():
        for error in tests.values():
            if verdict(error) == "unsupported":
                missing.update(set(lacking(error)))
    return counts, missing


__all__ = ["Again", "Gristmill", "lacking", "onnx", "run_suite", "table", "verdict"]
