"""The choice of a decode path: the fastest that serves a model."""

from __future__ import annotations

import os
from logging import getLogger
from typing import get_args

from rlhf_fast import ops
from rlhf_fast.errors import UserError
from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.model.model import Model
from rlhf_fast.model.rope_scaling import length_dependent_rope
from rlhf_fast.rollout.attention import AttentionDecoder
from rlhf_fast.rollout.decoder import DecodePath, Decoder
from rlhf_fast.rollout.fused import FusedDecoder

log = getLogger("rlhf_fast")
_warned: set[str] = set()


def require_model(caller: str, given: object) -> None:
    """Raise UserError for what is no Model, such as a path or a module of transformers."""
    if not isinstance(given, Model):
        raise UserError(
            f"{caller}: model must be a Model, got {type(given).__name__}; Model.load(path) makes one of a folder or"
            " hub name, and Model(module, tokenizer) of a module that is in memory"
        )


def choose_decoder(model: Model, decode_path: DecodePath = "auto") -> Decoder | None:
    """Return the fastest decoder that serves `model`, or None for transformers' own cache. A `decode_path` other than
    "auto" is the only one tried; UserError if it cannot serve the model."""
    if decode_path not in get_args(DecodePath):
        names = ", ".join(get_args(DecodePath))
        raise UserError(f"rollout: there is no decode path {decode_path!r}; there are: {names}")
    for name, make in (("fused", FusedDecoder.make), ("attention", AttentionDecoder.make)):
        if decode_path not in ("auto", name):
            continue
        try:
            if rope := length_dependent_rope(model):
                raise Unsupported(f"its rotation ({rope.kind}) depends on the length of the text")
            if decode_path == "auto" and name == "attention":
                _require_kernel(model.device.type)
            return make(model)
        except Unsupported as reason:
            if decode_path == name:
                raise UserError(f"{model.name}: decode path {name!r} cannot serve it, because {reason}") from reason
            if name == "attention":
                _warn_fallback(model, str(reason))
    return None


def _require_kernel(device: str) -> None:
    """Raise Unsupported if decode_attention would run its reference, which is slower than transformers' cache."""
    if ops.decode_attention.chosen(device) == "reference":
        raise Unsupported(f"decode_attention has no kernel here: {ops.decode_attention.why(device)}")


def _warn_fallback(model: Model, reason: str) -> None:
    warn_slow(f"{model.name}: responses are sampled over transformers' own cache, slower, because {reason}")


def warn_slow(text: str) -> None:
    """Warn once with this text, or raise UserError under RLHF_FAST_STRICT=1."""
    if os.environ.get("RLHF_FAST_STRICT") == "1":
        raise UserError(f"RLHF_FAST_STRICT=1 and {text}")
    if text not in _warned:
        _warned.add(text)
        log.warning(text)
