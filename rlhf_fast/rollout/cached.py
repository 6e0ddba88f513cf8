"""Rollouts over transformers' own KV cache: our loop, our sampler, the training model's own weights in place.

Every architecture that transformers can decode works. Prompts of one chunk are padded on the left inside this file, and
nowhere else. A prompt is read once however many samples it gets; rows that are over leave the batch.

What a sample is depends on (seed, step, uid, its number) alone: noise is keyed by these, not by the row's place. The
forward pass may round differently in other company, in float32 by about 1e-6 nats.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.batches import Prompts, Responses, response_mask
from rlhf_fast.config import SamplingConfig
from rlhf_fast.errors import BadRows, UserError
from rlhf_fast.model import Model
from rlhf_fast.rollout.stops import Stops

COMPACT = 0.75
"""Rows that are over are dropped once no more than this share is left: dropping copies the cache."""
MASK64 = 2**64 - 1


class Drawn(NamedTuple):
    """What a chunk of B rows has so far, R = max_new_tokens slots each."""

    tokens: Tensor
    numbers: Tensor
    """(4, B, R) float32: logprobs, raw_logprobs, kept_logprobs, entropy."""
    lengths: Tensor
    finished: Tensor


class Rollout:
    """Samples from `model` as it is at the call: a learner's step between two calls is seen."""

    def __init__(self, model: Model, sampling: SamplingConfig, seed: int = 0):
        self.model, self.sampling, self.seed = model, sampling, seed
        self.stops = Stops(model, sampling.stop)

    @torch.no_grad()
    def generate(self, prompts: Prompts, samples: int = 1, step: int = 0) -> Responses:
        """`samples` responses to each prompt, those of one prompt next to each other, prompts in the given order.

        The same seed, `step` and uids give the same noise: to draw anew from a prompt, pass another `step` (PPO passes
        the number of its batch). Nothing of torch's random state is used, and the model's mode is left as it was.
        """
        self._check(prompts)
        rows = [(i, k) for i in range(len(prompts.tokens)) for k in range(samples)]
        order = sorted(range(len(rows)), key=lambda row: len(prompts.tokens[rows[row][0]]))
        key = _mix(self.seed, step)
        training = self.model.module.training
        self.model.module.eval()
        try:
            results: list = [None] * len(rows)
            for start in range(0, len(order), self.sampling.batch):
                chunk = order[start : start + self.sampling.batch]
                which = [rows[row][0] for row in chunk]
                uids, numbers = [prompts.ids[i] for i in which], [rows[row][1] for row in chunk]
                row_ids = [uid * samples + number for uid, number in zip(uids, numbers, strict=True)]
                drawn = self._chunk([prompts.tokens[i] for i in which], uids, row_ids, key)
                for place, row in enumerate(chunk):
                    results[row] = (drawn, place)
        finally:
            self.model.module.train(training)
        return _assemble(prompts, rows, results)

    def _check(self, prompts: Prompts) -> None:
        limit = self.model.max_positions
        for uid, tokens in zip(prompts.ids, prompts.tokens, strict=True):
            if not tokens:
                raise BadRows(f"prompt {uid}: has no tokens; give it at least a start token", [("Responses", uid)])
            if limit and len(tokens) + self.sampling.max_new_tokens > limit:
                raise BadRows(
                    f"prompt {uid}: {len(tokens)} tokens and max_new_tokens {self.sampling.max_new_tokens} are more"
                    f" than the model's {limit} positions; lower sampling.max_new_tokens or data.max_prompt_tokens",
                    [("Responses", uid)],
                )

    def _chunk(self, tokens: list[list[int]], uids: list[int], row_ids: list[int], key: int) -> Drawn:
        """One batch of rows to its end."""
        cfg, device = self.sampling, self.model.device
        count, limit = len(tokens), cfg.max_new_tokens
        drawn = Drawn(
            torch.zeros(count, limit, dtype=torch.int64, device=device),
            torch.zeros(4, count, limit, device=device),
            torch.zeros(count, dtype=torch.int64, device=device),
            torch.zeros(count, dtype=torch.bool, device=device),
        )
        state = _Decoding(self.model, tokens)
        rows, ids = torch.arange(count, device=device), torch.tensor(row_ids, device=device)
        head = _float32_head(self.model)
        for slot in range(limit):
            token, numbers = self._draw(head(state.last), ids[rows], slot, key)
            if (token < 0).any():
                bad = [uids[row] for row in rows[token < 0].tolist()]
                raise BadRows(
                    f"token {slot + 1} of the response to prompt {bad[0]}: the model gives NaN or infinity; its weights"
                    " have gone astray, go back to an earlier checkpoint with a lower learning rate",
                    [("Responses", uid) for uid in bad],
                )
            drawn.tokens[rows, slot] = token
            drawn.numbers[:, rows, slot] = numbers
            running = ~drawn.finished[rows]
            drawn.lengths[rows[running]] += 1
            over = self.stops(drawn.tokens[rows], slot + 1)
            if slot + 1 >= cfg.min_new_tokens:
                drawn.finished[rows] |= over
            left = (~drawn.finished[rows]).nonzero()[:, 0]
            if not len(left) or slot + 1 == limit:
                break
            if len(left) <= COMPACT * len(rows):
                state.select(left)
                rows, token = rows[left], token[left]
            state.advance(token)
        return Drawn(*(field.cpu() for field in drawn))

    def _draw(self, logits: Tensor, row_ids: Tensor, slot: int, key: int) -> tuple[Tensor, Tensor]:
        """A token for each row (B,), and its logprob, raw_logprob, kept_logprob and entropy (4, B)."""
        cfg, allowed = self.sampling, logits
        forbid_end = slot < cfg.min_new_tokens and len(self.stops.ends)
        if forbid_end:
            allowed = logits.index_fill(1, self.stops.ends, -torch.inf)
        token, logprob, raw, kept, _, entropy = ops.sample_tokens(
            allowed, cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, key, row_ids, torch.full_like(row_ids, slot)
        )
        if forbid_end:
            # the trainer's forward pass knows nothing of the ban: what it will say is reported
            raw, _ = ops.token_logprobs(logits, token)
            if cfg.temperature > 0:
                logprob, entropy = ops.token_logprobs(logits, token, temperature=cfg.temperature)
        return token, torch.stack([logprob, raw, kept, entropy])


class _Decoding:
    """Rows in the middle of decoding: the cache, and the last layer's hidden state that predicts each next token."""

    def __init__(self, model: Model, tokens: list[list[int]]):
        self.model = model
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, tokens)))}
        unique = list(places)
        width = max(map(len, unique))
        ids = torch.zeros(len(unique), width, dtype=torch.int64)
        self.mask = torch.zeros_like(ids)
        for row, prompt in enumerate(unique):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            self.mask[row, width - len(prompt) :] = 1
        ids, self.mask = ids.to(model.device), self.mask.to(model.device)
        self.takes_positions = "position_ids" in inspect.signature(model.decoder.forward).parameters
        self.cache = None
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        self._forward(ids, positions)
        self.positions = positions[:, -1]
        index = torch.tensor([places[tuple(prompt)] for prompt in tokens], device=model.device)
        if index.tolist() != list(range(len(unique))):
            self.select(index)

    def select(self, index: Tensor) -> None:
        """Rows `index` become the batch; a row may be taken several times."""
        self.cache.batch_select_indices(index)
        self.mask, self.positions, self.last = self.mask[index], self.positions[index], self.last[index]

    def advance(self, token: Tensor) -> None:
        """Appends a token (B,) to each row."""
        self.positions = self.positions + 1
        self.mask = F.pad(self.mask, (0, 1), value=1)
        self._forward(token[:, None], self.positions[:, None])

    def _forward(self, ids: Tensor, positions: Tensor) -> None:
        arguments = {"position_ids": positions} if self.takes_positions else {}
        output = self.model.run_decoder(
            input_ids=ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **arguments
        )
        self.cache = getattr(output, "past_key_values", None)
        if self.cache is None:
            raise UserError(f"{self.model.name}: its decoder keeps no KV cache, so responses cannot be sampled from it")
        self.last = output.last_hidden_state[:, -1]


def _float32_head(model: Model) -> Callable[[Tensor], Tensor]:
    """Hidden states (B, D) -> logits (B, V) that were float32 from the accumulator on."""
    weight, bias = model.head_weight, model.head_bias
    wide = weight if weight.dtype == torch.float32 or weight.device.type == "cuda" else weight.float()
    bias = None if bias is None else bias.float()

    def logits(hidden: Tensor) -> Tensor:
        if wide.dtype == torch.float32:
            out = F.linear(hidden.float() * model.scale, wide, bias)
        else:
            out = torch.mm(hidden * model.scale, wide.t(), out_dtype=torch.float32)
            out = out if bias is None else out + bias
        return model.softcap * torch.tanh(out / model.softcap) if model.softcap else out

    return logits


def _mix(seed: int, step: int) -> int:
    """One non-negative 63-bit key of a run's seed and a step, spread by splitmix64's finalizer."""
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return (x ^ (x >> 31)) >> 1


def _assemble(prompts: Prompts, rows: list[tuple[int, int]], results: list[tuple[Drawn, int]]) -> Responses:
    """Rows of several chunks as one right-padded batch on the CPU."""
    prompt_lengths = torch.tensor([len(prompts.tokens[i]) for i, _ in rows], dtype=torch.int64)
    sizes = torch.tensor([int(drawn.lengths[place]) for drawn, place in results], dtype=torch.int64)
    lengths = prompt_lengths + sizes
    mask = response_mask(prompt_lengths, lengths)
    tokens = torch.zeros(len(rows), int(lengths.max()) if rows else 0, dtype=torch.int64)
    numbers = torch.zeros(4, *mask.shape)
    for row, ((i, _), (drawn, place)) in enumerate(zip(rows, results, strict=True)):
        size, start = int(sizes[row]), int(prompt_lengths[row])
        tokens[row, :start] = torch.tensor(prompts.tokens[i])
        tokens[row, start : start + size] = drawn.tokens[place, :size]
        numbers[:, row, :size] = drawn.numbers[:, place, :size]
    return Responses(
        tokens, prompt_lengths, lengths, mask, *numbers,
        finished=torch.tensor([bool(drawn.finished[place]) for drawn, place in results], dtype=torch.bool),
        uids=torch.tensor([prompts.ids[i] for i, _ in rows], dtype=torch.int64),
    )  # fmt: skip
