"""Sampling responses: `Rollout(model, sampling, seed).generate(prompts) -> Responses`.

The training model's own weights are read where they are. What a sample is depends on (seed, step, uid, its number)
alone: noise is keyed by these, and no row's place, neighbours or schedule enter it.
"""

from __future__ import annotations

import torch

from rlhf_fast.batches import Prompts, Responses
from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.errors import BadRows
from rlhf_fast.model.model import Model
from rlhf_fast.rollout import hf_cache
from rlhf_fast.rollout.choose import choose
from rlhf_fast.rollout.decoder import Decoder, Path
from rlhf_fast.rollout.kv_cache import Arena, affordable, allocate, page_of
from rlhf_fast.rollout.response_buffer import Progress, Record, Rows
from rlhf_fast.rollout.rope_scaling import by_length
from rlhf_fast.rollout.sampler import Draw, mix
from rlhf_fast.rollout.scheduler import Schedule, most_pages, positions_of
from rlhf_fast.rollout.stop_criteria import Stops

__all__ = ["Rollout"]


class Rollout:
    """Samples from `model` as it is at the call: a learner's step between two calls is seen.

    `path` insists on a way to decode (see rollout/decoder.py); "auto" takes the fastest that serves the model. The
    memory of keys and values is given back after each call, unless `keep_arena`.
    """

    def __init__(
        self, model: Model, sampling: SamplingConfig, seed: int = 0, *, keep_arena: bool = False, path: Path = "auto"
    ):
        self.model, self.sampling, self.seed, self.keep_arena = model, sampling, seed, keep_arena
        self.stops = Stops(model, sampling)
        self._wanted, self._chosen_for, self._decoder = path, None, None
        self._arena: Arena | None = None

    @property
    def path(self) -> str:
        """Who decodes: fused, attention or transformers. Settled at the first use."""
        decoder = self._decide()
        return "transformers" if decoder is None else decoder.name

    @torch.no_grad()
    def generate(
        self, prompts: Prompts, samples: int = 1, step: int = 0, progress: Progress | None = None
    ) -> Responses:
        """`samples` responses to each prompt, those of one prompt next to each other, prompts in the given order.

        The same seed, `step` and uids give the same noise: to draw anew from a prompt, pass another `step` (PPO passes
        the number of its batch). Nothing of torch's random state is used, and the model's mode is left as it was.
        `progress(tokens, ended)` is called after each step with the tokens it drew and the responses that it ended.
        """
        self._check(prompts)
        record = Record(Rows.of(prompts, samples))
        if not record.rows.which:
            return record.responses()
        decoder, cfg, training = self._decide(), self.sampling, self.model.module.training
        draw = Draw(self.model, cfg, self.stops.ends, mix(self.seed, step))
        self.model.module.eval()
        try:
            if decoder is None:
                hf_cache.run(self.model, draw, self.stops, cfg, record, progress)
            else:
                arena, self._arena = self._fitting(decoder, record.rows), None
                with decoder.ready():
                    Schedule(decoder, arena, draw, self.stops, cfg, record, progress).run()
                self._arena = arena if self.keep_arena else None
        finally:
            self.model.module.train(training)
        return record.responses()

    def _decide(self) -> Decoder | None:
        """Chosen once, and again after the model was moved, converted or wrapped."""
        model = self.model
        now = (model.module, model.device, model.head_weight.dtype)
        if self._chosen_for != now:
            self._decoder, self._chosen_for, self._arena = choose(model, self._wanted), now, None
        return self._decoder

    def _fitting(self, decoder: Decoder, rows: Rows) -> Arena:
        """The kept arena if it is large enough, else a new one."""
        cfg, device, kept = self.sampling, self.model.device, self._arena
        page, positions = page_of(device), sorted(positions_of(rows, cfg), reverse=True)
        slots = min(cfg.batch, len(positions))
        pages = affordable(decoder.shapes, decoder.dtype, page, most_pages(rows, cfg, page), cfg.cache_mb)
        if kept is not None and kept.slots >= slots and kept.width >= kept.need(positions[0]) and kept.pages >= pages:
            return kept
        self._arena = kept = None
        return allocate(decoder.shapes, decoder.dtype, device, positions, pages, slots, cfg.cache_mb, page)

    def _check(self, prompts: Prompts) -> None:
        limit, vocabulary = self.model.max_positions, self.model.base.get_input_embeddings().weight.shape[0]
        rotation, new = by_length(self.model), self.sampling.max_new_tokens
        for uid, tokens in zip(prompts.ids, prompts.tokens, strict=True):
            blame = [("Responses", uid)]
            if not tokens:
                raise BadRows(f"prompt {uid}: has no tokens; give it at least a start token", blame)
            if min(tokens) < 0 or max(tokens) >= vocabulary:
                wrong = next(token for token in tokens if not 0 <= token < vocabulary)
                raise BadRows(
                    f"prompt {uid}: token {wrong} is not one of the model's {vocabulary}, 0 to {vocabulary - 1}; use"
                    " the model's own tokenizer",
                    blame,
                )
            if limit and len(tokens) + new > limit:
                raise BadRows(
                    f"prompt {uid}: {len(tokens)} tokens and max_new_tokens {new} are more than the model's {limit}"
                    " positions; lower sampling.max_new_tokens or data.max_prompt_tokens",
                    blame,
                )
            if rotation and len(tokens) + new > rotation.original:
                raise BadRows(
                    f"prompt {uid}: {len(tokens)} tokens and max_new_tokens {new} are more than the model's original"
                    f" {rotation.original} positions, after which its rotation ({rotation.kind}) depends on the length"
                    " of the text, and samples on their company; lower sampling.max_new_tokens or"
                    " data.max_prompt_tokens",
                    blame,
                )
