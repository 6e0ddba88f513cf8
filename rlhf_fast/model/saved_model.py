"""Checks that the folder which is saved is the model: read by plain transformers, it must give the model's own numbers.

A probe is a few tokens with the log-probabilities (or scores) that the model in memory gives them. Before a run begins,
`check_saving` saves the model, or a copy with few layers, reads it again and compares. At the end `check_folder`
compares each folder with the probe that was written beside its weights, before the checkpoints are removed.

The model that is read again has the dtype of the folder and is freed at once. It takes as much memory as the gradients
did, which are freed by then. It lies where the trained one does, or on the CPU if the GPU has no room for both.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_fast.errors import UserError, writing
from rlhf_fast.model import lora
from rlhf_fast.model.model import SCORE_BIAS, Model
from rlhf_fast.model.pretrained import quiet

PROBE = "probe.json"
ROWS, LENGTH = 2, 16
TEXT = 'Zoë said:\n  "It\'s 3.14 — naïve 你好" \t</s><s>[INST] 🙂'
"""A text whose tokens show whether a tokenizer is the same."""
SMALL = 4
"""Layers of which a trial leaves none out."""


def save_with_probe(model: Model, folder: Path) -> None:
    """Save `model` to `folder` with a probe, which `check_folder` removes."""
    model.save(folder)
    with writing(folder):
        (folder / PROBE).write_text(json.dumps(probe(model)), encoding="utf-8")


@torch.no_grad()
def probe(model: Model) -> dict[str, Any]:
    """Return the probe of `model` as it is, as JSON."""
    length = min(model.max_positions or LENGTH, LENGTH)
    lengths = torch.tensor([length, max(length * 5 // 8, 2)][:ROWS])
    tokens = model.probe_tokens(ROWS, length).cpu()
    with model.eval_mode():
        if model.head == "lm":
            values = model.logprobs(tokens, torch.ones_like(lengths), lengths)[0]
            rows = [row[: n - 1] for row, n in zip(values.tolist(), lengths.tolist(), strict=True)]
        else:
            end = getattr(model.tokenizer, "eos_token_id", None)
            if end is not None:
                tokens[torch.arange(ROWS), lengths - 1] = end
            rows = [[score - model.score_bias] for score in model.last_scores(tokens, lengths).tolist()]
    return {
        "head": model.head,
        "tokens": [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)],
        "values": rows,
        "score_bias": model.score_bias,
        "attention": model.cfg.attention,
        "device": model.device.type,
        "trust_remote_code": model.cfg.trust_remote_code,
        "tokenizer": None if model.tokenizer is None else _tokenizer_facts(model.tokenizer),
    }


def check_folder(folder: Path) -> None:
    """Read each folder that has a probe, `folder` and those in it, and remove the probe. UserError if its numbers are
    not those of the probe."""
    for file in sorted(folder.rglob(PROBE)):
        with torch.random.fork_rng(devices=[]):
            _check(file.parent, json.loads(file.read_text(encoding="utf-8")))
        file.unlink()


def check_saving(model: Model, scratch: Path) -> None:
    """Save `model` below `scratch`, read it again, and compare. Of a model with many layers a copy of the first few is
    tried. UserError if what would be saved at the end is not the model.

    New adapters change nothing, so they get small random values meanwhile. Half precision would hide small faults, so
    the trial is one in float32.
    """
    with torch.random.fork_rng(devices=[]), lora.nonzero_adapters(model.module):
        if _try(model, scratch, few=True) is None:
            return
        error = _try(model, scratch, few=False)
        if error is not None:
            raise UserError(f"{model.name}: cannot be saved, as a trial before the run shows: {error}") from error


def _try(model: Model, scratch: Path, few: bool) -> Exception | None:
    """Return what goes wrong, or None."""
    try:
        with (
            tempfile.TemporaryDirectory(prefix="trial_", dir=scratch) as name,
            _first_layers(model, few),
            _float32(model),
        ):
            save_with_probe(model, Path(name))
            check_folder(Path(name))
    except Exception as error:  # a model cut short may fail in any way; then all of it is tried
        return error
    return None


@contextmanager
def _first_layers(model: Model, few: bool) -> Iterator[None]:
    """Leave out all but the first layers within the block: as many as show each kind of layer."""
    config = model.text_config
    count = getattr(config, "num_hidden_layers", None)
    stacks = [
        (parent, name, stack)
        for parent in model.decoder.modules()
        for name, stack in parent.named_children()
        if isinstance(stack, nn.ModuleList) and len(stack) == count
    ]
    if not few or not count or count <= SMALL or len(stacks) != 1:
        yield
        return
    parent, name, stack = stacks[0]
    lists = {key: value for key, value in vars(config).items() if isinstance(value, list) and len(value) == count}
    kinds = [_kind(layer, [str(value[i]) for value in lists.values()]) for i, layer in enumerate(stack)]
    keep = max(kinds.index(kind) for kind in kinds) + 1
    settings = dict(vars(config))
    try:
        parent._modules[name] = nn.ModuleList(list(stack)[:keep])
        for key, value in lists.items():
            setattr(config, key, value[:keep])
        config.num_hidden_layers = keep
        yield
    finally:
        parent._modules[name] = stack
        vars(config).clear()
        vars(config).update(settings)


@contextmanager
def _float32(model: Model) -> Iterator[None]:
    """Give the module float32 copies of its weights within the block."""
    tensors = [x for x in (*model.module.parameters(), *model.module.buffers()) if x.is_floating_point()]
    kept = [(x, x.data) for x in tensors if x.dtype != torch.float32]
    for x, data in kept:
        x.data = data.float()
    try:
        yield
    finally:
        for x, data in kept:
            x.data = data


def _kind(layer: nn.Module, settings: list[str]) -> tuple:
    return (type(layer), *settings, *((name, tuple(p.shape)) for name, p in layer.named_parameters()))


@torch.no_grad()
def _check(folder: Path, expected: dict[str, Any]) -> None:
    """Raise UserError unless plain transformers reads from `folder` what `expected`, a probe, holds."""
    lm = expected["head"] == "lm"
    auto: Any = AutoModelForCausalLM if lm else AutoModelForSequenceClassification
    attention = {"attn_implementation": "eager"} if expected["attention"] == "eager" else {}
    trust = {"trust_remote_code": expected["trust_remote_code"]}
    with quiet():
        module, info = auto.from_pretrained(folder, output_loading_info=True, **attention, **trust)
        if info["missing_keys"] or info["unexpected_keys"]:
            keys = sorted({*info["missing_keys"], *info["unexpected_keys"]})
            raise UserError(f"{folder}: {len(keys)} of its weights are not the architecture's, for instance {keys[0]}")
        module.eval().to(_device(folder, expected["device"]))
        read = _logprobs(module, expected["tokens"]) if lm else _scores(module, expected["tokens"])
        if getattr(module.config, SCORE_BIAS, 0.0) != expected["score_bias"]:
            raise UserError(f"{folder}: its config.json does not hold the score's constant {expected['score_bias']}")
        facts = expected["tokenizer"]
        if facts is not None:
            found = _tokenizer_facts(AutoTokenizer.from_pretrained(folder, **trust))
            differ = [name for name, value in facts.items() if found[name] != value]
            if differ:
                raise UserError(f"{folder}: its tokenizer is not the one of the run: {', '.join(differ)} differ")
    numbers, truth = (torch.cat([torch.tensor(row) for row in rows]) for rows in (read, expected["values"]))
    gap = (numbers - truth).abs()
    error = gap / truth.abs().clamp_min(1.0)
    mean, largest = (2e-4, 2e-4) if module.dtype == torch.float32 else (0.02, 0.2)
    if not (float(error.mean()) <= mean and float(error.max()) <= largest):
        what = "log-probabilities" if lm else "scores"
        raise UserError(
            f"{folder}: read again by transformers its {what} differ from the trained model's by up to"
            f" {float(gap.max()):.3g}, so it is not taken for the result"
        )


def _device(folder: Path, wanted: str) -> str:
    """Return the device for the weights of `folder`: the CPU if the wanted GPU has no room for them."""
    if wanted != "cuda" or not torch.cuda.is_available():
        return "cpu"
    torch.cuda.empty_cache()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return "cuda" if torch.cuda.mem_get_info()[0] > 1.5 * size else "cpu"


def _logprobs(module: Any, rows: list[list[int]]) -> list[list[float]]:
    """Return log p of each token but the first, of each row alone."""
    found = []
    for row in rows:
        tokens = torch.tensor([row], device=module.device)
        logits = module(input_ids=tokens, use_cache=False).logits[0, :-1]
        found.append(logits.float().log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].tolist())
    return found


def _scores(module: Any, rows: list[list[int]]) -> list[list[float]]:
    """Return the score of each row of a batch that is padded as the config says."""
    pad = module.config.get_text_config().pad_token_id
    if pad is None:
        alone = [torch.tensor([row], device=module.device) for row in rows]
        return [module(input_ids=row, use_cache=False).logits[0].float().tolist() for row in alone]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    inputs = {"input_ids": tokens.to(module.device), "attention_mask": mask.to(module.device)}
    scores: Tensor = module(**inputs, use_cache=False).logits
    return scores.float().tolist()


def _tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template")
    facts = {name: getattr(tokenizer, name, None) for name in names}
    return {**facts, "vocabulary size": len(tokenizer), "tokens of a text": tokenizer(TEXT)["input_ids"]}
