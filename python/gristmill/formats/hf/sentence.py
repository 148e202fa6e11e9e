"""The modules of a sentence-transformers folder: a transformer, pooling, dense layers, normalisation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gristmill.errors import FormatError
from gristmill.formats.container import parse
from gristmill.formats.folder import Folder
from gristmill.tensor.parts import Array
from gristmill.zoo.bert import Projection

LIST = "modules.json"
MODULES = 64
LARGEST = 2**31 - 1
POOLING = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "sqrt",
    "pooling_mode_weightedmean_tokens": "weighted",
}
UNKNOWN_POOLING = "pooling_mode_lasttoken"
ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": None,
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.activation.SiLU": "silu",
}


@dataclass(frozen=True)
class Modules:
    """What follows the transformer, and the path of its own folder."""

    transformer: str
    pooling: str
    projections: tuple[Projection, ...]
    normalize: bool
    arrays: dict[str, Array]


def read_modules(folder: Folder) -> Modules | None:
    """Read modules.json; None where the folder has none.

    Raises:
        FormatError: the modules are not a transformer, a pooling, and any number of dense layers before a normalisation.
    """
    if not folder.has(LIST):
        return None
    listed = _modules(folder)
    kinds = [kind for kind, _ in listed]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds.count("Pooling") != 1 or kinds.count("Transformer") != 1:
        raise FormatError(f"{LIST}: the modules must begin with one Transformer and one Pooling, got {kinds}")
    if "Normalize" in kinds and (kinds.count("Normalize") != 1 or kinds[-1] != "Normalize"):
        raise FormatError(f"{LIST}: Normalize must come once, and last, got {kinds}")
    projections: list[Projection] = []
    arrays: dict[str, Array] = {}
    for kind, path in listed:
        if kind == "Dense":
            projections.append(_dense(folder.inner(path), f"dense.{len(projections)}", arrays))
    pooling = _pooling(folder.inner(listed[1][1]))
    return Modules(listed[0][1], pooling, tuple(projections), "Normalize" in kinds, arrays)


def _modules(folder: Folder) -> list[tuple[str, str]]:
    """Return the kind and the path of each module; those that do nothing after training are left out."""
    # The file holds a list; the parser bounds objects.
    entries = parse(f'{{"modules":{folder.text(LIST)}}}'.encode(), LIST).get("modules")
    if not isinstance(entries, list) or not 0 < len(entries) <= MODULES:
        raise FormatError(f"{LIST}: must be a list of 1 to {MODULES} modules")
    known = ("Transformer", "Pooling", "Dense", "Normalize", "Dropout")
    found = []
    for entry in entries:
        kind, path = (entry.get("type"), entry.get("path")) if isinstance(entry, Mapping) else (None, None)
        name = kind.rpartition(".")[2] if isinstance(kind, str) else None
        if name not in known or not isinstance(path, str):
            raise FormatError(f"{LIST}: {str(entry)[:120]} is no module that is known; known: {', '.join(known)}")
        folder.inner(path)  # refuses ways out even where nothing is read
        if name != "Dropout":
            found.append((name, path))
    return found


def _pooling(folder: Folder) -> str:
    fields = folder.fields("config.json")
    chosen: list[Any] = [mode for key, mode in POOLING.items() if fields.flag(key)]
    if len(chosen) != 1 or fields.flag(UNKNOWN_POOLING):
        raise FormatError(f"the pooling must be one of {', '.join(POOLING)}, got {chosen}")
    return str(chosen[0])


def _dense(folder: Folder, name: str, arrays: dict[str, Array]) -> Projection:
    fields = folder.fields("config.json")
    outputs, bias = fields.integer("out_features", 1, LARGEST), fields.flag("bias", True)
    activation = fields.choice("activation_function", ACTIVATIONS, "torch.nn.modules.activation.Tanh")
    stored = folder.tensors()
    wanted = {"linear.weight", "linear.bias"} if bias else {"linear.weight"}
    if stored.keys() != wanted:
        raise FormatError(f"{folder.path.name}: a dense layer has tensors {sorted(wanted)}, found {sorted(stored)[:5]}")
    arrays |= {name + key.removeprefix("linear"): array for key, array in stored.items()}
    return Projection(name, outputs, activation, bias)
