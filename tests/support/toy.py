"""A task that is learned in seconds: words of one letter, models of a few thousand weights, and their data.

The demonstrated answer repeats the prompt's letters ("a b c ." -> "a b c"); rankings and rewards prefer the letter "a".
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rlhf_fast.config.fields import DataConfig, KLConfig, LogConfig, ModelConfig, OptimConfig, SamplingConfig
from rlhf_fast.config.stages import PPOConfig, RewardConfig, SFTConfig

LETTERS = "abcdefgh"


def tokenizer(letters: str = LETTERS):
    """Return a tokenizer with one token a letter, `.`, an unknown and an end token, and no padding token."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", ".", *letters])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")


def model(folder: Path, kind: str = "llama", seed: int = 0, letters: str = LETTERS) -> str:
    """Write a random model with its tokenizer; return the folder's name."""
    words = tokenizer(letters)
    size = {"vocab_size": len(words), "bos_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(seed)
    if kind == "llama":
        shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
        net = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **shape, **size))
    else:
        net = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, **size))
    net.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(count: int, seed: int = 0) -> list[str]:
    """Return `count` different prompts of two to four letters and a full stop."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(rng.choices(LETTERS, k=rng.randint(2, 4))) + " ."] = None
    return list(found)


def demonstrations(path: Path, count: int = 64) -> str:
    return jsonl(path, [{"prompt": text, "completion": text.removesuffix(" .")} for text in prompts(count)])


def rankings(path: Path, count: int = 48) -> str:
    """Write rankings of up to 5 responses by their number of a's; equal numbers are tied."""
    rng = random.Random(1)
    rows = []
    for text in prompts(2 * count):
        sampled = (" ".join(rng.choices("aa" + LETTERS, k=rng.randint(2, 5))) for _ in range(20))
        answers = list(dict.fromkeys(sampled))[: rng.randint(2, 5)]
        order = sorted({-answer.count("a") for answer in answers})
        if len(order) < 2:
            continue
        rows.append({"prompt": text, "responses": answers, "ranks": [order.index(-a.count("a")) + 1 for a in answers]})
    return jsonl(path, rows[:count])


def texts(path: Path, count: int = 40) -> str:
    rng = random.Random(2)
    return jsonl(path, [{"text": " ".join(rng.choices(LETTERS + ".", k=30))} for _ in range(count)])


def prompt_file(path: Path, count: int = 40) -> str:
    return jsonl(path, [{"prompt": text} for text in prompts(count, seed=3)])


def assert_is_short(cfg: PPOConfig) -> None:
    """Check that a run which a page shows ends in minutes on a small model, and is no warm-up alone."""
    plain = PPOConfig()
    assert cfg.episodes <= 4096 and cfg.episodes * cfg.sampling.max_new_tokens <= 2**19
    for ours, default in ((cfg.optim, plain.optim), (cfg.value_optim, plain.value_optim)):
        assert 0 < ours.warmup_steps <= cfg.steps / 8
        assert replace(ours, warmup_steps=default.warmup_steps) == default


def share_of_a(texts: list[str]) -> list[float]:
    """Return a reward for each text: the share of the answer's words that are the letter a."""
    answers = [text.partition(".")[2].split() for text in texts]
    return [sum(word == "a" for word in answer) / max(len(answer), 1) for answer in answers]


def model_at(folder: Path, **options) -> str:
    """Return the folder's random model, written on first use."""
    return str(folder / "model") if (folder / "model").exists() else model(folder / "model", **options)


def sft(folder: Path, out: str = "sft", **changes) -> SFTConfig:
    """Return settings of a run of about 15 steps with every part of the stage in use."""
    return replace(
        SFTConfig(
            out=str(folder / out),
            model=ModelConfig(model_at(folder)),
            data=DataConfig(demonstrations(folder / "demonstrations.jsonl"), valid_fraction=0.1),
            pretrain=DataConfig(texts(folder / "texts.jsonl")),
            pretrain_fraction=0.2,
            optim=OptimConfig(lr=3e-3),
            log=LogConfig(checkpoint_every=3, samples=2, live=False),
            sampling=SamplingConfig(max_new_tokens=6),
            epochs=4,
            batch=16,
            residual_dropout=0.1,
        ),
        **changes,
    )


def reward(folder: Path, out: str = "reward", **changes) -> RewardConfig:
    """Return settings of a run of about 16 steps."""
    return replace(
        RewardConfig(
            out=str(folder / out),
            model=ModelConfig(model_at(folder)),
            data=DataConfig(rankings(folder / "rankings.jsonl", 96), valid_fraction=0.1),
            demonstrations=DataConfig(demonstrations(folder / "demonstrations.jsonl")),
            optim=OptimConfig(lr=3e-3),
            log=LogConfig(checkpoint_every=3, samples=2, live=False),
            epochs=3,
            batch=16,
        ),
        **changes,
    )


def ppo(folder: Path, out: str = "ppo", **changes) -> PPOConfig:
    """Return settings of a run of 6 batches of 2 optimizer steps each, with PPO-ptx and the adaptive KL controller."""
    schedule = {"schedule": "constant", "warmup_steps": 4}
    return replace(
        PPOConfig(
            out=str(folder / out),
            policy=ModelConfig(model_at(folder)),
            reward="toy:share_of_a",
            data=DataConfig(prompt_file(folder / "prompts.jsonl"), valid_fraction=0.1),
            pretrain=DataConfig(texts(folder / "texts.jsonl"), max_response_tokens=16),
            optim=OptimConfig(lr=2e-3, **schedule),
            value_optim=OptimConfig(lr=3e-3, **schedule),
            sampling=SamplingConfig(max_new_tokens=6),
            kl=KLConfig(coef=0.05, controller="adaptive", target=0.5, horizon=200),
            log=LogConfig(checkpoint_every=2, samples=2, live=False),
            episodes=6 * 16,
            batch=16,
            minibatch=8,
            ptx_coef=0.1,
            ptx_ratio=1,
            ema=0.9,
        ),
        **changes,
    )


def rows(path: Path) -> list[dict]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def metrics(run: Path) -> list[dict]:
    """Return the rows of a run's metrics.jsonl without their times, which differ between equal runs."""
    return [
        {name: value for name, value in row.items() if not name.startswith(("time/", "perf/"))}
        for row in rows(run / "metrics.jsonl")
    ]


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a causal language model's folder, as plain transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def same_weights(one: Path, other: Path) -> bool:
    """Return whether two such folders hold the same model to the bit."""
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(w, theirs[name]) for name, w in ours.items())
