"""How much each weight alone costs: one after the other is compressed, all others as they were."""

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gristmill.compression.examples import checked
from gristmill.compression.measure import Yardstick
from gristmill.compression.mixing import with_weights_of
from gristmill.compression.provenance import check_finite_weights, data_checksum, model_checksum
from gristmill.compression.prune import Prune
from gristmill.compression.quality import answers, check_metric, drop_of, error_of, sample
from gristmill.compression.quantize import Quantize
from gristmill.compression.recipe import Context, Pass
from gristmill.compression.recipe_file import described
from gristmill.compression.watching import watched
from gristmill.errors import FormatError, ModelError
from gristmill.formats.atomic import check_folder, replacing
from gristmill.metrics import Metric, name_of
from gristmill.model import Model, check_model
from gristmill.runtime.threads import check_threads

PASSES: tuple[Pass, ...] = (Prune(0.5), Prune(0.8), Quantize("int8"))
VERSION = 1
LIMIT = 1 << 26  # bytes of a state


@dataclass(frozen=True)
class Trial:
    """One weight under one pass, all other weights as they were.

    Args:
        weight: its name.
        setting: the pass in short, such as "Prune 0.8 1x4".
        error: |y - y0| / |y0| of the answers; None where the pass does not fit the weight.
        drop: by how much the metric got worse; None without one.
        bytes_before, bytes_after: of the weight as stored.
        seconds: that it took.
    """

    weight: str
    setting: str
    error: float | None
    drop: float | None
    bytes_before: int
    bytes_after: int
    seconds: float


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` found. Print it for a table; `as_dict()` is JSON-compatible.

    Args:
        trials: by weight, then by setting.
        metric: whose drop was measured; "" for none.
    """

    trials: tuple[Trial, ...]
    metric: str

    @property
    def weights(self) -> tuple[str, ...]:
        """The weights in the order of the model."""
        return tuple(dict.fromkeys(trial.weight for trial in self.trials))

    @property
    def settings(self) -> tuple[str, ...]:
        """The passes that were tried."""
        return tuple(dict.fromkeys(trial.setting for trial in self.trials))

    def ranking(self, setting: str | None = None) -> tuple[str, ...]:
        """Return the weights that a setting fits, the most sensitive first: by the drop of the metric, where that is equal by the
        error. Without a setting, by the sum of errors over all that fit.

        Raises:
            ModelError: that setting was not tried.
        """
        if setting is not None and setting not in self.settings:
            raise ModelError(f"setting {setting!r} was not tried; known: {', '.join(self.settings)}")
        costs: dict[str, tuple[float, float]] = {}
        for trial in self.trials:
            if trial.error is not None and setting in (None, trial.setting):
                drop, error = costs.get(trial.weight, (0.0, 0.0))
                costs[trial.weight] = drop + (trial.drop or 0.0), error + trial.error
        if setting is None:
            return tuple(sorted(costs, key=lambda name: -costs[name][1]))
        return tuple(sorted(costs, key=lambda name: (-costs[name][0], -costs[name][1])))

    def as_dict(self) -> dict[str, Any]:
        """Return all figures as values that JSON has."""
        return {
            "metric": self.metric,
            "trials": [asdict(trial) for trial in self.trials],
            "ranking": {setting: list(self.ranking(setting)) for setting in self.settings},
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the figures as JSON, whole or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.as_dict(), indent=1) + "\n", "utf-8")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the error of every weight under every setting into a PNG file.

        Raises:
            MissingExtraError: matplotlib, of the extra "compress", is not installed.
        """
        from gristmill.compression.plot import plot_sensitivity

        plot_sensitivity(self.as_dict(), Path(path))

    def table(self) -> list[list[str]]:
        """Return rows of cells, the most sensitive weight first: the error, and the drop of the metric where it was measured."""
        found = {(trial.weight, trial.setting): trial for trial in self.trials}
        ranked = self.ranking()
        rows = [["rank", "weight", *self.settings]]
        for rank, name in enumerate([*ranked, *(name for name in self.weights if name not in ranked)], 1):
            rows.append([str(rank), name, *(_cell(found[name, setting]) for setting in self.settings)])
        return rows

    def __str__(self) -> str:
        rows = self.table()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines)


def _cell(trial: Trial) -> str:
    if trial.error is None:
        return "-"
    return f"{trial.error:.4f}" + ("" if trial.drop is None else f" ({trial.drop:+.4f})")


def sensitivity(
    model: Model,
    data: Any = None,
    passes: Sequence[Pass] = PASSES,
    *,
    metric: str | Metric | None = None,
    state: str | os.PathLike[str] | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """Compress one weight after the other, all others left as they are, and measure what that does to the answers.

    Costs one run over the data for each weight and pass; the model is compiled anew for each.

    Args:
        model: what to look at.
        data: as for `compress`; random inputs without, which tell less.
        passes: what to try, each by itself.
        metric: as for `compress`; the drop is measured beside the error where there is a metric.
        state: a file that keeps what was measured; the same call goes on from there after a kill.
        seed, threads, progress: as for `compress`.

    Raises:
        ModelError: a pass works on a whole model and not on one weight, or none fits; or `state` is of another call.
        DataError: the data do not fit the model.

    Example:
        >>> import gristmill as gm
        >>> found = gm.sensitivity(gm.zoo.mlp([16, 32, 8]), passes=[gm.Prune(0.5), gm.Quantize("int8")])
        >>> [trial.setting for trial in found.trials]
        ['Prune 0.5 1x4', 'Quantize int8', 'Prune 0.5 1x4', 'Quantize int8']
    """
    check_model(model)
    if not isinstance(passes, Sequence) or not passes or not all(isinstance(step, Pass) for step in passes):
        raise ModelError(f"sensitivity tries a list of passes such as [Prune(0.8), Quantize()], got {passes!r}")
    check_finite_weights(model)
    examples = None if data is None else checked("data", model, data)
    metric = check_metric(metric, examples)
    context = Context(model, examples, seed, check_threads(threads), False)
    few = sample(model, examples)
    yardstick = Yardstick(model, few, metric, answers(model, few, context.threads))
    told = "" if metric is None else name_of(metric)
    identity: dict[str, Any] = {
        "passes": [described(step) for step in passes],
        "model": model_checksum(model),
        "data": None if examples is None else data_checksum(tuple(examples)),
        "metric": told,
        "seed": seed,
    }
    known = _read(Path(state), identity) if state is not None else {}
    plan = _plan(model, passes)
    for name, label, step in watched(plan, "measuring", progress):
        if (name, label) not in known:
            known[name, label] = _tried(model, step, name, label, yardstick, context)
            if state is not None:
                _write(Path(state), identity, known.values())
    return Sensitivity(tuple(known[name, label] for name, label, _ in plan), told)


def _plan(model: Model, passes: Sequence[Pass]) -> list[tuple[str, str, Pass | None]]:
    """Return what to try: a weight, the name of the pass, and the pass where it fits the weight."""
    fits = [set(step.works_on(model)) for step in passes]
    labels = [short(step) for step in passes]
    if len(set(labels)) < len(labels):
        labels = [f"{label} ({position})" for position, label in enumerate(labels, 1)]
    names = [name for name in model.tensors if any(name in chosen for chosen in fits) or name in model.weights]
    order = {name: position for position, name in enumerate(model.weights)}
    names.sort(key=lambda name: order.get(name, -1))
    return [
        (name, label, step.restricted(name) if name in chosen else None)
        for name in names
        for step, label, chosen in zip(passes, labels, fits, strict=True)
    ]


def short(step: Pass) -> str:
    """Return a pass in a few words: its class, and its settings but those that are as they are by default.

    Example:
        >>> short(Prune(0.8))
        'Prune 0.8 1x4'
    """
    if isinstance(step, Prune):
        sparsity = dict(step.sparsity) if isinstance(step.sparsity, tuple) else step.sparsity
        return " ".join(map(str, ("Prune", sparsity or "", step.pattern, *_unusual(step)))).replace("  ", " ")
    if isinstance(step, Quantize):
        return " ".join(("Quantize", step.precision, *_unusual(step)))
    return " ".join((type(step).__name__, *_unusual(step)))


def _unusual(step: Pass) -> list[str]:
    """The settings that differ from their defaults and that the name of the pass does not hold, as texts."""
    from dataclasses import MISSING, fields

    told = {"sparsity", "pattern", "precision", "names", "skip"}
    return [
        f"{field.name}={getattr(step, field.name)}"
        for field in fields(step)
        if field.name not in told and field.default is not MISSING and _differs(getattr(step, field.name), field.default)
    ]


def _differs(value: Any, default: Any) -> bool:
    return isinstance(value, (str, int, float, bool)) and value != default


def _tried(model: Model, step: Pass | None, name: str, label: str, yardstick: Yardstick, context: Context) -> Trial:
    begin, before = time.perf_counter(), model.tensors[name]
    if step is None:
        return Trial(name, label, None, None, before.nbytes, before.nbytes, 0.0)
    made = step.apply(model, context)
    given = answers(with_weights_of(model, made, [name]), yardstick.examples, context.threads)
    figure, first = yardstick.figure(given), yardstick.figure(yardstick.answers)
    drop = drop_of(yardstick.metric, first and first.value, figure and figure.value)
    seconds = time.perf_counter() - begin
    return Trial(name, label, error_of(given, yardstick.answers), drop, before.nbytes, made.tensors[name].nbytes, seconds)


def _read(path: Path, identity: dict[str, Any]) -> dict[tuple[str, str], Trial]:
    """Return the trials of a state; none where there is no file yet.

    Raises:
        ModelError: it is of another call.
        FormatError: it is damaged.
    """
    check_folder(path)
    if not path.exists():
        return {}
    try:
        if path.stat().st_size > LIMIT:
            raise ValueError("it is too long")
        found = json.loads(path.read_text("utf-8"))
        if found["version"] != VERSION:
            raise ValueError(f"version {found['version']!r}")
        trials = [Trial(**trial) for trial in found["trials"]]
        before = found["identity"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} is no state of sensitivity: {error}; remove it to start anew") from error
    differences = [name for name, value in json.loads(json.dumps(identity)).items() if before.get(name) != value]
    if differences:
        raise ModelError(
            f"{path} holds the state of another call, which differs in {', '.join(differences)}: "
            "give the same again, another file, or remove it to start anew"
        )
    return {(trial.weight, trial.setting): trial for trial in trials}


def _write(path: Path, identity: dict[str, Any], trials: Iterable[Trial]) -> None:
    description = {"version": VERSION, "identity": identity, "trials": [asdict(trial) for trial in trials]}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(description), "utf-8")
