"""Rollouts: greedy decoding against transformers, log-probabilities against one forward pass, ends, seeds, company."""

import os
from pathlib import Path

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlhf_fast.batches import Prompts
from rlhf_fast.config import ModelConfig, SamplingConfig
from rlhf_fast.errors import UserError
from rlhf_fast.model import Model
from rlhf_fast.rollout import Rollout

DATA = Path(os.environ.get("RLHF_FAST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
STORIES = DATA / "models" / "stories260K"
END = 2
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1,
    "eos_token_id": END, "initializer_range": 0.3,
}  # fmt: skip
GPT = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
MODULES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT, bos_token_id=1, eos_token_id=END)),
    "mistral, sliding window": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, sliding_window=4)),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(
            vocab_size=61,
            hidden_size=32,
            n_layer=2,
            n_head=4,
            eos_token_id=END,
            pad_token_id=None,
            initializer_range=0.3,
        )  # fmt: skip
    ),
}


def prompts(*lengths, uids=None):
    tokens = [torch.randint(3, 61, (length,)).tolist() for length in lengths]
    return Prompts(uids or list(range(100, 100 + len(lengths))), tokens, [""] * len(lengths))


def llama(**config):
    return Model(LlamaForCausalLM(LlamaConfig(**{**SMALL, **config})))


def sampling(**settings):
    return SamplingConfig(**{"max_new_tokens": 12, **settings})


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_greedy_is_transformers_generate(make):
    """Ragged prompts in one batch, each against generate() alone."""
    model, batch = Model(make()), prompts(1, 7, 3, 12)
    found = Rollout(model, sampling(temperature=0.0)).generate(batch).response_ids()
    for tokens, response in zip(batch.tokens, found, strict=True):
        alone = model.module.generate(torch.tensor([tokens]), do_sample=False, max_new_tokens=12, pad_token_id=0)
        assert response == alone[0, len(tokens) :].tolist()


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no model at {STORIES}")
def test_greedy_story_is_the_authors():
    model = Model.load(ModelConfig(str(STORIES)))
    golden = (STORIES / "golden_greedy.txt").read_text()
    story = Prompts([0], [[model.tokenizer.bos_token_id]], [""])
    response = Rollout(model, SamplingConfig(temperature=0.0, max_new_tokens=256)).generate(story).response_ids()[0]
    text = model.tokenizer.decode(response).strip()
    assert len(response) > 100 and text[:600] == golden.strip()[:600]


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
@torch.no_grad()
def test_logprobs_are_those_of_one_forward_pass(make):
    """The first PPO step's ratio is 1 (W, L10): sampled in company, compared to the training forward."""
    model = Model(make())
    responses = Rollout(model, sampling(temperature=0.7, top_k=20)).generate(prompts(1, 7, 3, 12), samples=3)
    for temperature, theirs in [(0.7, responses.logprobs), (1.0, responses.raw_logprobs)]:
        ours, entropy = model.logprobs(responses.tokens, responses.prompt_lengths, responses.lengths, temperature)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
        if temperature == 0.7:
            torch.testing.assert_close(responses.entropy, entropy, rtol=0, atol=1e-5)
    assert (responses.kept_logprobs >= responses.logprobs - 1e-6).all()
    assert (responses.logprobs[~responses.mask] == 0).all() and (responses.logprobs[responses.mask] < 0).all()


@torch.no_grad()
def test_bfloat16_logprobs_are_near_one_forward_pass():
    """Their head is float32 from the accumulator on: the rest is rounding inside the layers, a few 1e-2 nats."""
    model = Model(MODULES["llama"]().bfloat16())
    responses = Rollout(model, sampling()).generate(prompts(1, 7, 3, 12), samples=8)
    ours, _ = model.logprobs(responses.tokens, responses.prompt_lengths, responses.lengths)
    gap = (ours - responses.logprobs)[responses.mask].abs()
    assert gap.mean() < 0.03 and gap.max() < 0.5
    assert responses.logprobs.dtype == torch.float32


def test_a_sample_does_not_depend_on_its_company():
    model, batch = llama(), prompts(2, 9, 5, 3, 6, 11, 4)
    whole = Rollout(model, sampling(batch=64), seed=5).generate(batch, samples=2)
    rows = whole.response_ids()
    for size in (1, 3, 7):
        assert Rollout(model, sampling(batch=size), seed=5).generate(batch, samples=2).response_ids() == rows
    order = [4, 0, 6, 2, 1, 5, 3]
    shuffled = Rollout(model, sampling(), seed=5).generate(batch.take(order), samples=2)
    assert shuffled.response_ids() == [rows[2 * i + k] for i in order for k in (0, 1)]
    assert shuffled.uids.tolist() == [batch.ids[i] for i in order for _ in (0, 1)]
    torch.testing.assert_close(shuffled.logprobs[0], whole.logprobs[8, : shuffled.mask.shape[1]], rtol=0, atol=1e-5)


def test_seed_step_and_uid_make_the_noise():
    model, batch = llama(eos_token_id=None), prompts(4, 4)
    first = Rollout(model, sampling(), seed=1).generate(batch, samples=2)
    rows = first.response_ids()
    assert len({tuple(row) for row in rows}) == 4
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert Rollout(model, sampling(), seed=1).generate(batch, samples=2).response_ids() == rows
    assert torch.equal(torch.get_rng_state(), state)
    for seed, step, uids in [(2, 0, batch.ids), (1, 1, batch.ids), (1, 0, [7, 8])]:
        other = Rollout(model, sampling(), seed=seed).generate(batch._replace(ids=uids), samples=2, step=step)
        assert all(a != b for a, b in zip(other.response_ids(), rows, strict=True))


def always(token: int, **config) -> Model:
    """A model that says `token` whatever it reads."""
    model = llama(**config)
    with torch.no_grad():
        model.module.lm_head.weight.zero_()
        model.module.model.norm.weight.zero_()
        model.module.lm_head.bias = torch.nn.Parameter(torch.zeros(61))
        model.module.lm_head.bias[token] = 50.0
    return model


def test_ends():
    batch = prompts(3, 5)
    batch.tokens[0][1] = END
    over = Rollout(always(END), sampling()).generate(batch)
    assert over.response_ids() == [[END], [END]] and over.finished.all()
    assert over.lengths.tolist() == [4, 6] and over.mask.shape == (2, 1)
    never = Rollout(always(9), sampling()).generate(batch)
    assert never.response_ids() == [[9] * 12] * 2 and not never.finished.any()
    several = always(9)
    several.module.generation_config.eos_token_id = [7, 9]
    assert Rollout(several, sampling()).generate(batch).response_ids() == [[9], [9]]
    padding = always(END)
    padding.module.config.pad_token_id = END
    assert Rollout(padding, sampling()).generate(batch).response_ids() == [[END], [END]]


def test_end_token_at_the_last_allowed_place_counts():
    late = Rollout(always(END), sampling(min_new_tokens=2, max_new_tokens=3)).generate(prompts(3))
    response = late.response_ids()[0]
    assert response[2] == END and END not in response[:2] and late.finished.all()


def test_min_new_tokens_leaves_the_reported_logprobs_alone():
    """The trainer's forward knows of no ban, so neither may the log-probabilities; the kept ones do."""
    model = always(END)
    with torch.no_grad():
        model.module.lm_head.bias.zero_()
    responses = Rollout(model, sampling(min_new_tokens=12)).generate(prompts(3, 6))
    assert not responses.finished.any()
    uniform, without_end = -torch.tensor(61.0).log(), -torch.tensor(60.0).log()
    torch.testing.assert_close(responses.logprobs, uniform.expand(2, 12), rtol=0, atol=1e-5)
    torch.testing.assert_close(responses.kept_logprobs, without_end.expand(2, 12), rtol=0, atol=1e-5)


class Letters:
    """A tokenizer whose token i is one letter."""

    eos_token_id = END

    def batch_decode(self, rows):
        return ["".join(chr(ord("a") + token % 26) for token in row) for row in rows]


def test_stop_text_ends_a_response_and_stays_in_it():
    model = always(27)
    model.tokenizer = Letters()
    responses = Rollout(model, sampling(stop=("bbb",))).generate(prompts(3, 5))
    assert responses.response_ids() == [[27] * 3] * 2 and responses.finished.all()
    assert not Rollout(model, sampling(stop=("bab",))).generate(prompts(3)).finished.any()


def test_weights_are_read_in_place_and_the_mode_is_kept():
    model, batch = llama(eos_token_id=None), prompts(4)
    rollout = Rollout(model, sampling(temperature=0.0))
    model.module.train()
    before = rollout.generate(batch).response_ids()
    assert model.module.training
    with torch.no_grad():
        for p in model.module.parameters():
            p.mul_(-1)
    assert rollout.generate(batch).response_ids() != before
    hidden = model.hidden(torch.tensor(batch.tokens))
    hidden.sum().backward()
    assert all(p.grad is not None for name, p in model.module.named_parameters() if "lm_head" not in name)


def test_what_cannot_be_sampled_is_said():
    with pytest.raises(UserError, match="prompt 102: has no tokens"):
        Rollout(llama(), sampling()).generate(prompts(2, 3, 0))
    with pytest.raises(UserError, match="prompt 100: 60 tokens and max_new_tokens 12 are more than the model's 64"):
        Rollout(llama(), sampling()).generate(prompts(60))
    with pytest.raises(UserError, match="stop texts need a tokenizer"):
        Rollout(llama(), sampling(stop=("x",)))


def test_a_model_gone_astray_is_said():
    model = llama()
    with torch.no_grad():
        model.module.lm_head.weight[5] = float("nan")
    with pytest.raises(UserError, match="token 1 of the response to prompt 100: the model gives NaN"):
        Rollout(model, sampling()).generate(prompts(3, 4))


def test_no_prompts_give_no_responses():
    responses = Rollout(llama(), sampling()).generate(prompts())
    assert responses.tokens.shape == (0, 0) and responses.response_ids() == []
