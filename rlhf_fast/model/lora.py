"""LoRA by peft (extra [lora]). This is the only file that knows peft's wrappers; peft is imported only in `attach`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_fast.config.fields import LoraConfig
from rlhf_fast.errors import UserError

SEPARATE_STARTS = ("gaussian", "eva", "orthogonal")
"""Values of peft's init_lora_weights, beside True and False, that leave the weights below the adapter as they are."""


def attach(module: PreTrainedModel, cfg: LoraConfig, head: str, seed: int) -> nn.Module:
    """Return a peft model around `module` that trains only the adapters (and a scalar head's `score`)."""
    try:
        import peft
    except ImportError as error:
        raise UserError("lora: needs the package peft; pip install peft, or set lora.rank=0") from error
    if head == "scalar" and "score" in cfg.targets:
        raise UserError("lora.targets: names `score`, which is trained as a whole beside the adapters; leave it out")
    alpha: Any = cfg.alpha  # peft's annotation is int, but it only divides alpha by the rank
    config = peft.LoraConfig(
        r=cfg.rank,
        lora_alpha=alpha,
        lora_dropout=cfg.dropout,
        target_modules=list(cfg.targets) or "all-linear",
        modules_to_save=["score"] if head == "scalar" else None,
        task_type=peft.TaskType.SEQ_CLS if head == "scalar" else peft.TaskType.CAUSAL_LM,
    )
    embedding, output_embedding = module.get_input_embeddings(), module.get_output_embeddings()
    tied = output_embedding is not None and getattr(output_embedding, "weight", None) is embedding.weight
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wrapped = peft.get_peft_model(module, config)
    except ValueError as error:
        raise UserError(f"lora.targets: {error}") from error
    if output_embedding is not None and unwrap(wrapped).get_output_embeddings() is not output_embedding:
        raise UserError("lora.targets: names the output embedding, which the fused head reads as it is; leave it out")
    if tied and unwrap(wrapped).get_input_embeddings() is not embedding:
        raise UserError("lora.targets: names the input embedding, which this model shares with its head; leave it out")
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


def state_of(module: nn.Module) -> str:
    """Return which adapters a layer applies and has merged, and their factors, as text to compare. "" for a layer
    without adapters."""
    attributes = vars(module)
    if "_active_adapter" not in attributes:
        return ""
    return repr(
        [attributes.get(name) for name in ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")]
    )


def weight_delta(layer: Any) -> torch.Tensor | int | None:
    """Return the sum that the active adapters of a wrapped linear layer add to its weight: a tensor of its shape, 0 if
    none is active, None if an adapter does more than add (DoRA and other variants, biases, kinds not known here)."""
    if getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False):
        return 0
    if not all(hasattr(layer, name) for name in ("get_delta_weight", "lora_A", "lora_variant", "lora_bias")):
        return None
    if any(layer.lora_bias.get(adapter) or adapter in layer.lora_variant for adapter in layer.active_adapters):
        return None
    return sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters if adapter in layer.lora_A)


@contextmanager
def nonzero_adapters(module: nn.Module) -> Iterator[None]:
    """Give each trainable weight of a peft model that is 0 everywhere small random values within the block. New
    adapters change nothing, so that a comparison which must see them would pass without them. Random states are kept.
    """
    has_adapters = any(map(state_of, module.modules()))
    zero = [p for p in module.parameters() if p.requires_grad and not p.any()] if has_adapters else []
    kept = [p.data for p in zero]
    generator = torch.Generator().manual_seed(0)
    for p in zero:
        p.data = (0.05 * torch.randn(p.shape, generator=generator)).to(p)
    try:
        yield
    finally:
        for p, data in zip(zero, kept, strict=True):
            p.data = data


def check_mergeable(module: Any) -> None:
    """Raise UserError if an adapter of a peft model is one of virtual tokens, which are no part of the weights."""
    for config in _adapter_configs(module):
        if getattr(config, "is_prompt_learning", False):
            raise UserError(
                f"{type(config).__name__}: puts virtual tokens before each row, which a folder of weights cannot hold;"
                " give the model a LoRA adapter"
            )


def check_unchanged_base(module: Any) -> None:
    """Raise UserError if an adapter of a peft model took its start out of the weights below it, which are then another
    model without the adapter."""
    for config in _adapter_configs(module):
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start not in SEPARATE_STARTS:
            raise UserError(
                f"init_lora_weights={start!r}: changes the model below the adapter, so that it is not the reference;"
                " load the reference from its folder, or start the adapter at 0 (init_lora_weights=True)"
            )


def _adapter_configs(module: Any) -> list[Any]:
    return [] if unwrap(module) is module else list(module.peft_config.values())


def save(module: Any, folder: Path) -> float:
    """Write the whole model to `folder` with the adapters merged, and the adapter alone to `folder/adapter`. Return the
    share of the adapters' change that the merged weights keep."""
    base = unwrap(module)
    if base is module:
        module.save_pretrained(folder)
        return 1.0
    state = merged_state_dict(base)
    base.save_pretrained(folder, state_dict=state)
    module.save_pretrained(folder / "adapter")
    if hasattr(base, "score"):
        _explain_score(base, folder / "adapter" / "README.md")
    return _kept_share(base, state)


def _explain_score(base: PreTrainedModel, readme: Path) -> None:
    """Write beside an adapter what else a program must set to read the same scores."""
    pad, rows = base.config.get_text_config().pad_token_id, len(base.get_input_embeddings().weight)  # type: ignore
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    readme.write_text(
        f"{text}\nThe score is read at the last token that is not padding. Before this adapter is put on its base, call"
        f" `base.resize_token_embeddings({rows})` and set `base.config.get_text_config().pad_token_id = {pad}`."
        " The folder above needs neither.\n",
        encoding="utf-8",
    )


def _kept_share(module: nn.Module, merged: dict[str, torch.Tensor]) -> float:
    """Return the projection of what merging changed on what the adapters add in float32. It is 1 in float32."""
    kept = whole = 0.0
    wrapped: set[str] = set()
    for name, layer in module.named_modules():
        if not hasattr(layer, "get_base_layer") or _is_inside(name, wrapped):
            continue
        wrapped.add(name)
        before = merged_state_dict(layer.get_base_layer())
        if all(value.dtype == torch.float32 for value in before.values()):
            continue
        exact = merged_state_dict(_merged_copy(layer, torch.float32))
        for key, value in before.items():
            change = exact[key].double() - value.double()
            kept += float(((merged[f"{name}.{key}"].to(value.device).double() - value.double()) * change).sum())
            whole += float((change * change).sum())
    return kept / whole if whole else 1.0


def merged_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict of the plain architecture, with the adapters merged by peft's own code.

    One wrapped layer at a time is copied and merged there. The weights in memory are not changed: merging and
    unmerging them would round, and a save would change the run.
    """
    merged: dict[str, torch.Tensor] = {}
    wrapped: set[str] = set()
    for name, layer in module.named_modules():
        is_wrapper = hasattr(layer, "unload_and_optionally_merge_module") or hasattr(layer, "base_layer")
        if not is_wrapper or _is_inside(name, wrapped):
            continue
        wrapped.add(name)
        try:
            plain = _merged_copy(layer)
        except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
            raise UserError(f"lora: the adapter of {name} cannot be merged into its weights: {error}") from error
        merged |= {f"{name}.{key}": value for key, value in merged_state_dict(plain).items()}
    return {key: value for key, value in module.state_dict().items() if not _is_inside(key, wrapped)} | merged


def _is_inside(name: str, modules: set[str]) -> bool:
    """Return whether one of `modules` is a parent of `name`, at any depth."""
    while name := name.rpartition(".")[0]:
        if name in modules:
            return True
    return False


def _merged_copy(layer: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the plain layer that a peft wrapper stands for, merged in `dtype`."""
    layer = copy.deepcopy(layer).to(dtype=dtype)
    if hasattr(layer, "unload_and_optionally_merge_module"):
        return layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    layer.merge()
    return layer.get_base_layer()
