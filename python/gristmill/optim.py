"""Optimisers over flat float32 vectors, each one fused pass of a C kernel.

Shaped like optax's pairs: `init(size)` makes the state, a dict of arrays that the caller keeps and checkpoints; `update(...)`
changes parameters and state in place. An optimiser itself is an immutable description.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, asdict, dataclass
from math import isfinite, sqrt
from typing import Any

import numpy as np

from gristmill import _core
from gristmill.errors import ModelError
from gristmill.tensor.parts import Array

State = dict[str, Array]
Rate = float | Callable[[int], float]  # a schedule gives the rate of step 1, 2, ...


def _check(what: str, value: float, low: float, high: float = float("inf")) -> None:
    if not (isinstance(value, (int, float)) and isfinite(value) and low <= value < high):
        raise ModelError(f"{what} must lie in [{low}, {high}), got {value!r}")


@dataclass(frozen=True)
class Optimizer:
    """What all optimisers share.

    Args:
        learning_rate: a number, or a function of the step (from 1).
        weight_decay: L2 coefficient.
        clip_norm: scale the gradient down to this global norm where it is larger; None for never.

    Raises:
        ModelError: a coefficient lies outside its range.
    """

    learning_rate: Rate
    _: KW_ONLY  # so that what follows the rate is what it is in torch.optim: SGD(0.1, 0.9) has momentum 0.9
    weight_decay: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.learning_rate):
            _check("learning_rate", self.learning_rate, 0.0)
        _check("weight_decay", self.weight_decay, 0.0)
        if self.clip_norm is not None and not (isinstance(self.clip_norm, (int, float)) and self.clip_norm > 0):
            raise ModelError(f"clip_norm must be positive or None, got {self.clip_norm!r}")

    def init(self, size: int) -> State:
        """Return the state for `size` parameters."""
        return {}

    def rate(self, step: int) -> float:
        return float(self.learning_rate(step) if callable(self.learning_rate) else self.learning_rate)

    def clip(self, squares: float) -> float:
        """The factor that the gradient is multiplied by, from its sum of squares."""
        if self.clip_norm is None or squares <= self.clip_norm**2:
            return 1.0
        return self.clip_norm / sqrt(squares)

    def update(self, params: Array, grads: Array, state: State, step: int, squares: float = 0.0, threads: int = 1) -> None:
        """Change parameters and state in place.

        Args:
            params: float32 [size].
            grads: float32 [size].
            state: what `init` made.
            step: counts from 1.
            squares: the sum of squares of `grads`; needed for clipping only.
            threads: for the kernel.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return the settings, for provenance."""
        settings = {k: v if not callable(v) else getattr(v, "__name__", "schedule") for k, v in asdict(self).items()}
        return {"optimizer": type(self).__name__, **settings}


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent: theta <- theta - rate * gradient, with optional momentum (as torch.optim.SGD).

    Example:
        >>> import numpy as np
        >>> theta = np.ones(2, np.float32)
        >>> SGD(0.5).update(theta, np.ones(2, np.float32), {}, step=1)
        >>> theta.tolist()
        [0.5, 0.5]
    """

    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("momentum", self.momentum, 0.0, 1.0)

    def init(self, size: int) -> State:
        return {"velocity": np.zeros(size, np.float32)} if self.momentum else {}

    def update(self, params: Array, grads: Array, state: State, step: int, squares: float = 0.0, threads: int = 1) -> None:
        rate, clip = self.rate(step), self.clip(squares)
        if self.momentum:
            _core.momentum_step(
                params, grads, state["velocity"], rate, self.momentum, 0.0, self.nesterov, self.weight_decay, clip, threads
            )
        else:
            _core.sgd_step(params, grads, rate, self.weight_decay, clip, threads)


@dataclass(frozen=True)
class Momentum(SGD):
    """SGD with momentum 0.9 unless told otherwise (Polyak 1964; `nesterov=True` for Sutskever et al. 2013)."""

    momentum: float = 0.9


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam (Kingma & Ba 2015); weight decay is added to the gradient, as torch.optim.Adam does."""

    learning_rate: Rate = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("beta1", self.beta1, 0.0, 1.0)
        _check("beta2", self.beta2, 0.0, 1.0)
        _check("epsilon", self.epsilon, 0.0)

    def init(self, size: int) -> State:
        return {"first": np.zeros(size, np.float32), "second": np.zeros(size, np.float32)}

    def update(self, params: Array, grads: Array, state: State, step: int, squares: float = 0.0, threads: int = 1) -> None:
        _core.adam_step(
            params,
            grads,
            state["first"],
            state["second"],
            self.rate(step),
            self.beta1,
            self.beta2,
            self.epsilon,
            self.weight_decay,
            isinstance(self, AdamW),
            step,
            self.clip(squares),
            threads,
        )


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    _: KW_ONLY
    weight_decay: float = 0.01


def check_optimizer(value: Any) -> Optimizer:
    """Return an optimiser as it is.

    Raises:
        ModelError: it is something else.
    """
    if not isinstance(value, Optimizer):
        raise ModelError(f"an optimizer is an object such as Adam(1e-3) or SGD(0.1), got {value!r}")
    return value
