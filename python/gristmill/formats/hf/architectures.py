"""config.json and the tensors' names of each architecture, in the terms of `zoo.bert`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from gristmill.errors import FormatError
from gristmill.formats.hf.files import Fields, Folder, widened
from gristmill.formats.hf.sentence import Modules
from gristmill.tensor.parts import Array
from gristmill.zoo.bert import Encoder, Projection

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
    """An encoder as a folder describes it; `longest` is the greatest number of tokens that it takes."""

    architecture: str
    shape: Encoder
    arrays: dict[str, Array]
    longest: int


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
    ("transformer.layer.", "encoder.layer."), ("attention.q_lin.", "attention.self.query."), ("attention.k_lin.", "attention.self.key."),
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
        raise FileNotFoundError(f"there is no config.json in {folder.path}: it is no Hugging Face model folder")
    config = folder.fields("config.json")
    architecture = config.values.get("model_type")
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise FormatError(f"config.json: model_type {str(architecture)[:80]!r} is not known; known: {', '.join(FAMILIES)}")
    family = FAMILIES[architecture]
    shape = _shape(config, family)
    stored = _renamed(folder.tensors(), family)
    if modules is None:
        shape = _with_head(shape, config, family, stored)
    else:
        on_top = {"pooling": modules.pooling, "projections": modules.projections, "normalize": modules.normalize}
        shape = replace(shape, **on_top, output="sentence_embedding")
        stored |= modules.arrays
    arrays = _matched(shape, stored)
    longest = shape.positions - (0 if shape.padding is None else shape.padding + 1)
    return Found(architecture, shape, arrays, longest)


def _shape(config: Fields, family: Family) -> Encoder:
    if config.flag("is_decoder") or config.flag("add_cross_attention"):
        raise FormatError("config.json: decoders are not supported")
    config.choice("position_embedding_type", {"absolute": 0}, "absolute")
    sizes = {name: config.integer(family.keys[name], 1, LARGEST) for name in KEYS if name not in ("layers", "activation")}
    shape = Encoder(
        layers=config.integer(family.keys["layers"], 1, LAYERS),
        **sizes,
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


def _with_head(shape: Encoder, config: Fields, family: Family, stored: dict[str, Array]) -> Encoder:
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


def _renamed(arrays: dict[str, Array], family: Family) -> dict[str, Array]:
    """Return tensors by BERT's names."""
    made: dict[str, Array] = {}
    for original, array in arrays.items():
        name = original.removeprefix(family.prefix)
        for old, new in (*family.renamed, ("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
            name = name.replace(old, new)
        if name in made:
            raise FormatError(f"tensor '{original}' has the same meaning as another one")
        made[name] = array
    return made


def _matched(shape: Encoder, stored: dict[str, Array]) -> dict[str, Array]:
    """Return the tensors that an encoder takes, as float32."""
    wanted = shape.tensors()
    faults = list(_faults(wanted, stored))
    if faults:
        rest = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise FormatError(f"the tensors do not fit config.json: {'; '.join(faults[:20])}{rest}")
    return {name: widened(name, stored[name]) for name in wanted}


def _faults(wanted: dict[str, tuple[int, ...]], stored: dict[str, Array]) -> Iterator[str]:
    for name, size in wanted.items():
        if name not in stored:
            yield f"'{name}' {list(size)} is missing"
        elif stored[name].shape != size:
            yield f"'{name}' is {list(stored[name].shape)} but must be {list(size)}"
    for name in stored.keys() - wanted.keys():
        if not name.startswith(UNUSED):
            yield f"'{name}' {list(stored[name].shape)} has no place in it"
