"""A YAML file with sections: a recipe, which has settings for all stages and a section for each stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlhf_fast.config.resolve import setting_types
from rlhf_fast.config.run_file import read_run_file, run_settings
from rlhf_fast.config.stages import STAGES
from rlhf_fast.config.yaml_file import Setting, read_yaml
from rlhf_fast.errors import UserError, nearest

EVAL = "eval"
"""The section of the evaluation, which runs after the stages."""
SHARED = ("out", "preset", "seed", "device")
"""Settings for all stages."""
PASSED_ON = ("seed", "device")
"""Settings for all stages that a stage has too."""


def split_sections(
    path: str | Path, values: Mapping[str, Setting]
) -> tuple[dict[str, Setting], dict[str, dict[str, Setting]]]:
    """Split the settings into those for all stages and those of each stage."""
    shared: dict[str, Setting] = {}
    sections: dict[str, dict[str, Setting]] = {}
    for name, setting in values.items():
        stage, dot, rest = name.partition(".")
        if _is_in_section(name, setting):
            section = sections.setdefault(stage, {})
            if dot:
                section[rest] = setting
        elif name in SHARED:
            shared[name] = setting
        else:
            if dot and (near := meant_section(stage)):
                raise UserError(f'{path}: no section "{stage}"; did you mean {near}? ({setting.origin})')
            known = ", ".join([*SHARED, *STAGES, EVAL])
            raise UserError(f'{path}: no setting "{name}" for all stages; there are {known} ({setting.origin})')
    return shared, sections


def read_stage(path: str | Path, stage: str) -> tuple[str, dict[str, Setting]]:
    """Return the preset and the settings that a file has for one stage: all that it holds, or of a recipe the stage's
    section and what holds for all stages. The recipe's `out` gets the stage's name. A run.json gives its run back."""
    if run := read_run_file(path):
        return "", run_settings(path, run, stage)
    values = read_yaml(path)
    own = "reward" if stage == "ppo" else ""  # an empty `reward:` is a setting of PPO
    found = {name.partition(".")[0] for name, setting in values.items() if _is_in_section(name, setting)}
    has_own = bool(own) and any(name in setting_types(STAGES[stage]) and name not in SHARED for name in values)
    if not found or (found == {own} and has_own):  # the reward may be a map, which is refused later
        return "", values
    shared, sections = split_sections(path, values)
    if stage not in sections:
        raise UserError(f"{path}: has no section {stage}; it has {', '.join(sections)}")
    layer = {name: shared[name] for name in PASSED_ON if name in shared}
    if out := shared_text(shared, "out", ""):
        layer["out"] = Setting(str(Path(out) / stage), shared["out"].origin)
    return shared_text(shared, "preset", ""), layer | sections[stage]


def meant_section(name: str) -> str:
    """Return the section that was meant by a name; "" for that of a stage's own group, as model, or if none is near."""
    groups = {path.partition(".")[0] for cls in STAGES.values() for path in setting_types(cls)}
    return "" if name in groups else nearest(name, [*STAGES, EVAL])


def shared_text(shared: Mapping[str, Setting], name: str, default: str) -> str:
    """Return the text of a setting for all stages."""
    setting = shared.get(name, Setting(default, ""))
    if setting.value is None:
        return default
    if not isinstance(setting.value, str):
        raise UserError(f"{name} must be text (in quotes, if it looks like a number) ({setting.origin})")
    return setting.value


def _is_in_section(name: str, setting: Setting) -> bool:
    stage, dot, _ = name.partition(".")
    return stage in (*STAGES, EVAL) and (bool(dot) or setting.value is None)
