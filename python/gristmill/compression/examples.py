"""What `compress` is given to calibrate, train and measure on: checked, and in one form whatever it came as."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from gristmill import losses
from gristmill.errors import DataError
from gristmill.model import Model
from gristmill.runtime.packing import PLACES
from gristmill.tensor.parts import Array
from gristmill.text import Tokenizer, check_sentences
from gristmill.training.data import as_array, check_finite, convert
from gristmill.zoo.bert import IDS, MASK, TYPES

KEYS = (losses.LABELS, losses.TARGET)


class Examples(NamedTuple):
    """Inputs and what is wanted for them.

    Args:
        inputs: for a model of one input an array [examples, ...], else such arrays by input name; of the model's dtypes.
        target: labels or targets [examples, ...], or None.
    """

    inputs: Array | Mapping[str, Array]
    target: Array | None

    def by_name(self, model: Model) -> dict[str, Array]:
        """The inputs by name."""
        return dict(self.inputs) if isinstance(self.inputs, Mapping) else {next(iter(model.inputs)): self.inputs}

    @property
    def number(self) -> int:
        """How many examples there are."""
        return len(next(iter(self.inputs.values())) if isinstance(self.inputs, Mapping) else self.inputs)

    def first(self, count: int) -> "Examples":
        """The first examples, at most `count`."""
        inputs = self.inputs
        cut = {name: array[:count] for name, array in inputs.items()} if isinstance(inputs, Mapping) else inputs[:count]
        return Examples(cut, None if self.target is None else self.target[:count])

    def batches(self, model: Model, size: int) -> Iterator[dict[str, Array]]:
        """Yield the inputs by name, `size` examples at a time."""
        named = self.by_name(model)
        for start in range(0, self.number, size):
            yield {name: np.ascontiguousarray(array[start : start + size]) for name, array in named.items()}


def checked(what: str, model: Model, data: Any) -> Examples:
    """Return data in the form that passes take.

    Args:
        what: the name of the argument, for errors.
        model: whose inputs they are.
        data: inputs alone, or (inputs, target). Inputs are an array for a model of one input; arrays by input name, with `labels`
            or `target` among them or not; a tuple of arrays in the order of `model.inputs`; a list of sentences for a model with
            a tokenizer; or an iterable of batches, each one of these but sentences. Batches of token ids of different lengths are
            padded, for which the model must take an attention mask.

    Raises:
        DataError: they are none of these, do not fit the model, are empty or not finite.
    """
    inputs, target = _split(what, model, data)
    named = {name: convert(name, array, model.inputs[name]) for name, array in _named(what, model, inputs).items()}
    missing = sorted(model.inputs.keys() - named.keys())
    if missing:
        raise DataError(f"{what} must hold every input of the model; missing: {', '.join(missing)}")
    _check_shapes(what, model, named)
    for name, array in named.items():
        check_finite(name, array)
    counts = {name: len(array) for name, array in named.items()}
    if target is not None:
        target = as_array("target", target)
        if target.dtype.kind not in "biuf" or target.ndim == 0:
            raise DataError(f"{what}: labels must be numbers, one row for each example; got {target.dtype} {target.shape}")
        check_finite("target", target)
        counts["labels"] = len(target)
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise DataError(f"{what} must have the same number of examples, at least one, in every array; got {counts}")
    return Examples(named if len(named) > 1 else next(iter(named.values())), target)


def _split(what: str, model: Model, data: Any) -> tuple[Any, Any]:
    """Tell inputs and target apart."""
    if isinstance(data, Mapping):
        keys = [key for key in KEYS if key in data and key not in model.inputs]
        if len(keys) > 1:
            raise DataError(f"{what} holds both {' and '.join(keys)}; leave one out")
        return {name: value for name, value in data.items() if name not in keys}, data[keys[0]] if keys else None
    if not isinstance(data, tuple):
        return data, None
    several = len(model.inputs) > 1
    if several and len(data) == len(model.inputs) and all(isinstance(part, np.ndarray) for part in data):
        return data, None
    if len(data) != 2:
        raise DataError(f"{what} must be x or (x, labels), got a tuple of {len(data)}")
    return data


def _named(what: str, model: Model, inputs: Any) -> dict[str, Any]:
    """Give each input its name."""
    if isinstance(inputs, Mapping):
        unknown = sorted(map(str, inputs.keys() - model.inputs.keys()))
        if unknown:
            raise DataError(f"{what} holds {', '.join(unknown)}, but the model takes {', '.join(model.inputs)}")
        return dict(inputs)
    if isinstance(inputs, tuple):
        if len(inputs) != len(model.inputs):
            raise DataError(f"{what}: a tuple must hold the inputs {', '.join(model.inputs)}, got {len(inputs)} arrays")
        return dict(zip(model.inputs, inputs, strict=True))
    if isinstance(inputs, list) and inputs and isinstance(inputs[0], str):
        return tokenized(what, model, inputs)
    if _are_batches(inputs):
        return _joined(what, model, inputs)
    if len(model.inputs) > 1:
        wanted = ", ".join(f"{name}: {kind}" for name, kind in model.inputs.items())
        raise DataError(f"{what}: this model takes several inputs; give arrays by name, {{{wanted}}}")
    name = next(iter(model.inputs))
    array = as_array("x", inputs)
    if array.dtype.kind not in "biuf" or array.ndim == 0 or len(array) == 0:
        raise DataError(f"{what} must be x or the tuple (x, labels), x numbers [examples, ...]; got {array.dtype} {array.shape}")
    return {name: array}


def _are_batches(inputs: Any) -> bool:
    """Whether inputs come in parts: a list of mappings or tuples, or an iterable that is no array and no text."""
    if isinstance(inputs, list):
        return bool(inputs) and isinstance(inputs[0], (Mapping, tuple))
    plain = isinstance(inputs, (np.ndarray, str, bytes)) or hasattr(inputs, "__array__")
    return isinstance(inputs, Iterable) and not plain


def _joined(what: str, model: Model, batches: Iterable[Any]) -> dict[str, Any]:
    """Put batches one after the other."""
    named = [{name: as_array(name, array) for name, array in _named(what, model, batch).items()} for batch in batches]
    if not named:
        raise DataError(f"{what}: there are no batches")
    if any(batch.keys() != named[0].keys() for batch in named):
        raise DataError(f"{what}: every batch must hold the same inputs")
    joined = {}
    for name in named[0]:
        arrays = [batch[name] for batch in named]
        if MASK in model.inputs and all(array.ndim == 2 for array in arrays):
            longest = max(array.shape[1] for array in arrays)
            arrays = [np.pad(array, ((0, 0), (0, longest - array.shape[1]))) for array in arrays]
        if any(array.ndim == 0 or array.shape[1:] != arrays[0].shape[1:] for array in arrays):
            raise DataError(
                f"{what}: batches of '{name}' differ beyond their first axis: {[array.shape for array in arrays][:4]}"
            )
        joined[name] = np.concatenate(arrays)
    return joined


def tokenized(what: str, model: Model, sentences: list[str]) -> dict[str, Array]:
    """Return sentences as the token ids that the model takes, padded to the longest.

    Raises:
        DataError: the model has no tokenizer.
        ModelError: one of them is no string.
    """
    spec = model.meta.get("tokenizer")
    if not isinstance(spec, Mapping) or IDS not in model.inputs:
        raise DataError(f"{what}: sentences are for a model with a tokenizer; gm.load of a Hugging Face folder brings one")
    tokens = Tokenizer(spec)(check_sentences(sentences))
    longest = max(1, *(len(ids) for ids, _ in tokens))
    made = {name: np.zeros((len(tokens), longest), np.int64) for name in (IDS, MASK, TYPES, PLACES)}
    made[PLACES][:] = np.arange(longest)
    for row, (ids, types) in enumerate(tokens):
        made[IDS][row, : len(ids)], made[TYPES][row, : len(ids)], made[MASK][row, : len(ids)] = ids, types, 1
    return {name: array for name, array in made.items() if name in model.inputs}


def _check_shapes(what: str, model: Model, named: Mapping[str, Array]) -> None:
    symbols: dict[str, int] = {}
    for name, array in named.items():
        kind = model.inputs[name]
        fits = array.ndim == len(kind.shape) and all(
            have == (symbols.setdefault(want, have) if isinstance(want, str) else want)
            for have, want in zip(array.shape[1:], kind.shape[1:], strict=True)
        )
        if not fits:
            raise DataError(f"{what}: '{name}' has shape {array.shape}, the model takes {kind}")
