"""Post-training quantisation: int8 weights with a scale per output channel, int8 activations with a scale per row at run time."""

from dataclasses import dataclass

from gristmill.compression.recipe import Context, Pass, targets
from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.tensor import Quantized, Sparse, Tensor


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantise the weights of Linear nodes, dense and sparse.

    Weights that are int8 already stay, and so do sparse ones whose inputs are no multiple of four: no int8 kernel reads them.

    Args:
        precision: "int8".
        names: shell patterns of the weights to quantise; none for all.
        skip: shell patterns of weights to leave.

    Raises:
        ModelError: the precision is unknown.

    Example:
        >>> import gristmill as gm
        >>> model, _ = gm.compress(gm.zoo.mlp([64, 32]), [gm.Quantize("int8")])
        >>> model.tensors["layer0.weight"].kind
        'quantized'
    """

    precision: str = "int8"
    names: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.precision != "int8":
            raise ModelError(f"Quantize: unknown precision {self.precision!r}; this version has int8")

    def apply(self, model: Model, context: Context) -> Model:
        quantized: dict[str, Tensor] = {}
        for name in targets(model, self.names, self.skip):
            tensor = model.tensors[name]
            if tensor.kind == "dense":
                quantized[name] = Quantized.from_dense(tensor.dense(), context.threads)
            elif isinstance(tensor, Sparse) and tensor.scale is None and tensor.shape[1] % 4 == 0:
                quantized[name] = tensor.quantized(context.threads)
        return model.replace(tensors=quantized)
