"""The files of an untrusted folder: JSON of bounded size, tensors, and no way out of the folder."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gristmill.errors import FormatError
from gristmill.formats.container import DTYPES, map_file, parse, read
from gristmill.tensor.parts import Array

JSON_BYTES = 64 << 20
SHARDS = 1024
BF16 = np.dtype([("bfloat16", "<u2")])  # the upper half of a float32, in a dtype that no other has
ACCEPTED = {**DTYPES, "BF16": BF16}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Folder:
    """A folder whose files are named by other files of it. Symbolic links to files are followed, as hub caches have them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def inner(self, name: Any) -> "Folder":
        """Return a folder inside this one; "" is the folder itself.

        Raises:
            FormatError: the name leads out of the folder.
        """
        return self if name == "" else Folder(self.path / _inside(name, "module path"))

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def text(self, name: str) -> str:
        """Return a file of at most JSON_BYTES as text.

        Raises:
            FormatError: it is larger, or not UTF-8.
        """
        with open(self.path / name, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FormatError(f"{name} is not a regular file")
            data = file.read(JSON_BYTES + 1)
        if len(data) > JSON_BYTES:
            raise FormatError(f"{name} has more than {JSON_BYTES} bytes")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{name} is not UTF-8: {error}") from error

    def fields(self, name: str) -> "Fields":
        """Return a JSON object of the folder."""
        return Fields(name, parse(self.text(name).encode(), name))

    def tensors(self, dtypes: Mapping[str, np.dtype[Any]] = ACCEPTED) -> dict[str, Array]:
        """Return all tensors of model.safetensors, or of the shards that its index lists, as they are stored.

        Args:
            dtypes: the NumPy dtype of each code that is accepted.

        Raises:
            FormatError: a file is damaged, or the index and the shards disagree.
            FileNotFoundError: there are none.
        """
        if self.has(WEIGHTS):
            return self._read(WEIGHTS, dtypes)
        if not self.has(INDEX):
            pickled = sorted(path.name for path in self.path.glob("*.bin"))
            hint = f"; {pickled[0]} is a pickle file, which is never read: convert it to safetensors" if pickled else ""
            raise FileNotFoundError(f"there is no {WEIGHTS} in {self.path}{hint}")
        listed = self.fields(INDEX).values.get("weight_map")
        if not isinstance(listed, Mapping) or not all(isinstance(name, str) for name in listed.values()):
            raise FormatError(f"{INDEX}: weight_map must map tensors to files")
        shards = sorted(set(listed.values()))
        if len(shards) > SHARDS:
            raise FormatError(f"{INDEX}: {len(shards)} files are more than {SHARDS}")
        arrays: dict[str, Array] = {}
        for shard in shards:
            if len(Path(_inside(shard, "file of the index")).parts) != 1 or not shard.endswith(".safetensors"):
                raise FormatError(f"{INDEX}: {shard!r} is not the name of a safetensors file")
            if not self.has(shard):
                raise FormatError(f"{INDEX}: the file {shard} is missing")
            arrays |= {name: array for name, array in self._read(shard, dtypes).items() if listed.get(name) == shard}
        missing = sorted(listed.keys() - arrays.keys())
        if missing:
            raise FormatError(f"{INDEX}: the files lack tensors that it lists: {missing[:10]}")
        return arrays

    def _read(self, name: str, dtypes: Mapping[str, np.dtype[Any]]) -> dict[str, Array]:
        try:
            arrays, _ = read(map_file(self.path / name), dtypes, aligned=False)
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from error
        return arrays


def widened(name: str, array: Array) -> Array:
    """Return a tensor as float32.

    Raises:
        FormatError: it is not of floats.
    """
    if array.dtype == BF16:
        bits = np.array(array).view("<u2").reshape(array.shape)
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if array.dtype.kind != "f":
        raise FormatError(f"tensor '{name}' is {array.dtype}; weights must be floats")
    with np.errstate(over="ignore"):
        wide = np.asarray(array, np.float32)
    return wide if wide.flags.aligned else wide.copy()


def _inside(name: Any, what: str) -> str:
    """Return a relative path that stays in its folder."""
    if not isinstance(name, str) or not name.isprintable() or len(name) > 255 or "\\" in name or ":" in name:
        raise FormatError(f"{what} {str(name)[:80]!r} is not the name of a place in the folder")
    if not name or name.startswith("/") or any(part in ("", ".", "..") for part in name.rstrip("/").split("/")):
        raise FormatError(f"{what} {name!r} leads out of the folder")
    return name


class Fields:
    """The fields of a JSON object, each checked as it is read."""

    def __init__(self, what: str, values: Mapping[str, Any]) -> None:
        self.what, self.values = what, values

    def fault(self, key: str, wanted: str) -> FormatError:
        return FormatError(f"{self.what}: {key} must be {wanted}, got {str(self.values.get(key))[:80]!r}")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.fault(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float) -> float:
        value = self.values.get(key, default)
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.fault(key, f"a number from {low} to {high}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key, default)
        if type(value) is not bool:
            raise self.fault(key, "true or false")
        return value

    def choice(self, key: str, choices: Mapping[str, Any], default: str) -> Any:
        """Return what a text stands for."""
        value = self.values.get(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self.fault(key, f"one of {', '.join(choices)}")
        return choices[value]
