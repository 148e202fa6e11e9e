"""Sentences in, vectors out: tokenisation, packing of uneven lengths without padding, and `embed`."""

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from gristmill.errors import FormatError, MissingExtraError, ModelError
from gristmill.model import Model, check_model
from gristmill.ops import Node
from gristmill.ops.embedding import positions
from gristmill.runtime.packing import IDS, MASK, OFFSETS, PLACES, TYPES, counting, packed, sentence_model
from gristmill.runtime.session import Session
from gristmill.tensor.parts import Array

ROWS = 128  # of a chunk of packed sentences: enough for the matrix products, few enough for a core's cache
ROUND = 16  # plans have multiples of this many rows
SEGMENTS = (1, 4, 16, 64, 256)  # and one of these numbers of segments, the last of which may be empty
PART = 1024  # sentences that the tokenizer is given at a time
LENGTH = 1 << 20  # what a tokenizer may be asked to truncate to


class Tokenizer:
    """Text to token ids, as the `tokenizer` in a model's meta says; truncated, never padded.

    Args:
        spec: `kind` "huggingface", `definition` (the text of tokenizer.json), `max_length` in tokens, and `lowercase`.

    Raises:
        FormatError: the definition is damaged.
        MissingExtraError: the tokenizers library is not installed.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        length, definition = spec.get("max_length"), spec.get("definition")
        if spec.get("kind") != "huggingface" or not isinstance(definition, str):
            raise FormatError("the model's tokenizer is of an unknown kind")
        if type(length) is not int or not 1 <= length <= LENGTH:
            raise FormatError(f"the tokenizer's max_length must be a whole number from 1 to {LENGTH}, got {str(length)[:80]!r}")
        self.max_length = length
        self.lowercase = bool(spec.get("lowercase"))
        self._inner = _library_tokenizer(definition, length)

    def __call__(self, sentences: Sequence[str]) -> list[tuple[Array, Array]]:
        """Return the ids and the types of each sentence's tokens, int64."""
        texts = [sentence.lower() for sentence in sentences] if self.lowercase else list(sentences)
        return [(np.array(e.ids, np.int64), np.array(e.type_ids, np.int64)) for e in self._inner.encode_batch(texts)]


@lru_cache(maxsize=4)
def _library_tokenizer(definition: str, length: int) -> Any:
    try:
        import tokenizers  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise MissingExtraError("tokenizers", "hf") from error
    try:
        made = tokenizers.Tokenizer.from_str(definition)
        made.no_padding()
        made.enable_truncation(length)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics are no Exceptions
        raise FormatError(f"the model's tokenizer is damaged: {error}") from error
    return made


class Embedder:
    """A model compiled to embed sentences on one thread count. Safe to use from several threads at once.

    Args:
        model: an encoder with a tokenizer in its meta.
        threads, precision: as for `Session`.

    Raises:
        ModelError: the model has no tokenizer, or takes inputs that sentences do not give.
    """

    def __init__(self, model: Model, threads: int | None = None, precision: str | None = None) -> None:
        spec = check_model(model).meta.get("tokenizer")
        if not isinstance(spec, Mapping):
            raise ModelError("the model has no tokenizer; gm.load of a Hugging Face folder with a tokenizer.json brings one")
        self.tokenizer = Tokenizer(spec)
        whole = sentence_model(model)
        self.width = int(whole.types[whole.outputs[0]].shape[-1])
        self._ids = min((whole.tensors[n.inputs[0]].shape[0] for n in whole.nodes if _looks_up(n, whole)), default=None)
        self._counting: tuple[int, int | None] = (0, None)
        try:
            twin = packed(whole)
            self._counting = counting(whole)
            self.packs = True
        except ModelError:
            twin, self.packs = whole, False
        self.session = Session(twin, threads, precision)

    def __call__(self, sentences: Iterable[str], batch_size: int = 32) -> Array:
        """Return the vectors [n, width] of n sentences, float32, in their order."""
        texts = check_sentences(sentences)
        if not isinstance(batch_size, (int, np.integer)) or isinstance(batch_size, bool) or batch_size < 1:
            raise ModelError(f"batch_size must be at least 1 and whole, got {batch_size!r}")
        parts = range(0, len(texts), PART)  # between which Ctrl-C is heard
        tokens = [each for start in parts for each in self.tokenizer(texts[start : start + PART])]
        self._check(tokens)
        order = sorted(range(len(texts)), key=lambda i: -len(tokens[i][0]))
        vectors = np.zeros((len(texts), self.width), np.float32)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            if self.packs:
                self._run_packed(tokens, batch, vectors)
            else:
                self._run_padded(tokens, batch, vectors)
        return vectors

    def _check(self, tokens: list[tuple[Array, Array]]) -> None:
        largest = max((int(ids.max(initial=0)) for ids, _ in tokens), default=0)
        if self._ids is not None and largest >= self._ids:
            raise ModelError(f"the tokenizer gives id {largest}, the model has an embedding for ids below {self._ids}")

    def _run_packed(self, tokens: list[tuple[Array, Array]], batch: list[int], vectors: Array) -> None:
        alike: dict[int, list[list[int]]] = {}
        lengths = [len(tokens[i][0]) for i in batch]
        shared = chunks(lengths, self.session.threads)
        segments = next((n for n in SEGMENTS if n >= max(map(len, shared))), len(batch))
        for chunk in shared:
            rows = rounded(sum(lengths[i] for i in chunk))
            alike.setdefault(rows, []).append([batch[i] for i in chunk])
        for rows, members in alike.items():
            items = [self._packed_inputs(tokens, chunk, rows, segments) for chunk in members]
            if len(items) == 1:
                made = [next(iter(self.session.run(**items[0]).values()))]
            else:
                stacked = {name: np.stack([item[name] for item in items]) for name in items[0]}
                made = list(next(iter(self.session.map(**stacked).values())))
            for chunk, output in zip(members, made, strict=True):
                vectors[chunk] = output[: len(chunk)]

    def _packed_inputs(self, tokens: list[tuple[Array, Array]], chunk: list[int], rows: int, segments: int) -> dict[str, Array]:
        offsets = np.zeros(segments + 1, np.int64)
        np.cumsum([len(tokens[i][0]) for i in chunk], out=offsets[1 : len(chunk) + 1])
        offsets[len(chunk) + 1 :] = offsets[len(chunk)]
        inputs = {name: np.zeros(rows, np.int64) for name in (IDS, TYPES, PLACES)}
        for i, begin, end in zip(chunk, offsets[:-1], offsets[1:], strict=False):
            inputs[IDS][begin:end], inputs[TYPES][begin:end] = tokens[i]
            inputs[PLACES][begin:end] = positions(tokens[i][0], *self._counting)
        given = {**inputs, OFFSETS: offsets}
        return {name: given[name] for name in self.session.model.inputs}

    def _run_padded(self, tokens: list[tuple[Array, Array]], batch: list[int], vectors: Array) -> None:
        longest = max(len(tokens[batch[0]][0]), 1)
        given = {name: np.zeros((len(batch), longest), np.int64) for name in (IDS, MASK, TYPES, PLACES)}
        given[PLACES][:] = np.arange(longest)
        for row, i in enumerate(batch):
            ids, types = tokens[i]
            given[IDS][row, : len(ids)], given[TYPES][row, : len(ids)], given[MASK][row, : len(ids)] = ids, types, 1
        inputs = {name: given[name].astype(kind.dtype, copy=False) for name, kind in self.session.model.inputs.items()}
        vectors[batch] = next(iter(self.session.run(**inputs).values()))


def _looks_up(node: Node, model: Model) -> bool:
    return node.op == "Gather" and node.input(1) == IDS and node.inputs[0] in model.tensors


def check_sentences(sentences: Iterable[str]) -> list[str]:
    """Return sentences as a list.

    Raises:
        ModelError: it is one string, or one of them is no string; the message says which.
    """
    if isinstance(sentences, (str, bytes)) or not isinstance(sentences, Iterable):
        raise ModelError(f"sentences must be a list of strings, got {type(sentences).__name__}")
    texts = list(sentences)
    for index, sentence in enumerate(texts):
        if not isinstance(sentence, str):
            raise ModelError(f"sentence {index} must be a string, got {type(sentence).__name__}: {str(sentence)[:80]!r}")
        if not sentence.isascii() and any("\ud800" <= character <= "\udfff" for character in sentence):
            raise ModelError(f"sentence {index} holds a lone surrogate, which is no text: {sentence[:80]!r}")
    return [str(sentence) for sentence in texts]


def chunks(lengths: Sequence[int], threads: int) -> list[list[int]]:
    """Share sentences out to chunks of about ROWS rows, and of less where some threads would get none.

    Each goes to the first chunk that has room for it, so that falling lengths fill chunks well.

    Args:
        lengths: tokens of each sentence, falling.
        threads: how many there are to share chunks.

    Example:
        >>> chunks([100, 60, 60, 20], threads=1)
        [[0, 3], [1, 2]]
    """
    room = max(ROUND, min(ROWS, -(-sum(lengths) // (ROUND * threads)) * ROUND)) if len(lengths) > 1 else ROWS
    made: list[list[int]] = []
    free: list[int] = []
    for index, length in enumerate(lengths):
        place = next((i for i, left in enumerate(free) if left >= length and len(made[i]) < SEGMENTS[-1]), len(made))
        if place == len(made):
            made.append([])
            free.append(max(room, length))
        made[place].append(index)
        free[place] -= length
    return made


def rounded(rows: int) -> int:
    """Return the height of a chunk's plan: few different ones, so that chunks share plans and run side by side."""
    return ROWS if 3 * ROWS // 4 < rows <= ROWS else -(-rows // ROUND) * ROUND


_embedders: "weakref.WeakKeyDictionary[Model, dict[Any, Embedder]]" = weakref.WeakKeyDictionary()
_embedders_lock = threading.Lock()


def embedder_of(model: Model, threads: int | None = None, precision: str | None = None) -> Embedder:
    """Return a model's embedder, made on first use and kept as long as the model lives."""
    with _embedders_lock:
        made = _embedders.setdefault(check_model(model), {})
        key = threads, precision
        if key not in made:
            made[key] = Embedder(model.replace(), threads, precision)
        return made[key]


def embed(
    model: Model, sentences: Iterable[str], batch_size: int = 32, threads: int | None = None, precision: str | None = None
) -> Array:
    """Embed sentences: one vector for each.

    Uneven lengths cost no padding: sentences are packed one after the other, and attention stays within each. What is too long
    is truncated to the length that the model was made for.

    Args:
        model: an encoder that `load` read from a Hugging Face folder, or that was made from such, in any precision. Where it has
            no vector for the sentence, the mean of its tokens' vectors is taken.
        sentences: strings.
        batch_size: how many to run at a time; their vectors do not depend on it but in their last bits.
        threads: at most this many. Default: as for `Session`.
        precision: "float32", "bf16" or "int8"; None runs tensors as they are.

    Returns:
        A float32 array [sentences, width], in their order.

    Raises:
        ModelError: a sentence is no string (the message says which), or the model cannot embed.
        MissingExtraError: the tokenizers library, the extra "hf", is not installed.

    Example:
        >>> model = gm.load("all-MiniLM-L6-v2")                            # doctest: +SKIP
        >>> gm.embed(model, ["A mill grinds grain.", "Flour."]).shape      # doctest: +SKIP
        (2, 384)
    """
    return embedder_of(model, threads, precision)(sentences, batch_size)


def embed_in_parts(embedder: Embedder, sentences: Sequence[str], batch_size: int, size: int = 2048) -> Iterator[Array]:
    """Yield the vectors of a long list part by part, so that somebody can watch."""
    for start in range(0, len(sentences), size):
        yield embedder(sentences[start : start + size], batch_size)
