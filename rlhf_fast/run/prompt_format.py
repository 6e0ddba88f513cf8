"""The format of prompts that a run's model learns: run.json holds it, and it binds resumed runs and later stages.

`template` in run.json has the kind (chat, plain, dialog), the date that a chat template takes for today's (null if it
writes none), and a checksum of a few conversations as tokens, which shows that a tokenizer or template has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf_fast.config.fields import DataConfig
from rlhf_fast.config.rewards import is_function
from rlhf_fast.config.stages import PPOConfig, RewardConfig, SFTConfig, StageConfig
from rlhf_fast.data.chat_template import process_start
from rlhf_fast.data.encode import Encoder, PromptFormat, Template, resolve_template
from rlhf_fast.data.fields import InvalidRow, Message
from rlhf_fast.errors import UserError
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.outputs import RUN, read_run

TEMPLATE = "template"
"""The section of run.json."""
KINDS = ("chat", "plain", "dialog")
PARTS_OF_A_RUN = ("ema", "last", "value")
"""Folders inside a run's `out` that hold models of that run."""
_USER: Message = {"role": "user", "content": "  What is 2 + 2, \u00e4 and <b>?\nSay it."}
_ASSISTANT: Message = {"role": "assistant", "content": "It is 4."}
PROBES: tuple[list[Message], ...] = (
    [_USER],
    [{"role": "system", "content": "Be brief."}, _USER],
    [_USER, _ASSISTANT, {"role": "user", "content": "Why?"}],
)


def bind_prompt_format(
    run_folder: RunFolder, path: str, tokenizer: Any, data: Mapping[str, DataConfig], *, teaches: bool = False
) -> PromptFormat:
    """Return the format of a run's prompts and put it into its run.json.

    path: the model that the run starts from, whose own format holds unless the run is one that `teaches` it another.
    data: setting -> the data that it reads. UserError if the settings, the model's run or this run's start differ.
    """
    name, value = _explicit_template(run_folder.stage, data)
    saved = read_run(run_folder.out)
    started = _section(run_folder.out, saved) if TEMPLATE in saved else {}
    if started:
        prompt_format = PromptFormat(started["kind"], _date(started))
        _check_tokens(started, tokenizer, prompt_format, f"{run_folder.out}: since this run was started,")
    else:
        setting = f"{run_folder.stage}: {name}"
        prompt_format, notes = model_prompt_format(path, tokenizer, value, setting, strict=not teaches)
        run_folder.notes += notes
    run_folder.manifest[TEMPLATE] = started or as_json(tokenizer, prompt_format)
    first = next(iter(data.values()))
    encoder = Encoder(tokenizer, prompt_format.template, first.append_eos, prompt_format.date)
    run_folder.notes += encoder.notes(learned=run_folder.stage == "sft")
    return prompt_format


def bound_prompt_format(run_folder: RunFolder) -> PromptFormat:
    """Return the format that `bind_prompt_format` has put into the run's run.json."""
    recorded = run_folder.manifest[TEMPLATE]
    return PromptFormat(recorded["kind"], _date(recorded))


def model_prompt_format(
    path: str, tokenizer: Any, template: Template, setting: str, *, strict: bool
) -> tuple[PromptFormat, list[str]]:
    """Return the format in which the model at `path` is asked, and notes.

    template: the wish; auto is the format that the model's run.json has. strict: another one is an error, no note.
    """
    recorded = recorded_format(path)
    own, notes = recorded.get("kind"), []
    if own and template not in ("auto", own):
        if strict:
            raise _another_template(setting, template, path, own)
        notes.append(f"{setting} is {template}, but the run that wrote {path} had {own}")
    kind = resolve_template(tokenizer, own if own and template == "auto" else template, setting, path)
    prompt_format = PromptFormat(kind, _date(recorded) or process_start())
    if kind == own:
        _check_tokens(recorded, tokenizer, prompt_format, f"{path}: since its run.json was written,")
    return prompt_format, notes


def check_same_format(prompt_format: PromptFormat, cfg: StageConfig) -> Iterator[str]:
    """Yield a note for each other model of the stage that has learned another date; UserError for another template."""
    for setting, path in _other_models(cfg).items():
        recorded = recorded_format(path)
        if recorded.get("kind", prompt_format.template) != prompt_format.template:
            raise UserError(
                f"{setting}: the run that wrote {path} had data.template {recorded['kind']}, and the prompts are"
                f" {prompt_format.template} here; models of one run must know one form of prompt"
            )
        date, now = _date(recorded), prompt_format.date or process_start()
        if date and date.date() != now.date():
            yield f"{setting}: {path} has learned prompts of {date.date()}; the chat template writes {now.date()} here"


def check_planned_format(cfg: StageConfig, tokenizer: Any, earlier: Sequence[StageConfig]) -> None:
    """Raise UserError, before anything is trained, if a stage's prompts have another form than its models learn.

    earlier: the stages of the recipe, some of whose folders this one reads.
    """
    kind = _planned_kind(cfg, tokenizer, earlier)
    for setting, path in _other_models(cfg).items():
        if _model_kind(path, tokenizer, earlier) not in (None, kind):
            raise UserError(
                f"{cfg.stage}: {setting} ({path}) learns prompts in another form than {kind}; give all"
                " stages one data.template"
            )


def _planned_kind(cfg: StageConfig, tokenizer: Any, earlier: Sequence[StageConfig]) -> Template:
    """Return the kind that a stage's prompts will have."""
    start, data = _start(cfg), {"data": cfg.data}
    if isinstance(cfg, RewardConfig):
        data["demonstrations"] = cfg.demonstrations
    name, template = _explicit_template(cfg.stage, data)
    own = _model_kind(start, tokenizer, earlier)
    if own and template not in ("auto", own) and not isinstance(cfg, SFTConfig):
        raise _another_template(f"{cfg.stage}: {name}", template, start, own)
    return resolve_template(tokenizer, own if own and template == "auto" else template)


def _model_kind(path: str, tokenizer: Any, earlier: Sequence[StageConfig]) -> Template | None:
    """Return the kind that the run has or will have which writes the model; None if no run of ours does."""
    for stage in earlier:
        if Path(path).absolute() == Path(stage.out).absolute() and not (Path(path) / "config.json").exists():
            return _planned_kind(stage, tokenizer, [other for other in earlier if other is not stage])
    return recorded_format(path).get("kind")


def _start(cfg: StageConfig) -> str:
    return cfg.policy.path if isinstance(cfg, PPOConfig) else cfg.model.path


def _other_models(cfg: StageConfig) -> dict[str, str]:
    """Return the models that read the prompts beside the one that is trained: setting -> path."""
    if isinstance(cfg, PPOConfig):
        models = {"reference": cfg.reference, "value.path": cfg.value.path}
    elif not (isinstance(cfg, SFTConfig) and cfg.select == "reward"):
        return {}
    else:
        models = {}
    models |= {setting: str(spec) for setting, spec in cfg.rewards().items() if not is_function(spec)}
    return {setting: path for setting, path in models.items() if path}


def _explicit_template(stage: str, data: Mapping[str, DataConfig]) -> tuple[str, Template]:
    """Return the setting that names a template, and that; "auto" if none does. UserError if two of them differ."""
    explicit: dict[str, Template] = {}
    for setting, cfg in data.items():
        if cfg.path and cfg.template != "auto":
            explicit[f"{setting}.template"] = cfg.template
    if len(set(explicit.values())) > 1:
        found = " and ".join(f"{name} is {value}" for name, value in explicit.items())
        raise UserError(f"{stage}: {found}; prompts of one model must have one form")
    return next(iter(explicit.items()), ("data.template", "auto"))


def _another_template(setting: str, template: str, path: str, own: str) -> UserError:
    return UserError(
        f"{setting} is {template}, but the run that wrote {path} had {own}; leave it at auto, or train the model with"
        f" {template} first"
    )


def recorded_format(path: str) -> dict[str, Any]:
    """Return the format in the run.json of the run that wrote the model at `path`; {} if it has none.

    Runs of earlier versions have no such section, but their setting.
    """
    folder = Path(path)
    places = [folder, folder.resolve().parent] if folder.name in PARTS_OF_A_RUN else [folder]
    for place in places:
        saved: dict[str, Any] = {}
        with suppress(UserError):  # a run.json of another program
            saved = read_run(place)
        if found := _section(place, saved):
            return found
    return {}


def _section(folder: Path, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the format in run.json (`saved`), {} if it has none; UserError for one that no run of ours has written."""
    found = saved.get(TEMPLATE)
    if found is None and TEMPLATE not in saved:
        data = saved.get("config", {}).get("data")
        kind = data.get("template", "auto") if isinstance(data, dict) else "auto"
        found = {} if kind == "auto" else {"kind": kind}
    if not found and isinstance(found, dict):
        return {}
    if isinstance(found, dict) and found.get("kind") in KINDS and isinstance(found.get("tokens", ""), str):
        with suppress(ValueError, TypeError):
            datetime.fromisoformat("2000-01-01" if found.get("date") is None else found["date"])
            return found
    raise UserError(
        f"{folder / RUN}: its `{TEMPLATE}` is not what a run of ours writes; put the old text back, or remove"
        f" `{TEMPLATE}` from it to go on with today's template"
    )


def as_json(tokenizer: Any, prompt_format: PromptFormat) -> dict[str, Any]:
    """Return the section of run.json."""
    date = prompt_format.date or process_start()
    shown = date.isoformat() if _may_show_date(tokenizer, prompt_format) else None
    return {"kind": prompt_format.template, "date": shown, "tokens": token_checksum(tokenizer, prompt_format)}


def token_checksum(tokenizer: Any, prompt_format: PromptFormat) -> str:
    """Return a checksum of the PROBES with an answer as tokens. A refused one counts as its error."""
    encoder = Encoder(tokenizer, prompt_format.template, eos=False, date=prompt_format.date)
    found = [_probe_ids(encoder, turns) for turns in PROBES]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _probe_ids(encoder: Encoder, turns: list[Message]) -> Any:
    try:
        return [encoder.prompt(turns)[0], encoder.answer(turns, _ASSISTANT)]
    except (InvalidRow, UserError) as error:
        return type(error).__name__


def _may_show_date(tokenizer: Any, prompt_format: PromptFormat) -> bool:
    """Return whether the prompts may hold a date: a template may write one only with tools, for instance."""
    chat = Encoder(tokenizer, prompt_format.template, eos=False).chat
    return chat is not None and (chat.shows_date or "strftime_now" in str(tokenizer.chat_template))


def _date(recorded: Mapping[str, Any]) -> datetime | None:
    return datetime.fromisoformat(recorded["date"]) if recorded.get("date") else None


def _check_tokens(recorded: Mapping[str, Any], tokenizer: Any, prompt_format: PromptFormat, since: str) -> None:
    """Raise UserError if the probes do not give the recorded tokens."""
    if recorded.get("tokens", "") not in ("", token_checksum(tokenizer, prompt_format)):
        raise UserError(
            f"{since} the tokenizer or its chat template has changed: one conversation gives other tokens; put the old"
            " files (or version of transformers) back, or remove `template` from that run.json to go on with the new"
        )
