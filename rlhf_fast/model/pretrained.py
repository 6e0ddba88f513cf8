"""Weights and tokenizer from a folder or hub name, and a sentence for each way in which they do not fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.errors import UserError


@contextmanager
def quiet() -> Iterator[None]:
    """transformers and peft print neither bars nor warnings: what matters of them is checked and said by us."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def load_module(cfg: ModelConfig, head: str, fresh_head: bool, seed: int) -> nn.Module:
    """The transformers module, every weight of it found. `fresh_head` draws a missing score row by `seed`."""
    if not cfg.path:
        raise UserError("model: no path given; give a folder or a hub name, for instance --model.path out/sft")
    must_be_somewhere(cfg.path)
    if (Path(cfg.path) / "adapter_config.json").is_file():
        raise UserError(f"{cfg.path}: holds an adapter alone; give the folder with the merged weights above it")
    try:
        config = AutoConfig.from_pretrained(cfg.path, trust_remote_code=cfg.trust_remote_code)
        scalar = any("SequenceClassification" in name for name in config.architectures or ())
        if head == "lm" and scalar:
            raise UserError(f"{cfg.path}: is a reward model, not a language model; give a base or SFT model")
        kind = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
        if head == "scalar":
            config.num_labels = 1
        with quiet():
            module, info = kind.from_pretrained(
                cfg.path, config=config, dtype=getattr(torch, cfg.dtype), attn_implementation=cfg.attention,
                trust_remote_code=cfg.trust_remote_code, output_loading_info=True,
            )  # fmt: skip
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{cfg.path}: cannot be loaded as a {head} model: {reason}") from error
    missing = set(info["missing_keys"])
    untrained = {key for key in missing if key.startswith("score.")}
    if untrained and not fresh_head:
        raise UserError(
            f"{cfg.path}: its scalar head was never trained (no {min(untrained)} in its weights); train a reward model"
            " first and give that folder"
        )
    if missing - untrained:
        absent = missing - untrained
        raise UserError(f"{cfg.path}: {len(absent)} weights are missing, for instance {min(absent)}")
    if untrained:
        weight = module.score.weight
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        weight.data.copy_(noise / (weight.shape[1] + 1) ** 0.5)
    return module


def load_tokenizer(cfg: ModelConfig, module: nn.Module | None = None):
    """The tokenizer beside the weights, no larger than the model's vocabulary if the model is given."""
    must_be_somewhere(cfg.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.path, trust_remote_code=cfg.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{cfg.path}: has no tokenizer that loads: {reason}") from error
    vocabulary = module.config.get_text_config().vocab_size if module is not None else len(tokenizer)
    if len(tokenizer) > vocabulary:
        raise UserError(f"{cfg.path}: the tokenizer has {len(tokenizer)} tokens, the model only {vocabulary}")
    return tokenizer


def must_be_somewhere(path: str) -> None:
    """UserError for what is no folder, and no hub name or none that can be had: one look, where transformers would ask
    again and again for half a minute."""
    if Path(path).exists():
        return
    hub = path.count("/") == 0 or (path.count("/") == 1 and not Path(path).parent.is_dir())
    if path.startswith(("/", ".", "~")) or not hub:
        raise UserError(f"{path}: there is no such folder; look at the path, or train that model first")
    try:
        if not isinstance(huggingface_hub.try_to_load_from_cache(path, "config.json"), str):
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(path, "config.json"))
    except EntryNotFoundError:
        return  # a hub model of another kind: loading it says of which
    except Exception as error:  # of whichever HTTP library the hub's client uses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"{path}: there is no such folder here, and to download it from the hub by that name failed ({reason});"
            " look at the path, or give a hub name that can be reached"
        ) from error


def check_tokenizers(ours, theirs, name: str) -> None:
    """UserError unless model `name` with the tokenizer `theirs` can read the tokens that `ours` makes."""
    own, other = ours.get_vocab(), theirs.get_vocab()
    if own != other:
        differing = next(iter(sorted(set(own.items()) ^ set(other.items()))))[0]
        raise UserError(
            f"{name}: its tokenizer is not the policy's ({len(other)} tokens against {len(own)}; {differing!r}"
            " differs); models of one run must come from one base model"
        )
    if theirs.chat_template and ours.chat_template != theirs.chat_template:
        raise UserError(
            f"{name}: its chat template is not the policy's; it has learned to score another form of prompt"
        )
