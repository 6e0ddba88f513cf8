"""Sampling of responses: `Rollout(model, sampling, seed).generate(prompts) -> Responses`.

A rollout reads the training model's own weights; it makes no copy. The sampling noise of a token depends only on
(seed, step, uid * samples + k, j), for token j of response k of a prompt. So another number of samples gives other
noise; another batch or order of scheduling does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlhf_fast.batches import Prompts, Responses
from rlhf_fast.config.checks import require_settings
from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.errors import BadRows, UserError
from rlhf_fast.model.model import Model
from rlhf_fast.model.rope_scaling import length_dependent_rope
from rlhf_fast.rollout import hf_generate
from rlhf_fast.rollout.choose import choose_decoder, require_model
from rlhf_fast.rollout.cuda_graphs import DecodeGraphs, decode_graphs
from rlhf_fast.rollout.decoder import DecodePath, Decoder
from rlhf_fast.rollout.fused import FusedDecoder
from rlhf_fast.rollout.hf_batch import BatchKind, choose_batch
from rlhf_fast.rollout.kv_cache import PagedKVCache, cap_pages, create_cache, page_bytes, page_size_for
from rlhf_fast.rollout.response_buffer import ProgressCallback, Requests, ResponseBuffer, TokenCallback
from rlhf_fast.rollout.sampler import Sampler, rollout_key
from rlhf_fast.rollout.scheduler import Scheduler, cache_lengths, pages_needed
from rlhf_fast.rollout.stop_criteria import StopCriteria

__all__ = ["Rollout"]


class Rollout:
    """Samples from `model` with the weights it has at the call, so it sees every optimizer step.

    decode_path: how to decode (see rollout/decoder.py); "auto" takes the fastest that serves the model.
    keep_cache: keep the memory of keys and values for the next call; otherwise each call frees it.
    cuda_graphs: on a GPU, capture the decode step of the fused path as CUDA graphs. They are kept with the cache.
    """

    def __init__(
        self,
        model: Model,
        sampling: SamplingConfig,
        seed: int = 0,
        *,
        keep_cache: bool = False,
        decode_path: DecodePath = "auto",
        cuda_graphs: bool = True,
    ):
        require_model("Rollout", model)
        require_settings("Rollout", "sampling", SamplingConfig, sampling)
        self.model = model
        self.sampling = sampling
        self.seed = seed
        self.keep_cache = keep_cache
        self.cuda_graphs = cuda_graphs
        self.stop_criteria = StopCriteria(model, sampling)
        self._requested_decode_path: DecodePath = decode_path
        self._decoder: Decoder | None = None
        self._decoder_key: tuple | None = None
        self._batch_kind: BatchKind | None = None
        """The way to decode rows without a decoder."""
        self._cache: PagedKVCache | None = None
        self._graphs: DecodeGraphs | None = None
        """Graphs over `_cache`."""
        self._get_decoder()  # a model that cannot be sampled from is refused now, not in the middle of a run

    @property
    def decode_path(self) -> str:
        """The decode path: fused, attention or transformers. It is chosen at creation."""
        decoder = self._get_decoder()
        return "transformers" if decoder is None else decoder.name

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts | Sequence[str],
        samples: int = 1,
        step: int = 0,
        progress: ProgressCallback | None = None,
        on_tokens: TokenCallback | None = None,
    ) -> Responses:
        """Return `samples` responses for each prompt, those of one prompt next to each other, in the prompts' order.

        prompts: Prompts, or texts, which the model's tokenizer encodes and whose uids are 0, 1, ...
        step: the same seed, step, uids and `samples` give the same noise; another step gives new samples. PPO
            passes the number of its batch.
        progress: called after each step with the number of tokens sampled and of responses finished in it.
        on_tokens: called with the tokens themselves as soon as they are sampled, for instance to show them.

        torch's random state is not used, and the model's training mode is kept. UserError for prompts that the model
        cannot answer.
        """
        if not isinstance(prompts, Prompts):
            prompts = self._encode(prompts)
        self._check(prompts)
        buffer = ResponseBuffer(Requests.from_prompts(prompts, samples), on_tokens)
        if not buffer.requests.num_responses:
            return buffer.to_responses()
        decoder = self._get_decoder()
        sampler = Sampler(self.model, self.sampling, self.stop_criteria.end_tokens, rollout_key(self.seed, step))
        training = self.model.module.training
        self.model.module.eval()
        try:
            if decoder is None:
                criteria, kind = self.stop_criteria, self._batch_kind
                assert kind is not None
                hf_generate.generate(self.model, sampler, criteria, self.sampling, buffer, kind, progress)
            else:
                self._decode(decoder, sampler, buffer, progress)
        finally:
            self.model.module.train(training)
        return buffer.to_responses()

    def _decode(
        self, decoder: Decoder, sampler: Sampler, buffer: ResponseBuffer, progress: ProgressCallback | None
    ) -> None:
        """Generate all responses over a KV cache."""
        cache = self._get_cache(decoder, buffer.requests)
        kept, self._cache, self._graphs = self._graphs, None, None  # an exception must not leave a half-used cache
        with decoder.session():
            graphs = decode_graphs(decoder, cache, sampler, kept) if self.cuda_graphs else None
            kept = None
            criteria, sampling = self.stop_criteria, self.sampling
            Scheduler(decoder, cache, sampler, criteria, sampling, buffer, progress, graphs).run()
        if self.keep_cache:
            self._cache = cache
            self._graphs = graphs if graphs is not None and graphs.reads_parameters() else None

    def _get_decoder(self) -> Decoder | None:
        """Return the decoder. It is chosen at creation, and again after the model is moved, converted or wrapped; the
        kept cache is then dropped."""
        model = self.model
        key = (model.module, model.device, model.head_weight.dtype, model.exact)
        if self._decoder_key != key:
            self._decoder = choose_decoder(model, self._requested_decode_path)
            if model.exact and not (isinstance(self._decoder, FusedDecoder) and self._decoder.is_compiled):
                name = "transformers" if self._decoder is None else self._decoder.name
                raise UserError(
                    f"{model.name}: exact needs the compiled step of the decode path fused, and the path is {name};"
                    " set exact to false"
                )
            self._batch_kind = choose_batch(model) if self._decoder is None else None
            self._decoder_key = key
            self._cache = self._graphs = None
        return self._decoder

    def _get_cache(self, decoder: Decoder, requests: Requests) -> PagedKVCache:
        """Return the kept cache if it is large enough, else a new one."""
        cfg, device, kept = self.sampling, self.model.device, self._cache
        page_size = page_size_for(device)
        lengths = sorted(cache_lengths(requests, cfg), reverse=True)
        num_slots = min(cfg.batch, len(lengths))
        bytes_per_page = page_bytes(decoder.shapes, decoder.dtype, page_size)
        num_pages = cap_pages(pages_needed(requests, cfg, page_size), bytes_per_page, cfg.cache_mb)
        if (
            kept is not None
            and kept.num_slots >= num_slots
            and kept.num_pages >= num_pages
            and kept.max_pages_per_slot >= kept.pages_for(lengths[0])
        ):
            return kept
        self._cache = self._graphs = kept = None  # free the old cache before the new one is allocated
        return create_cache(
            decoder.shapes, decoder.dtype, device, lengths, num_pages, num_slots, cfg.cache_mb, page_size
        )

    def _encode(self, texts: Sequence[str]) -> Prompts:
        if isinstance(texts, str):
            raise UserError("rollout: prompts is one text; give a list of texts")
        if isinstance(texts, Mapping) or not hasattr(texts, "__getitem__"):
            raise UserError(f"rollout: prompts are of type {type(texts).__name__}; give a list of texts, or Prompts")
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"rollout: prompt {number} is {_described(text)}")
        if self.model.tokenizer is None:
            raise UserError(
                f"rollout: {self.model.name} has no tokenizer, which prompts given as texts need; give Prompts with"
                " token ids"
            )
        return Prompts.from_texts(self.model.tokenizer, texts)

    def _check(self, prompts: Prompts) -> None:
        """Raise BadRows for a prompt that is empty, too long, or has a token that the model does not know."""
        limit = self.model.max_positions
        vocab_size = self.model.num_rows
        rope, max_new_tokens = length_dependent_rope(self.model), self.sampling.max_new_tokens
        for uid, tokens in zip(prompts.uids, prompts.tokens, strict=True):
            rows = [("Responses", uid)]
            if not tokens:
                raise BadRows(f"prompt {uid}: has no tokens; give it at least a start token", rows)
            if min(tokens) < 0 or max(tokens) >= vocab_size:
                unknown = next(token for token in tokens if not 0 <= token < vocab_size)
                raise BadRows(
                    f"prompt {uid}: token {unknown} is not one of the model's {vocab_size}, 0 to {vocab_size - 1}; use"
                    " the model's own tokenizer",
                    rows,
                )
            if limit and len(tokens) + max_new_tokens > limit:
                raise BadRows(
                    f"prompt {uid}: {len(tokens)} tokens and max_new_tokens {max_new_tokens} are more than the model's"
                    f" {limit} positions; {_remedy(len(tokens), max_new_tokens, limit)}",
                    rows,
                )
            if rope and len(tokens) + max_new_tokens > rope.original_positions:
                raise BadRows(
                    f"prompt {uid}: {len(tokens)} tokens and max_new_tokens {max_new_tokens} are more than the model's"
                    f" original {rope.original_positions} positions, after which its rotation ({rope.kind}) depends on"
                    " the length of the text, and samples on the batch;"
                    f" {_remedy(len(tokens), max_new_tokens, rope.original_positions)} (in a stage: lower"
                    " sampling.max_new_tokens or data.max_prompt_tokens)",
                    rows,
                )


def _remedy(length: int, max_new_tokens: int, limit: int) -> str:
    """Return what lets a prompt and its response fit in `limit` positions: either change, where it can be enough."""
    ways = [f"shorten the prompt to at most {limit - max_new_tokens} tokens"] if max_new_tokens < limit else []
    ways += [f"set max_new_tokens to at most {limit - length}"] if length < limit else []
    return ", or ".join(ways) or "shorten the prompt and lower max_new_tokens"


def _described(prompt: Any) -> str:
    """Return the kind of a prompt that is no text, and what to give instead."""
    if isinstance(prompt, Mapping) or (isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], Mapping)):
        how = "model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) is one"
        kind = "a chat message" if isinstance(prompt, Mapping) else "a list of chat messages"
        return f"{kind}; give a text for each conversation, as the model was trained to read it: {how}"
    kind = type(prompt).__name__
    return f"of type {kind}; give texts, or token ids as Prompts(uids=[0], tokens=[[...]], texts=[''])"
