"""The tokens that all engines are given: 200 sentences, each for itself, and batches of one length cut from their text."""

from pathlib import Path

import numpy as np

SENTENCES = Path(__file__).with_name("sentences.txt")
START, END = 101, 102  # [CLS] and [SEP] of the BERT family
VOCABULARY = 20_000
LONG = 128


def tokenize(source: Path, target: Path) -> None:
    """Write the ids of every sentence; without a tokenizer beside the model, random ids of the same lengths."""
    lines = SENTENCES.read_text().splitlines()
    folder = source if source.is_dir() else source.parent
    if (folder / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        rows = [tokenizer.encode(line).ids for line in lines]
    else:
        rng = np.random.default_rng(0)
        rows = [[START, *rng.integers(1000, VOCABULARY, len(line.split())), END] for line in lines]
    ids = np.concatenate([np.asarray(row, np.int64) for row in rows])
    np.savez(target, ids=ids, lengths=np.array([len(row) for row in rows]))


def sentences(cache: Path) -> list[dict[str, np.ndarray]]:
    """Return the inputs of every sentence, a batch of one each: no padding."""
    with np.load(cache / "tokens.npz") as file:
        return [inputs(row[np.newaxis]) for row in np.split(file["ids"], np.cumsum(file["lengths"])[:-1])]


def batch(cache: Path, count: int, length: int) -> dict[str, np.ndarray]:
    """Return `count` rows of `length` tokens, cut from the text of the sentences."""
    text = np.concatenate([each["input_ids"][0, 1:-1] for each in sentences(cache)])
    middle = np.resize(text, (count, length - 2))
    return inputs(np.pad(np.pad(middle, ((0, 0), (1, 0)), constant_values=START), ((0, 0), (0, 1)), constant_values=END))


def calibration(cache: Path) -> list[dict[str, np.ndarray]]:
    """Return the sentences that quality is judged by, which favours who calibrates on them, and longer rows of the same text."""
    rows = sentences(cache)
    long = batch(cache, sum(each["input_ids"].size - 2 for each in rows) // (LONG - 2), LONG)["input_ids"]
    return rows + [inputs(row[np.newaxis]) for row in long]


def inputs(ids: np.ndarray) -> dict[str, np.ndarray]:
    ids = np.ascontiguousarray(ids, np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
