"""Prune all-MiniLM-L6-v2 to 80 % in blocks, taught by its own dense self on unlabelled text, on two cores.

    python examples/sparse_minilm.py MODEL --work FOLDER --pattern 4x4

MODEL is the Hugging Face folder of sentence-transformers/all-MiniLM-L6-v2. The sparsity rises in stages; each prunes by the error
that it makes (second_order.py), then the student learns the teacher's hidden states after every layer and its sentence vectors.
Texts are taken round by round: the teacher's answers for a round are computed once and used in all its epochs. A run that was
stopped goes on where it was: every stage has a checkpoint, and what it ended with is FOLDER/<sparsity>.safetensors.
FOLDER/log.jsonl tells the quality after every round.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import gristmill as gm
import second_order
import texts
from gristmill import losses
from gristmill.metrics import spearman
from gristmill.model import Model
from gristmill.optim import Optimizer
from gristmill.runtime.session import Session
from gristmill.tensor.parts import Array
from gristmill.tensor.selection import Pattern
from gristmill.text import Tokenizer
from gristmill.training.sparsity import GradualPruning

HELD_OUT = Path(find_spec("gristmill").origin).parent / "bench" / "sentences.txt"  # general English; nothing is trained on it
STAGES = ((0.5, 30), (0.7, 15), (0.8, 20), (0.9, 10))  # sparsity, rounds


@dataclass(frozen=True)
class Setting:
    """How a run is trained.

    Args:
        length: tokens of a text, at most.
        pieces: texts that the corpus is made of, before some are joined.
        round_texts: texts of a round; epochs: how often a round's texts are visited.
        batch_size: texts of a step.
        calibration_texts: texts that pruning is decided on.
        rate: of AdamW, at its highest.
    """

    length: int = 40
    pieces: int = 220_000
    round_texts: int = 4096
    epochs: int = 3
    batch_size: int = 32
    calibration_texts: int = 512
    rate: float = 3e-3
    seed: int = 0

    @property
    def steps(self) -> int:
        """Steps of a round."""
        return self.epochs * (self.round_texts // self.batch_size)


SHORT = Setting(length=16, pieces=400, round_texts=64, epochs=1, batch_size=16, calibration_texts=32)


@dataclass(frozen=True)
class Decay:
    """A rate that rises for `warmup` steps, then falls along a line to a twentieth at step `end`."""

    rate: float
    warmup: int
    end: int

    @property
    def __name__(self) -> str:
        return f"decay({self.rate}, {self.warmup}, {self.end})"

    def __call__(self, step: int) -> float:
        return self.rate * min(step / self.warmup, max(1.0 - step / self.end, 0.05))


class Distillation:
    """A teacher and the texts that it answers."""

    def __init__(self, model: Model, folder: Path, setting: Setting, sources: Sequence[Path]) -> None:
        self.model, self.folder, self.setting = model, folder, setting
        layers = [node.outputs[0] for node in model.nodes if node.outputs[0].endswith(".output.LayerNorm")]
        self.hidden = [name for name in layers if ".attention." not in name]
        self.weights = tuple(name for name in model.weights if name.startswith("encoder."))
        self.teacher = Session(model.replace(outputs=(*model.outputs, *self.hidden)))
        self.tokenizer = Tokenizer({**model.meta["tokenizer"], "max_length": setting.length})
        self.sources = sources

    def texts(self) -> list[str]:
        """The corpus, made once and kept: two thirds of the texts are joined with what follows until the length is full."""
        path = self.folder / "texts.json"
        if not path.exists():
            vocabulary = json.loads(self.model.meta["tokenizer"]["definition"])["model"]["vocab"]
            words = [word for word in vocabulary if word.isalpha() and word.isascii() and len(word) > 2]
            path.write_text(json.dumps(self.joined(texts.sentences(self.sources, self.setting.pieces, self.setting.seed, words))))
        return json.loads(path.read_text())

    def joined(self, pieces: Sequence[str]) -> list[str]:
        """Join texts that fit into one example together; every third stays alone."""
        made: list[str] = []
        room = 0
        for piece, (ids, _) in zip(pieces, self.tokenizer(pieces), strict=True):
            tokens = len(ids) - 2  # without the marks of begin and end
            if tokens <= room and len(made) % 3:
                made[-1] += " " + piece
                room -= tokens
            else:
                made.append(piece)
                room = self.setting.length - len(ids)
        return made

    def inputs(self, sentences: Sequence[str]) -> dict[str, Array]:
        """Tokens, padded to one length."""
        shape = len(sentences), self.setting.length
        made = {name: np.zeros(shape, np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
        for row, (ids, _) in enumerate(self.tokenizer(sentences)):
            made["input_ids"][row, : len(ids)], made["attention_mask"][row, : len(ids)] = ids, 1
        return made

    def examples(self, sentences: Sequence[str]) -> dict[str, Array]:
        """Tokens and the teacher's answers: what a round trains on."""
        tokens = self.inputs(sentences)
        width = int(self.model.types[self.model.outputs[0]].shape[-1])
        made = {name: np.empty((len(sentences), self.setting.length, width), np.float32) for name in self.hidden}
        made[self.model.outputs[0]] = np.empty((len(sentences), width), np.float32)
        for start in range(0, len(sentences), 64):
            part = slice(start, start + 64)
            for name, array in self.teacher.run(**{key: value[part] for key, value in tokens.items()}).items():
                made[name][part] = array
        return {**tokens, **{losses.target_of(self.model, name): array for name, array in made.items()}}

    def loss(self, examples: Mapping[str, Array]) -> losses.Loss:
        """The vectors' cosine, and each layer's squared error relative to the variance of its values."""
        shares = {name: float(np.var(examples[losses.target_of(self.model, name)][:256])) for name in self.hidden}
        layers = {name: ("mse", 1.0 / (len(shares) * share)) for name, share in shares.items()}
        return losses.weighted({self.model.outputs[0]: ("cosine", 1.0), **layers})


def train(run: Distillation, pattern: str, stages: Sequence[tuple[float, int]], workers: int) -> None:
    """Go through the stages, each from what the one before ended with."""
    setting = run.setting
    corpus = run.texts()
    shares = run.loss(run.examples(corpus[:256]))
    student, first = run.model, 0
    for sparsity, count in stages:
        done = run.folder / f"{round(100 * sparsity)}.safetensors"
        if not done.exists():
            student = start(run, student, pattern, sparsity, corpus[-setting.calibration_texts :])
            pruning = GradualPruning(run.weights, sparsity, begin=1, end=1, pattern=pattern)  # what is zero stays so
            optimizer = gm.AdamW(Decay(setting.rate, max(1, setting.steps // 4), setting.steps * count), clip_norm=5.0)
            for turn in range(count):
                begin = (first + turn) * setting.round_texts
                part = [corpus[place % len(corpus)] for place in range(begin, begin + setting.round_texts)]
                trained = one_round(run, student, shares, part, optimizer, pruning, turn, workers)
            gm.save(trained, done)
        student = gm.load(done).replace(meta=run.model.meta)
        first += count


def start(run: Distillation, student: Model, pattern: str, sparsity: float, sentences: Sequence[str]) -> Model:
    """Prune to the stage's sparsity, once."""
    path = run.folder / f"{round(100 * sparsity)}.start.safetensors"
    if not path.exists():
        block = Pattern.named(pattern).block
        pruned = second_order.prune(run.model, student, run.weights, run.inputs(sentences), block, sparsity)
        print(json.dumps({"pruned": sparsity, "quality": quality(run.model, pruned)}), flush=True)
        gm.save(pruned, path)
    return gm.load(path).replace(meta=run.model.meta)


def one_round(
    run: Distillation,
    student: Model,
    loss: losses.Loss,
    sentences: Sequence[str],
    optimizer: Optimizer,
    pruning: GradualPruning,
    turn: int,
    workers: int,
) -> Model:
    """Train on the next texts, where the stage's checkpoint left off."""
    began = time.perf_counter()
    examples = run.examples(sentences)
    answered = time.perf_counter()
    result = gm.fit(
        student, examples, loss, optimizer, epochs=run.setting.epochs * (turn + 1), batch_size=run.setting.batch_size,
        workers=workers, threads=1, slices=4, seed=run.setting.seed, precision="bf16", pruning=pruning,
        trainable=[name for name in student.tensors if name.startswith("encoder.")],
        checkpoint=run.folder / f"{round(100 * pruning.final)}.checkpoint", resume=True, progress=False,
    )  # fmt: skip
    cosine, rank = quality(run.model, result.model)
    row = {
        "pattern": pruning.pattern, "stage": pruning.final, "turn": turn, "steps": run.setting.steps * (turn + 1),
        "tokens": int(examples["attention_mask"].sum()) * run.setting.epochs, "loss": float(result.history["loss"][-1]),
        "cosine": cosine, "spearman": rank, "teacher_seconds": answered - began, "seconds": time.perf_counter() - began,
    }  # fmt: skip
    with (run.folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)
    return result.model


def quality(teacher: Model, student: Model) -> tuple[float, float]:
    """Return the mean cosine between both models' vectors of the held-out sentences, and Spearman's correlation of the
    similarities of all pairs."""
    sentences = HELD_OUT.read_text().splitlines()
    theirs, ours = gm.embed(teacher, sentences), gm.embed(student.replace(meta=teacher.meta), sentences)
    pairs = np.triu_indices(len(sentences), 1)
    return float((theirs * ours).sum(axis=1).mean()), float(spearman((theirs @ theirs.T)[pairs], (ours @ ours.T)[pairs]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for the corpus, checkpoints and snapshots")
    parser.add_argument("--pattern", default="4x4", choices=("1x4", "2x4", "4x4"))
    parser.add_argument(
        "--stages", default=",".join(f"{share}:{rounds}" for share, rounds in STAGES), help="sparsity:rounds, ..."
    )
    sources = [*map(Path, sys.path), Path("/usr/share/doc"), Path("/usr/share/perl"), Path("/usr/share/man")]
    parser.add_argument("--texts", type=Path, nargs="*", default=sources, help="folders of docstrings and documentation")
    parser.add_argument("--rate", type=float, default=Setting.rate)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="a few steps on short texts, to see that everything works")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    stages = [(float(share), int(rounds)) for share, rounds in (stage.split(":") for stage in given.stages.split(","))]
    setting = SHORT if given.short else Setting(rate=given.rate)
    train(Distillation(gm.load(given.model), given.work, setting, given.texts), given.pattern, stages, given.workers)


if __name__ == "__main__":
    main()
