"""The README's Python runs, block after block, as a reader would run it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(number, folder):
    """Each block is a script of its own, without a __main__ guard; files pass from one to the next."""
    script = folder / f"block{number}.py"
    script.write_text(BLOCKS[number])
    done = subprocess.run([sys.executable, script.name], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_are_blocks_for_every_stage():
    text = "\n".join(BLOCKS)
    for name in ("gm.fit(", "gm.fit_gradient(", "gm.compress(", "gm.EdgeTrainer(", "gm.serve("):
        assert name in text
