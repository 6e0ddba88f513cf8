"""Shapes of known models, with random weights made on the device itself: the whole-program benches load no files."""

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from rlhf_fast.model.model import Head, Model

COMMON = {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SMOLLM2_135M = COMMON | {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
}  # fmt: skip
LLAMA_1B = COMMON | {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}  # fmt: skip
STORIES_260K = COMMON | {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 512, "rope_theta": 10000.0,
}  # fmt: skip
TINY = SMOLLM2_135M | {
    "vocab_size": 97, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 256,
}  # fmt: skip
SHAPES = {"135M": SMOLLM2_135M, "1B": LLAMA_1B}


def random_model(shape: dict, device: str, dtype: torch.dtype, head: Head = "lm", seed: int = 0) -> Model:
    """Return a model of a shape with random weights. No end token is known, so every response has the full length."""
    torch.manual_seed(seed)
    auto, labels = AutoModelForCausalLM, {}
    if head == "scalar":
        auto, labels = AutoModelForSequenceClassification, {"num_labels": 1}
    with torch.device(device):
        module = auto.from_config(LlamaConfig(**shape, **labels), dtype=dtype, attn_implementation="sdpa")
    return Model(module.to(device), head=head)


def step_bytes(shape: dict, weights: int, batch: int, context: int, itemsize: int) -> int:
    """Return the bytes that a decode step must read: the weights, and the keys and values of each row's context."""
    cached = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"] * itemsize
    return weights + cached * batch * context


def prefill_flops(shape: dict, batch: int, length: int) -> float:
    """Return the operations of prefill: the layers' products for each token, and causal attention."""
    D, heads, d = shape["hidden_size"], shape["num_attention_heads"], shape["head_dim"]
    layer = D * d * (2 * heads + 2 * shape["num_key_value_heads"]) + 3 * D * shape["intermediate_size"]
    attention = 4 * heads * d * length * (length + 1) / 2
    return batch * shape["num_hidden_layers"] * (2.0 * layer * length + attention)
