"""A world small enough to learn in seconds: words of one letter, models of a few thousand weights, and data about them.

The demonstrated answer to a prompt repeats its letters ("a b c ." -> "a b c"); rankings and rewards like the letter "a".
"""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefgh"


def tokenizer(letters: str = LETTERS):
    """One token a letter, `.`, an unknown and an end token; no padding token."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", ".", *letters])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")


def model(folder: Path, kind: str = "llama", seed: int = 0, letters: str = LETTERS) -> str:
    """Writes a random model with its tokenizer; returns the folder's name."""
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
    """Different prompts of two to four letters and a full stop."""
    chance, found = random.Random(seed), {}
    while len(found) < count:
        found[" ".join(chance.choices(LETTERS, k=chance.randint(2, 4))) + " ."] = None
    return list(found)


def demonstrations(path: Path, count: int = 64) -> str:
    return jsonl(path, [{"prompt": text, "completion": text.removesuffix(" .")} for text in prompts(count)])


def rankings(path: Path, count: int = 48, least: int = 2, most: int = 5) -> str:
    """Ragged rankings by the number of a's, equal numbers tied."""
    chance, rows = random.Random(1), []
    for text in prompts(count):
        drawn = (" ".join(chance.choices("aa" + LETTERS, k=chance.randint(2, 5))) for _ in range(20))
        answers = list(dict.fromkeys(drawn))[: chance.randint(least, most)]
        order = sorted({-answer.count("a") for answer in answers})
        rows.append({"prompt": text, "responses": answers, "ranks": [order.index(-a.count("a")) + 1 for a in answers]})
    return jsonl(path, rows)


def texts(path: Path, count: int = 40) -> str:
    chance = random.Random(2)
    return jsonl(path, [{"text": " ".join(chance.choices(LETTERS + ".", k=30))} for _ in range(count)])


def prompt_file(path: Path, count: int = 40) -> str:
    return jsonl(path, [{"prompt": text} for text in prompts(count, seed=3)])


def share_of_a(texts: list[str]) -> list[float]:
    """A reward: how much of the answer is the letter a."""
    answers = [text.partition(".")[2].split() for text in texts]
    return [sum(word == "a" for word in answer) / max(len(answer), 1) for answer in answers]
