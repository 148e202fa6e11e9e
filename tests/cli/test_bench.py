"""`gristmill bench`, as far as it needs no rival: the race, the arithmetic, the tables, the chart and the file."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from gristmill.bench import apart, inputs, terminal
from gristmill.bench.engines import ENGINES, OURS, Engine
from gristmill.bench.floor import Sizes, work
from gristmill.bench.race import Contest, Entry, race, ratios
from gristmill.bench.report import FORMAT, checks, cosines, figures, line
from gristmill.bench.rows import QUICK, ROWS, contenders, scaled
from gristmill.bench.suite import Suite, cache_of
from gristmill.cli import app

# Workers that know nothing but the protocol: they say who they are, and take as long as they are told.
SLEEPER = (
    "import os, time; from gristmill.bench.protocol import serve; print(os.getpid(), flush=True); "
    "serve(1, lambda: time.sleep(float(sys.argv[2])))"
)


def sleeper(label, seconds):
    return Entry(label, apart.command(sys.executable, False, SLEEPER, str(seconds)))


def row_of(row=ROWS[0], floor=None, **rounds):
    return {
        "name": row.name, **asdict(row), "title": row.title, "unit": "s", "failed": {}, "floor": floor or {}, "floor_unknown": "",
        "rounds": {label.replace("_", " ", 1): times for label, times in rounds.items()},
    }  # fmt: skip


@pytest.fixture
def result():
    first = row_of(
        floor={"vnni": 0.05, "exp": 0.01}, gristmill=[0.1, 0.1, 0.1], openvino_latency=[0.13, 0.12, 0.125], torch=[0.4] * 3
    )
    return {
        "format": FORMAT, "date": "2026-01-01", "model": "tiny", "machine": {"cpu": "some CPU"}, "rounds": 3, "seconds": 0.1,
        "missing": {"ctranslate2": "no module ctranslate2: python -m pip install ctranslate2"},
        "engines": {
            name: {"label": ENGINES[name].label, "importable": [], "sizes": {name: 3 << 20}, "versions": {name: "1.0"}}
            for name in (OURS, "openvino", "torch")
        },
        "rows": [first, row_of(ROWS[2], openvino_latency=[0.001] * 3)],
        "quality": [{"engine": OURS, "precision": "int8", "variant": "", "mean": 0.999, "min": 0.99, "reference": "torch"}],
        "start": [{"engine": "torch", "precision": "fp32", "variant": "", "failed": "PyTorch ended with status 1: no"}],
    }  # fmt: skip


def shown(*renderables):
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for each in renderables:
        console.print(each)
    return console.export_text()


def test_ratios_are_taken_within_rounds():
    assert ratios({"ours": [1.0, 2.0, 4.0], "rival": [2.0, 2.0, 4.0]}) == {"ours": 1.0, "rival": 1.0}
    assert ratios({"ours": [1.0, 10.0, 1.0], "rival": [2.0, 20.0, 3.0]})["rival"] == 2.0


def test_the_fastest_setting_of_an_engine_is_its_figure():
    rounds = {"openvino latency": [3.0], "gristmill": [2.0], "openvino streams": [2.5], "torch": [9.0]}
    found = figures(rounds)
    assert [(each.engine, each.variant, each.times_ours) for each in found] == [
        (OURS, "", 1.0), ("openvino", "streams", 1.25), ("torch", "", 4.5),
    ]  # fmt: skip


def test_a_line_has_ratio_target_and_share_of_the_limit(result):
    first, second = map(line, result["rows"])
    assert first.rival.label == "OpenVINO"
    assert first.ratio == pytest.approx(1.25)
    assert first.reached
    assert first.share == pytest.approx(0.6)
    assert second.ours is None
    assert second.ratio is None
    assert second.reached is None
    assert first.amount(first.ours) == "320 /s"
    assert second.amount(second.rival) == "1.00 ms"


def test_without_any_figure_a_row_is_empty():
    empty = line(row_of())
    assert (empty.figures, empty.ours, empty.rival, empty.ratio, empty.share) == ((), None, None, None, None)


def test_what_is_asked_beside_speed(result):
    result["start"] = [
        {"engine": engine, "precision": "fp32", "variant": "", "imported": seconds, "first": 0.1}
        for engine, seconds in ((OURS, 0.2), ("onnxruntime", 0.1))
    ]
    found = {check.title: (check.reached, check.shown(check.ours), check.shown(check.bound)) for check in checks(result)}
    assert found == {
        "int8: mean cosine to fp32": (True, "0.9990", "0.9980"),
        "int8: least cosine to fp32": (True, "0.9900", "0.9900"),
        "fp32: import, as ONNX Runtime": (False, "0.2000 s", "0.1000 s"),
        "fp32: load + first answer, as ONNX Runtime": (True, "0.1000 s", "0.1000 s"),
    }


def test_our_own_size_is_that_of_the_package(tmp_path):
    suite = Suite(tmp_path, tmp_path, engines=(OURS,))
    assert suite.find() == [OURS]
    assert suite.described[OURS]["sizes"][OURS] > 1 << 20


def test_a_lock_is_held_during_the_turns_and_free_afterwards(tmp_path):
    lock = tmp_path / "lock"
    held = []

    def look(text):
        if "round" in text:
            with open(lock) as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held.append(text)

    race(Contest("naps", 1, (sleeper("a", 0.001),), rounds=2, seconds=0.01), look, [lock])
    assert len(held) == 2
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_cosines():
    a = np.array([[1.0, 0.0], [0.0, 2.0]])
    assert cosines(a, np.array([[3.0, 0.0], [1.0, 1.0]])) == pytest.approx(((1 + 0.5**0.5) / 2, 0.5**0.5))


def test_the_work_of_a_row():
    sizes = Sizes(layers=6, width=384, hidden=1536, heads=12)
    amounts = work(sizes, ROWS[0])
    assert amounts["vnni"] == 2 * 4096 * 6 * (4 * 384**2 + 2 * 384 * 1536)
    assert amounts["bf16"] == 6 * 32 * 12 * (2 * 2 * 128 * 128 * 32)  # scores and their use, 32 wide in each head
    assert amounts["exp"] == 6 * 32 * 12 * 128 * 128
    training = next(row for row in ROWS if row.train and row.precision == "fp32")
    inference = next(row for row in ROWS if not row.train and row.name == "fp32-32x128-2t")
    assert work(sizes, training)["fma"] == 3 * work(sizes, inference)["fma"]
    assert "quantize" not in work(sizes, inference)


def test_sizes_come_from_a_config(tmp_path):
    assert Sizes.read(tmp_path) is None
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    (tmp_path / "config.json").write_text(json.dumps(dict(zip(names, (1, 2, 3, 4), strict=True))))
    assert Sizes.read(tmp_path) == Sizes(1, 2, 3, 4)


def test_rows_are_distinct_and_ours_comes_first():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert set(QUICK) <= set(names)
    for row in ROWS:
        found = list(contenders(row))
        assert found[0] == (OURS, row.pruned)
        assert len(set(found)) == len(found)
        assert any(engine == row.rival for engine, _ in found)
    assert {row.threads for row in scaled(ROWS, 8)} == {1, 8}
    assert scaled(ROWS, None) == ROWS


def test_batches_are_cut_from_the_sentences(tmp_path):
    inputs.tokenize(tmp_path / "no-such-model.onnx", tmp_path / "tokens.npz")
    rows = inputs.sentences(tmp_path)
    assert len(rows) == len(inputs.SENTENCES.read_text().splitlines()) == 200
    batch = inputs.batch(tmp_path, 3, 16)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
    assert all(each.shape == (3, 16) and each.dtype == np.int64 for each in batch.values())
    assert (batch["input_ids"][:, 0] == inputs.START).all()
    assert (batch["input_ids"][:, -1] == inputs.END).all()
    assert batch["attention_mask"].all()
    assert len(inputs.calibration(tmp_path)) > 200


def test_a_race_gives_every_engine_its_rounds():
    contest = Contest("naps", 1, (sleeper("a", 0.001), sleeper("b", 0.004)), rounds=3, seconds=0.01)
    said = []
    result = race(contest, said.append)
    assert {label: len(times) for label, times in result["rounds"].items()} == {"a": 3, "b": 3}
    assert all(time > 0.001 for times in result["rounds"].values() for time in times)
    assert result["failed"] == {}
    assert "naps: b, round 3 of 3" in said


def test_an_engine_that_fails_is_named_and_the_others_go_on():
    broken = Entry("broken", apart.command(sys.executable, False, "raise SystemExit('no such instruction')"))
    result = race(Contest("naps", 1, (sleeper("a", 0.001), broken), rounds=2, seconds=0.01))
    assert list(result["rounds"]) == ["a"]
    assert result["failed"] == {"broken": "broken ended with status 1: no such instruction"}


def test_a_rivals_process_does_not_load_ours():
    code = "import gristmill.bench.race, gristmill.bench.worker; print('gristmill._core' in sys.modules)"
    done = subprocess.run(apart.command(sys.executable, False, code), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


RUNNER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background is born without
from gristmill.bench import apart
from gristmill.bench.race import Contest, Entry, race
code = sys.argv[1]
entries = tuple(Entry(name, apart.command(sys.executable, False, code, "0.01")) for name in "ab")
race(Contest("naps", 1, entries, rounds=10_000, seconds=0.01), lambda text: print(text, flush=True))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_no_child_outlives_the_runner(number, tmp_path):
    told = tmp_path / "pids"
    code = SLEEPER.replace("print(os.getpid(), flush=True)", f"open({str(told)!r}, 'a').write(f'{{os.getpid()}}\\\\n')")
    code = code.replace("\\\\n", "\\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER, code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    while "round 2" not in runner.stdout.readline():
        pass
    runner.send_signal(number)
    runner.wait()
    runner.stdout.close()
    pids = [int(text) for text in told.read_text().split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while (left := [pid for pid in pids if running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == []


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_missing_rivals_are_named_with_the_command(monkeypatch, tmp_path):
    absent = Engine("Absent", ("no_such_module",), ("no-such-package",), (), "import no_such_module")
    monkeypatch.setitem(ENGINES, "openvino", absent)
    suite = Suite(tmp_path, tmp_path, engines=("openvino",))
    assert suite.find() == []
    assert suite.missing == {"openvino": f"no module no_such_module: {sys.executable} -m pip install no-such-package"}


def test_the_file_has_the_whole_schema(monkeypatch, tmp_path):
    monkeypatch.setattr(Suite, "floor", lambda self, row: ({}, "not asked"))
    suite = Suite(tmp_path / "m.onnx", tmp_path / "cache", engines=(), rounds=2, name="m")
    made = json.loads(json.dumps(suite.run(ROWS[:2], ("start", "memory"))))
    assert set(made) == {
        "format", "date", "model", "machine", "rounds", "seconds", "engines", "missing", "rows", "start", "memory",
    }  # fmt: skip
    assert made["format"] == FORMAT
    assert made["machine"]["cores"] == os.cpu_count()
    assert [row["name"] for row in made["rows"]] == [row.name for row in ROWS[:2]]
    assert set(made["rows"][0]) == {
        "name", "precision", "batch", "length", "threads", "rival", "target", "goal", "train", "pruned", "title", "unit",
        "rounds", "failed", "floor", "floor_unknown",
    }  # fmt: skip


def test_tables_and_bars_show_every_row(result):
    text = shown(*terminal.everything(result))
    for wanted in (
        "int8, 32 x 128, 2 threads",
        "320 /s",
        "1.25x",
        "1.20x",
        "reached",
        "60%",
        "1.00 ms",
        "0.9990 / 0.9900",
        "3.0 MiB",
    ):
        assert wanted in text
    remarks = list(terminal.remarks(result))
    assert remarks[0] == "CTranslate2 is not measured: no module ctranslate2: python -m pip install ctranslate2"
    assert any("PyTorch ended with status 1" in each for each in remarks)


def test_the_chart_is_a_png_with_the_rows(result, tmp_path):
    pytest.importorskip("matplotlib")
    from gristmill.bench.plot import draw, plot

    plot(result, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    (axes,) = draw(result).axes
    texts = {text.get_text() for text in axes.texts}
    assert {row["title"] for row in result["rows"]} <= texts
    assert len(axes.patches) == 4  # three engines and one


def test_the_chart_names_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["bench", "--model", str(tmp_path), "--plot", str(tmp_path / "chart.png")])
    assert done.exit_code == 1
    assert "gristmill[bench]" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--rows", "int9"], "no row is named"), (["--model", "/no/such/model"], "does not exist"), (["--rounds", "0"], "rounds")],
)
def test_wrong_options(arguments, message):
    done = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert message in done.stderr


def test_each_version_of_a_model_has_a_cache_of_its_own(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    before = cache_of(tmp_path, model)
    assert cache_of(tmp_path, model) == before
    (model / "config.json").write_text('{"a": 1}')
    assert cache_of(tmp_path, model) != before
