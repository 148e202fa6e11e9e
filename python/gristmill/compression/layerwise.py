"""Compression weight by weight, from a mapped file to a file: what is in memory is one weight and what is made of it.

The dense tensors of a mapped file take no memory until they are touched, and none any more when their pages are given back.
What has become of a weight is written to a file of its own at once, so that a run that was killed goes on with the next one; in
the end the files are joined.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from gristmill.compression.measure import describe, memory
from gristmill.compression.provenance import check_finite_weights, made_with, model_checksum
from gristmill.compression.quality import error_of
from gristmill.compression.recipe import Context, Pass
from gristmill.compression.recipe_file import described
from gristmill.compression.report import Layer, Report, Stage
from gristmill.compression.state import State, discard
from gristmill.compression.watching import watched
from gristmill.errors import BudgetError, FormatError, ModelError
from gristmill.formats import check_target, container, load, streaming
from gristmill.formats.container import release
from gristmill.model import Model
from gristmill.runtime.arena import parse_bytes
from gristmill.runtime.threads import check_threads
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

KEY = "gristmill.weight"
WORKING_COPIES = 6  # of the largest weight in float32: scores, masks, what is made, and the comparison with what was
INTERPRETER = 16 << 20  # what code and small objects may still take


@dataclass(frozen=True)
class Stored:
    """A tensor that is only its parts in a file; it can be saved and described, not run.

    Args:
        description: what `spec` returns.
        arrays: what `parts` returns, by suffix.
        shape, dtype: of the tensor.
    """

    description: dict[str, Any]
    arrays: Mapping[str, Array]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def kind(self) -> str:
        return str(self.description["kind"])

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def parts(self) -> dict[str, Array]:
        return dict(self.arrays)

    def spec(self) -> dict[str, Any]:
        return self.description


def compress_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    recipe: Sequence[Pass],
    *,
    max_memory: int | str | None = None,
    state: str | os.PathLike[str] | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: bool | None = None,
) -> Report:
    """Compress a model file that need not fit into memory, weight by weight.

    For recipes of local passes: those for which a weight's fate depends on that weight alone, such as `Clip`, `Prune` by
    magnitude within a layer, and `Quantize` without calibration. The file is the one that `compress` and `save` would have
    written. Neither quality nor speed is measured; load the result to do so.

    Args:
        source: a native file, which is mapped; other formats are read into memory.
        target: a `.safetensors` path.
        recipe: passes in order.
        max_memory: bytes, or a text such as "2GiB", that the process may have resident at most, what it has now included.
        state: a folder for finished weights, with which a run that was killed goes on; removed in the end. Default: a temporary
            one beside the target.
        seed, threads, progress: as for `compress`.

    Returns:
        The report, without quality and latencies.

    Raises:
        BudgetError: it needs more than `max_memory`; `needed_bytes` says how much.
        ModelError: a pass is not local, or does not fit the model, or a weight is not finite; or `state` is of another run.
        FormatError, OSError: as `load` and `save`; the target is as it was.

    Example:
        >>> import tempfile, gristmill as gm
        >>> folder = tempfile.mkdtemp()
        >>> gm.save(gm.zoo.mlp([256, 256]), folder + "/model.safetensors")
        >>> report = compress_file(folder + "/model.safetensors", folder + "/small.safetensors", [gm.Quantize("int8")])
        >>> report.bytes_after < report.bytes_before / 3
        True
    """
    wanted = check_target(target)
    if wanted.suffix != ".safetensors":
        raise FormatError(f"{target}: weight by weight, only .safetensors files are written")
    model = load(source)
    names = touched(recipe, model)
    needed = needed_bytes(model, names)
    if max_memory is not None and needed > parse_bytes(max_memory):
        raise BudgetError(
            f"weight by weight, this model needs {needed:,} bytes of memory, {WORKING_COPIES} times its largest weight and "
            f"what the process holds already; max_memory is {parse_bytes(max_memory):,}",
            needed,
        )
    check_finite_weights(model)
    context = Context(model, None, seed, check_threads(threads), progress)
    entry = {**made_with(), "seed": seed, "data": None, "input": model_checksum(model)}
    identity = {"recipe": [described(step) for step in recipe], "input model": entry["input"], "seed": seed, "way": "by weight"}
    begin = time.perf_counter()
    with folder_for(state, wanted) as folder:
        work = State(folder, identity).folder / "weights"
        work.mkdir(exist_ok=True)
        done = list(_weights(model, recipe, names, context, work, progress))
        small = model.replace(tensors={name: stored for name, stored, _ in done})
        small = small.replace(meta=meta_of(model, recipe, {**entry, "output": model_checksum(small)}))
        streaming.save(small, wanted)
        after = streaming.file_bytes(small)
        discard(folder)
    seconds = time.perf_counter() - begin
    stages = (_stage("original", streaming.file_bytes(model), model.nbytes, 0.0), _stage("recipe", after, small.nbytes, seconds))
    layers = tuple(layer for _, _, layer in done if layer.name in model.weights)
    note = "quality and speed were not measured: the model went from file to file, weight by weight"
    return Report(stages, layers, tuple(map(described, recipe)), "", small.meta["compression"][-1], None, (note,))


def meta_of(model: Model, recipe: Sequence[Pass], entry: dict[str, Any]) -> dict[str, Any]:
    """Return a model's meta with a recipe and what it ran with added."""
    passes = [*model.meta.get("recipe", []), *map(described, recipe)]
    return {**model.meta, "recipe": passes, "compression": [*model.meta.get("compression", []), entry]}


def touched(recipe: Sequence[Pass], model: Model) -> list[str]:
    """Return the tensors that a recipe of local passes changes, in the order of the model.

    Raises:
        ModelError: a pass is not local.
    """
    for step in recipe:
        if not step.local:
            raise ModelError(
                f"{type(step).__name__} as it is set looks at more than one weight at a time, so it cannot go weight by weight: "
                "use compress, with as much memory as it needs"
            )
    wanted = {name for step in recipe for name in step.works_on(model)}
    return [name for name in model.tensors if name in wanted]


def goes_by_weight(recipe: Sequence[Pass], model: Model, target: Path) -> bool:
    """Whether `compress_file` serves: all passes are local, and the target is a native file."""
    return target.suffix == ".safetensors" and bool(recipe) and all(step.local for step in recipe)


def needed_bytes(model: Model, names: Sequence[str]) -> int:
    """Return the memory that the process will have resident at most: what it has now, and what the largest weight takes."""
    largest = max((4 * prod(model.tensors[name].shape) for name in names), default=0)
    return (memory("VmRSS") or 0) + INTERPRETER + WORKING_COPIES * largest


@contextmanager
def folder_for(state: str | os.PathLike[str] | None, target: Path) -> Iterator[Path]:
    """Yield the folder of the state, or a temporary one beside the target."""
    if state is not None:
        yield Path(state)
        return
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        yield Path(folder)


def _weights(
    model: Model, recipe: Sequence[Pass], names: Sequence[str], context: Context, work: Path, progress: bool | None
) -> Iterator[tuple[str, Any, Layer]]:
    """Yield what has become of each weight, and what is to be said of it; made now or by a run before."""
    steps = [(step, set(step.works_on(model))) for step in recipe]
    for name in watched(names, "compressing", progress):
        path = work / f"{list(model.tensors).index(name)}.safetensors"
        found = _read(path, name) if path.exists() else None
        if found is None:
            begin = time.perf_counter()
            tensor = _through(model, [step for step, chosen in steps if name in chosen], name, context)
            layer = _layer(name, model.tensors[name], tensor, time.perf_counter() - begin)
            parts = container.little_endian(tensor.parts())
            text = json.dumps({"name": name, "spec": tensor.spec(), "dtype": str(tensor.dtype), "layer": asdict(layer)})
            streaming.write(path, {f"part{suffix}": array for suffix, array in parts.items()}, {KEY: text})
            del tensor, parts
            found = _read(path, name)
            if found is None:
                raise FormatError(f"{path} does not read as it was written")
        release(array for array in vars(model.tensors[name]).values() if isinstance(array, np.ndarray))
        yield name, *found


def _through(model: Model, steps: Sequence[Pass], name: str, context: Context) -> Tensor:
    """Return a weight after the passes that are meant for it."""
    for step in steps:
        model = step.restricted(name).apply(model, context)
    return model.tensors[name]


def _read(path: Path, name: str) -> tuple[Stored, Layer] | None:
    """Return a finished weight; None where the file holds something else."""
    try:
        arrays, metadata = container.read(container.map_file(path))
        found = container.parse(metadata[KEY].encode(), "weight")
        if found["name"] != name:
            return None
        layer = Layer(**{**found["layer"], "shape": tuple(found["layer"]["shape"])})
        parts = {key.removeprefix("part"): array for key, array in arrays.items()}
        return Stored(found["spec"], parts, layer.shape, np.dtype(found["dtype"])), layer
    except (FormatError, KeyError, TypeError, ValueError):
        return None


def _layer(name: str, old: Tensor, new: Tensor, seconds: float) -> Layer:
    return Layer(
        name=name,
        kind=describe(new),
        shape=new.shape,
        error=error_of(new.dense(), old.dense()),
        output_error=None,
        sensitivity_rank=None,
        sparsity=float(new.sparsity),
        seconds=seconds,
        bytes_before=old.nbytes,
        bytes_after=new.nbytes,
        latency_ms_before={},
        latency_ms_after={},
    )


def _stage(name: str, file_bytes: int, weight_bytes: int, seconds: float) -> Stage:
    nothing = (None,) * 7
    return Stage(name, *nothing, file_bytes, weight_bytes, {}, {}, {}, seconds, memory("VmHWM"))
