"""Who may import whom, read from the imports themselves."""

import ast
import re
from pathlib import Path

import pytest

import gristmill

ROOT = Path(gristmill.__file__).parent
SOURCES = Path(__file__).parents[1] / "src" / "fastcore"

# A later layer may import an earlier one and its own, never back.
LAYERS = (
    ("errors", "_core"),
    ("tensor",),
    ("ops",),
    ("model", "autodiff"),
    ("formats", "runtime", "optim", "losses", "zoo", "text"),
    ("training", "metrics"),
    ("compression", "edge"),
    ("serving",),
    ("bench",),
    ("cli", "__main__", "__init__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# The one import against the order: a model compiles its own session, late.
LATE = {("model", "runtime")}
APART = {("compression", "edge"), ("edge", "compression")}
SERVING_MAY = {"errors", "_core", "tensor", "ops", "model", "runtime", "formats", "serving"}


def imports_of(path):
    """Yield (imported module's first name inside the package, whether at the top of the file)."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gristmill":
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            for name in names:
                yield name, id(node) in top
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "gristmill" and "." in alias.name:
                    yield alias.name.split(".")[1], id(node) in top


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert own in LEVEL, f"{own} has no layer"
    for name, at_top in imports_of(path):
        if own in ("cli", "__init__", "__main__"):
            continue
        if (own, name) in LATE:
            assert not at_top
            continue
        assert LEVEL[name] <= LEVEL[own], f"{own} (layer {LEVEL[own]}) imports {name} (layer {LEVEL[name]})"
        assert (own, name) not in APART
        assert own != "serving" or name in SERVING_MAY


def test_no_file_names_that_say_nothing():
    empty = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "base"}
    assert not [path for path in FILES if path.stem in empty]


@pytest.mark.skipif(not SOURCES.exists(), reason="installed without sources")
def test_the_border_holds_no_loops_over_data_and_no_threads():
    for path in [SOURCES / "core.pyx", *SOURCES.glob("*/*.pxi")]:
        text = path.read_text()
        assert "prange" not in text, path
        assert not re.search(r"\b(float|double|u?int\d+_t)\s*\[:", text), f"{path}: a typed memoryview, to loop over data"


@pytest.mark.skipif(not SOURCES.exists(), reason="installed without sources")
def test_kernels_know_neither_python_nor_threads():
    for path in SOURCES.glob("*/*.c"):
        text = path.read_text()
        assert not re.search(r"#include\s*[<\"](omp|Python)\.h", text), path
        if path.stem in ("scalar", "avx2", "avx512", "avx512vnni", "avx512bf16"):
            assert not re.search(r"\b(malloc|calloc|realloc|printf|exit|abort)\s*\(", text), path
            assert "parallel.h" not in text, path
