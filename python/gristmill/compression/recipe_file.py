"""Recipes as data: to and from plain values, JSON and YAML.

What a pass looks like follows from its own fields and their types, so that a new pass or setting needs nothing here.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from inspect import isabstract
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from gristmill.compression.provenance import data_checksum, model_checksum
from gristmill.compression.recipe import Pass
from gristmill.errors import FormatError, MissingExtraError, ModelError
from gristmill.formats import load
from gristmill.formats.atomic import replacing
from gristmill.model import Model

JSON, YAML = (".json",), (".yaml", ".yml")
LIMIT = 1 << 20  # bytes of a recipe


def to_dict(recipe: Sequence[Pass]) -> list[dict[str, Any]]:
    """Return the passes of a recipe as values that JSON has: {"pass": its class, and every setting}.

    Raises:
        ModelError: a setting is a model, an array or a function, which only a program can give.

    Example:
        >>> import gristmill as gm
        >>> to_dict([gm.Clip(value=0.5)])[0]["pass"]
        'Clip'
    """
    return [_plain(step, f"{type(step).__name__}", _refused) for step in recipe]


def described(step: Pass) -> dict[str, Any]:
    """Return the settings of a pass for provenance: as `to_dict`, with the checksums of models and arrays in their place."""
    made: dict[str, Any] = _plain(step, type(step).__name__, _checksum)
    return made


def from_dict(entries: Any, folder: str | os.PathLike[str] = ".") -> list[Pass]:
    """Return the passes that `to_dict` was given.

    Args:
        entries: a list of passes, or {"recipe": such a list}. A pass is {"pass": "Prune", "sparsity": 0.8}, or
            {"Prune": {"sparsity": 0.8}}, or a bare name; settings left out have their defaults.
        folder: where paths of models start.

    Raises:
        ModelError: a pass or a setting is unknown (the message names the nearest), of the wrong type, or out of its range.

    Example:
        >>> from_dict([{"pass": "Prune", "sparsity": 0.5}, "Quantize"])[1].precision
        'int8'
    """
    if isinstance(entries, Mapping):
        if entries.keys() != {"recipe"}:
            raise ModelError(f"a recipe is a list of passes, or a mapping with the one key 'recipe'; got {_keys(entries)}")
        entries = entries["recipe"]
    if not isinstance(entries, (list, tuple)) or not entries:
        raise ModelError(f"a recipe is a list of at least one pass, got {_short(entries)}")
    return [_built(Pass, entry, f"pass {position}", Path(folder)) for position, entry in enumerate(entries, 1)]


def read_recipe(path: str | os.PathLike[str]) -> list[Pass]:
    """Read a recipe from a `.json`, `.yaml` or `.yml` file. Paths of models in it start from its folder.

    Raises:
        FormatError: the file is none of these, or damaged.
        ModelError: as `from_dict`.
        MissingExtraError: PyYAML, of the extra "compress", is not installed.
        OSError: it cannot be read.

    Example:
        >>> import tempfile, gristmill as gm
        >>> path = tempfile.mkdtemp() + "/recipe.json"
        >>> write_recipe([gm.Prune(0.8), gm.Quantize("int8")], path)
        >>> [type(step).__name__ for step in read_recipe(path)]
        ['Prune', 'Quantize']
    """
    found = Path(path)
    _check_suffix(found)
    with open(found, "rb") as file:
        data = file.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise FormatError(f"{path}: a recipe takes at most {LIMIT:,} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text") from error
    try:
        return from_dict(_parsed(found, text), found.parent)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def write_recipe(recipe: Sequence[Pass], path: str | os.PathLike[str]) -> None:
    """Write a recipe to a `.json`, `.yaml` or `.yml` file, whole or not at all.

    Raises:
        FormatError: the suffix is none of these.
        ModelError: as `to_dict`.
        MissingExtraError: PyYAML, of the extra "compress", is not installed.
        OSError: it cannot be written.
    """
    target = Path(path)
    _check_suffix(target)
    entries = {"recipe": to_dict(recipe)}
    text = json.dumps(entries, indent=2) + "\n" if target.suffix in JSON else _yaml().safe_dump(entries, sort_keys=False)
    with replacing(target) as temporary:
        temporary.write_text(text, "utf-8")


def _check_suffix(path: Path) -> None:
    if path.suffix not in JSON + YAML:
        raise FormatError(f"{path}: a recipe is a file that ends in {', '.join(JSON + YAML)}")


def _parsed(path: Path, text: str) -> Any:
    if path.suffix in JSON:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path} is not valid JSON: {error}") from error
    yaml = _yaml()
    try:
        return yaml.load(text, _loader(yaml))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid YAML: {error}") from error


def _yaml() -> Any:
    try:
        import yaml  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise MissingExtraError("PyYAML", "compress") from error
    return yaml


def _loader(yaml: Any) -> Any:
    """Return the safe loader, which makes plain values only, with two corrections."""
    import re

    class Loader(yaml.SafeLoader):  # type: ignore[misc,unused-ignore]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            twice = [key for key in keys if keys.count(key) > 1]
            if twice:
                raise yaml.YAMLError(f"the key {twice[0]!r} appears twice")
            return super().construct_mapping(node, deep)

    # YAML 1.1 takes 1e-3 for a text: it wants a dot.
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))
    return Loader


def known(base: type) -> dict[str, type]:
    """Return the classes of a kind that can be made, by name.

    Example:
        >>> known(Pass)["Prune"].__name__
        'Prune'
    """
    import_module("gristmill.compression")  # brings all passes
    found: dict[str, type] = {}
    rest = [base]
    while rest:
        kind = rest.pop()
        rest.extend(kind.__subclasses__())
        if kind is not base and is_dataclass(kind) and not isabstract(kind) and not kind.__name__.startswith("_"):
            found.setdefault(kind.__name__, kind)
    return dict(sorted(found.items()))


# From objects to plain values.


def _plain(value: Any, where: str, other: Callable[[Any, str], Any]) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple) and value and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        return {str(name): _plain(item, where, other) for name, item in value}
    if isinstance(value, (tuple, list)) and not any(isinstance(item, (np.ndarray, Mapping)) for item in value):
        return [_plain(item, where, other) for item in value]
    if isinstance(value, Mapping) and all(isinstance(item, (str, int, float)) for pair in value.items() for item in pair):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, (type, Model)):
        settings = {field.name: _plain(getattr(value, field.name), f"{where}: {field.name}", other) for field in fields(value)}
        return {_kind_key(type(value)): type(value).__name__, **settings}
    return other(value, where)


def _kind_key(kind: type) -> str:
    """The key that names a class: "pass" for passes, "optimizer" for optimisers."""
    lineage = [base for base in kind.__mro__ if is_dataclass(base)]
    return lineage[-1].__name__.lower()


def _refused(value: Any, where: str) -> Any:
    kind = "a model in memory; save it and give its path in the file" if isinstance(value, Model) else type(value).__name__
    raise ModelError(f"{where} is {kind}, which a recipe file cannot hold")


def _checksum(value: Any, where: str) -> Any:
    if isinstance(value, Model):
        return {"model": model_checksum(value)}
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return {"data": data_checksum(value)} if isinstance(value, (np.ndarray, Mapping, list, tuple)) else type(value).__name__


# From plain values to objects.


def _built(base: type, entry: Any, where: str, folder: Path) -> Any:
    """Make an object of a kind from its name and its settings."""
    name, settings = _named(base, entry, where)
    kinds = known(base)
    if name not in kinds:
        raise ModelError(f"{where}: there is no {_kind_key(base)} {name!r}{_nearest(name, kinds)}")
    kind = kinds[name]
    hints, own = get_type_hints(kind), {field.name: field for field in fields(kind) if field.init}
    for setting in settings:
        if setting not in own:
            raise ModelError(f"{where}: {name} has no setting {setting!r}{_nearest(str(setting), own)}")
    for setting, field in own.items():
        if setting not in settings and _required(field):
            raise ModelError(f"{where}: {name} needs the setting {setting!r}")
    values = {s: _converted(value, hints[s], f"{where}: {name}: {s}", folder) for s, value in settings.items()}
    try:
        return kind(**values)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error


def _required(field: "Field[Any]") -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _named(base: type, entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    key = _kind_key(base)
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, Mapping) and isinstance(entry.get(key), str):
        return entry[key], {name: value for name, value in entry.items() if name != key}
    if isinstance(entry, Mapping) and len(entry) == 1:
        ((name, settings),) = entry.items()
        if isinstance(name, str) and isinstance(settings, Mapping | NoneType):
            return name, dict(settings or {})
    raise ModelError(f"{where} must be a name, or a mapping with {key!r} and settings; got {_short(entry)}")


def _converted(value: Any, hint: Any, where: str, folder: Path) -> Any:
    """Return a plain value as the type that a setting has.

    Raises:
        ModelError: it is of another type.
    """
    if value is None and NoneType in _choices(hint):
        return None
    for choice in _choices(hint):
        try:
            return _as(value, choice, where, folder)
        except TypeError:
            continue
    raise ModelError(f"{where} must be {_spelled(hint)}, got {_short(value)}")


def _choices(hint: Any) -> tuple[Any, ...]:
    """The types that a hint allows."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _as(value: Any, hint: Any, where: str, folder: Path) -> Any:
    """Return a value as one type. TypeError: it is no such value."""
    if hint is Any:
        return value
    origin = get_origin(hint) or hint
    if origin in (tuple, list) or origin in (Sequence, Iterable):
        return _as_tuple(value, hint, where, folder)
    if isinstance(origin, type) and issubclass(origin, Model) and isinstance(value, str):
        return load(folder / value)
    if isinstance(origin, type) and is_dataclass(origin) and not issubclass(origin, Model):
        root = next(kind for kind in reversed(origin.__mro__) if is_dataclass(kind))
        made = _built(root, value, where, folder)
        if not isinstance(made, origin):
            raise TypeError
        return made
    if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if origin in (int, str, bool, NoneType, dict) and isinstance(value, origin):
        if origin is int and isinstance(value, bool):
            raise TypeError
        return value
    if str(origin) == "typing.Literal" and value in get_args(hint):
        return value
    raise TypeError


def _as_tuple(value: Any, hint: Any, where: str, folder: Path) -> Any:
    kinds = get_args(hint) or (Any, ...)
    if isinstance(value, str) and kinds[0] is str:
        return (value,)
    if not isinstance(value, (list, tuple)):
        raise TypeError
    if kinds[1:] in ((), (Ellipsis,)):
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise TypeError
    return tuple(_converted(item, kind, where, folder) for item, kind in zip(value, kinds, strict=True))


def _spelled(hint: Any) -> str:
    names = {NoneType: "nothing", float: "a number", int: "a whole number", str: "a text", bool: "true or false"}
    spelled = []
    for choice in _choices(hint):
        if choice in names:
            spelled.append(names[choice])
        elif get_origin(choice) in (tuple, list, Sequence):
            spelled.append("a list")
        elif isinstance(choice, type) and issubclass(choice, Model):
            spelled.append("the path of a model")
        elif isinstance(choice, type):
            spelled.append(choice.__name__)
    return " or ".join(spelled) or str(hint)


def _nearest(name: str, choices: Iterable[str]) -> str:
    known_names = list(choices)
    lowered = {each.lower(): each for each in known_names}
    close = get_close_matches(name.lower(), lowered, 1)
    return f"; did you mean {lowered[close[0]]!r}?" if close else f" (known: {', '.join(known_names)})"


def _keys(value: Mapping[Any, Any]) -> str:
    return _short(list(value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
