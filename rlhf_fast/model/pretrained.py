"""Load weights and tokenizer from a folder or hub name, with a UserError for each way in which they do not fit."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.errors import UserError, listed
from rlhf_fast.model.pad_token import PAD_TOKEN
from rlhf_fast.model.vocabulary import tokens_of_rows

log = getLogger("rlhf_fast")
CONFIG = "config.json"
SCORE_BIAS = "rlhf_fast_score_bias"
"""Key of config.json for the constant that is added to the score: transformers' `score` layers have no bias. A program
that does not know the key reads scores shifted by this constant; rankings and differences are the same."""
SCORE_TOKEN = "rlhf_fast_score_token"
"""Key of config.json for the token whose score is the row's. Folders without it, but with the bias, mean the last."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers and peft. We check what matters ourselves."""
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


def model_config(given: object) -> ModelConfig:
    """Return the settings of a model to load, of which the path alone may be given."""
    if isinstance(given, (str, os.PathLike)):
        return ModelConfig(path=os.fspath(given))
    if not isinstance(given, ModelConfig):
        raise UserError(
            f"Model.load: takes a folder, a hub name or a ModelConfig, got {type(given).__name__}; write"
            " Model.load(path), or Model(module, tokenizer) for a module that is in memory"
        )
    return given


def require_module(given: object) -> nn.Module:
    """Return what Model wraps. UserError if it is no module."""
    if not isinstance(given, nn.Module):
        raise UserError(
            f"Model: wraps a module that is in memory, got {type(given).__name__}; Model.load(path) loads a folder or"
            " hub name"
        )
    return given


def load_module(
    cfg: ModelConfig, head: str, fresh_head: bool, seed: int, device: torch.device
) -> tuple[PreTrainedModel, bool]:
    """Return the transformers module on `device`, and whether its scalar head is new: with `fresh_head`, a missing
    score row is drawn with `seed`. UserError if another weight is missing."""
    if not cfg.path:
        raise UserError("model: no path given; give a folder or a hub name, for instance --model.path out/sft")
    check_folder(cfg.path, head, fresh_head)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(cfg.path, trust_remote_code=cfg.trust_remote_code)
        scalar = any("SequenceClassification" in name for name in config.architectures or ())
        if head == "lm" and scalar:
            raise UserError(f"{cfg.path}: is a reward model, not a language model; give a base or SFT model")
        if head == "scalar" and scalar and config.num_labels != 1:
            raise UserError(f"{cfg.path}: its head has {config.num_labels} outputs; a reward model has one, the score")
        auto: Any = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
        if head == "scalar":
            config.num_labels = 1
        with quiet():
            module, info = _read_module(auto, cfg, config)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # configs, weights and remote code are foreign: they may fail in any way
        raise UserError(f"{cfg.path}: cannot be loaded as a {head} model: {_describe(error)}") from error
    _check_end_tokens(module, cfg.path)
    if head == "scalar":
        check_score_layer(module, cfg.path)
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
    unused = [key for key in info["unexpected_keys"] if not (head == "scalar" and key.startswith("lm_head."))]
    if unused:
        log.warning("%s: %d of its weights are not used, for instance %s", cfg.path, len(unused), min(unused))
    if untrained:
        _draw_score(module.score, seed)
    return module.to(device), bool(untrained)


def _read_module(auto: Any, cfg: ModelConfig, config: Any) -> tuple[Any, dict[str, Any]]:
    """Return the module on the CPU and transformers' notes on its weights. An architecture without the default
    attention implementation gets transformers' choice."""
    settings = {"dtype": getattr(torch, cfg.dtype), "trust_remote_code": cfg.trust_remote_code}
    try:
        return auto.from_pretrained(
            cfg.path, config=config, attn_implementation=cfg.attention, output_loading_info=True, **settings
        )
    except ValueError as error:
        if cfg.attention != "sdpa" or "scaled_dot_product_attention" not in str(error):
            raise
        config._attn_implementation = None
        return auto.from_pretrained(cfg.path, config=config, output_loading_info=True, **settings)


def config_number(name: str, config: Any, key: str) -> float:
    """Return a number of a config, 0 if it has none. UserError if it is something else."""
    value = getattr(config, key, None)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise UserError(f"{name}: config.json: {key} must be a number, not {value!r}")
    return float(value or 0.0)


def _check_end_tokens(module: PreTrainedModel, path: str) -> None:
    """Raise UserError unless the end tokens of the configs are numbers."""
    for place in (getattr(module, "generation_config", None), module.config.get_text_config()):
        ids = getattr(place, "eos_token_id", None)
        for token in ids if isinstance(ids, list) else [ids]:
            if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
                raise UserError(f"{path}: {type(place).__name__}: eos_token_id must be a number or a list, not {ids!r}")


def check_score_layer(module: PreTrainedModel, name: str) -> None:
    """Raise UserError unless the module has a scalar head `score`."""
    layer: Any = getattr(module, "score", None)
    if not isinstance(getattr(layer, "base_layer", layer), nn.Linear) or layer.out_features != 1:
        raise UserError(f"{name}: {type(module).__name__} has no linear head `score` with one output")


def _draw_score(layer: Any, seed: int) -> None:
    """Draw the row of N(0, 1 / (D + 1)); a bias is 0."""
    noise = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed))
    layer.weight.data.copy_(noise / (layer.weight.shape[1] + 1) ** 0.5)
    if layer.bias is not None:
        layer.bias.data.zero_()


def load_tokenizer(cfg: ModelConfig, module: PreTrainedModel | None = None):
    """Return the tokenizer in the folder. UserError if it has more tokens than the vocabulary of `module`."""
    check_path(cfg.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.path, trust_remote_code=cfg.trust_remote_code)
    except Exception as error:  # its files are foreign: they may fail in any way
        raise UserError(f"{cfg.path}: has no tokenizer that loads: {_describe(error)}") from error
    # lengths are checked here, by the model's positions; transformers' own warning says that indexing will fail
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    if module is not None:
        vocabulary = getattr(module.config.get_text_config(), "vocab_size", 0)
        num_tokens = len(tokens_of_rows(tokenizer, vocabulary))
        if num_tokens > vocabulary:
            raise UserError(f"{cfg.path}: the tokenizer has {num_tokens} tokens, the model only {vocabulary}")
    return tokenizer


def check_path(path: str) -> None:
    """Raise UserError if `path` is neither a folder nor a hub name that can be downloaded. This asks the hub once;
    transformers would retry for half a minute."""
    if Path(path).exists():
        return
    hub = path.count("/") == 0 or (path.count("/") == 1 and not Path(path).parent.is_dir())
    if path.startswith(("/", ".", "~")) or not hub:
        raise UserError(f"{path}: there is no such folder; look at the path, or train that model first")
    try:
        if not isinstance(huggingface_hub.try_to_load_from_cache(path, CONFIG), str):
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(path, CONFIG))
    except EntryNotFoundError:
        return  # a hub model without config.json: loading it raises an error that says more
    except Exception as error:  # the hub's client may raise errors of several HTTP libraries
        reason = _first_line(error).rstrip(".")
        raise UserError(
            f"{path}: there is no such folder here, and to download it from the hub by that name failed ({reason});"
            " look at the path, or give a hub name that can be reached"
        ) from error


def check_folder(path: str, head: str = "lm", fresh_head: bool = False) -> None:
    """Raise UserError if `path` is neither a hub name nor the folder of a model, before its config is read.

    Where the folder has none, but holds folders of models with this head, they are named.
    """
    check_path(path)
    folder = Path(path)
    if folder.is_file():
        raise UserError(f"{path}: is a file; give the folder of a model")
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{path}: holds an adapter alone; give the folder with the merged weights above it")
    if not folder.is_dir() or (folder / CONFIG).is_file():
        return
    is_reward = head == "scalar" and not fresh_head
    models = [
        [str(file.parent) for file in sorted(folder.glob(f"{stars}/{CONFIG}")) if _is_scalar(file) == is_reward]
        for stars in ("*", "*/*")
    ]
    kind, below = "reward" if is_reward else "language", models[0] or models[1]
    hint = f"give one of the {kind} models in it: {listed(below)}" if below else "look at the path"
    raise UserError(f"{path}: is the folder of no model (it has no {CONFIG}); {hint}")


def _is_scalar(config: Path) -> bool:
    """Return whether the model of a config.json has a scalar head, by the name of its class."""
    return b"SequenceClassification" in config.read_bytes()


def check_tokenizers(ours, theirs, name: str) -> None:
    """Raise UserError unless model `name`, whose tokenizer is `theirs`, understands the tokens of `ours`. A padding
    token more, as reward models have, makes no difference."""
    own, other = (
        {token: i for token, i in tokenizer.get_vocab().items() if token != PAD_TOKEN} for tokenizer in (ours, theirs)
    )
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _describe(error: Exception) -> str:
    """Return the error as one line. An error that no program raised on purpose says little without its type."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, KeyError) and len(text.split()) == 1:
        return f"its files name {text}, which transformers {transformers.__version__} does not know"
    accidents = (KeyError, TypeError, AttributeError, IndexError, ArithmeticError, AssertionError)
    return f"{type(error).__name__} {text}" if isinstance(error, accidents) or not text else text
