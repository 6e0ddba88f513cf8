"""Check that a stage's models and sizes fit each other, by config.json and tokenizer, before any weights are read.

A recipe checks all its stages so before the first one starts. A model that an earlier stage will write has the sizes
and the tokenizer of the model which that stage starts from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import AutoConfig

from rlhf_fast.config.data_path import shown_path
from rlhf_fast.config.fields import DataConfig, ModelConfig, SamplingConfig
from rlhf_fast.config.rewards import RewardSpec, is_function, model_specs, reward_specs
from rlhf_fast.config.stages import PPOConfig, RewardConfig, SFTConfig, StageConfig
from rlhf_fast.data import read_prompts
from rlhf_fast.data.encode import Template
from rlhf_fast.data.row_columns import require_columns
from rlhf_fast.data.rows import read_examples
from rlhf_fast.errors import UserError, nearest, shortened
from rlhf_fast.model.pretrained import check_path, check_tokenizers, load_tokenizer, quiet
from rlhf_fast.model.vocabulary import tokens_of_rows
from rlhf_fast.rollout.exact import find_kernel_obstacle
from rlhf_fast.run.info import TOKENIZER_FILES, sha256
from rlhf_fast.run.logs import check_sinks
from rlhf_fast.run.outputs import check_hub_names
from rlhf_fast.run.prompt_format import check_planned_format
from rlhf_fast.training.rewards import check_function

S = TypeVar("S", bound=StageConfig)

ROWS_TRIED = 64
"""Rows of each file that are read first, to see whether they are rows of the stage and whether any prompt fits."""
DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla", "meta")
"""Kinds of devices that torch runs on, first those that we are tested on."""


class Role(NamedTuple):
    """A model that a stage loads. setting: what names it."""

    setting: str
    cfg: ModelConfig
    head: str
    trained: bool
    fresh_head: bool = False

    def __str__(self) -> str:
        return f"{self.setting} ({self.cfg.path})"


class Sizes(NamedTuple):
    """Numbers and tokenizer of a role's folder. positions: 0 = no limit. rows: of the vocabulary."""

    role: Role
    positions: int
    rows: int
    tokenizer: Any


def check_fit(cfg: StageConfig, earlier: Sequence[StageConfig] = ()) -> int:
    """Return how many tokens every model of the stage can read in a row, 0 for any; UserError if they do not fit.

    earlier: the stages of the recipe, some of whose folders this one reads.
    """
    check_device(cfg.stage, cfg.device)
    check_sinks(cfg.log.sinks)
    if isinstance(cfg, PPOConfig) and cfg.exact and (why := find_kernel_obstacle()):
        raise UserError(f"ppo: exact cannot be set, because {why}; set exact to false")
    _check_first_rows(cfg)
    _check_functions(cfg)
    roles = list(_roles(cfg))
    for role in roles:
        if role.trained and role.cfg.lora.rank and find_spec("peft") is None:
            name = role.setting.replace("path", "lora.rank")
            raise UserError(
                f"{cfg.stage}: {name} is {role.cfg.lora.rank}, which needs the package peft; pip install peft"
                f", or set {name} to 0"
            )
        if role.trained and role.cfg.dtype == "float16":
            name = role.setting.replace("path", "dtype")
            raise UserError(f"{cfg.stage}: {name} is float16, whose gradients underflow; set it to bfloat16 or float32")
    tokenizers: dict[object, Any] = {}
    sizes = [found for role in roles if (found := _sizes(role, earlier, tokenizers))]
    if not earlier:
        check_hub_names(cfg.out, cfg.model_paths())
    if not sizes or sizes[0].role is not roles[0]:  # the loader says why a config cannot be read
        return 0
    main, *others = sizes
    for other in others:
        if other.tokenizer is not main.tokenizer:
            check_tokenizers(main.tokenizer, other.tokenizer, str(other.role))
    check_planned_format(cfg, main.tokenizer, earlier)
    needed = max(tokens_of_rows(main.tokenizer, main.rows).values(), default=-1) + 1
    if main.rows < needed:
        token = main.tokenizer.convert_ids_to_tokens(needed - 1)
        raise UserError(
            f"{cfg.stage}: {main.role} has {main.rows} vocabulary rows, but its own tokenizer has tokens up to number"
            f" {needed - 1} ({token!r}); resize its embeddings (resize_token_embeddings({needed}) in transformers), or"
            " remove the tokens that it has no row for"
        )
    for each in sizes:
        if each.rows < needed:
            raise UserError(
                f"{cfg.stage}: {each.role} has {each.rows} vocabulary rows, but {main.role} has tokens up to number"
                f" {needed - 1}; models of one run must come from one base model"
            )
    smallest = min((each for each in sizes if each.positions), key=lambda each: each.positions, default=None)
    if smallest is None:
        return 0
    if isinstance(cfg, PPOConfig) or (isinstance(cfg, SFTConfig) and cfg.select == "reward"):
        _check_room(cfg.stage, cfg.sampling, smallest)
    if isinstance(cfg, PPOConfig):
        _check_prompts(cfg.data, cfg.sampling, main.tokenizer, smallest)
    return smallest.positions


def _check_first_rows(cfg: StageConfig) -> None:
    """Raise UserError if the first rows of one of the stage's files are not of its kind. No tokens are made."""
    if isinstance(cfg, SFTConfig):
        kinds = [(cfg.data, "demonstrations"), *([(cfg.pretrain, "texts")] if cfg.pretrain_fraction else [])]
    elif isinstance(cfg, RewardConfig):
        kinds = [(cfg.data, "comparisons"), (cfg.demonstrations, "demonstrations")]
    else:
        kinds = [(cfg.data, "prompts"), (cfg.pretrain, "texts")]
    for data, kind in kinds:
        for file, limit in ((data.path, data.limit), (data.valid, 0)):
            if data.path and file:
                read_examples(file, kind, data.columns, min(limit or ROWS_TRIED, ROWS_TRIED), data.remove_columns)


def _check_functions(cfg: StageConfig) -> None:
    """Raise UserError if a reward function cannot be imported or called, or does not go with the rows' columns."""
    if isinstance(cfg, RewardConfig):
        return
    specs = reward_specs(cfg.reward if isinstance(cfg, PPOConfig) else cfg.select_reward)
    wanted = [check_function(spec) for spec in specs if is_function(spec)]
    if not any(found.depends_on_columns for found in wanted) or (isinstance(cfg, SFTConfig) and cfg.select != "reward"):
        return
    kind = "prompts" if isinstance(cfg, PPOConfig) else "demonstrations"
    for file, limit in ((cfg.data.path, cfg.data.limit), (cfg.data.valid, 0)):
        for tried in (min(limit or ROWS_TRIED, ROWS_TRIED), limit) if file else ():
            examples = read_examples(file, kind, cfg.data.columns, tried, cfg.data.remove_columns)
            try:
                require_columns(shown_path(file), examples, wanted)
                break
            except UserError:  # the first rows may lack what later ones have
                if tried == limit or len(examples) < tried:
                    raise


def _roles(cfg: StageConfig) -> Iterator[Role]:
    """Yield the models that the stage loads, the one that samples first."""
    if isinstance(cfg, RewardConfig):
        yield Role("model.path", cfg.model, "scalar", trained=True, fresh_head=True)
    elif isinstance(cfg, SFTConfig):
        yield Role("model.path", cfg.model, "lm", trained=True)
        for path in model_specs(cfg.select_reward) if cfg.select == "reward" else ():
            yield Role("select_reward", replace(cfg.model, path=path), "scalar", trained=False)
    else:
        yield Role("policy.path", cfg.policy, "lm", trained=True)
        if cfg.reference:
            yield Role("reference", replace(cfg.policy, path=cfg.reference), "lm", trained=False)
        for path in model_specs(cfg.reward):
            yield Role("reward", replace(cfg.value, path=path), "scalar", trained=False)
        if cfg.value.path:
            yield Role("value.path", cfg.value, "scalar", trained=True)
        elif cfg.value.dtype == "float16":
            yield Role("value.path", replace(cfg.value, path=cfg.policy.path), "scalar", trained=True, fresh_head=True)


def _sizes(role: Role, earlier: Sequence[StageConfig], tokenizers: dict[object, Any]) -> Sizes | None:
    """Return the sizes of a role; None if its config cannot be read. UserError for a model of the wrong kind.

    tokenizers: those that are loaded already, by the bytes of their files.
    """
    source, kind = _start(role.cfg, earlier)
    check_path(source.path)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source.path, trust_remote_code=source.trust_remote_code)
    except Exception:  # foreign code, which may fail in any way
        return None
    names = " ".join(config.architectures or ())
    kind = kind or ("scalar" if "SequenceClassification" in names else "lm" if "ForCausalLM" in names else "")
    if role.head == "lm" and kind == "scalar":
        raise UserError(f"{role}: is a reward model, not a language model; give a base or SFT model")
    if role.head == "scalar" and kind == "lm" and not role.fresh_head:
        raise UserError(f"{role}: is a language model, whose scalar head was never trained; give a reward model")
    text_config = config.get_text_config()
    numbers = [getattr(text_config, name, None) for name in ("max_position_embeddings", "vocab_size")]
    positions, rows = (number if isinstance(number, int) else 0 for number in numbers)
    bytes_of = _tokenizer_files(source.path)
    if bytes_of not in tokenizers:
        tokenizers[bytes_of] = load_tokenizer(source)
    return Sizes(role, positions, rows, tokenizers[bytes_of])


def _tokenizer_files(path: str) -> object:
    """Return the checksums of the files of a folder that make its tokenizer; a hub name stands for itself."""
    if not Path(path).is_dir():
        return path
    files = [file for pattern in TOKENIZER_FILES for file in sorted(Path(path).glob(pattern))]
    return tuple((file.name, sha256(file)) for file in files)


def _start(cfg: ModelConfig, earlier: Sequence[StageConfig]) -> tuple[ModelConfig, str]:
    """Return the model whose sizes `cfg.path` has, and the kind of head that it will have. They are those of an earlier
    stage's start if `cfg.path` is the folder that the stage has yet to write; else `cfg` and ""."""
    path = Path(cfg.path)
    if (path / "config.json").exists():
        return cfg, ""
    for stage in earlier:
        if path.absolute() == Path(stage.out).absolute():
            begins = stage.policy if isinstance(stage, PPOConfig) else stage.model
            others = [other for other in earlier if other is not stage]
            return _start(begins, others)[0], "scalar" if isinstance(stage, RewardConfig) else "lm"
    return cfg, ""


def planned(cfg: S, earlier: Sequence[StageConfig]) -> S:
    """Return the settings with each folder that a stage of `earlier` has yet to write replaced by the model which that
    stage starts from: of the same sizes, though perhaps without a trained scalar head."""

    def start_of(path: str) -> str:
        return _start(ModelConfig(path), earlier)[0].path if path else path

    def start_of_reward(spec: RewardSpec) -> RewardSpec:
        return start_of(spec) if isinstance(spec, str) and not is_function(spec) else spec

    template = _planned_template((cfg.policy if isinstance(cfg, PPOConfig) else cfg.model).path, earlier)
    changes: dict[str, Any] = {}
    for name, value in vars(cfg).items():
        if isinstance(value, ModelConfig):
            changes[name] = replace(value, path=start_of(value.path))
        elif isinstance(value, DataConfig) and value.template == "auto":
            changes[name] = replace(value, template=template)
        elif name == "reference":
            changes[name] = start_of(value)
        elif name in ("reward", "select_reward"):
            changes[name] = tuple(map(start_of_reward, reward_specs(value)))
    return replace(cfg, **changes)


def _planned_template(path: str, earlier: Sequence[StageConfig]) -> Template:
    """Return the template that a model will have learned by the settings of the stages which have yet to write it."""
    for stage in earlier:
        if Path(path).absolute() == Path(stage.out).absolute() and not (Path(path) / "config.json").exists():
            if stage.data.template != "auto":
                return stage.data.template
            begins = stage.policy if isinstance(stage, PPOConfig) else stage.model
            return _planned_template(begins.path, [other for other in earlier if other is not stage])
    return "auto"


def _check_room(stage: str, sampling: SamplingConfig, smallest: Sizes) -> None:
    if sampling.max_new_tokens >= smallest.positions:
        raise UserError(
            f"{stage}: sampling.max_new_tokens is {sampling.max_new_tokens}, but {smallest.role} has only"
            f" {smallest.positions} positions, prompt included; lower it"
        )


def _check_prompts(data: DataConfig, sampling: SamplingConfig, tokenizer: Any, smallest: Sizes) -> None:
    """Raise UserError if no prompt leaves room for the longest response."""
    room = smallest.positions - sampling.max_new_tokens
    if room >= data.max_prompt_tokens:
        return
    first = min(data.limit or ROWS_TRIED, ROWS_TRIED)
    if _why_none_fits(data, first, tokenizer, room) and (reason := _why_none_fits(data, data.limit, tokenizer, room)):
        raise UserError(
            f"ppo: no prompt fits: {smallest.role} has {smallest.positions} positions, of which sampling.max_new_tokens"
            f" takes {sampling.max_new_tokens} ({reason}); lower it, or give shorter prompts"
        )


def _why_none_fits(data: DataConfig, limit: int, tokenizer: Any, room: int) -> str:
    """Return what `read_prompts` says if none of the first `limit` prompts fits in `room` tokens, else ""."""
    try:
        read_prompts(replace(data, limit=limit, valid="", valid_fraction=0.0), tokenizer, 0, room)
    except UserError as error:
        if "none of the" not in str(error):
            raise
        return str(error)
    return ""


def check_device(command: str, device: str) -> None:
    """Raise UserError for a device that torch does not know or that is not there."""
    if device == "auto":
        return
    if fault := _device_fault(device):
        raise UserError(f"{command}: device {device} cannot be used: {fault}")
    try:
        torch.zeros(1, device=device).cpu()  # `meta` has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without XPU
        reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
        raise UserError(
            f"{command}: device {device} cannot be used: {shortened(reason, 160)}; choose cpu or auto"
        ) from error


def _device_fault(device: str) -> str:
    """Return why a device cannot be used, and the remedy; "" if there is no known reason."""
    kind, _, index = device.partition(":")
    if kind not in DEVICES or (index and not index.isdigit()):
        named = "cuda" if kind.lower() in ("gpu", "nvidia", "rocm", "hip") else nearest(kind.lower(), DEVICES)
        meant = f"did you mean {named}? " if named and kind not in DEVICES else ""
        return f"there is no such device; {meant}choose auto, cpu, cuda, cuda:1 (the second GPU) or mps (a Mac's)"
    if kind == "cuda" and not torch.backends.cuda.is_built() and not torch.version.hip:
        return "this build of torch has no CUDA; choose cpu or auto, or install torch with CUDA (pytorch.org)"
    if kind == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU; choose cpu or auto, or look at the driver and CUDA_VISIBLE_DEVICES (`nvidia-smi`)"
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        there = ", ".join(f"cuda:{i}" for i in range(torch.cuda.device_count()))
        return f"torch sees only {there}; choose one of them, cpu or auto"
    if kind == "mps" and not torch.backends.mps.is_available():
        return "it is the GPU of a Mac, which torch does not see here; choose cpu or auto"
    if kind == "cpu" and int(index or 0):
        return "there is one CPU; choose cpu or auto"
    return ""
