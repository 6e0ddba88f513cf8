"""A tiny random model of any architecture of transformers, from its own default config."""

import inspect
from typing import Any

import torch
from transformers import PreTrainedConfig

SIZES = {
    "vocab_size": 67, "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "embedding_size": 32,
    "intermediate_size": 48, "ffn_dim": 48, "ffn_hidden_size": 48, "n_inner": 48, "d_ff": 48, "d_inner": 48,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "expert_ffn_hidden_size": 16,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 1, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "attention_heads": 4, "num_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "n_positions": 64,
    "max_seq_len": 64, "context_length": 64, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "rotary_dim": 4,
    "sliding_window": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "state_size": 8, "chunk_size": 8, "n_groups": 1,
    "mamba_d_ssm": 64, "attention_hidden_size": 32, "image_size": 28, "patch_size": 14, "vision_config": None,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 67, "word_embed_proj_dim": 32,
    "ffn_config": None, "global_head_dim": 8, "num_global_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}


def shrunken(kind: type[PreTrainedConfig], depth: int = 0, **changes: Any) -> PreTrainedConfig:
    """Return a config of a few thousand weights: the class's sizes replaced, its sub-configs shrunken too."""
    names = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__annotations__", {}))
    for parent in kind.__mro__:
        names |= set(vars(parent).get("__annotations__", {}))
    mapped = {short: common for common, short in getattr(kind, "attribute_map", {}).items()}
    values = {}
    for name in names | set(mapped):
        if name in SIZES and SIZES[name] is not None:
            values[name] = SIZES[name]
        elif mapped.get(name) in SIZES and SIZES[mapped[name]] is not None:
            values[name] = SIZES[mapped[name]]
        elif name in TOKENS:
            values[name] = TOKENS[name]
    if "kv_lora_rank" in names:  # latent attention has as many heads of keys as of queries
        values |= {"num_key_value_heads": 4}
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        if depth < 3 and isinstance(part, type) and hasattr(part, "sub_configs") and part.__name__ != "AutoConfig":
            values[name] = shrunken(part, depth + 1).to_dict()
    config = kind(**{**values, **changes})
    for place in (config, config.get_text_config()):
        for name, value in TOKENS.items():
            setattr(place, name, value)
    return config


def count_weights(kind: type, config: PreTrainedConfig) -> int:
    """Return the number of weights of the architecture, without making them."""
    with torch.device("meta"):
        return sum(p.numel() for p in kind(config).parameters())
