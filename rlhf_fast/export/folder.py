"""A Hugging Face folder of a model in another dtype, or with its adapter merged anew, read again by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.config.run_file import read_run_file, run_directory
from rlhf_fast.errors import UserError
from rlhf_fast.export.agreement import NEAR_TIE, Row, compare, logits_of, rounding
from rlhf_fast.model import lora
from rlhf_fast.model.model import Model
from rlhf_fast.model.pretrained import quiet
from rlhf_fast.model.saved_model import check_folder, save_with_probe
from rlhf_fast.run.outputs import RUN
from rlhf_fast.run.prompt_format import PARTS_OF_A_RUN

ADAPTER, ADAPTER_CONFIG = "adapter", "adapter_config.json"
ROUNDING = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-10}
"""Largest distance of two neighbours of a dtype, relative."""
KINDS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
ARITHMETIC = 2e-3
"""Largest gap of a near tie that the order of sums explains, in nats."""


def write_folder(model: Model, folder: Path, dtype: str, rows: list[Row]) -> str:
    """Write the model in `dtype`, compare the folder with it as transformers reads it, and return the result.

    rows: our greedy responses in float32, which the folder must give too. The model has the weights of the folder then.
    """
    if dtype == "float16":
        _check_range(model)
    half = getattr(torch, dtype)
    model.module.to(half)
    model.base.config.dtype = half
    save_with_probe(model, folder)
    check_folder(folder)
    model.module.to(torch.float32)
    if not rows:
        return f"{dtype}: scores equal to the model's"
    moved = rounding(rows, logits_of(model.base))
    with quiet():
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    allowed = min(moved, NEAR_TIE[KINDS[dtype]]) + ARITHMETIC
    found = compare(rows, logits_of(again.eval()), allowed, model.num_tokens, f"transformers on {dtype}")
    return found.sentence(f"transformers on {dtype}", len(rows))


def _check_range(model: Model) -> None:
    """Raise UserError for a weight that float16 cannot hold."""
    largest = torch.finfo(torch.float16).max
    for name, parameter in model.base.named_parameters():
        if bool((parameter.abs() > largest).any()):
            raise UserError(f"{name}: has weights above {largest:.0f}; choose --safetensors-dtype bfloat16 or float32")


def merge_adapter(run: str, model: Model) -> str:
    """Put into `model`, which is the run's, the weights of its base with the adapter added in float32. Return a note.

    The run's own weights have the adapter merged in their dtype, which rounds a small change away. UserError if the run
    has no adapter, its base is not there, or they are not what the run's weights were merged from.
    """
    folder = Path(run) / ADAPTER
    config = require_adapter(run)
    named = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    base = _base_folder(run, named) if named else None
    if not base:
        raise UserError(
            f"{config}: the adapter's base model is {named!r}, and there is no such folder here; put its path into"
            " base_model_name_or_path, or leave --merge-lora out: the run's own weights have the adapter merged"
        )
    merged = _merged_weights(str(base), folder, model)
    state: dict[str, Any] = dict(model.base.named_parameters())
    saved = saved_dtype(run)
    changed = 0.0
    if missing := sorted(state.keys() - merged.keys()):
        raise UserError(f"{base}: has no weight {missing[0]}, which {run} has; it is not the adapter's base model")
    for name in state:
        value, before = merged[name], state[name].detach()
        size = max(float(value.abs().max()), 1e-30)
        changed = max(changed, float((before - value).abs().max()) / size)
        state[name].data.copy_(value)
    if changed > 4 * ROUNDING.get(saved, ROUNDING["bfloat16"]):
        raise UserError(
            f"{run}: its weights are not those of {base} with the adapter merged (they differ by {changed:.1%});"
            " the base has changed since, or is another one: give the right path in base_model_name_or_path"
        )
    return (
        f"{base} and {folder} merged in float32; the run's own weights, in {saved}, differ by up to {changed:.1g} of"
        " the largest weight of a matrix"
    )


def _base_folder(run: str, name: str) -> Path | None:
    """Return the folder of the adapter's base model, None if it is not there. A relative path is that of the directory
    in which the run was started, or else of the working directory."""
    folder = Path(run).resolve()
    files = [folder / RUN, *([folder.parent / RUN] if folder.name in PARTS_OF_A_RUN else [])]
    places = [run_directory(file, found) / name for file in files if (found := read_run_file(file))]
    return next((place for place in [*places, Path(name)] if (place / "config.json").is_file()), None)


def require_adapter(run: str) -> Path:
    """Return the config file of the run's adapter; UserError if it has none."""
    config = Path(run) / ADAPTER / ADAPTER_CONFIG
    if not config.is_file():
        raise UserError(f"{run}: has no {ADAPTER}/, so that there is nothing to merge; leave --merge-lora out")
    return config


def _merged_weights(base: str, adapter: Path, model: Model) -> dict[str, torch.Tensor]:
    """Return the base's weights with the adapter merged in float32."""
    try:
        import peft
    except ImportError as error:
        raise UserError("export: --merge-lora needs the package peft; pip install peft") from error
    plain = Model.load(ModelConfig(path=base), head=model.head, tokenizer=False, fresh_head=True, device="cpu")
    rows = len(model.base.get_input_embeddings().weight)  # type: ignore[arg-type,union-attr]
    if len(plain.base.get_input_embeddings().weight) != rows:  # type: ignore[arg-type,union-attr]
        with quiet():
            plain.base.resize_token_embeddings(rows)
    with quiet():
        wrapped = peft.PeftModel.from_pretrained(plain.module, str(adapter))
    return lora.merged_state_dict(lora.unwrap(wrapped))


def saved_dtype(run: str) -> str:
    """Return the dtype in the run's config.json."""
    config = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
