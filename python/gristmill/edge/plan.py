"""How training will use its bytes, decided before any is allocated."""

from collections.abc import Mapping
from dataclasses import dataclass

from gristmill import _core
from gristmill.autodiff import gradient_name
from gristmill.errors import BudgetError
from gristmill.model import Model
from gristmill.ops import TensorType
from gristmill.optim import Optimizer
from gristmill.runtime.arena import ALIGN
from gristmill.runtime.plan import weight_view
from gristmill.runtime.session import Session
from gristmill.tensor.parts import Array

FLOAT = 4


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes that training takes beyond the model and the data.

    `micro_batch` examples go through the network at a time; where that is less than a batch, their gradients are accumulated.
    """

    micro_batch: int
    parameters: int
    gradients: int
    accumulator: int
    optimizer: int
    activations: int
    packed_weights: int
    staging: int

    @property
    def nbytes(self) -> int:
        """All of it."""
        return sum(value for name, value in vars(self).items() if name != "micro_batch")


def plan_memory(
    session: Session, trainable: Mapping[str, Array], optimizer: Optimizer, batch: int, budget: int | None
) -> MemoryPlan:
    """Choose the largest micro-batch that fits the budget.

    Args:
        session: over the gradient model, its trainable arrays standing in for the arena's slices.
        trainable: by tensor name, in the shapes that train.
        optimizer: whose state counts.
        batch: examples per update.
        budget: bytes, or None for no bound.

    Raises:
        BudgetError: not even one example at a time fits; `needed_bytes` says what would.
    """

    def with_micro_batch(micro: int) -> MemoryPlan:
        return _lay_out(session, trainable, optimizer, micro, batch)

    whole = with_micro_batch(batch)
    if budget is None or whole.nbytes <= budget:
        return whole
    best = with_micro_batch(1)
    if best.nbytes > budget:
        best = min(best, whole, key=lambda plan: plan.nbytes)  # a small batch may need less than an accumulator
        detail = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in vars(best).items() if name != "micro_batch")
        raise BudgetError(
            f"training needs at least {best.nbytes:,} bytes ({detail}), the budget is {budget:,}; "
            "raise memory=, or update less: update='bias' or 'last:1'",
            best.nbytes,
        )
    low, high = 1, batch
    while high - low > 1:
        middle = (low + high) // 2
        candidate = with_micro_batch(middle)
        if candidate.nbytes <= budget:
            low, best = middle, candidate
        else:
            high = middle
    return best


def input_types(model: Model, batch: int) -> dict[str, TensorType]:
    """The model's input types with every symbolic dimension set to `batch`."""
    return {
        name: TensorType(kind.dtype, tuple(batch if isinstance(dim, str) else dim for dim in kind.shape))
        for name, kind in model.inputs.items()
    }


def _lay_out(session: Session, trainable: Mapping[str, Array], optimizer: Optimizer, micro: int, batch: int) -> MemoryPlan:
    gradients = {gradient_name(name): array for name, array in trainable.items()}
    types = input_types(session.model, micro)
    layout = session.layout(types, gradients)
    tensors = session.weights.model.tensors
    size = flat_size(trainable)
    return MemoryPlan(
        micro_batch=micro,
        parameters=size * FLOAT,
        gradients=size * FLOAT,
        accumulator=size * FLOAT if micro < batch else 0,
        optimizer=sum(array.nbytes for array in optimizer.init(0).values()) + size * FLOAT * len(optimizer.init(0)),
        activations=layout.nbytes,
        packed_weights=sum(_core.packed_nbytes(p.pack, weight_view(tensors[p.name])) for p in layout.packs),
        staging=sum(kind.nbytes for kind in types.values()),
    )


def flat_size(trainable: Mapping[str, Array]) -> int:
    """Elements of the flat vector that holds all trainable arrays, each starting on a cache line."""
    return sum(padded(array.size) for array in trainable.values())


def padded(size: int) -> int:
    return -(-size // (ALIGN // FLOAT)) * (ALIGN // FLOAT)
