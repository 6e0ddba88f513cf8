"""Checks that the folder which is saved is the model: read by plain transformers, it must give the model's own numbers.

A probe is a few tokens with the log-probabilities (or scores) that the model in memory gives them. Before a run begins,
`check_saving` saves the model, or a copy with few layers, reads it again and compares. At the end `check_folder`
compares each folder with the probe that was written beside its weights, before the checkpoints are removed.

The model that is read again has the dtype of the folder and is freed at once. It takes as much memory as the gradients
did, which are freed by then. It lies where the trained one does, or on the CPU if the GPU has no room for both.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_fast.errors import UserError, writing
from rlhf_fast.model import lora
from rlhf_fast.model.model import Model
from rlhf_fast.model.pretrained import SCORE_BIAS, quiet
from rlhf_fast.model.reduced import first_layers, float32, is_memory_error

PROBE = "probe.json"
ROWS, LENGTH = 2, 16
TEXT = 'Zoë said:\n  "It\'s 3.14 — naïve 你好" \t</s><s>[INST] 🙂'
"""A text whose tokens show whether a tokenizer is the same."""
TRIAL = "trial_"
KEPT = 0.9
"""Share of an adapter's change below which the user is told that merging has rounded."""


def save_with_probe(model: Model, folder: Path) -> None:
    """Save `model` to `folder` with a probe, which `check_folder` removes."""
    share = model.save(folder)
    with writing(folder):
        (folder / PROBE).write_text(json.dumps(probe(model) | {"merged_share": share}), encoding="utf-8")


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
        "device": str(model.device),
        "trust_remote_code": model.cfg.trust_remote_code,
        "tokenizer": None if model.tokenizer is None else _tokenizer_facts(model.tokenizer),
    }


def check_folder(folder: Path) -> None:
    """Read each folder that has a probe, `folder` and those in it, and remove the probe. UserError if its numbers are
    not those of the probe."""
    for file in _probes(folder):
        _compare(file)
        file.unlink()


def check_finished(folder: Path) -> list[str]:
    """Do what `check_folder` does at the end of a run, and return notes for the user. Where the computer fails, and not
    the folder, a note says that it was not compared."""
    notes = []
    for file in _probes(folder):
        expected = json.loads(file.read_text(encoding="utf-8"))
        part = "" if file.parent == folder else f"{file.parent.name}: "
        try:
            _compare(file)
        except Exception as error:  # reading weights may fail in any way, and all training lies behind
            if not is_memory_error(error) and not (isinstance(error, OSError) and error.errno):
                reason = (
                    str(error) if isinstance(error, UserError) else f"{folder}: cannot be read again: {_said(error)}"
                )
                raise UserError(
                    f"{reason}. The trained weights stay in {folder}; look at the disk and at the version of"
                    " transformers, and start the same command again: it saves and compares once more"
                ) from error
            notes.append(
                f"{part}the saved model is written, and was not read again to compare it, because {_said(error)}"
            )
        if expected["merged_share"] < KEPT:
            notes.append(
                f"{part}the merged weights hold {expected['merged_share']:.0%} of what the adapter learned, the rest is"
                " lost to their half precision; adapter/ holds all of it (or train with model.dtype=float32)"
            )
        file.unlink()
    return notes


def _probes(folder: Path) -> list[Path]:
    return sorted(folder.rglob(PROBE))


def _compare(file: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        _check(file.parent, json.loads(file.read_text(encoding="utf-8")))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def check_saving(model: Model, scratch: Path) -> None:
    """Save `model` below `scratch`, read it again, and compare. Of a model with many layers a copy of the first few is
    tried. UserError if what would be saved at the end is not the model.

    New adapters change nothing, so they get small random values meanwhile. Half precision would hide small faults, so
    the trial is one in float32.
    """
    for left in scratch.glob(f"{TRIAL}*"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    with torch.random.fork_rng(devices=[]), lora.nonzero_adapters(model.module):
        if _try(model, scratch, few=True) is None:
            return
        error = _try(model, scratch, few=False)
        if error is not None:
            reason = str(error) if isinstance(error, UserError) else _said(error)
            raise UserError(f"{model.name}: cannot be saved, as a trial before the run shows: {reason}") from error


def _try(model: Model, scratch: Path, few: bool) -> Exception | None:
    """Return what goes wrong with the model, or None. What goes wrong with the disk or the memory is raised."""
    try:
        with (
            tempfile.TemporaryDirectory(prefix=TRIAL, dir=scratch) as name,
            first_layers(model, few),
            float32(model),
        ):
            save_with_probe(model, Path(name))
            check_folder(Path(name))
    except Exception as error:  # a model cut short may fail in any way; then all of it is tried
        if is_memory_error(error) or isinstance(error.__cause__, OSError):  # the cause of what `writing` raises
            raise
        if isinstance(error, OSError) and error.errno:
            with writing(scratch):
                raise
        return error
    return None


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
    # another device's rounding in half precision sends single tokens to other experts; finer faults showed in the trial
    mean, largest = (2e-4, 2e-4) if module.dtype == torch.float32 else (0.1, 1.0)
    if not (float(error.mean()) <= mean and float(error.max()) <= largest):
        what = "log-probabilities" if lm else "scores"
        raise UserError(
            f"{folder}: read again by transformers its {what} differ from the trained model's by up to"
            f" {float(gap.max()):.3g}, so it is not taken for the result"
        )


def _device(folder: Path, wanted: str) -> str:
    """Return the device for the weights of `folder`: the CPU if the wanted GPU has no room for them."""
    if not wanted.startswith("cuda") or not torch.cuda.is_available():
        return "cpu"
    torch.cuda.empty_cache()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return wanted if torch.cuda.mem_get_info(wanted)[0] > 1.5 * size else "cpu"


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
    sizes = {"vocabulary size": len(tokenizer)}
    return {**facts, **sizes, "tokens of a text": _encoded(tokenizer, TEXT), "tokens of its own": _own(tokenizer)}


def _own(tokenizer: Any) -> list[int] | str:
    """Return the tokens of a text that is made of the tokenizer's own."""
    ids = list(range(0, len(tokenizer), max(len(tokenizer) // 64, 1)))
    try:
        text = tokenizer.decode(ids, skip_special_tokens=True)
    except Exception as error:  # ids may have gaps
        return type(error).__name__
    return _encoded(tokenizer, text)


def _encoded(tokenizer: Any, text: str) -> list[int] | str:
    """Return the tokens of a text, or the error of a tokenizer that has no token for a part of it."""
    try:
        return tokenizer(text)["input_ids"]
    except Exception as error:  # the type is that of the binding
        return f"{type(error).__name__}: {error}"
