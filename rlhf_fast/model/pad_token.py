"""The padding token of a model with a scalar head.

transformers reads the score of a row at its last token that is not the padding token. A row whose end token is also the
padding token is read one token early, and so is a text that ends with an unknown word where that stands for padding.
So a new head gets a padding token that ends nothing, under which "the last token" and "the last one that is not
padding" are the same for every program. A head that was trained elsewhere keeps its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

PAD_TOKEN = "<|pad|>"
MODALITIES = ("image", "video", "vision", "audio", "img")
"""In names of padding tokens that stand for a part of another input."""


def end_tokens(module: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Return the tokens that may end a text: those of the configs and of the tokenizer."""
    sources = (getattr(module, "generation_config", None), module.config.get_text_config(), module.config, tokenizer)
    found: set[int] = set()
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        found |= set(ids) if isinstance(ids, (list, tuple)) else {ids} if ids is not None else set()
    return found


def pad_ends_rows(module: PreTrainedModel, tokenizer: Any) -> bool:
    """Return whether a row can end with the padding token of the config."""
    pad = module.config.get_text_config().pad_token_id
    return pad is not None and pad in end_tokens(module, tokenizer) | {getattr(tokenizer, "unk_token_id", None)}


def give_pad_token(module: PreTrainedModel, tokenizer: Any) -> None:
    """Set a padding token that ends no row in the config, and in `tokenizer` unless it is None.

    It is the tokenizer's own, or another special token made for padding, or a row of the vocabulary without a token.
    Where there is none of them the embedding gets one row more.
    """
    config = module.config.get_text_config()
    ends = end_tokens(module, tokenizer) | {getattr(tokenizer, "unk_token_id", None)}
    pad = next((i for i in _candidates(config, tokenizer) if i not in ends and 0 <= i < config.vocab_size), None)
    if pad is None and tokenizer is None:
        pad = config.vocab_size
    elif pad is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        pad = tokenizer.pad_token_id
    elif tokenizer is not None and tokenizer.pad_token_id != pad:
        tokenizer.add_special_tokens({"pad_token": tokenizer.convert_ids_to_tokens(pad)})
    if pad >= config.vocab_size:
        module.resize_token_embeddings(pad + 1, mean_resizing=False)
        module.get_input_embeddings().weight.data[pad] = 0
    for place in (config, module.config):
        if hasattr(place, "pad_token_id"):
            place.pad_token_id = pad


def _candidates(config: Any, tokenizer: Any) -> Iterable[int]:
    """Yield the padding tokens that are there, best first."""
    if tokenizer is None:
        return [config.pad_token_id] if config.pad_token_id is not None else []
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    named = [
        i
        for i, name in special.items()
        if "pad" in name.lower() and name not in template and not any(word in name.lower() for word in MODALITIES)
    ]
    own = [i for i in (tokenizer.pad_token_id, config.pad_token_id) if i in special]
    return [*own, *named]
