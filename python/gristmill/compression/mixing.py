"""A model with some of its weights as another model has them."""

from collections.abc import Iterable

from gristmill.model import Model
from gristmill.tensor import Tensor


def with_weights_of(model: Model, other: Model, names: Iterable[str]) -> Model:
    """Return `model` with weights of `other`, and with what belongs to them: the bias that is added after each, and the
    attributes of the nodes that read it (the scale of its activations).

    Args:
        model: what is changed.
        other: a model of the same graph.
        names: weights that both have, of one shape.
    """
    wanted = set(names)
    nodes = {node.outputs: node for node in other.nodes}
    kept, tensors = [], {name: other.tensors[name] for name in wanted}
    for node in model.nodes:
        twin = nodes.get(node.outputs)
        if twin is None or twin.inputs != node.inputs or node.input(1) not in wanted:
            kept.append(node)
            continue
        kept.append(twin)
        tensors |= _biases(model, other, node.inputs[2:])
    return model.replace(nodes=tuple(kept), tensors=tensors)


def _biases(model: Model, other: Model, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of these names that both models have in one shape."""
    both = [name for name in names if name in model.tensors and name in other.tensors]
    return {name: other.tensors[name] for name in both if model.tensors[name].shape == other.tensors[name].shape}
