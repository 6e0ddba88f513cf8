"""`rlhf-fast show-config`: every setting of a stage as YAML with its meaning, or the difference between two presets."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_fast.config.presets import preset
from rlhf_fast.config.recipe_flags import SECTIONS
from rlhf_fast.config.resolve import difference, resolve, show, to_commented_yaml, to_plain
from rlhf_fast.config.sections import EVAL, read_stage
from rlhf_fast.config.stages import STAGES
from rlhf_fast.errors import UserError
from rlhf_fast.run.terminal import aligned


def show_config(stage: str, name: str, file: str = "", diff: tuple[str, str] | None = None) -> Iterator[str]:
    """Yield the lines to print for one stage, "eval" or "all". `name` is a preset, `file` a YAML file with settings
    over it."""
    if stage == EVAL and (name or diff):
        raise UserError("show-config: eval has no presets; leave out --preset and --diff")
    for each in STAGES if stage == "all" else (stage,):
        if diff:
            yield from _preset_difference(each, *diff)
            continue
        file_preset, settings = read_stage(file, each) if file else ("", {})
        if stage == "all":
            yield f"{each}:"
        layers = () if each == EVAL else (preset(each, name or file_preset),)
        cfg = resolve(SECTIONS[each], *layers, settings, check=False)
        yield from to_commented_yaml(cfg, indent="  " if stage == "all" else "")


def _preset_difference(stage: str, left: str, right: str) -> Iterator[str]:
    """Yield a table of the settings in which two presets of a stage differ, and an empty line."""
    a, b = (resolve(STAGES[stage], preset(stage, name), check=False) for name in (left, right))
    rows = [(path, show(to_plain(was)), show(to_plain(now))) for path, was, now in difference(a, b)]
    yield from aligned([(stage, left, right), *rows])
    if not rows:
        yield "  no difference"
    yield ""
