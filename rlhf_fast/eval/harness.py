"""Our scorer and rollout as a model of EleutherAI's lm-eval, which has hundreds of tasks more.

    python -m rlhf_fast.eval.harness run --model rlhf_fast --model_args pretrained=runs/ppo --tasks hellaswag

runs lm-eval's own command with this model in it. Versions of lm-eval that look for the entry point `lm_eval.models`
(after 0.4.13) find it by themselves. Encoding and results are those of lm-eval's `hf` model in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from rlhf_fast.batches import Prompts
from rlhf_fast.config.fields import ModelConfig, SamplingConfig
from rlhf_fast.errors import UserError
from rlhf_fast.eval.encoding import Encoder
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.scoring import Scorer

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    MISSING = "rlhf_fast.eval.harness needs lm-eval, which is not installed: pip install lm-eval"
    if __name__ == "__main__":
        sys.exit(f"error: {MISSING}")
    raise UserError(MISSING) from error

MAX_LENGTH = 2048
"""Tokens of a window of text, for a model without a limit of positions."""
MAX_NEW_TOKENS = 256
"""New tokens where a task does not say how many, as lm-eval's `hf` model."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""lm-eval's names of the number of new tokens. The first of them that a task has counts."""
FILTERS = ("top_p", "top_k", "min_p")
"""Settings of sampling that a task's `generation_kwargs` and ours call by the same name."""
WITHOUT_EFFECT = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "length_penalty": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "no_repeat_ngram_size": 0,
    "typical_p": 1,
    "min_length": 0,
    "early_stopping": False,
    "use_cache": True,
}
"""Settings that a task may have at these values alone."""


@register_model("rlhf_fast")
class RlhfFastLM(TemplateLM):
    """A model folder of ours or of transformers.

    pretrained: the folder or hub name. dtype: of weights and activations. batch_size: responses generated at a time;
    scores do not need one. device: "cpu" or "cuda", the default is a GPU where there is one; without one it is the CPU.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str,
        dtype: Any = "float32",
        batch_size: int | str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self._rank, self._world_size = 0, 1
        cfg = ModelConfig(path=pretrained, dtype=dtype, trust_remote_code=trust_remote_code)
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"  # lm-eval asks for cuda:0 where nobody names a device
        self.model = Model.load(cfg, device=device)
        self.tokenizer = self.model.tokenizer
        self.encoder = Encoder(self.tokenizer, self.model.max_positions)
        self.scorer = Scorer(self.model)
        self.batch = next(int(size) for size in map(str, (batch_size, max_batch_size, 64)) if size.isdigit())

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that an empty context is: bos, else eos."""
        return self.encoder.start

    @property
    def max_length(self) -> int:
        return self.model.max_positions or MAX_LENGTH

    @property
    def tokenizer_name(self) -> str:
        return self.model.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text."""
        return self.encoder.ids(string, add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return log-probability and greedy flag of each continuation. Long contexts are cut on the left."""
        pairs = [(self.encoder.cut(context, len(answer) - 1), answer) for _text, context, answer in requests]
        found = [(score.logprob, score.greedy) for score in self.scorer(pairs)]
        for request, answer in zip(requests, found, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """Return the log-probability of whole texts, in windows that have as much context as fits."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            parts = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            found = [utils.make_disjoint_window(part) for part in parts]
            windows += found
            owners += [i] * len(found)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self.scorer(windows), strict=True):
            totals[owner] += score.logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """Return the answers up to the first of the task's stop texts, without it."""
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for members in alike.values():
            settings = requests[members[0]].args[1]
            sampling = self._sampling(settings)
            tokens = [
                self.encoder.cut(
                    self.tok_encode(requests[i].args[0]) or [self.prefix_token_id], sampling.max_new_tokens
                )
                for i in members
            ]
            responses = Rollout(self.model, sampling).generate(Prompts(members, tokens, [""] * len(members)))
            for i, text in zip(members, responses.texts(self.tokenizer), strict=True):
                for stop in sampling.stop:
                    text = text.split(stop)[0]
                answers[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return answers

    def _sampling(self, settings: dict[str, Any]) -> SamplingConfig:
        """Return a task's `generation_kwargs` as our settings, by the rules of lm-eval's `normalize_gen_kwargs`.

        Without do_sample, a temperature above 0 samples; do_sample: false is greedy at any temperature. UserError for
        sampling at temperature 0, as transformers has, and for what a rollout does not do.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        _check_supported(given)
        until = given.get("until") or ()
        stop = tuple(filter(None, [until] if isinstance(until, str) else until))
        name = next((name for name in LENGTHS if name in given), LENGTHS[0])
        wanted = int(given.get(name, MAX_NEW_TOKENS))
        if wanted >= self.max_length:
            raise UserError(f"{name} {wanted} leaves no room in {self.max_length} positions; give a smaller one")
        greedy = SamplingConfig(
            temperature=0.0,
            max_new_tokens=wanted,
            min_new_tokens=int(given.get("min_new_tokens", 0)),
            stop=stop,
            batch=self.batch,
        )
        temperature = float(given.get("temperature", 0.0))
        if not given.get("do_sample", temperature > 0):
            return greedy
        if not temperature:
            raise UserError("do_sample is true and temperature is 0; give a temperature above 0, or do_sample false")
        filters = {name: given[name] for name in FILTERS if name in given}
        return replace(greedy, temperature=temperature, **filters)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the tokenizer's chat template writes it."""
        if not self.tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template; run without --apply_chat_template")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )


def _check_supported(settings: dict[str, Any]) -> None:
    """Raise UserError for settings of generation that would be dropped."""
    if "max_length" in settings:
        raise UserError("max_length counts the tokens of the prompt too; give max_gen_toks, the number of new ones")
    known = {"until", "do_sample", "temperature", "min_new_tokens", *LENGTHS, *FILTERS}
    for name, value in settings.items():
        if name not in known and (name not in WITHOUT_EFFECT or value != WITHOUT_EFFECT[name]):
            raise UserError(f"generation_kwargs: {name}: {value} is not supported; leave it out, or use --model hf")


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
