"""A run of `compress` on the disk, so that it goes on after a kill: the model and the report after each complete pass.

The folder holds `state.json`, which names the model file that goes with it, `model-<passes>.safetensors`, and a folder for what a
long pass keeps of its own. Files appear whole or not at all, the model before the state that names it: whenever a run ends, the
folder tells of the last complete pass.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gristmill.compression.provenance import model_checksum
from gristmill.compression.report import Stage
from gristmill.errors import FormatError, ModelError
from gristmill.formats import native
from gristmill.formats.atomic import replacing
from gristmill.model import Model

VERSION = 1
STATE = "state.json"
OWN = ("model-*.safetensors", ".model-*.tmp", ".state.json.*.tmp", "weights/*.safetensors", "weights/.*.tmp")
LIMIT = 1 << 26  # bytes of state.json


class State:
    """Where a run stands.

    Args:
        folder: made where there is none.
        identity: what a run must have in common with the one that it goes on with: recipe, checksums of model and data, options.

    Raises:
        ModelError: the folder belongs to a run of another identity; the message says what differs.
        FormatError: what is in it is damaged.
        OSError: it cannot be read or written.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.identity = json.loads(json.dumps(identity))
        self.done = 0
        self.stages: list[Stage] = []
        self.seconds: dict[str, float] = {}
        self.model: Model | None = None
        self.folder.mkdir(parents=False, exist_ok=True)
        if (self.folder / STATE).exists():
            self._read()
        else:
            self._write(None)

    def _read(self) -> None:
        path = self.folder / STATE
        try:
            if path.stat().st_size > LIMIT:
                raise ValueError("it is too long")
            found = json.loads(path.read_text("utf-8"))
            if found["version"] != VERSION:
                raise ValueError(f"version {found['version']!r}, this gristmill reads {VERSION}")
            self._compare(found["identity"])
            self.done, self.seconds = int(found["done"]), dict(found["seconds"])
            self.stages = [Stage.from_dict(stage) for stage in found["stages"]]
            model, checksum = found["model"], found["checksum"]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            if isinstance(error, ModelError):
                raise
            raise FormatError(f"{path} is no state of compress: {error}; remove {self.folder} to start anew") from error
        if model is not None:
            self.model = native.load(self.folder / Path(model).name)
            if model_checksum(self.model) != checksum:
                raise FormatError(f"{self.folder / model} is damaged; remove {self.folder} to start anew")

    def _compare(self, found: Mapping[str, Any]) -> None:
        differences = [name for name in self.identity if found.get(name) != self.identity[name]]
        if differences:
            raise ModelError(
                f"{self.folder} holds the state of another run, which differs in {', '.join(differences)}: "
                "give the same again, another folder, or remove it to start anew"
            )

    def commit(self, model: Model, stages: Sequence[Stage], seconds: Mapping[str, float]) -> None:
        """Write the model and the report after one more complete pass.

        Raises:
            OSError: they could not be written; the state before is intact.
        """
        path = self._model(self.done + 1)
        try:
            native.save(model, path)
            before = self.done
            self.done, self.stages, self.seconds = self.done + 1, list(stages), dict(seconds)
            self._write(model)
        except OSError as error:
            where = error.filename or path
            raise OSError(error.errno, f"{error.strerror or error}; the earlier state is intact", os.fspath(where)) from error
        self._remove(self._model(before), self.pass_folder(before))

    def _write(self, model: Model | None) -> None:
        description = {
            "version": VERSION,
            "identity": self.identity,
            "done": self.done,
            "model": None if model is None else self._model(self.done).name,
            "checksum": None if model is None else model_checksum(model),
            "stages": [asdict(stage) for stage in self.stages],
            "seconds": self.seconds,
        }
        with replacing(self.folder / STATE) as temporary:
            temporary.write_text(json.dumps(description), "utf-8")

    def begin(self, stages: Sequence[Stage]) -> None:
        """Write the report on the original model."""
        self.stages = list(stages)
        self._write(None)

    def _model(self, done: int) -> Path:
        return self.folder / f"model-{done}.safetensors"

    def pass_folder(self, position: int) -> Path:
        """Where the pass at a position, from 0, may keep files of its own."""
        return self.folder / f"pass-{position + 1}"

    def open_pass_folder(self, position: int) -> Path:
        """Make that folder where there is none."""
        folder = self.pass_folder(position)
        folder.mkdir(exist_ok=True)
        return folder

    @staticmethod
    def _remove(*paths: Path) -> None:
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def discard(folder: str | os.PathLike[str]) -> None:
    """Remove the state in a folder, and the folder where nothing else is in it."""
    root = Path(folder)
    if not root.is_dir():
        return
    (root / STATE).unlink(missing_ok=True)
    for pattern in OWN:
        for path in root.glob(pattern):
            path.unlink(missing_ok=True)
    for path in root.glob("pass-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (root / "weights", root):
        with suppress(OSError):  # somebody keeps files of his own there
            path.rmdir()
