"""A Llama of a few thousand weights in memory, as policy or as scorer, and gradients of a loss on it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.model.model import Model

VOCABULARY = 61
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": None,
}  # fmt: skip


def policy(dtype=torch.float32):
    return Model(LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype), cfg=ModelConfig("toy"))


def scorer():
    return Model(LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1)), head="scalar")


def gradients(model, loss):
    """Return the gradient of a loss by parameter name."""
    model.module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.trainable().items() if p.grad is not None}


def assert_same_gradients(ours, theirs, rtol=1e-4, atol=1e-6):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=rtol, atol=atol, msg=name)
