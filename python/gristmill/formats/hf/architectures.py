"""config.json and the tensors' names of each architecture, in the terms of `zoo.bert`."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from gristmill.errors import FormatError
from gristmill.formats.compressed_tensors.codes import DTYPES
from gristmill.formats.compressed_tensors.layers import assemble
from gristmill.formats.compressed_tensors.scheme import read_scheme
from gristmill.formats.compressed_tensors.weight import Weight
from gristmill.formats.folder import Fields, Folder, widened
from gristmill.formats.hf.sentence import Modules
from gristmill.tensor import Dense, Tensor
from gristmill.tensor.parts import Array
from gristmill.zoo.bert import Encoder, Projection

Stored = Array | Weight  # a tensor of the file: as it is, or compressed

LARGEST = 2**31 - 1
LAYERS = 1024
ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "relu": "relu", "silu": "silu", "swish": "silu", "tanh": "tanh", "sigmoid": "sigmoid",
}  # fmt: skip
# What checkpoints hold beside the encoder: buffers, and the heads of pretraining.
UNUSED = (
    "embeddings.position_ids",
    "embeddings.token_type_ids",
    "pooler.",
    "cls.",
    "lm_head.",
    "vocab_",
    "classifier.",
    "qa_outputs.",
)


@dataclass(frozen=True)
class Found:
    """An encoder as a folder describes it.

    Args:
        longest: the greatest number of tokens that it takes.
        compression: how its weights were compressed, in JSON's terms; None if they were not.
    """

    architecture: str
    shape: Encoder
    tensors: dict[str, Tensor]
    longest: int
    compression: dict[str, Any] | None = None


@dataclass(frozen=True)
class Family:
    """How an architecture writes things.

    Args:
        keys: the fields of config.json by field of Encoder.
        prefix: of the tensors' names, in models with a head.
        renamed: parts of the tensors' names, and what BERT calls them.
        classifier: the layers of its head that classifies sequences, and their activations.
        epsilon: where the configuration has none.
        counts_padding: False where places are counted without padding tokens.
        typed: whether there may be a table of token types.
    """

    keys: dict[str, str]
    prefix: str
    classifier: tuple[tuple[str, str | None], ...]
    renamed: tuple[tuple[str, str], ...] = ()
    counts_padding: bool = True
    typed: bool = True


KEYS = {
    "layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads", "intermediate": "intermediate_size",
    "vocabulary": "vocab_size", "positions": "max_position_embeddings", "activation": "hidden_act",
}  # fmt: skip
DISTILLED = {
    **KEYS, "layers": "n_layers", "hidden": "dim", "heads": "n_heads", "intermediate": "hidden_dim", "activation": "activation",
}  # fmt: skip
DISTILLED_NAMES = (
    ("transformer.layer.", "encoder.layer."), ("attention.q_lin.", "attention.self.query."),
    ("attention.k_lin.", "attention.self.key."),
    ("attention.v_lin.", "attention.self.value."), ("attention.out_lin.", "attention.output.dense."),
    ("sa_layer_norm.", "attention.output.LayerNorm."), ("ffn.lin1.", "intermediate.dense."), ("ffn.lin2.", "output.dense."),
    ("output_layer_norm.", "output.LayerNorm."),
)  # fmt: skip
ROBERTA = Family(KEYS, "roberta.", (("classifier.dense", "tanh"), ("classifier.out_proj", None)), counts_padding=False)
FAMILIES = {
    "bert": Family(KEYS, "bert.", (("pooler.dense", "tanh"), ("classifier", None))),
    "distilbert": Family(
        DISTILLED, "distilbert.", (("pre_classifier", "relu"), ("classifier", None)), DISTILLED_NAMES, typed=False
    ),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
}
# The end of the class name in `architectures`: what is on top of the encoder.
HEADS: dict[str, Callable[[Family], tuple[str | None, tuple[tuple[str, str | None], ...]]]] = {
    "Model": lambda family: (None, ()),
    "ForMaskedLM": lambda family: (None, ()),
    "ForPreTraining": lambda family: (None, ()),
    "ForSequenceClassification": lambda family: ("first", family.classifier),
    "ForTokenClassification": lambda family: (None, (("classifier", None),)),
    "ForQuestionAnswering": lambda family: (None, (("qa_outputs", None),)),
}


def read_encoder(folder: Folder, modules: Modules | None) -> Found:
    """Read config.json and the tensors that it calls for.

    Args:
        folder: of the transformer.
        modules: what a sentence-transformers folder puts on top; None where it is none.

    Raises:
        FormatError: the configuration is out of range, or the tensors do not fit it: all of them are named.
    """
    if not folder.has("config.json"):
        raise FormatError("it is a folder without a config.json, and so no Hugging Face model")
    config = folder.fields("config.json")
    architecture = config.values.get("model_type")
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise FormatError(f"config.json: model_type {str(architecture)[:80]!r} is not known; known: {', '.join(FAMILIES)}")
    family = FAMILIES[architecture]
    shape = _shape(config, family)
    stored, compression = _stored(folder, config)
    stored = _renamed(stored, family)
    if modules is None:
        shape = _with_head(shape, config, family, stored)
    else:
        shape = replace(
            shape,
            pooling=modules.pooling,
            projections=modules.projections,
            normalize=modules.normalize,
            output="sentence_embedding",
        )
        stored |= modules.arrays
    tensors = _matched(shape, stored)
    longest = shape.positions - (0 if shape.padding is None else shape.padding + 1)
    if compression is not None:
        compression["expanded"] = _expanded(shape, stored)
    return Found(architecture, shape, tensors, longest, compression)


def _stored(folder: Folder, config: Fields) -> tuple[dict[str, Stored], dict[str, Any] | None]:
    """Return the tensors of a folder, and how they were compressed, or None."""
    scheme = read_scheme(config.values)
    if scheme is None:
        return dict(folder.tensors()), None
    if scheme.transformed:
        raise FormatError(
            "config.json: transform_config: layers that rotate their inputs are not supported; "
            "gristmill.formats.compressed_tensors.read gives the weights"
        )
    return assemble(folder.tensors(DTYPES), scheme), scheme.described()


def _expanded(shape: Encoder, stored: dict[str, Stored]) -> dict[str, int]:
    """Count the compressed weights that became float32, by what kept them from staying as they were."""
    weights = (stored[name] for name in shape.tensors())
    return dict(Counter(weight.obstacle for weight in weights if isinstance(weight, Weight) and weight.obstacle is not None))


def _shape(config: Fields, family: Family) -> Encoder:
    if config.flag("is_decoder") or config.flag("add_cross_attention"):
        raise FormatError("config.json: decoders are not supported")
    config.choice("position_embedding_type", {"absolute": 0}, "absolute")

    def size(name: str) -> int:
        return config.integer(family.keys[name], 1, LARGEST)

    shape = Encoder(
        layers=config.integer(family.keys["layers"], 1, LAYERS),
        hidden=size("hidden"),
        heads=size("heads"),
        intermediate=size("intermediate"),
        vocabulary=size("vocabulary"),
        positions=size("positions"),
        types=config.integer("type_vocab_size", 0, LARGEST, 2) if family.typed else 0,
        activation=config.choice(family.keys["activation"], ACTIVATIONS, "gelu"),
        epsilon=config.number("layer_norm_eps", 0.0, 1.0, 1e-12),
        padding=None if family.counts_padding else config.integer("pad_token_id", 0, LARGEST, 1),
        pooling=None,
        normalize=False,
        output="last_hidden_state",
    )
    if shape.hidden % shape.heads:
        raise FormatError(f"config.json: the width {shape.hidden} is not a multiple of the number of heads, {shape.heads}")
    if shape.padding is not None and shape.padding + 1 >= shape.positions:
        raise FormatError(f"config.json: pad_token_id {shape.padding} leaves no place of {shape.positions} for a token")
    return shape


def _with_head(shape: Encoder, config: Fields, family: Family, stored: dict[str, Stored]) -> Encoder:
    """Add the task's head that `architectures` names."""
    named = config.values.get("architectures") or ["Model"]
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise config.fault("architectures", "a list of names")
    head = next((end for end in HEADS if named[0].endswith(end)), None)
    if head is None:
        raise FormatError(
            f"config.json: the head of {named[0][:80]!r} is not known; known are names that end in {', '.join(HEADS)}"
        )
    pooling, layers = HEADS[head](family)
    projections = []
    for name, activation in layers:
        weight = stored.get(f"{name}.weight")
        outputs = weight.shape[0] if weight is not None and weight.ndim == 2 else 1  # what is wrong is named with all else
        projections.append(Projection(name, outputs, activation))
    output = "logits" if layers else shape.output
    return replace(shape, pooling=pooling, projections=tuple(projections), output=output)


def _renamed(arrays: dict[str, Stored], family: Family) -> dict[str, Stored]:
    """Return tensors by BERT's names."""
    made: dict[str, Stored] = {}
    for original, array in arrays.items():
        name = original.removeprefix(family.prefix)
        for old, new in (*family.renamed, ("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
            name = name.replace(old, new)
        if name in made:
            raise FormatError(f"tensor '{original}' has the same meaning as another one")
        made[name] = array
    return made


def _matched(shape: Encoder, stored: dict[str, Stored]) -> dict[str, Tensor]:
    """Return the tensors that an encoder takes: float32, or as they were compressed."""
    wanted = shape.tensors()
    faults = list(_faults(wanted, stored))
    if faults:
        rest = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise FormatError(f"the tensors do not fit config.json: {'; '.join(faults[:20])}{rest}")
    return {name: _tensor(name, stored[name]) for name in wanted}


def _tensor(name: str, stored: Stored) -> Tensor:
    return stored.tensor() if isinstance(stored, Weight) else Dense(widened(name, stored))


def _faults(wanted: dict[str, tuple[int, ...]], stored: dict[str, Stored]) -> Iterator[str]:
    for name, size in wanted.items():
        if name not in stored:
            yield f"'{name}' {list(size)} is missing"
        elif stored[name].shape != size:
            yield f"'{name}' is {list(stored[name].shape)} but must be {list(size)}"
    for name in stored.keys() - wanted.keys():
        if not name.startswith(UNUSED):
            yield f"'{name}' {list(stored[name].shape)} has no place in it"
