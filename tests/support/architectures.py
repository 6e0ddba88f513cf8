"""Small random models of many architectures, with odd shapes, and prompts for them."""

import torch
import transformers as t

from rlhf_fast.batches import Prompts
from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.model.model import Model

END, V = 2, 61
SMALL = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1,
    "eos_token_id": END, "initializer_range": 0.3,
}  # fmt: skip
GPT = {
    "vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": END,
}  # fmt: skip


def build(name: str, shape: dict = SMALL, **changes):
    """Return a function that makes the module. `name` is transformers' prefix of Config and ForCausalLM."""

    def make():
        kind = getattr(t, f"{name}ForCausalLM", None) or getattr(t, f"{name}LMHeadModel")
        config = getattr(t, f"{name}TextConfig", None) or getattr(t, f"{name}Config")
        return kind(config(**{**shape, **changes}))

    return make


SERVED = {
    "llama": build("Llama"),
    "llama, one head of keys": build("Llama", num_key_value_heads=1, head_dim=10, tie_word_embeddings=True),
    "llama, as many heads of keys": build("Llama", num_key_value_heads=4, attention_bias=True),
    "llama, scaled rotation": build(
        "Llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    ),
    "mistral, sliding window": build("Mistral", sliding_window=4),
    "mixtral": build("Mixtral"),
    "qwen2": build("Qwen2"),
    "qwen3": build("Qwen3", head_dim=8),
    "gemma": build("Gemma", head_dim=8),
    "gemma2, soft caps": build("Gemma2", head_dim=8, sliding_window=4),
    "gemma3, sliding window": build("Gemma3", head_dim=8, sliding_window=4),
    "phi": build("Phi"),
    "phi3": build("Phi3"),
    "gpt2": build("GPT2", GPT),
    "gpt2, scaled by layer": build("GPT2", GPT, scale_attn_by_inverse_layer_idx=True),
    "gpt_bigcode": build("GPTBigCode", GPT),
    "gpt_neox": build("GPTNeoX"),
    "opt": build("OPT"),
    "smollm3": build("SmolLM3"),
    "olmo2": build("Olmo2"),
    "granite": build("Granite"),
    "starcoder2": build("Starcoder2"),
    "cohere": build("Cohere"),
    "glm4": build("Glm4"),
    "exaone4, sliding window": build("Exaone4", sliding_window=4),
    "persimmon": build("Persimmon"),
}
"""Models that the attention decoder must serve."""
REFUSED = {
    "stablelm": (build("StableLm"), "its layers drop keyword arguments on the way to the attention"),
    "gptj": (build("GPTJ", GPT, rotary_dim=4), "make 0 calls of transformers' attention interface"),
    "bloom": (
        build("Bloom", {k: v for k, v in SMALL.items() if "position" not in k}, n_layer=2, n_head=4),
        "positions",
    ),
    "gpt_oss": (build("GptOss", head_dim=8), "its attention asks for s_aux"),
    "diffllama": (build("DiffLlama"), "its 2 layers make 4 calls"),
    "minimax": (build("MiniMax"), "its 2 layers make 1 calls"),
}
"""Models that it must refuse, and the reason."""


def prompts(*lengths: int, uids: list[int] | None = None) -> Prompts:
    """Return random prompts without special tokens, with uids from 100."""
    tokens = [torch.randint(3, V, (length,)).tolist() for length in lengths]
    return Prompts(uids or list(range(100, 100 + len(lengths))), tokens, [""] * len(lengths))


def llama(**config) -> Model:
    return Model(build("Llama", **config)())


def sampling(**settings) -> SamplingConfig:
    return SamplingConfig(**{"max_new_tokens": 12, **settings})


def greedy(module, tokens: list[int], count: int = 12) -> list[int]:
    """Return transformers' own greedy response to one prompt."""
    ids = torch.tensor([tokens], device=module.device)
    return module.generate(ids, do_sample=False, max_new_tokens=count, pad_token_id=0)[0, len(tokens) :].tolist()
