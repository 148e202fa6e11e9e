"""What `gristmill.text` needs to tokenise: the text of tokenizer.json and the greatest length, kept in the model's meta."""

from typing import Any

from gristmill.errors import FormatError
from gristmill.formats.container import parse
from gristmill.formats.folder import Folder

DEFINITION = "tokenizer.json"
LIMITS = {"sentence_bert_config.json": "max_seq_length", "tokenizer_config.json": "model_max_length"}


def read_tokenizer(folder: Folder, longest: int) -> dict[str, Any] | None:
    """Return the tokenizer as JSON-compatible values; None where there is no tokenizer.json.

    Args:
        folder: of the transformer.
        longest: the greatest number of tokens that the model takes.

    Raises:
        FormatError: a file is damaged.
    """
    if not folder.has(DEFINITION):
        return None
    definition = folder.text(DEFINITION)
    parse(definition.encode(), DEFINITION)
    limits = [longest]
    for name, key in LIMITS.items():
        value = folder.fields(name).values.get(key) if folder.has(name) else None
        if type(value) in (int, float) and value is not None and value >= 1:  # unlimited ones are written as 1e30
            limits.append(int(min(value, longest)))
        elif value is not None:
            raise FormatError(f"{name}: {key} must be a number from 1, got {str(value)[:80]!r}")
    lower = folder.has("sentence_bert_config.json") and folder.fields("sentence_bert_config.json").flag("do_lower_case")
    return {"kind": "huggingface", "max_length": min(limits), "lowercase": int(lower), "definition": definition}
