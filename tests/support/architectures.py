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
    """Return a function that makes the module. `name` is transformers' prefix of Config and ForCausalLM.

    A wider module gets smaller weights. Those of the shape's own width would make its float32 forward ill-conditioned:
    two correct orders of sums then differ by more than the decoders' check against the module allows."""
    if "hidden_size" in changes:
        widening = changes["hidden_size"] / shape["hidden_size"]
        changes.setdefault("initializer_range", shape["initializer_range"] / max(1, widening))

    def make():
        kind = getattr(t, f"{name}ForCausalLM", None) or getattr(t, f"{name}LMHeadModel")
        config = getattr(t, f"{name}TextConfig", None) or getattr(t, f"{name}Config")
        return kind(config(**{**shape, **changes}))

    return make


def halved(module: torch.nn.Module) -> torch.nn.Module:
    """Halve the weights of a module. Attention over larger ones is so sharp that the rounding of bfloat16
    is enlarged, and that the gradients of two correct passes differ by up to a quarter."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter *= 0.5
    return module


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


LAYERS3, LAYERS4 = {**SMALL, "num_hidden_layers": 3}, {**SMALL, "num_hidden_layers": 4}
ALTERNATING = ["linear_attention", "full_attention"] * 2
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ALTERNATING,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ZAMBA = {"layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": 4, "use_mamba_kernels": False}
RECURRENT = {
    "mamba": build("Mamba", state_size=8),
    "mamba2": build("Mamba2", state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
    "falcon_mamba": build("FalconMamba", state_size=8),
    "jamba": build(
        "Jamba", LAYERS4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2,
        mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False,
    ),
    "zamba": build(
        "Zamba", LAYERS4, **ZAMBA, mamba_d_state=8, mamba_dt_rank=4, n_mamba_heads=2, attention_hidden_size=64,
        attention_head_dim=16,
    ),
    "zamba2": build(
        "Zamba2", LAYERS4, **ZAMBA, mamba_d_state=8, n_mamba_heads=8, mamba_headdim=8, chunk_size=8, num_mem_blocks=1,
        time_step_min=0.1,
    ),
    "bamba": build("Bamba", LAYERS3, attn_layer_indices=[1], **MAMBA2),
    "falcon_h1": build("FalconH1", mamba_d_ssm=64, **MAMBA2),
    "granitemoehybrid": build(
        "GraniteMoeHybrid", LAYERS3, layer_types=["mamba", "attention", "mamba"], shared_intermediate_size=32,
        num_local_experts=2, num_experts_per_tok=1, **MAMBA2,
    ),
    "nemotron_h": build(
        "NemotronH", LAYERS4, layers_block_type=["mamba", "attention", "mlp", "mamba"], mamba_num_heads=8,
        mamba_head_dim=8, ssm_state_size=8, n_groups=2, chunk_size=8, head_dim=8, use_mamba_kernels=False,
        time_step_min=1e-6,
    ),
    "lfm2": build("Lfm2", LAYERS3, layer_types=["conv", "full_attention", "conv"]),
    "recurrent_gemma": build(
        "RecurrentGemma", LAYERS3, lru_width=32, attention_window_size=8, head_dim=8,
        block_types=("recurrent", "recurrent", "attention"),
    ),
    "qwen3_next": build(
        "Qwen3Next", LAYERS4, head_dim=8, shared_expert_intermediate_size=16, **DELTA, **EXPERTS,
    ),
    "qwen3_5": build("Qwen3_5", LAYERS4, head_dim=8, **DELTA),
    "olmo_hybrid": build("OlmoHybrid", LAYERS4, **DELTA),
    "minimax": build("MiniMax", LAYERS4, layer_types=ALTERNATING, head_dim=8, block_size=8),
    "rwkv": build("Rwkv", {k: v for k, v in SMALL.items() if "position" not in k}, context_length=64),
}  # fmt: skip
"""Models with recurrent layers, alone or between attention layers."""


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
    return _generate(module, tokens, count).sequences[0, len(tokens) :].tolist()


def prompts_without_ties(module, *lengths: int) -> Prompts:
    """Return random prompts in whose greedy responses each token is the likeliest by more than rounding could change:
    of two that are equally likely either would be right."""
    found = prompts(*lengths)
    for row, length in enumerate(lengths):
        draws = (prompts(length).tokens[0] for _ in range(100))
        found.tokens[row] = next(tokens for tokens in draws if _smallest_lead(module, tokens) > 1e-3)
    return found


def _smallest_lead(module, tokens: list[int]) -> float:
    """Return by how much the likeliest token's logit exceeds the next one's, at the least, in a greedy response."""
    top = torch.cat(_generate(module, tokens, 12).logits).topk(2).values
    return float((top[:, 0] - top[:, 1]).min())


def _generate(module, tokens: list[int], count: int):
    ids = torch.tensor([tokens], device=module.device)
    options = {"return_dict_in_generate": True, "output_logits": True}
    return module.generate(ids, do_sample=False, max_new_tokens=count, pad_token_id=0, **options)
