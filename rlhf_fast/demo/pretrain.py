"""Pretrain the two base models that come with the package: `python -m rlhf_fast.demo.pretrain small out/small`.

Both learn next-word prediction on new documents of the raw web of world 0 (corpus.py) and are saved in bfloat16. The
small one reads 5 million words in about 4 minutes of one core. The large one reads only 1 million, in about 10 minutes,
and so ends at a held-out loss of 0.777 nats per word, against 0.748.
"""

import argparse
import logging
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_fast.batches import Texts, pad_rows
from rlhf_fast.config.fields import OptimConfig
from rlhf_fast.demo.corpus import Web
from rlhf_fast.demo.world import World
from rlhf_fast.model.model import Model
from rlhf_fast.training.learner import Learner, evaluate
from rlhf_fast.training.losses import pretrain_loss

WORLD_SEED = 0  # seed of the world on whose web the models are trained
POSITIONS = 128
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 2, "num_attention_heads": 4},
    "large": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 8},
}
STEPS = {"small": 2500, "large": 1000}
LEARNING_RATES = {"small": 3e-3, "large": 2e-3}
BATCH_TOKENS = {"small": 2048, "large": 1024}
VALID_MICRO_BATCH = 4096


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each word of the world's web."""
    web = Web(World(WORLD_SEED), random.Random("vocabulary"))
    words = sorted({word for _ in range(20_000) for word in web.document().split()})
    special = {"eos_token": "<|end|>", "pad_token": "<|pad|>", "unk_token": "<|unknown|>"}
    vocabulary = {word: i for i, word in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **special)


def make_model(size: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Model:
    """Return an untrained Llama of that size."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPES[size],
    )
    return Model(LlamaForCausalLM(config), tokenizer)


def text_batches(web: Web, tokenizer: PreTrainedTokenizerFast, documents: int, tokens: int) -> list[Texts]:
    """Return new documents in shuffled batches of at most `tokens` with padding, each of similar lengths."""
    rows = tokenizer([web.document() for _ in range(documents)]).input_ids
    rows = sorted(([*row, tokenizer.eos_token_id] for row in rows), key=len)
    batches: list[list[list[int]]] = [[]]
    for row in rows:
        if (len(batches[-1]) + 1) * len(row) > tokens:
            batches.append([])
        batches[-1].append(row)
    web.rng.shuffle(batches)
    return [Texts(*pad_rows(batch)) for batch in batches if batch]


def pretrain(size: str, out: str | Path, steps: int = 0, seed: int = 0) -> float:
    """Train from scratch, save a bfloat16 folder, and return the held-out loss in nats per token."""
    tokenizer = make_tokenizer()
    model = make_model(size, tokenizer, seed)
    steps = steps or STEPS[size]
    held = text_batches(Web(World(WORLD_SEED), random.Random("held out")), tokenizer, 400, VALID_MICRO_BATCH)
    web = Web(World(WORLD_SEED), random.Random(f"pretraining {seed}"))
    optim = OptimConfig(lr=LEARNING_RATES[size], warmup_steps=min(50, steps // 4), final_ratio=0.05, weight_decay=0.01)
    learner = Learner(model, optim, steps)
    batches: list[Texts] = []
    start = time.perf_counter()
    for step in range(1, steps + 1):
        batches = batches or text_batches(web, tokenizer, 4000, BATCH_TOKENS[size])
        learner.step([(pretrain_loss, batches.pop(), 1.0)])
        if step % max(steps // 10, 1) == 0:
            loss = evaluate(model, pretrain_loss, held, VALID_MICRO_BATCH)["loss/pretrain"]
            logging.info("%s %d/%d: loss %.4f, %.0f s", size, step, steps, loss, time.perf_counter() - start)
    model.module.to(torch.bfloat16)
    model.save(out)
    return evaluate(model, pretrain_loss, held, VALID_MICRO_BATCH)["loss/pretrain"]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Pretrain one of the demo's base models on the raw web of its world.")
    parser.add_argument("size", choices=list(SHAPES))
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=0, help="0 = as many as for the shipped model")
    parser.add_argument("--seed", type=int, default=0, help="seed for the weights and the documents")
    arguments = parser.parse_args()
    pretrain(arguments.size, arguments.out, arguments.steps, arguments.seed)
