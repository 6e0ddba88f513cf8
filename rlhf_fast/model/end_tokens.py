"""The tokens that end a response, for our rollouts and, in the saved generation config, for other programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlhf_fast.data.encode import template_end


def end_token_ids(model: Any) -> list[int]:
    """Return the tokens that end a response: those of the generation config or else of the model config, the
    tokenizer's, and the one that the chat template writes after an answer."""
    generation = getattr(model.base, "generation_config", None)
    ids = _as_list(getattr(generation, "eos_token_id", None)) or _as_list(model.text_config.eos_token_id)
    tokenizer_ids = (getattr(model.tokenizer, "eos_token_id", None), template_end(model.tokenizer))
    return sorted({*ids, *(token for token in tokenizer_ids if token is not None)})


@contextmanager
def in_generation_config(model: Any) -> Iterator[None]:
    """List all end tokens in the generation config within the block: a server that reads no chat template would write
    on past the end of an answer."""
    config: Any = getattr(model.base, "generation_config", None)
    if config is None or model.head != "lm":
        yield
        return
    given, ids = config.eos_token_id, end_token_ids(model)
    try:
        if set(ids) != set(_as_list(given)):
            config.eos_token_id = ids if len(ids) != 1 else ids[0]
        yield
    finally:
        config.eos_token_id = given


def _as_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]
