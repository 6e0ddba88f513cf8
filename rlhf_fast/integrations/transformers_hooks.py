"""The code of transformers that `lazy_head` and `layers.fused` stand on, by family of model/architectures.py."""

from __future__ import annotations

from rlhf_fast.integrations.hooks import Hook

TESTED = "5.23.0"
HEADS = {
    "llama": ("LlamaForCausalLM", "self.model("),
    "mistral": ("MistralForCausalLM", "self.model("),
    "qwen2": ("Qwen2ForCausalLM", "self.model("),
    "qwen3": ("Qwen3ForCausalLM", "self.model("),
    "smollm3": ("SmolLM3ForCausalLM", "self.model("),
    "gpt2": ("GPT2LMHeadModel", "self.transformer("),
    "gpt_neox": ("GPTNeoXForCausalLM", "self.gpt_neox("),
}
"""Module -> class with a language model's head, and how it calls its decoder."""
LLAMA = {
    "Model.forward": ("create_causal_mask", "self.rotary_emb(hidden_states", "self.norm(hidden_states)"),
    "DecoderLayer.forward": (
        *("self.input_layernorm(hidden_states)", "self.post_attention_layernorm(hidden_states)"),
        "hidden_states = residual + hidden_states",
    ),
    "Attention.forward": (
        *(f"self.{name}(hidden_states)" for name in ("q_proj", "k_proj", "v_proj")),
        *("apply_rotary_pos_emb(query_states, key_states, cos, sin)", "scaling=self.scaling", "self.o_proj("),
    ),
    "MLP.forward": ("self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))",),
    "RMSNorm.forward": ("torch.rsqrt(variance + self.variance_epsilon)",),
}
QK_NORMS = ("self.q_norm(", "self.k_norm(")
LAYERS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "llama": ("Llama", LLAMA),
    "mistral": ("Mistral", LLAMA | {"Model.forward": (*LLAMA["Model.forward"], "self.config.sliding_window is None")}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", LLAMA | {"Attention.forward": (*LLAMA["Attention.forward"], *QK_NORMS)}),
    "smollm3": ("SmolLM3", LLAMA | {"Attention.forward": (*LLAMA["Attention.forward"], "if self.use_rope:")}),
    "gpt2": (
        "GPT2",
        {
            "Model.forward": ("create_causal_mask", "self.wpe(position_ids)", "self.ln_f(hidden_states)"),
            "Block.forward": ("self.ln_1(", "attn_output + residual", "self.ln_2(", "self.mlp("),
            "Attention.forward": ("self.c_attn(hidden_states).split(self.split_size", "self.c_proj("),
            "MLP.forward": ("self.c_fc(", "self.act(", "self.c_proj("),
        },
    ),
    "gpt_neox": (
        "GPTNeoX",
        {
            "Model.forward": ("create_causal_mask", "self.rotary_emb(hidden_states", "self.final_layer_norm("),
            "Layer.forward": (
                *("if self.use_parallel_residual:", "mlp_output + attn_output + hidden_states"),
                "self.mlp(self.post_attention_layernorm(attn_output))",
            ),
            "Attention.forward": ("self.query_key_value(hidden_states)", "qkv.chunk(3, dim=-1)", "self.dense("),
            "MLP.forward": ("self.dense_h_to_4h(", "self.act(", "self.dense_4h_to_h("),
        },
    ),
}
"""Module -> beginning of its classes' names, and code of their methods that our layers stand for."""


def _hook(file: str, name: str, contains: str) -> Hook:
    return Hook("transformers", TESTED, f"transformers/{file}", name, contains=contains)


def _file(family: str) -> str:
    return f"models/{family}/modeling_{family}.py"


_PACKED = "if position_ids is not None and attention_mask is None and (past_key_values is None):"
HEAD_HOOKS = (
    *(_hook(_file(family), f"{name}.forward", "self.lm_head(hidden_states)") for family, (name, _) in HEADS.items()),
    *(_hook(_file(family), f"{name}.forward", "self.loss_function(") for family, (name, _) in HEADS.items()),
    _hook("loss/loss_utils.py", "ForCausalLMLoss", "fixed_cross_entropy(logits, shift_labels"),
    _hook("loss/loss_utils.py", "fixed_cross_entropy", "cross_entropy(source, target"),
    _hook("trainer.py", "Trainer.compute_loss", "model(**inputs)"),
)
"""`lazy_head` relies on them: the head is a module that is called, and the loss is a cross-entropy."""
LAYER_HOOKS = (
    *(_hook(_file(family), f"{name}.forward", call) for family, (name, call) in HEADS.items()),
    *(
        _hook(_file(family), prefix + method, code)
        for family, (prefix, methods) in LAYERS.items()
        for method, codes in methods.items()
        for code in codes
    ),
    _hook("masking_utils.py", "_preprocess_mask_arguments", _PACKED),
)
"""`layers.fused` relies on them: the decoder is a module that is called, its layers compute what ours do, and positions
that begin again mark packed rows. Each model is compared with our layers besides, before they run."""
HOOKS = HEAD_HOOKS + LAYER_HOOKS
