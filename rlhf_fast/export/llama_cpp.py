"""A GGUF file in llama.cpp, through the package llama-cpp-python: tokens of prompts, end tokens, greedy responses."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.export.agreement import NEAR_TIE, Agreement, Row, compare

PROGRAM = "llama.cpp"
ARITHMETIC = {"silu": 2e-3, "gelu_tanh": 2e-2, "gelu": 5e-2}
"""Largest gap of a near tie that arithmetic alone explains, in nats: llama.cpp looks GELU up in a table of half
precision, and takes the approximation by tanh for the exact one."""


def is_installed() -> bool:
    """Return whether llama-cpp-python is there."""
    return importlib.util.find_spec("llama_cpp") is not None


def check(
    path: Path, rows: Sequence[Row], *, is_chat: bool, ends: Sequence[int], activation: str, kind: str,
    rounding: float, num_tokens: int,
) -> Agreement:  # fmt: skip
    """Compare the file with the model's greedy responses. UserError if a prompt has other tokens in llama.cpp, an end
    token ends nothing, or it says other tokens.

    rounding: how far the file's weights, of type `kind`, move a logit. For q8_0 llama.cpp rounds the activations too,
    which counts once more.
    """
    import llama_cpp

    longest = max(len(row.tokens) for row in rows)
    try:
        engine: Any = llama_cpp.Llama(
            str(path), n_ctx=longest + 8, n_batch=longest + 8, n_ubatch=longest + 8, logits_all=True, verbose=False,
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
        )  # fmt: skip
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"{path}: {PROGRAM} cannot load it: {' '.join(str(error).split())[:200]}") from error
    try:
        for row in rows:
            _check_prompt(engine, row, is_chat)
        vocabulary = llama_cpp.llama_model_get_vocab(engine.model)
        for end in ends:
            if not llama_cpp.llama_vocab_is_eog(vocabulary, end):
                raise UserError(f"{path}: token {end} ends our responses, and does not end {PROGRAM}'s")

        def logits(tokens: Sequence[int]) -> Tensor:
            engine.reset()
            engine.eval(list(tokens))
            return torch.from_numpy(engine.scores[: len(tokens)].copy())

        allowed = min((2 if kind == "q8_0" else 1) * rounding, NEAR_TIE[kind]) + ARITHMETIC[activation]
        return compare(rows, logits, allowed, num_tokens, PROGRAM)
    finally:
        engine.close()


def _check_prompt(engine: Any, row: Row, is_chat: bool) -> None:
    """Raise UserError if a prompt's text has other tokens than ours. A chat template writes its start token itself."""
    found = engine.tokenize(row.text.encode(), add_bos=not is_chat, special=is_chat)
    if found != row.prompt:
        at = next((i for i, (x, y) in enumerate(zip(found, row.prompt, strict=False)) if x != y), None)
        place = f"token {at + 1} is {found[at]}, ours {row.prompt[at]}" if at is not None else "one is longer"
        raise UserError(f"{PROGRAM} reads the prompt {row.text[:40]!r} as other tokens than the model: {place}")
