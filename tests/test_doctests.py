"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import gristmill

NAMES = [
    info.name
    for info in pkgutil.walk_packages(gristmill.__path__, "gristmill.")
    if info.name not in ("gristmill._core", "gristmill.__main__", "gristmill.training.worker")
]


@pytest.mark.parametrize("name", NAMES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_public_names_carry_docstrings():
    bare = [name for name in gristmill.__all__ if name != "__version__" and not getattr(gristmill, name).__doc__]
    assert not bare


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    tests = [test for name in NAMES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(tests) >= 20
