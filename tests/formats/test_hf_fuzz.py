"""Hostile configurations: whatever JSON they hold, a folder loads or is refused, and nothing large is allocated."""

import copy
import json
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gristmill as gm
from formats.hf_folders import BERT, DISTILBERT, MODULES, POOLING, ROBERTA, SHAPE, distilled, tensors_of, write
from gristmill.errors import FormatError
from gristmill.model import Model

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.integers(0, 64) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["bert", "gelu", "", "..", "/", "1_Pooling", "BertModel", "BertForSequenceClassification"])
    | st.sampled_from([10**30, 2**31 - 1])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6
)
CONFIGS = {"bert": BERT, "distilbert": DISTILBERT, "roberta": ROBERTA}
SLOW = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    plain = tensors_of(SHAPE)
    stored = {"bert": plain, "distilbert": distilled(plain), "roberta": plain}
    return {kind: write(tmp_path_factory.mktemp(kind), CONFIGS[kind], tensors, MODULES) for kind, tensors in stored.items()}


def loads_or_refuses(folder):
    with suppress(FormatError, FileNotFoundError):
        assert isinstance(gm.load(folder), Model)


@SLOW
@given(kind=st.sampled_from(list(CONFIGS)), data=st.data())
def test_config(folders, kind, data):
    config = dict(CONFIGS[kind])
    for _ in range(data.draw(st.integers(1, 3))):
        config[data.draw(st.sampled_from([*config, "is_decoder", "position_embedding_type"]))] = data.draw(VALUES)
    (folders[kind] / "config.json").write_text(json.dumps(config))
    loads_or_refuses(folders[kind])


@SLOW
@given(data=st.data())
def test_modules(folders, data):
    folder, modules, pooling = folders["bert"], copy.deepcopy(MODULES), dict(POOLING)
    (folder / "config.json").write_text(json.dumps(BERT))
    match data.draw(st.integers(0, 2)):
        case 0:
            modules = data.draw(VALUES)
        case 1:
            modules[data.draw(st.integers(0, 2))][data.draw(st.sampled_from(["path", "type"]))] = data.draw(VALUES)
        case 2:
            pooling[data.draw(st.sampled_from([*POOLING, "pooling_mode_lasttoken"]))] = data.draw(VALUES)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    loads_or_refuses(folder)


@SLOW
@given(
    name=st.sampled_from(["config.json", "modules.json", "tokenizer.json", "sentence_bert_config.json"]),
    data=st.binary(max_size=40),
)
def test_bytes(folders, name, data):
    folder = folders["roberta"]
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(data)
    loads_or_refuses(folder)
    (folder / name).write_bytes(before)
