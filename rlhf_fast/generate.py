"""`rlhf-fast generate`: responses of a model to a file of prompts, as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rlhf_fast.config import DataConfig, ModelConfig
from rlhf_fast.data import read_prompts
from rlhf_fast.errors import SHOWN, UserError, naming, writing
from rlhf_fast.model import Model
from rlhf_fast.options import GenerateOptions
from rlhf_fast.rollout import Rollout


def generate(options: GenerateOptions) -> int:
    """Writes the responses batch by batch and returns how many there are."""
    device = None if options.device == "auto" else options.device
    model = Model.load(ModelConfig(path=options.model, dtype=options.dtype), device=device)
    room = model.max_positions - options.sampling.max_new_tokens if model.max_positions else 0
    if model.max_positions and room < 1:
        raise UserError(
            f"generate: max_new_tokens is {options.sampling.max_new_tokens}, but {options.model} has only"
            f" {model.max_positions} positions, prompt included; give a smaller --max-new-tokens"
        )
    cfg = DataConfig(
        path=options.prompts, limit=options.limit, template=options.template, columns=options.columns,
        max_prompt_tokens=sys.maxsize,
    )  # fmt: skip
    prompts = read_prompts(cfg, model.tokenizer).train
    long = [row.place for row in prompts.rows if room and len(row.prompt) > room]
    if long:
        shown = ", ".join(long[:SHOWN]) + (", ..." if len(long) > SHOWN else "")
        raise UserError(
            f"generate: {len(long)} of {len(prompts)} prompts are over the {room} tokens that max_new_tokens"
            f" {options.sampling.max_new_tokens} leaves of {model.max_positions} positions; give a smaller"
            f" --max-new-tokens or remove them ({shown})"
        )
    print(f"generate: {prompts.notes}", file=sys.stderr)
    rollout, written = Rollout(model, options.sampling, options.seed), 0
    with _target(options.out) as stream:
        for batch in prompts.in_order(max(options.sampling.batch // options.n, 1)):
            with naming(Responses=prompts.place):
                responses = rollout.generate(batch, options.n)
            texts = model.tokenizer.batch_decode(responses.response_ids(), skip_special_tokens=True)
            sums = (responses.logprobs * responses.mask).sum(1).tolist()
            sizes = (responses.lengths - responses.prompt_lengths).tolist()
            ended = responses.finished.tolist()
            for i, (text, size, end, logprob) in enumerate(zip(texts, sizes, ended, sums, strict=True)):
                row = {"prompt": batch.texts[i // options.n], "completion": text, "tokens": size, "finished": end}
                stream.write(json.dumps(row | {"logprob": logprob}, ensure_ascii=False) + "\n")
                written += 1
            stream.flush()
    return written


@contextmanager
def _target(out: str) -> Iterator[TextIO]:
    if out == "-":
        yield sys.stdout
        return
    with writing(out), open(out, "w", encoding="utf-8") as stream:
        yield stream
