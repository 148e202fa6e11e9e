"""`max_drop`: put the most sensitive layers back to what they were until the metric has lost no more than it may."""

from collections.abc import Callable
from dataclasses import dataclass

from gristmill.compression.measure import Yardstick, output_errors
from gristmill.compression.mixing import with_weights_of
from gristmill.compression.quality import answers, drop_of
from gristmill.errors import DataError, ModelError
from gristmill.model import Model


@dataclass(frozen=True)
class Reverted:
    """What it took.

    Args:
        model: with the fewest layers put back, of those that were tried.
        names: of the weights that were put back, the most sensitive first.
        evaluations: how often the metric was measured: at most 2 + log2(n + 1) times for n changed weights.
        met: whether the drop is within bounds.
    """

    model: Model
    names: tuple[str, ...]
    evaluations: int
    met: bool


def check_drop(max_drop: float, metric: object) -> float:
    """Return the drop as a number.

    Raises:
        ModelError: it is no number from 0.
        DataError: there is no metric that could drop.
    """
    if isinstance(max_drop, bool) or not isinstance(max_drop, (int, float)) or not max_drop >= 0:
        raise ModelError(f"max_drop must be a number from 0, got {max_drop!r}")
    if metric is None:
        raise DataError("max_drop needs something to measure on: pass data=, with labels or without")
    return float(max_drop)


def revert(
    original: Model, compressed: Model, yardstick: Yardstick, max_drop: float, threads: int, drop: float | None = None
) -> Reverted:
    """Revert weights to the original's, with their biases and activation scales, most sensitive first.

    How sensitive a weight is says the error of the answers with that weight alone compressed, one run of a few examples each.
    How many must go is found by halving: with k weights reverted the drop is taken to be no less than with k + 1. What is
    returned was measured, so that the bound holds even where that is not so. Where not even all weights suffice, because other
    tensors were trained, these go back too, and the model is the original.

    Args:
        original, compressed: before and after the recipe.
        yardstick: with a metric.
        max_drop: that the metric may lose.
        threads: for kernels.
        drop: of the compressed model, where it is known.
    """
    spent = 0

    def lost(model: Model) -> float:
        nonlocal spent
        spent += 1
        return _drop(model, yardstick, threads)

    if (lost(compressed) if drop is None else drop) <= max_drop:
        return Reverted(compressed, (), spent, True)
    ranked = ranking(original, compressed, yardstick, threads)
    names, model = _fewest(ranked, lambda some: with_weights_of(compressed, original, some), lambda made: lost(made) <= max_drop)
    if model is not None:
        return Reverted(model, names, spent, True)
    if _alike(original, compressed):
        return Reverted(original.replace(meta=compressed.meta), tuple(ranked), spent, True)
    return Reverted(compressed, (), spent, False)


def _fewest(
    ranked: list[str], made: Callable[[list[str]], Model], fits: Callable[[Model], bool]
) -> tuple[tuple[str, ...], Model | None]:
    """Return the shortest head of a ranking that fits, and its model; None where not even the whole does."""
    few, best = 0, None
    many = len(ranked) + 1
    while many - few > 1:
        middle = (few + many) // 2
        model = made(ranked[:middle])
        if fits(model):
            many, best = middle, model
        else:
            few = middle
    return tuple(ranked[:many]), best


def _alike(original: Model, compressed: Model) -> bool:
    """Whether a recipe left the graph and all shapes as they were, so that everything can go back."""
    shapes = [{name: tensor.shape for name, tensor in model.tensors.items()} for model in (original, compressed)]
    return shapes[0] == shapes[1] and [n.outputs for n in original.nodes] == [n.outputs for n in compressed.nodes]


def ranking(original: Model, compressed: Model, yardstick: Yardstick, threads: int) -> list[str]:
    """Return the weights that a recipe changed and that can go back, the most sensitive first."""
    changed = [
        name
        for name, tensor in original.tensors.items()
        if name in compressed.tensors
        and compressed.tensors[name] is not tensor
        and compressed.tensors[name].shape == tensor.shape
        and (name in original.weights or compressed.tensors[name].kind != tensor.kind)
    ]
    errors = output_errors(original, compressed, changed, yardstick, threads)
    return sorted(changed, key=lambda name: -errors.get(name, 0.0))


def _drop(model: Model, yardstick: Yardstick, threads: int) -> float:
    figure = yardstick.figure(answers(model, yardstick.examples, threads))
    first = yardstick.figure(yardstick.answers)
    assert figure is not None
    assert first is not None
    found = drop_of(yardstick.metric, first.value, figure.value)
    assert found is not None
    return found
