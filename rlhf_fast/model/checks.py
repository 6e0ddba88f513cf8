"""Checks, when a model is created, that the fused ops and the training forward compute what its own module does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_fast.batches import last_columns
from rlhf_fast.errors import UserError
from rlhf_fast.model.dropout import config_without_dropout
from rlhf_fast.model.noise import Trial, check_causal, find_noise
from rlhf_fast.model.pad_token import end_tokens

LONG = 64
"""Tokens of the row on which noise is searched for: some acts on long rows only."""
ENDS = 4
"""End tokens that are tried in the check of a score head."""


@torch.no_grad()
def check_decoder(model: Any) -> set[nn.Module]:
    """Check that the decoder is finite and causal, computes each row alone, and the same in training mode. Return the
    modules that must stay in evaluating mode for that."""
    tokens = model.probe_tokens(2, 8)
    hidden = model.hidden(tokens)
    if not hidden.isfinite().all():
        raise UserError(f"{model.name}: gives NaN or infinity on any input; its weights are spoiled")
    tolerance = _tolerance(model.head_weight)
    check_causal(model.name, model.hidden, tokens, hidden, tolerance)
    long = model.probe_tokens(1, min(model.max_positions or LONG, LONG))

    def with_gradients() -> Tensor:
        with torch.enable_grad():
            return model.hidden(long).detach()

    trials = [Trial(with_gradients, model.hidden(long)), Trial(lambda: model.hidden(tokens), hidden)]
    with config_without_dropout(model.base):
        return find_noise(model.name, model.decoder, trials, tolerance)


@torch.no_grad()
def find_logit_scale(model: Any) -> float:
    """Return the scale under which our head computes the module's own logits. UserError if there is none."""
    head = model.base.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(f"{model.name}: its head is a {type(head).__name__}; only a linear layer can be fused")
    tokens = model.probe_tokens(2, 8)
    expected = model.base(input_ids=tokens, use_cache=False).logits.float()
    hidden = model.hidden(tokens).float()
    bias = None if head.bias is None else head.bias.float()
    for scale in _known_logit_scales(model.text_config):
        logits = F.linear(hidden * scale, head.weight.float(), bias)
        if model.softcap:
            logits = model.softcap * torch.tanh(logits / model.softcap)
        if logits.shape == expected.shape and _allclose(logits, expected, head.weight):
            return scale
    raise UserError(
        f"{model.name}: its logits are not a linear map of the decoder's last hidden state (with a scale or soft"
        f" cap); the fused head cannot stand for {type(model.base).__name__}"
    )


@torch.no_grad()
def check_score_head(model: Any) -> None:
    """Check that the module's own score is the one that our head reads: of a plain row, of rows with an end token in
    them, and of a padded row."""
    plain = model.probe_tokens(1, min(model.max_positions or 8, 8)).cpu()
    length = plain.shape[1]
    rows, lengths = [plain], [length]
    for end in sorted(end_tokens(model.base, model.tokenizer))[:ENDS]:
        if 0 <= end < model.num_rows and length > 2:
            rows.append(plain.clone())
            rows[-1][0, length // 2] = end
            lengths.append(length)
    pad = model.score_pad
    if pad is not None and 0 <= pad < model.num_rows and length > 2:
        rows.append(plain.clone())
        rows[-1][0, length - 2 :] = pad
        lengths.append(length - 2)
    for row, n in zip(rows, lengths, strict=True):
        inputs = {"input_ids": row, "attention_mask": (torch.arange(length) < n).long()[None]}
        if n == length:
            del inputs["attention_mask"]
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        expected = model.base(**inputs, use_cache=False).logits.float()[0, 0] + model.score_bias
        # on the module's own hidden states: in half precision those of our layers may be rounded to another score
        column = last_columns(row, torch.tensor([n]), pad)
        score = model.score_hidden(model.hidden(inputs["input_ids"])[0, column])
        if not _allclose(score, expected, model.head_weight):
            which = "" if row is plain else " that is not padding (of a row with end or padding tokens in it)"
            raise UserError(f"{model.name}: its score is not a linear map of the last token's hidden state{which}")


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Check that two packed rows have the hidden states that each has alone."""
    tokens = model.probe_tokens(2, 8)
    positions = torch.arange(8).repeat(2)[None]
    with model.eval_mode():
        packed = model.hidden(tokens.reshape(1, 16), positions).reshape(2, 8, -1).float()
        alone = model.hidden(tokens).float()
    if not _allclose(packed, alone, model.head_weight):
        raise UserError(f"{model.name}: packed rows see one another in this architecture; set packing=false")


def _allclose(actual: Tensor, expected: Tensor, weight: Tensor) -> bool:
    """Return True if both agree within the rounding of the dtype of `weight`."""
    return bool((actual - expected).abs().max() <= _tolerance(weight) * expected.abs().max().clamp_min(1.0))


def _tolerance(weight: Tensor) -> float:
    return 1e-4 if weight.dtype == torch.float32 else 0.05


def _known_logit_scales(config: Any) -> Iterator[float]:
    """Yield the factors on logits that architectures use (Cohere; Granite and HyperCLOVA X; Falcon-H1)."""
    yield 1.0
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        if factor := getattr(config, name, None):
            yield from (float(factor), 1.0 / float(factor))
