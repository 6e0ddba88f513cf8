"""The choice between the ways to decode: the fastest that serves a model."""

from __future__ import annotations

import os
from logging import getLogger

from rlhf_fast import ops
from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.attention import AttentionDecoder
from rlhf_fast.rollout.decoder import Decoder, Path, Unsupported
from rlhf_fast.rollout.fused import FusedDecoder
from rlhf_fast.rollout.rope_scaling import by_length

log = getLogger("rlhf_fast")
_told: set[str] = set()


def choose(model: Model, path: Path = "auto") -> Decoder | None:
    """The fastest decoder that serves `model`, or None: transformers' own cache. `path` insists on one, and raises
    UserError where it cannot."""
    if path not in Path.__args__:
        raise UserError(f"rollout: there is no path {path!r}; there are: {', '.join(Path.__args__)}")
    for name, make in (("fused", FusedDecoder.make), ("attention", AttentionDecoder.make)):
        if path not in ("auto", name):
            continue
        try:
            if rotation := by_length(model):
                raise Unsupported(f"its rotation ({rotation.kind}) depends on the length of the text")
            if path == "auto" and name == "attention":
                _need_kernel(model.device.type)
            return make(model)
        except Unsupported as reason:
            if path == name:
                raise UserError(f"{model.name}: path {name!r} cannot decode it, because {reason}") from reason
            if name == "attention":
                _warn(model, str(reason))
    return None


def _need_kernel(device: str) -> None:
    """The reference of decode_attention is right, but slower than transformers' cache."""
    if ops.decode_attention.chosen(device) == "reference":
        raise Unsupported(f"decode_attention has no kernel here: {ops.decode_attention.why(device)}")


def _warn(model: Model, reason: str) -> None:
    """Nobody falls back in silence: once a reason, or an error under RLHF_FAST_STRICT=1."""
    text = f"{model.name}: responses are sampled over transformers' own cache, slower, because {reason}"
    if os.environ.get("RLHF_FAST_STRICT") == "1":
        raise UserError(f"RLHF_FAST_STRICT=1 and {text}")
    if text not in _told:
        _told.add(text)
        log.warning(text)
