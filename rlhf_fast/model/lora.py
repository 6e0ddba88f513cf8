"""LoRA by peft (extra [lora]). This is the only file that knows peft's wrappers; peft is imported only in `attach`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_fast.config.fields import LoraConfig
from rlhf_fast.errors import UserError


def attach(module: PreTrainedModel, cfg: LoraConfig, head: str, seed: int) -> nn.Module:
    """Return a peft model around `module` that trains only the adapters (and a scalar head's `score`)."""
    try:
        import peft
    except ImportError as error:
        raise UserError("lora: needs the package peft; pip install 'rlhf-fast[lora]', or set lora.rank=0") from error
    alpha: Any = cfg.alpha  # peft's annotation is int, but it only divides alpha by the rank
    config = peft.LoraConfig(
        r=cfg.rank,
        lora_alpha=alpha,
        lora_dropout=cfg.dropout,
        target_modules=list(cfg.targets) or "all-linear",
        modules_to_save=["score"] if head == "scalar" else None,
        task_type=peft.TaskType.SEQ_CLS if head == "scalar" else peft.TaskType.CAUSAL_LM,
    )
    output_embedding = module.get_output_embeddings()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wrapped = peft.get_peft_model(module, config)
    except ValueError as error:
        raise UserError(f"lora.targets: {error}") from error
    if output_embedding is not None and unwrap(wrapped).get_output_embeddings() is not output_embedding:
        raise UserError("lora.targets: names the output embedding, which the fused head reads as it is; leave it out")
    return wrapped


def unwrap(module: Any) -> PreTrainedModel:
    """Return the transformers model inside a peft model, or the module itself."""
    return module.get_base_model() if hasattr(module, "peft_config") and hasattr(module, "get_base_model") else module


def adapter_disabled(module: Any) -> AbstractContextManager[None]:
    """Return a context in which a peft model runs without its adapter."""
    return module.disable_adapter()


def active_layer(layer: Any) -> Any:
    """Return the layer that computes the output where peft keeps an original and a trained copy."""
    if not hasattr(layer, "modules_to_save"):
        return layer
    return layer.original_module if layer.disable_adapters else layer.modules_to_save[layer.active_adapters[0]]


def weight_delta(layer: Any) -> torch.Tensor | int | None:
    """Return the sum that the active adapters of a wrapped linear layer add to its weight: a tensor of its shape, 0 if
    none is active, None if an adapter does more than add (DoRA, biases, and kinds not known here)."""
    if getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False):
        return 0
    if not hasattr(layer, "get_delta_weight") or any(getattr(layer, "use_dora", {}).values()):
        return None
    if any(getattr(layer, "lora_bias", {}).get(adapter) for adapter in layer.active_adapters):
        return None
    return sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters if adapter in layer.lora_A)


def save(module: Any, folder: Path) -> None:
    """Write the whole model to `folder` with the adapters merged, and the adapter alone to `folder/adapter`."""
    base = unwrap(module)
    if base is module:
        module.save_pretrained(folder)
        return
    base.save_pretrained(folder, state_dict=merged_state_dict(base))
    module.save_pretrained(folder / "adapter")


def merged_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict of the plain architecture, with each adapter's product added to its weight. The weights in
    memory are not changed: merging and unmerging them would round, and a save would change the run."""
    layers: dict[str, Any] = dict(module.named_modules())
    deltas = {
        f"{name}.base_layer.weight": layer.get_delta_weight(adapter)
        for name, layer in layers.items()
        if hasattr(layer, "get_delta_weight")
        for adapter in layer.active_adapters
    }
    merged = {}
    for name, value in module.state_dict().items():
        if "lora_" in name or ".original_module." in name:
            continue
        weight = value + deltas[name].to(value.dtype) if name in deltas else value
        plain_name = name.replace(".base_layer.", ".")
        head, separator, tail = plain_name.partition(".modules_to_save.")
        merged[f"{head}.{tail.partition('.')[2]}" if separator else plain_name] = weight
    return merged
