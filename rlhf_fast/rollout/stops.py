"""When a response is over: at an end token, or once its text holds a stop text."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.data.encode import template_end
from rlhf_fast.errors import UserError
from rlhf_fast.model import Model


def end_tokens(model: Model) -> list[int]:
    """The ids that end a response: the generation config's (there may be several), the tokenizer's, and the one that
    its chat template puts behind an answer."""
    generation = getattr(model.base, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not ids and (own := model.base.config.get_text_config().eos_token_id) is not None:
        ids = own if isinstance(own, list) else [own]
    own = (getattr(model.tokenizer, "eos_token_id", None), template_end(model.tokenizer))
    return sorted({*ids, *(token for token in own if token is not None)})


class Stops:
    """Called with each new token of each row."""

    def __init__(self, model: Model, texts: tuple[str, ...]):
        if texts and model.tokenizer is None:
            raise UserError("sampling.stop: stop texts need a tokenizer; leave it empty")
        self.ends = torch.tensor(end_tokens(model), dtype=torch.int64, device=model.device)
        self.texts, self.tokenizer = texts, model.tokenizer
        # a token is at least one byte of text, so that many last tokens hold every stop text that has just ended
        self.tail = max((len(text.encode()) for text in texts), default=0)

    def __call__(self, responses: Tensor, length: int) -> Tensor:
        """(B,) bool: which of the responses (B, R) are over with their token `length - 1`."""
        over = torch.isin(responses[:, length - 1], self.ends)
        if self.texts:
            tails = self.tokenizer.batch_decode(responses[:, max(0, length - self.tail) : length].tolist())
            found = [any(text in tail for text in self.texts) for tail in tails]
            over |= torch.tensor(found, device=over.device)
        return over
