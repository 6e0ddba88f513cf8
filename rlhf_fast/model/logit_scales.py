"""Names of the config values by which models bend or scale their logits."""

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Soft caps: Gemma; RecurrentGemma; xLSTM."""
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
"""Scales: Cohere, Falcon-H1, Granite and others."""
