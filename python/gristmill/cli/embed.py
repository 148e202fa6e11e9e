"""`gristmill embed`."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gristmill.cli.console import notes
from gristmill.errors import DataError

if TYPE_CHECKING:
    from gristmill.tensor.parts import Array

SUFFIXES = (".npy", ".jsonl")


def embed(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder, or a model file that was made from one.")],
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Sentences to embed.")] = None,
    source: Annotated[
        Path | None, typer.Option("--input", help="A file with a sentence on each line; - reads them from stdin.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--output", help="Write .npy (an array) or .jsonl instead of printing JSON.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bf16, or int8 to quantise dense weights first.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the physical cores.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sentences of one run.")] = 32,
) -> None:
    """Embed sentences: one vector for each."""
    import numpy as np

    import gristmill as gm
    from gristmill.formats.atomic import check_folder
    from gristmill.text import Embedder, embed_in_parts

    if out is not None:
        if out.suffix not in SUFFIXES:
            raise DataError(f"--output must end in {' or '.join(SUFFIXES)}, got {out}")
        check_folder(out)
    sentences = read_sentences(texts, source)
    embedder = Embedder(gm.load(model), threads, precision)
    begin = time.perf_counter()
    parts = list(watched(embed_in_parts(embedder, sentences, batch_size), len(sentences)))
    seconds = time.perf_counter() - begin
    vectors = np.concatenate([np.empty((0, embedder.width), np.float32), *parts])
    write_vectors(out, sentences, vectors)
    notes().print(
        f"{len(sentences)} sentence{'s' * (len(sentences) != 1)} in {seconds:.3f} s, {len(sentences) / max(seconds, 1e-9):.0f} /s"
    )


def read_sentences(texts: list[str] | None, source: Path | None) -> list[str]:
    """Return the sentences of the command line, or the lines of a file.

    Raises:
        DataError: there are both or neither, or the file is no text.
    """
    if (source is None) == (not texts):
        raise DataError("give sentences, or --input with a file of them")
    if source is None:
        return list(texts or ())
    try:
        text = sys.stdin.read() if str(source) == "-" else source.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text: {error}") from error
    return text.removesuffix("\n").split("\n") if text else []


def watched(parts: "Iterator[Array]", total: int) -> "Iterator[Array]":
    """Show a bar on stderr where that is a terminal."""
    from rich.progress import Progress

    with Progress(console=notes(), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("embedding", total=total)
        for part in parts:
            bar.advance(task, len(part))
            yield part


def write_vectors(path: Path | None, sentences: list[str], vectors: "Array") -> None:
    """Write an array or JSON lines, whole or not at all; print JSON lines where there is no path."""
    import numpy as np

    from gristmill.formats.atomic import replacing

    def lines() -> Iterator[str]:
        for sentence, vector in zip(sentences, vectors, strict=True):
            yield json.dumps({"text": sentence, "embedding": [round(float(x), 7) for x in vector]}, ensure_ascii=False)

    if path is None:
        for line in lines():
            print(line)
        return
    with replacing(path) as temporary:
        if path.suffix == ".npy":
            with open(temporary, "wb") as file:
                np.save(file, vectors)
        else:
            with open(temporary, "w", encoding="utf-8") as text:
                text.writelines(f"{line}\n" for line in lines())
    notes().print(f"saved {path}: {vectors.shape[0]} x {vectors.shape[1]} float32")
