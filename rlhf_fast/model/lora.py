"""LoRA by peft (extra [lora]): the one place that knows peft's wrappers. Without adapters everything here is plain."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from rlhf_fast.config.fields import LoraConfig
from rlhf_fast.errors import UserError


def attach(module: nn.Module, cfg: LoraConfig, head: str, seed: int) -> nn.Module:
    """A peft model around `module` in which only the adapters (and a scalar head's `score`) can be trained."""
    try:
        import peft
    except ImportError as error:
        raise UserError("lora: needs the package peft; pip install 'rlhf-fast[lora]', or set lora.rank=0") from error
    config = peft.LoraConfig(
        r=cfg.rank, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, target_modules=list(cfg.targets) or "all-linear",
        modules_to_save=["score"] if head == "scalar" else None,
        task_type=peft.TaskType.SEQ_CLS if head == "scalar" else peft.TaskType.CAUSAL_LM,
    )  # fmt: skip
    output = module.get_output_embeddings()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wrapped = peft.get_peft_model(module, config)
    except ValueError as error:
        raise UserError(f"lora.targets: {error}") from error
    if output is not None and base(wrapped).get_output_embeddings() is not output:
        raise UserError("lora.targets: names the output embedding, which the fused head reads as it is; leave it out")
    return wrapped


def base(module: nn.Module) -> nn.Module:
    """transformers' module inside a peft model, or the module itself."""
    return module.get_base_model() if hasattr(module, "peft_config") and hasattr(module, "get_base_model") else module


def active(layer: nn.Module) -> nn.Module:
    """The layer that answers where peft keeps an original and a trained copy."""
    if not hasattr(layer, "modules_to_save"):
        return layer
    name = layer.active_adapters[0]
    return layer.original_module if layer.disable_adapters else layer.modules_to_save[name]


def delta(layer: nn.Module) -> torch.Tensor | int | None:
    """What the active adapters of a wrapped linear layer add to its weight: a tensor of its shape, 0 where none is
    active, None where an adapter does more than add (DoRA, biases of its own, and kinds not known here)."""
    if getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False):
        return 0
    if not hasattr(layer, "get_delta_weight") or any(getattr(layer, "use_dora", {}).values()):
        return None
    if any(getattr(layer, "lora_bias", {}).get(adapter) for adapter in layer.active_adapters):
        return None
    return sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters if adapter in layer.lora_A)


def save(module: nn.Module, folder: Path) -> None:
    """The whole model to `folder`, adapters merged in the written copy only; the adapter alone to `folder/adapter`."""
    inner = base(module)
    if inner is module:
        module.save_pretrained(folder)
        return
    inner.save_pretrained(folder, state_dict=merged_state(inner))
    module.save_pretrained(folder / "adapter")


def merged_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the plain architecture with each adapter's product added to its weight; nothing is changed in
    memory, so that saving does not move a run by rounding."""
    deltas = {
        f"{name}.base_layer.weight": layer.get_delta_weight(adapter)
        for name, layer in module.named_modules()
        if hasattr(layer, "get_delta_weight")
        for adapter in layer.active_adapters
    }
    merged = {}
    for name, value in module.state_dict().items():
        if "lora_" in name or ".original_module." in name:
            continue
        value = (value + deltas[name].to(value.dtype)) if name in deltas else value
        name = name.replace(".base_layer.", ".")
        head, saved, tail = name.partition(".modules_to_save.")
        merged[f"{head}.{tail.partition('.')[2]}" if saved else name] = value
    return merged
