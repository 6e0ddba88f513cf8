"""Compare another program with the model: greedy tokens of ours, checked one by one in its logits.

The other program reads the prompt and our greedy response, and its likeliest token must be ours at every position: then
its own greedy response is ours. A file of rounded weights may prefer another token where two are nearly equally likely.
Such a near tie is bounded by measurement: our own forward pass on the file's weights shows how far rounding moves a
logit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.batches import Prompts
from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.data.encode import Encoder
from rlhf_fast.data.fields import InvalidRow
from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.rollout import Rollout

NEW_TOKENS = 64
LIKELIEST = 8
"""Tokens at a position whose logits show how far other weights move them."""
NEAR_TIE = {"f32": 0.001, "f16": 0.05, "bf16": 0.25, "q8_0": 0.5}
"""Largest gap in nats between two tokens that the rounding of a type may ever exchange."""
TEXTS = (
    "Once upon a time",
    "Why is the sky blue?",
    "Zoë wrote: 3.14 + 22 = 25.14, isn't it?\n\n  def f(x):\n    return x  # 你好 🙂",
    "Name three animals. Then say which one is the largest, and why.",
)
"""Prompts, before the model's format of prompts."""
Logits = Callable[[Sequence[int]], Tensor]
"""A function from tokens to their logits (number of tokens, rows) float32."""


class Row(NamedTuple):
    """A prompt with our greedy response, and our logits where each token of it is predicted."""

    text: str
    prompt: list[int]
    response: list[int]
    logits: Tensor
    """(response tokens, rows) float32."""

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.response


class Agreement(NamedTuple):
    """The result of a comparison with another program."""

    tokens: int
    ties: list[str]
    """A phrase for each token that differs and is a near tie."""
    moved: float
    """Largest difference of a log-probability of our tokens, in nats."""
    allowed: float
    """Largest gap in nats that counts as a near tie."""

    def sentence(self, program: str, prompts: int) -> str:
        """Return the result for the user."""
        equal = self.tokens - len(self.ties)
        said = f"{program}: {equal} of {self.tokens} greedy tokens of {prompts} prompts are ours"
        if self.ties:
            said += f"; the others are near ties, up to {self.allowed:.2g} nats apart: {'; '.join(self.ties[:3])}"
        return f"{said} (log-probabilities differ by up to {self.moved:.2g} nats)"


def greedy_rows(model: Model, encoder: Encoder, positions: int) -> list[Row]:
    """Return our greedy responses to TEXTS. UserError if no prompt leaves room in `positions` for one token."""
    prompts = []
    for text in TEXTS:
        try:
            ids, shown = encoder.prompt([{"role": "user", "content": text}] if encoder.chat else text)
        except InvalidRow:  # a tokenizer that cannot read a text of these
            continue
        if len(ids) < positions and ids:
            prompts.append((shown, ids))
    if not prompts:
        raise UserError(f"{model.name}: no prompt of the comparison fits its {positions} positions")
    new = min(NEW_TOKENS, positions - max(len(ids) for _, ids in prompts))
    rollout = Rollout(model, SamplingConfig(temperature=0.0, max_new_tokens=new))
    responses = rollout.generate(
        Prompts(list(range(len(prompts))), tokens=[ids for _, ids in prompts], texts=[text for text, _ in prompts])
    )
    rows = []
    for (text, ids), response in zip(prompts, responses.response_ids(), strict=True):
        rows.append(Row(text, ids, response, _kept(logits_of(model.base)([*ids, *response]), len(ids))))
    return rows


def logits_of(module: Any) -> Logits:
    """Return the function that computes logits by the own forward pass of a module of transformers."""

    def logits(tokens: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return module(input_ids=torch.tensor([tokens], device=module.device)).logits[0].float().cpu()

    return logits


def _kept(logits: Tensor, prompt: int) -> Tensor:
    """Return the logits that predict a response."""
    return logits[prompt - 1 : -1].clone()


def rounding(rows: Sequence[Row], logits: Logits) -> float:
    """Return how far other weights move our logits, in nats: the largest change of the gap between our token and one of
    the likeliest at its position."""
    largest = 0.0
    for row in rows:
        change = _kept(logits(row.tokens), len(row.prompt)) - row.logits
        near = row.logits.topk(min(LIKELIEST, row.logits.shape[1]), 1).indices
        of_ours = change.gather(1, torch.tensor(row.response)[:, None])
        largest = max(largest, float((change.gather(1, near) - of_ours).abs().max()))
    return largest


def compare(rows: Sequence[Row], logits: Logits, allowed: float, num_tokens: int, program: str) -> Agreement:
    """Return how the program's logits agree; UserError for a token that differs by more than a near tie.

    allowed: largest gap between two tokens' logits that is a near tie. num_tokens: ids from here have no token.
    """
    ties, moved = [], 0.0
    for number, row in enumerate(rows, start=1):
        theirs = _kept(logits(row.tokens), len(row.prompt))
        ours = torch.tensor(row.response)
        logprobs = [_logprobs(x, num_tokens).gather(1, ours[:, None])[:, 0] for x in (row.logits, theirs)]
        moved = max(moved, float((logprobs[0] - logprobs[1]).abs().max()))
        chosen = theirs[:, :num_tokens].argmax(1)
        for i in (chosen != ours).nonzero()[:, 0].tolist():
            gap = float(row.logits[i, ours[i]] - row.logits[i, chosen[i]])
            pair = f"is {int(ours[i])}, theirs {int(chosen[i])}"
            phrase = f"token {i + 1} of response {number} {pair}, {gap:.2g} nats apart"
            if not gap <= allowed:
                raise UserError(
                    f"{program} says other tokens than the model: {phrase}, and a near tie is up to {allowed:.2g}"
                )
            ties.append(phrase)
    if not moved <= max(allowed, 0.01):
        raise UserError(
            f"{program} gives our tokens other log-probabilities than the model, by up to {moved:.2g} nats, where its"
            f" rounding explains {allowed:.2g}"
        )
    return Agreement(sum(len(row.response) for row in rows), ties, moved, allowed)


def _logprobs(logits: Tensor, num_tokens: int) -> Tensor:
    return logits[:, :num_tokens].log_softmax(1)
