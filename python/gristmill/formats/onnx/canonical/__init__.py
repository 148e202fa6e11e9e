"""Imported graphs in the operators that kernels serve: what exporters spell out is one node again.

`canonical` is a fixed list of passes, each a function from a model to an equal model, over the vocabulary of `graph`, `facts` (symbolic
shapes), `arrangement` (views) and `masks`. A pass that does not recognise something leaves it as it is.
"""

from gristmill.formats.onnx.canonical.activations import activations
from gristmill.formats.onnx.canonical.attention import attentions
from gristmill.formats.onnx.canonical.convolution import normalized_convolutions, padded_windows
from gristmill.formats.onnx.canonical.fold import fold, share
from gristmill.formats.onnx.canonical.linear import biases, products
from gristmill.formats.onnx.canonical.norms import normalizations, shifts
from gristmill.formats.onnx.canonical.pooling import means, unit_vectors
from gristmill.formats.onnx.canonical.quantized import dequantize_constants, drop_repeats, quantized_products
from gristmill.formats.onnx.canonical.split import split_products
from gristmill.formats.onnx.canonical.views import cancel_views, lift_views
from gristmill.model import Model

__all__ = ["PASSES", "canonical"]

PASSES = (
    fold,
    share,
    activations,
    normalizations,
    shifts,
    padded_windows,
    normalized_convolutions,
    drop_repeats,
    quantized_products,
    dequantize_constants,
    products,
    biases,
    lift_views,
    cancel_views,
    split_products,
    attentions,
    cancel_views,
    lift_views,
    cancel_views,
    means,
    unit_vectors,
    fold,
    share,
)


def canonical(model: Model) -> Model:
    """Return an equal model, results rounded in another order, in as few and as fast operators as its graph admits."""
    for each in PASSES:
        model = each(model)
    return model
