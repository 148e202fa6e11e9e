"""Recipes as data: there and back, what is refused and how it is said."""

import json
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest

import gristmill as gm
from gristmill.compression.recipe import Pass
from gristmill.compression.recipe_file import described, from_dict, known, read_recipe, to_dict, write_recipe
from gristmill.errors import FormatError, MissingExtraError, ModelError

pytest.importorskip("yaml")
RECIPES = {
    "all": [gm.Clip(), gm.Prune(0.8), gm.Distill(epochs=3), gm.Quantize("int8")],
    "names": [gm.Clip(value=0.5, names=("layer0*", "layer[1]*"), skip=("layer2*",))],
    "shares": [gm.Prune({"layer0*": 0.5, "*": 0.9}), gm.Prune(pattern="2:4")],
    "optimizer": [gm.Distill(optimizer=gm.AdamW(1e-3, weight_decay=0.1, clip_norm=1.0), alpha=1.0)],
    "calibrated": [gm.Quantize("int8", calibration="data", percentile=99.9)],
}


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_comes_back_as_it_was_written(name, suffix, tmp_path):
    write_recipe(RECIPES[name], tmp_path / f"recipe.{suffix}")
    assert read_recipe(tmp_path / f"recipe.{suffix}") == RECIPES[name]
    assert from_dict(json.loads(json.dumps(to_dict(RECIPES[name])))) == RECIPES[name]


NEEDED = {"Prune": {"sparsity": 0.5}, "RemoveHeads": {"fraction": 0.5}, "RemoveLayers": {"layers": (1,)}}


def test_every_pass_and_every_setting_can_be_written():
    assert {"Clip", "Prune", "Distill", "Quantize"} <= known(Pass).keys()
    for kind in known(Pass).values():
        step = kind(**NEEDED.get(kind.__name__, {}))
        (entry,) = to_dict([step])
        assert entry.keys() == {"pass", *(field.name for field in fields(kind))}
        assert from_dict([entry]) == [step]


def test_a_pass_of_somebody_else_is_known_by_its_fields(tmp_path):
    @dataclass(frozen=True)
    class Halve(Pass):
        times: int = 1
        only: tuple[str, ...] = ()

        def apply(self, model, context):
            changed = {
                name: model.tensors[name].with_trainable(model.tensors[name].trainable / 2**self.times) for name in self.only
            }
            return model.replace(tensors=changed)

    write_recipe([Halve(2, ("layer0.weight",))], tmp_path / "recipe.yaml")
    (step,) = read_recipe(tmp_path / "recipe.yaml")
    model = gm.zoo.mlp([4, 3])
    small, report = gm.compress(model, [step])
    np.testing.assert_array_equal(small.tensors["layer0.weight"].dense(), model.tensors["layer0.weight"].dense() / np.float32(4))
    assert report.recipe[0] == {"pass": "Halve", "times": 2, "only": ["layer0.weight"]}


def test_the_short_forms(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "- Clip\n- Prune:\n    sparsity: 0.5\n- pass: Distill\n  optimizer: {SGD: {learning_rate: 1e-2}}\n- Quantize:\n"
    )
    clip, prune, distill, quantize = read_recipe(path)
    assert (clip, prune, quantize) == (gm.Clip(), gm.Prune(0.5), gm.Quantize())
    assert distill.optimizer == gm.SGD(0.01)


def test_a_teacher_is_named_by_its_path(tmp_path):
    gm.save(gm.zoo.mlp([4, 3], seed=5), tmp_path / "teacher.safetensors")
    (tmp_path / "recipe.json").write_text('[{"pass": "Distill", "teacher": "teacher.safetensors"}]')
    (distill,) = read_recipe(tmp_path / "recipe.json")
    assert distill.teacher.weights == ("layer0.weight",)
    assert described(distill)["teacher"]["model"].startswith("sha256:")
    with pytest.raises(ModelError, match=r"Distill: teacher is a model in memory; save it"):
        to_dict([distill])


WRONG: dict[str, tuple[Any, str]] = {
    "no list": ("Prune", "at least one pass"),
    "empty": ([], "at least one pass"),
    "other keys": ({"passes": []}, "'recipe'"),
    "pass": ([{"pass": "Prun", "sparsity": 0.5}], "no pass 'Prun'; did you mean 'Prune'"),
    "far pass": (["Sharpen"], r"known: .*Clip.*Quantize"),
    "setting": ([{"pass": "Prune", "sparsty": 0.5}], "pass 1: Prune has no setting 'sparsty'; did you mean 'sparsity'"),
    "second": (["Clip", {"Quantize": {"precision": 8}}], "pass 2: Quantize: precision must be a text, got 8"),
    "type": ([{"pass": "Distill", "epochs": "ten"}], "epochs must be a whole number, got 'ten'"),
    "bool for int": ([{"pass": "Distill", "epochs": True}], "epochs must be a whole number, got True"),
    "names": ([{"pass": "Clip", "names": 3}], "names must be a list, got 3"),
    "names of numbers": ([{"pass": "Clip", "names": [3]}], "names must be a text, got 3"),
    "range": ([{"pass": "Prune", "sparsity": 1.5}], "pass 1: Prune: sparsity must lie in"),
    "optimizer": ([{"Distill": {"optimizer": {"Adamw": {}}}}], "no optimizer 'Adamw'; did you mean 'AdamW'"),
    "needed": ([{"Distill": {"optimizer": "SGD"}}], "SGD needs the setting 'learning_rate'"),
    "teacher": ([{"Distill": {"teacher": 3}}], "teacher must be the path of a model"),
    "no mapping": ([3], "must be a name, or a mapping"),
    "two names": ([{"Clip": {}, "Prune": {}}], "must be a name, or a mapping"),
}  # fmt: skip


@pytest.mark.parametrize(("entries", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_recipe_is_said(entries, message):
    with pytest.raises(ModelError, match=message):
        from_dict(entries)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.json", "{", "not valid JSON"),
        ("r.json", "[" * 100_000, "not valid JSON"),
        ("r.yaml", "- [", "not valid YAML"),
        ("r.yaml", "- !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("r.yaml", "- Prune:\n    sparsity: 0.5\n    sparsity: 0.6\n", "appears twice"),
        ("r.toml", "", r"ends in \.json, \.yaml, \.yml"),
        ("r.json", " " * (1 << 20) + "[]", "at most"),
    ],
)
def test_damaged_files_are_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(FormatError, match=message):
        read_recipe(tmp_path / name)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="not UTF-8"):
        read_recipe(tmp_path / "r.yaml")
    with pytest.raises(FileNotFoundError):
        read_recipe(tmp_path / "absent.json")


def test_a_schedule_cannot_be_written_and_nothing_is_left(tmp_path):
    with pytest.raises(ModelError, match="learning_rate"):
        write_recipe([gm.Distill(optimizer=gm.SGD(lambda step: 1 / step))], tmp_path / "r.json")
    assert not list(tmp_path.iterdir())


def test_yaml_without_pyyaml_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    (tmp_path / "r.yaml").write_text("- Clip\n")
    with pytest.raises(MissingExtraError, match=r"gristmill\[compress\]"):
        read_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.json").write_text('["Clip"]')
    assert read_recipe(tmp_path / "r.json") == [gm.Clip()]


def test_the_recipe_of_a_saved_model_can_be_run_again(tmp_path):
    model = gm.zoo.mlp([32, 16, 4], seed=1)
    small, _ = gm.compress(model, [gm.Clip(), gm.Prune({"layer0*": 0.5}), gm.Quantize()])
    gm.save(small, tmp_path / "small.safetensors")
    meta = gm.load(tmp_path / "small.safetensors").meta
    again, _ = gm.compress(model, from_dict(meta["recipe"]))
    gm.save(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "small.safetensors").read_bytes()
