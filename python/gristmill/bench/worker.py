"""What runs in an engine's own process: one job, described by a JSON object in the last argument."""

import json
import resource
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from gristmill.bench import apart, inputs
from gristmill.bench.protocol import Call, die_with_parent, serve

RUN = "runpy.run_module('gristmill.bench.worker', run_name='__main__')"
# Where only the import is timed, it comes before all others but NumPy's.
TIMED = (
    "import numpy; sys.import_began = time.perf_counter(); {imports}; "
    "sys.import_seconds = time.perf_counter() - sys.import_began; "
)
REPORT = "report "  # what a job answers, among whatever libraries print


def command(python: str, ours: bool, job: dict[str, Any]) -> tuple[str, ...]:
    """Return the command line that does a job in an interpreter."""
    before = TIMED.format(imports=job["imports"]) if job["do"] == "start" else ""
    return apart.command(python, ours, RUN, json.dumps(job), before=before)


def answer(**figures: Any) -> None:
    print(REPORT + json.dumps(figures), flush=True)


def prepare(engine: Any, job: dict[str, Any]) -> None:
    engine.prepare(Path(job["source"]), Path(job["cache"]), set(job["precisions"]))
    answer(done=True)


def loaded(engine: Any, job: dict[str, Any]) -> Any:
    return engine.load(Path(job["cache"]), job["precision"], job["threads"], job["variant"])


def timed(engine: Any, job: dict[str, Any]) -> None:
    feed = inputs.batch(Path(job["cache"]), job["batch"], job["length"])
    run = loaded(engine, job)
    batches = getattr(run, "batches", 1)

    def call() -> float:
        begin = time.perf_counter()
        run(feed)
        return (time.perf_counter() - begin) / batches

    serve(job["threads"], call)


def quality(engine: Any, job: dict[str, Any]) -> None:
    """Write the vectors of all sentences, one run each: no padding."""
    run = loaded(engine, job)
    vectors = [np.array(run(feed), np.float32)[0] for feed in inputs.sentences(Path(job["cache"]))]
    np.save(job["target"], np.stack(vectors))
    answer(done=True)


def start(engine: Any, job: dict[str, Any]) -> None:
    """Time the way from the file to the first answer; the import was timed when the process began."""
    feed = inputs.batch(Path(job["cache"]), job["batch"], job["length"])
    begin = time.perf_counter()
    loaded(engine, job)(feed)
    answer(imported=sys.import_seconds, first=time.perf_counter() - begin)  # type: ignore[attr-defined]


def memory(engine: Any, job: dict[str, Any]) -> None:
    run = loaded(engine, job)
    feed = inputs.batch(Path(job["cache"]), job["batch"], job["length"])
    for _ in range(2):
        run(feed)
    answer(peak=peak_memory())


def peak_memory() -> int:
    """Return the largest resident set of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss also counts the process that started this one
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def train(engine: Any, job: dict[str, Any]) -> None:
    cache = Path(job["cache"])
    feed = inputs.batch(cache, job["batch"], job["length"])
    call: Call = engine.trainer(cache, job["precision"], job["threads"], job["variant"], feed)
    serve(job["threads"], call)


def describe(engine: Any, job: dict[str, Any]) -> None:
    """Say which of the job's modules this interpreter can import, and how much room the distributions take."""
    from importlib.metadata import PackageNotFoundError, distribution
    from importlib.util import find_spec

    sizes, versions = {}, {}
    for name in job["packages"]:
        try:
            found = distribution(name.partition("[")[0])
        except PackageNotFoundError:
            continue
        versions[name] = found.version
        sizes[name] = size([Path(str(found.locate_file(each))) for each in found.files or ()])
    if "gristmill" in job["imports"]:  # it may run from its sources, or from a link to them
        sizes["gristmill"] = size(list(apart.PACKAGE.rglob("*")))
    answer(importable=[name for name in job["imports"] if find_spec(name)], sizes=sizes, versions=versions)


def size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files if file.is_file())


JOBS = {each.__name__: each for each in (prepare, timed, quality, start, memory, train, describe)}

if __name__ == "__main__":
    die_with_parent()
    request = json.loads(sys.argv[-1])
    name = request.get("engine")
    JOBS[request["do"]](import_module(f"gristmill.bench.engines.{name}") if name else None, request)
