"""Runs the table: finds the engines, prepares their files, races the rows, and measures quality, start and memory."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from gristmill.bench import inputs
from gristmill.bench.engines import ENGINES, OURS
from gristmill.bench.floor import Sizes, floor
from gristmill.bench.limits import LimitUnknown
from gristmill.bench.machine import machine
from gristmill.bench.race import Contest, Entry, Worker, race
from gristmill.bench.report import FORMAT, cosines
from gristmill.bench.rows import VARIANTS, Row, contenders
from gristmill.bench.worker import REPORT, command
from gristmill.errors import WorkerError

STARTS = 5
MEMORY_BATCH, MEMORY_LENGTH = 32, 256
START_LENGTH = 16
PARTS = ("quality", "start", "memory")  # what can be asked for beside the rows
REFERENCES = ("torch", "onnxruntime", "openvino", OURS)  # whose float32 vectors the others are compared with


@dataclass
class Suite:
    """One run for one model. Everything that engines need lies in `cache`; nothing is prepared twice."""

    source: Path
    cache: Path
    rivals_python: str = sys.executable
    rounds: int = 7
    seconds: float = 0.15
    progress: Callable[[str], None] = lambda _: None
    name: str = ""
    locks: Sequence[Path] = ()
    engines: Sequence[str] = tuple(ENGINES)
    missing: dict[str, str] = field(default_factory=dict)
    described: dict[str, Any] = field(default_factory=dict)

    def python(self, engine: str) -> str:
        return sys.executable if engine == OURS else self.rivals_python

    def job(self, engine: str, do: str, **more: Any) -> tuple[str, ...]:
        job = {"do": do, "engine": engine, "cache": str(self.cache), **more}
        return command(self.python(engine), engine == OURS, job)

    def ask(self, label: str, line: Sequence[str], threads: int = 1) -> dict[str, Any]:
        """Run a job in a process of its own and return what it reports."""
        worker = Worker(label, line, threads, {})
        try:
            while not (answer := worker.answer()).startswith(REPORT):
                pass
            return json.loads(answer.removeprefix(REPORT))
        finally:
            worker.close()

    def find(self) -> list[str]:
        """Return the engines that can run here; the others are in `missing`, with the command that adds them."""
        present = []
        for name in self.engines:
            engine = ENGINES[name]
            wanted = {*engine.imports, *engine.prepares}
            job = {"do": "describe", "imports": sorted(wanted), "packages": engine.packages}
            python = self.python(name)
            try:
                self.described[name] = found = self.ask(engine.label, command(python, name == OURS, job))
            except WorkerError as error:
                self.missing[name] = f"{error}: {python} -m pip install numpy {' '.join(engine.packages)}"
                continue
            absent = wanted - set(found["importable"])
            if name != OURS and absent:
                reason = f"no module {', '.join(sorted(absent))}"
                self.missing[name] = f"{reason}: {python} -m pip install {' '.join(engine.packages)}"
            else:
                present.append(name)
        return present

    def prepare(self, engines: Iterable[str], precisions: Iterable[str]) -> list[str]:
        """Make every engine's files and return the engines that have them."""
        self.cache.mkdir(parents=True, exist_ok=True)
        if not (self.cache / "tokens.npz").exists():
            inputs.tokenize(self.source, self.cache / "tokens.npz")
        ready = []
        for name in engines:
            self.progress(f"{ENGINES[name].label} prepares its files")
            try:
                self.ask(ENGINES[name].label, self.job(name, "prepare", source=str(self.source), precisions=sorted(precisions)))
                ready.append(name)
            except WorkerError as error:
                self.missing[name] = f"could not prepare the model: {error}"
        return ready

    def race(self, row: Row, engines: Sequence[str]) -> dict[str, Any]:
        """Race one row; labels are (engine, variant) joined by a blank."""
        entries = []
        for name, variant in contenders(row):
            if name in engines:
                job = {
                    "precision": row.precision, "threads": row.threads, "variant": variant, "batch": row.batch,
                    "length": row.length,
                }  # fmt: skip
                line = self.job(name, "train" if row.train else "timed", **job)
                entries.append(Entry(f"{name} {variant}".strip(), line))
        contest = Contest(row.title, row.threads, tuple(entries), rounds=self.rounds, seconds=self.seconds)
        return race(contest, self.progress, self.locks)

    def vectors(self, engine: str, precision: str, variant: str = "") -> np.ndarray:
        """Return the vectors of all sentences."""
        target = self.cache / f"vectors-{engine}-{precision}-{variant}.npy"
        job = self.job(engine, "quality", precision=precision, threads=1, variant=variant, target=str(target))
        self.ask(ENGINES[engine].label, job)
        return np.load(target)

    def start(self, engine: str, precision: str, variant: str = "") -> dict[str, float]:
        """Return the median seconds of the import, and from the file to the first answer, of processes that start anew."""
        job = self.job(
            engine, "start", precision=precision, threads=1, variant=variant, batch=1, length=START_LENGTH,
            imports=ENGINES[engine].start,
        )  # fmt: skip
        runs = [self.ask(ENGINES[engine].label, job) for _ in range(STARTS)]
        return {name: median(run[name] for run in runs) for name in ("imported", "first")}

    def memory(self, engine: str, precision: str, variant: str = "", threads: int = 1) -> int:
        """Return the peak resident bytes of a process that runs batches of 32 x 256."""
        job = self.job(
            engine, "memory", precision=precision, threads=threads, variant=variant, batch=MEMORY_BATCH, length=MEMORY_LENGTH
        )
        return self.ask(ENGINES[engine].label, job)["peak"]

    def run(self, rows: Sequence[Row], parts: Sequence[str] = PARTS) -> dict[str, Any]:
        """Measure everything that is asked for and return it as the JSON file holds it."""
        precisions = {row.precision for row in rows} | ({"fp32", "bf16", "int8"} if parts else {"fp32"})
        engines = self.prepare(self.find(), precisions)
        labels = {name: {"label": ENGINES[name].label, **self.described[name]} for name in engines}
        result: dict[str, Any] = {
            "format": FORMAT,
            "date": time.strftime("%Y-%m-%d"),
            "model": self.name or self.source.name,
            "machine": machine(()),
            "rounds": self.rounds,
            "seconds": self.seconds,
            "engines": labels,
            "missing": self.missing,
            "rows": [self.measured(row, engines) for row in rows],
        }
        for part in parts:
            result[part] = getattr(self, f"all_{part}")(engines)
        return result

    def measured(self, row: Row, engines: Sequence[str]) -> dict[str, Any]:
        self.progress(row.title)
        raced = self.race(row, engines)
        limits, unknown = self.floor(row)
        return {"name": row.name, **asdict(row), **raced, "floor": limits, "floor_unknown": unknown}

    def floor(self, row: Row) -> tuple[dict[str, float], str]:
        """Return the seconds that the limits of this machine allow, or why they are not known."""
        sizes = Sizes.read(self.source)
        if sizes is None:
            return {}, "no config.json says how much work the model is"
        try:
            return floor(sizes, row), ""
        except LimitUnknown as error:
            return {}, str(error)

    def settings(self, engines: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        """Yield (engine, precision, variant) of everything that is not a race."""
        for precision in ("fp32", "bf16", "int8"):
            for engine in engines:
                for variant in ("",) if engine == OURS else VARIANTS.get((engine, precision), ()):
                    yield engine, precision, variant

    def each(self, engines: Sequence[str], part: str, measure: Callable[[str, str, str], dict[str, Any]]) -> list[dict[str, Any]]:
        lines = []
        for engine, precision, variant in self.settings(engines):
            self.progress(f"{part}: {ENGINES[engine].label} {precision} {variant}".rstrip())
            found = {"engine": engine, "precision": precision, "variant": variant}
            try:
                lines.append(found | measure(engine, precision, variant))
            except WorkerError as error:
                lines.append(found | {"failed": str(error)})
        return lines

    def all_quality(self, engines: Sequence[str]) -> list[dict[str, Any]]:
        reference = next(name for name in REFERENCES if name in engines)
        variant = VARIANTS[reference, "fp32"][0] if reference != OURS else ""
        wanted = self.vectors(reference, "fp32", variant)

        def measure(engine: str, precision: str, variant: str) -> dict[str, Any]:
            mean, least = cosines(self.vectors(engine, precision, variant), wanted)
            return {"mean": mean, "min": least, "reference": reference}

        return self.each(engines, "quality", measure)

    def all_start(self, engines: Sequence[str]) -> list[dict[str, Any]]:
        return self.each(engines, "start", self.start)

    def all_memory(self, engines: Sequence[str]) -> list[dict[str, Any]]:
        return self.each(engines, "memory", lambda *setting: {"peak": self.memory(*setting)})


def cache_of(root: Path, source: Path) -> Path:
    """Return the folder of one model's prepared files: another model, or another version of it, has another."""
    files = sorted(source.glob("*")) if source.is_dir() else [source]
    known = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    digest = hashlib.sha256(json.dumps([str(source.resolve()), known]).encode()).hexdigest()[:16]
    return root / digest
