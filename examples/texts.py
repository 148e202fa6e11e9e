"""Unlabelled text that every machine has: docstrings and documentation of what is installed, and sentences from templates."""

import ast
import gzip
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

TEMPLATES: list[str] = []
WORDS: dict[str, list[str]] = {}
for line in Path(__file__).with_name("grammar.txt").read_text().splitlines()[2:]:
    kind, colon, words = line.partition(": ")
    if colon and kind.isalpha() and kind.islower():
        WORDS.setdefault(kind, []).extend(words.split())
    elif line:
        TEMPLATES.append(line)
STOP = set(WORDS.pop("stop"))


def sentences(folders: Sequence[Path], limit: int, seed: int, vocabulary: Sequence[str]) -> list[str]:
    """Return `limit` texts, shuffled: up to half of them found, the rest generated; in half of all, some words are exchanged for
    random ones of the vocabulary, so that every word is seen."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    paths = list(_files(folders))
    rng.shuffle(paths)
    for path in paths:
        if len(found) >= limit // 2:
            break
        found.update(dict.fromkeys(_split(_read(path))))
    made = [generate(rng) for _ in range(limit - min(len(found), limit // 2))]
    texts = [exchanged(text, rng, vocabulary) if rng.random() < 0.5 else text for text in (*list(found)[: limit // 2], *made)]
    rng.shuffle(texts)
    return texts


def generate(rng: random.Random) -> str:
    """Return one to three sentences made from templates."""
    return " ".join(_fill(rng.choice(TEMPLATES), rng) for _ in range(rng.choice((1, 1, 1, 2, 2, 3))))


def _fill(template: str, rng: random.Random) -> str:
    def word(match: re.Match[str]) -> str:
        kind = match.group(1)
        if kind == "num":
            return str(rng.randint(2, 90))
        if kind == "year":
            return str(rng.randint(1780, 2026))
        return rng.choice(WORDS["verb"]).capitalize() if kind == "Verb" else rng.choice(WORDS[kind])

    return re.sub(r"\{(\w+)\}", word, template)


def exchanged(text: str, rng: random.Random, vocabulary: Sequence[str]) -> str:
    """Return a text with a share of its words other than function words exchanged."""
    share = rng.choice((0.15, 0.3, 0.6))
    return re.sub(
        r"[A-Za-z]{3,}",
        lambda m: rng.choice(vocabulary) if m.group().lower() not in STOP and rng.random() < share else m.group(),
        text,
    )


def _files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        if folder.is_dir():
            for path in sorted(folder.rglob("*")):
                if path.suffix in (".py", ".txt", ".rst", ".md", ".pod", ".gz") and path.is_file():
                    yield path


def _read(path: Path) -> str:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw[: 1 << 20].decode("utf-8")
        return "\n\n".join(_docstrings(text)) if path.suffix == ".py" else _plain(text)
    except (OSError, EOFError, ValueError, SyntaxError, RecursionError):
        return ""  # a file that cannot be read has no text for us


def _docstrings(source: str) -> Iterator[str]:
    if '"""' not in source:
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def _plain(text: str) -> str:
    """Take the marks of manual pages out."""
    text = re.sub(r"^\.(SH|SS|TP|PP|IP|P|sp|br|nf|fi|RS|RE|TH).*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"^\.[A-Z]{1,2} ", "", text, flags=re.MULTILINE)
    return re.sub(r"\\f[A-Z]|\\&|\\-|\\\(..", lambda m: "-" if m.group() == "\\-" else "", text)


def _split(text: str) -> Iterator[str]:
    """Yield runs of one to three sentences of ordinary prose."""
    for paragraph in re.split(r"\n\s*\n", text):
        line = re.sub(r"\s+", " ", paragraph).strip(" -*#>=")
        if len(line) < 25 or not line[0].isalpha() or sum(c.isalpha() or c == " " for c in line) < 0.9 * len(line):
            continue
        parts = re.split(r"(?<=[.!?]) (?=[A-Z])", line)
        for start in range(0, min(len(parts), 12), 2):
            piece = " ".join(parts[start : start + 2])
            if 20 <= len(piece) <= 400:
                yield piece
