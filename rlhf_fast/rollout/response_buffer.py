"""The requests of a rollout, and the buffer that collects its sampled tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_fast.batches import Prompts, Responses, pad_rows, response_mask
from rlhf_fast.errors import BadRows, UserError
from rlhf_fast.rollout.stop_criteria import Stops

ProgressCallback = Callable[[int, int], None]
"""Called after each step with the number of tokens sampled and the number of responses finished in it."""


TokenCallback = Callable[["np.ndarray", "np.ndarray", "TokenSample"], None]
"""Called at each step with the responses (n,) that get a token, the tokens (n,), and what the sampler knows of them. An
exception in it ends the rollout."""


class Requests(NamedTuple):
    """B requested responses, `samples` for each prompt, those of one prompt next to each other."""

    prompts: list[list[int]]
    """Distinct prompts: equal ones under several uids are prefilled once."""
    prompt_index: list[int]
    """(B,) the prompt of each response."""
    uids: list[int]
    """(B,) uid of the prompt."""
    row_ids: np.ndarray
    """(B,) int64: key of each response's sampling noise: uid * samples + k."""

    @classmethod
    def from_prompts(cls, prompts: Prompts, samples: int) -> Requests:
        """Return `samples` requests for each prompt. UserError if `samples` < 1 or a key does not fit in 64 bits."""
        if samples < 1:
            raise UserError(f"rollout: samples must be at least 1, not {samples}")
        too_large = [uid for uid in prompts.uids if not -(2**63) <= uid * samples <= 2**63 - samples]
        if too_large:
            raise BadRows(
                f"prompt {too_large[0]}: its uid times {samples} samples does not fit 64 bits, and the noise of a"
                " response is named by such a number; give smaller uids",
                [("Responses", uid) for uid in too_large],
            )
        distinct = {tokens: i for i, tokens in enumerate(dict.fromkeys(map(tuple, prompts.tokens)))}
        prompt_index = [distinct[tuple(tokens)] for tokens in prompts.tokens for _ in range(samples)]
        uids = [uid for uid in prompts.uids for _ in range(samples)]
        row_ids = np.array([uid * samples + k for uid in prompts.uids for k in range(samples)], dtype=np.int64)
        return cls([list(tokens) for tokens in distinct], prompt_index, uids, row_ids)

    @property
    def num_responses(self) -> int:
        return len(self.prompt_index)

    def responses_by_prompt(self) -> list[list[int]]:
        """Return the responses of each distinct prompt."""
        responses: list[list[int]] = [[] for _ in self.prompts]
        for response, prompt in enumerate(self.prompt_index):
            responses[prompt].append(response)
        return responses


class TokenSample(NamedTuple):
    """One sampled token for each of n rows. All fields are (n,), all but `token` float32 nats."""

    token: Tensor
    logprobs: Tensor
    raw_logprobs: Tensor
    kept_logprobs: Tensor
    entropy: Tensor


class ResponseBuffer:
    """All tokens of a rollout, stored in the order of sampling and sorted into rows at the end."""

    def __init__(self, requests: Requests, on_tokens: TokenCallback | None = None):
        self.requests = requests
        self.on_tokens = on_tokens
        self.lengths = np.zeros(requests.num_responses, dtype=np.int64)
        self.reasons = np.zeros(requests.num_responses, dtype=np.uint8)
        self.stop_indices = np.full(requests.num_responses, -1, dtype=np.int64)
        self._indices: list[tuple[np.ndarray, np.ndarray]] = []
        self._tokens: list[np.ndarray] = []
        self._statistics: list[tuple[Tensor, ...]] = []

    def add(self, responses: np.ndarray, steps: np.ndarray, sample: TokenSample) -> np.ndarray:
        """Store token number `steps` (n,) of `responses` (n,). The arguments are not copied and must not change.
        Return the tokens on the host. BadRows if a model's logits are not finite, for then there is no token."""
        tokens = sample.token.cpu().numpy()
        if tokens.min() < 0:
            invalid = (tokens < 0).nonzero()[0]
            invalid = invalid[responses[invalid].argsort()]
            uids = [self.requests.uids[response] for response in responses[invalid].tolist()]
            raise BadRows(
                f"token {steps[invalid[0]] + 1} of the response to prompt {uids[0]}: the model gives NaN or infinity;"
                " its weights have gone astray, go back to an earlier checkpoint with a lower learning rate",
                [("Responses", uid) for uid in uids],
            )
        self._indices.append((responses, steps))
        self._tokens.append(tokens)
        self._statistics.append(sample[1:])
        if self.on_tokens is not None:
            self.on_tokens(responses, tokens, sample)
        return tokens

    def finish(self, responses: np.ndarray, lengths: np.ndarray, stops: Stops) -> None:
        """Mark those of `responses` (n,) that `stops` says as finished, after `lengths` (n,) tokens."""
        finished = stops.finished
        self.lengths[responses[finished]] = lengths[finished]
        self.reasons[responses[finished]] = stops.reasons[finished]
        self.stop_indices[responses[finished]] = stops.stop_indices[finished]

    def to_responses(self) -> Responses:
        """Return all responses as one right-padded batch on the CPU."""
        prompts = [self.requests.prompts[i] for i in self.requests.prompt_index]
        tokens, prompt_lengths = pad_rows(prompts)
        lengths = prompt_lengths + torch.from_numpy(self.lengths)
        mask = response_mask(prompt_lengths, lengths)
        tokens = torch.nn.functional.pad(tokens, (0, int(lengths.max()) - tokens.shape[1] if prompts else 0))
        statistics = torch.zeros(4, *mask.shape, dtype=torch.float32)
        if self._tokens:
            rows, steps = (torch.from_numpy(np.concatenate(part)) for part in zip(*self._indices, strict=True))
            tokens[rows, prompt_lengths[rows] + steps] = torch.from_numpy(np.concatenate(self._tokens))
            parts = [torch.cat(part) for part in zip(*self._statistics, strict=True)]
            statistics[:, rows, steps] = torch.stack(parts).cpu()
        logprobs, raw_logprobs, kept_logprobs, entropy = statistics
        return Responses(
            tokens=tokens,
            prompt_lengths=prompt_lengths,
            lengths=lengths,
            mask=mask,
            logprobs=logprobs,
            raw_logprobs=raw_logprobs,
            kept_logprobs=kept_logprobs,
            entropy=entropy,
            finish_reasons=torch.from_numpy(self.reasons),
            uids=torch.tensor(self.requests.uids, dtype=torch.int64),
            stop_indices=torch.from_numpy(self.stop_indices),
        )
