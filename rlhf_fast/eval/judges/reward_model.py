"""A judge of pairs by a reward model: the answer with the higher score is better, equal scores are a tie."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rlhf_fast.batches import Demonstrations, pad_rows
from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.data.encode import Encoder
from rlhf_fast.data.fields import InvalidRow
from rlhf_fast.errors import UserError
from rlhf_fast.eval.judges.functions import check_numbers
from rlhf_fast.eval.judges.protocol import Validation
from rlhf_fast.model.model import Model
from rlhf_fast.run.outputs import read_run
from rlhf_fast.run.prompt_format import model_prompt_format
from rlhf_fast.training.micro_batches import micro_batches


class RewardModelJudge:
    """Scores each answer once, in the form of prompts that the reward model has learned; both orders agree.

    A pair has no judgement (NaN) if the prompt and an answer are more tokens than the model has positions.

    scores: (prompt, answer) -> score, of all answers that were asked for.
    """

    def __init__(self, model: Model, path: str = "", micro_batch_tokens: int = 8192):
        self.model, self.name, self.micro_batch_tokens = model, path or model.name, micro_batch_tokens
        self.validation: Validation | None = None
        self.scores: dict[tuple[str, str], float] = {}
        prompt_format, _ = model_prompt_format(self.name, model.tokenizer, "auto", "judge.preference", strict=False)
        self.encoder = Encoder(
            model.tokenizer, prompt_format.template, learned_end_tokens(self.name), prompt_format.date
        )

    @classmethod
    def load(cls, cfg: ModelConfig, device: str | torch.device | None = None) -> RewardModelJudge:
        """Return the judge of a reward model's folder."""
        return cls(Model.load(cfg, head="scalar", device=device), cfg.path)

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        scores = self.answer_scores([*prompts, *prompts], [*first, *second])
        pairs = zip(scores[: len(prompts)], scores[len(prompts) :], strict=True)
        return [_winner(one, other) for one, other in pairs]

    def answer_scores(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Return the reward model's score of each answer. NaN for one that is too long for it."""
        keys = list(zip(prompts, answers, strict=True))
        new = [key for key in dict.fromkeys(keys) if key not in self.scores]
        encoded = dict(zip(new, (self._encode(*key) for key in new), strict=True))
        limit = self.model.max_positions or math.inf
        short = {key: found for key, found in encoded.items() if len(found[0]) <= limit}
        self.scores |= dict.fromkeys(new, math.nan)
        if short:
            found = check_numbers(self._run(list(short.values())), self.name, [prompt for prompt, _ in short])
            self.scores |= dict(zip(short, found, strict=True))
        return [self.scores[key] for key in keys]

    @torch.no_grad()
    def _run(self, encoded: Sequence[tuple[list[int], int]]) -> list[float]:
        tokens, lengths = pad_rows([ids for ids, _ in encoded])
        batch = Demonstrations(tokens, torch.tensor([length for _, length in encoded]), lengths)
        scores = torch.zeros(len(encoded))
        for index, part in micro_batches(batch, self.micro_batch_tokens, packed=lambda: self.model.packs_rows):
            scores[index] = self.model.last_scores(part.tokens, part.lengths, part.prompt_lengths).cpu()
        return scores.tolist()

    def _encode(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """Return the tokens of prompt and answer, and the prompt's number of tokens."""
        try:
            before, after = self.encoder.prompt(prompt)[0], self.encoder.response(answer)
        except InvalidRow as error:
            raise UserError(f"judge {self.name}: cannot read the prompt {prompt[:60]!r}: {error}") from error
        return before + after, len(before)


def _winner(first: float, second: float) -> float:
    """Return 1.0, 0.5 or 0.0 for the larger of two scores, and NaN where one is missing."""
    if math.isnan(first + second):
        return math.nan
    return 0.5 if first == second else float(first > second)


def learned_end_tokens(path: str) -> bool:
    """Return whether the run that wrote a reward model ended its answers with an end token."""
    try:
        data = read_run(path).get("config", {}).get("data", {})
    except UserError:  # a folder of another program
        return True
    return bool(data.get("append_eos", True)) if isinstance(data, dict) else True
