"""Flags over a recipe's values: `--ppo.kl.coef 0.1` for a stage's section, `--seed 1` for all stages.

A sweep takes several values after a flag. They become one set of flags for each combination.
"""

from __future__ import annotations

import itertools
import re
import textwrap
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Union, get_args, get_origin

from rlhf_fast.config.evaluation import EvalConfig
from rlhf_fast.config.library_names import meant_setting
from rlhf_fast.config.resolve import coerce, setting_types, show, to_plain, unknown_setting
from rlhf_fast.config.sections import EVAL, PASSED_ON, SHARED, meant_section
from rlhf_fast.config.stages import STAGES, SFTConfig
from rlhf_fast.config.yaml_file import Setting
from rlhf_fast.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SECTIONS: dict[str, type[DataclassInstance]] = {**STAGES, EVAL: EvalConfig}
"""Section of a recipe -> its settings."""
Overrides = Mapping[str, Mapping[str, Setting]]
"""Section -> path -> setting; "" has the settings for all stages."""


class Flag(NamedTuple):
    """A flag as it was written, and the words after it. section: "" = for all stages."""

    name: str
    section: str
    path: str
    words: list[str]
    is_off: bool = False
    """The form `--no-NAME` of a switch."""

    @property
    def kind(self) -> Any:
        """The type of the setting."""
        if self.section:
            return setting_types(SECTIONS[self.section])[self.path]
        return setting_types(SFTConfig)[self.path] if self.path in PASSED_ON else str

    @property
    def setting(self) -> str:
        """The setting's name in a recipe."""
        return f"{self.section}.{self.path}" if self.section else self.path


class Combination(NamedTuple):
    """One combination of a sweep's values. values: setting -> the value as a YAML file would have it."""

    values: dict[str, str]
    flags: list[Flag]


def read_flags(argv: Sequence[str], command: str, extra: Collection[str] = ()) -> list[Flag]:
    """Return the flags of a command line without its recipe. UserError for a name that no recipe can have.

    extra: names without values of a recipe, which the command knows.
    """
    found: list[Flag] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"{command}: {word} belongs to no flag; write the recipe first, then --SETTING VALUE")
        name, equals, value = word.partition("=")
        values = [value] if equals else list(itertools.takewhile(lambda word: not word.startswith("--"), words))
        words = words if equals else words[len(values) :]
        path = name.removeprefix("--").replace("-", "_")
        section, dot, rest = path.partition(".")
        flag = Flag(name, "", path, values)
        if dot and section in SECTIONS:
            cls = SECTIONS[section]
            flag = Flag(name, section, rest, values)
            if rest not in setting_types(cls):
                group, inner, last = rest.rpartition(".")
                switch = f"{group}{inner}{last.removeprefix('no_')}"
                if not last.startswith("no_") or setting_types(cls).get(switch) is not bool:
                    raise unknown_setting(cls, rest, name)
                flag = Flag(name, section, switch, values, is_off=True)
        elif path not in (*SHARED, *extra):
            raise UserError(f"{command}: there is no flag {name}; {_hint(path)}")
        _refuse_second_list(flag, found, command)
        found.append(flag)
    return found


def _hint(path: str) -> str:
    """Return what may have been meant by a flag that is neither of a section nor for all stages."""
    if path in SECTIONS:
        return f"write --{path}.SETTING for a setting of that section"
    inside = [f"--{section}.{path}" for section, cls in SECTIONS.items() if path in setting_types(cls)]
    if inside:
        return f"write {' or '.join(inside)}"
    section, dot, rest = path.partition(".")
    if dot and (meant := meant_section(section)):
        return f"there is no section {section} either; did you mean --{meant}.{rest}?"
    names = [*SHARED, *(f"{section}.{name}" for section, cls in SECTIONS.items() for name in setting_types(cls))]
    near = meant_setting(path, names)
    return f"did you mean --{near}?" if near else "`rlhf-fast show-config all` lists the settings"


def _refuse_second_list(flag: Flag, earlier: Sequence[Flag], command: str) -> None:
    """Raise UserError if a list or map is given twice, of which one would be lost. Of single values the last counts."""
    if flag.path in (*SHARED, "sweep.out") and not flag.section:
        return
    if _is_collection(flag.kind) and any(other.setting == flag.setting for other in earlier):
        raise UserError(f"{command}: {flag.name} is given twice, and only one would count; give all after one")


def _is_collection(kind: Any) -> bool:
    """Return whether a setting takes several words: a list, a map, or one of them among others."""
    if get_origin(kind) in (Union, types.UnionType):
        return any(map(_is_collection, get_args(kind)))
    return get_origin(kind) in (tuple, dict, list, Sequence)


def overrides(flags: Sequence[Flag], command: str) -> dict[str, dict[str, Setting]]:
    """Return the settings of flags by section. UserError for a value of the wrong type, or too many or no words."""
    found: dict[str, dict[str, Setting]] = {}
    for flag in flags:
        setting = Setting(_value(flag, command), flag.name)
        if flag.section:
            coerce(SECTIONS[flag.section], flag.path, setting)
        found.setdefault(flag.section, {})[flag.path] = setting
    return found


def _value(flag: Flag, command: str) -> object:
    kind, words = flag.kind, flag.words
    if kind is bool:
        if words:
            group, dot, last = flag.name.removeprefix("--").rpartition(".")
            last = re.sub("^no[-_]", "", last) if flag.is_off else last
            raise UserError(
                f"{command}: {flag.name} takes no value: give --{group}{dot}{last} alone, or --{group}{dot}no-{last}"
            )
        return not flag.is_off
    if get_origin(kind) is dict:
        keys = words[::2]
        if not words or len(words) % 2:
            raise UserError(
                f"{command}: {flag.name} needs pairs of a name and a value, got {' '.join(words) or 'none'}"
            )
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise UserError(f"{command}: {flag.name} has {twice[0]} twice, and only one can be meant")
        return dict(zip(keys, words[1::2], strict=True))
    if get_origin(kind) is tuple:
        return words
    if not words:
        raise UserError(f"{command}: {flag.name} needs a value")
    if len(words) > 1:
        if _is_collection(kind):
            return words
        raise UserError(
            f"{command}: {flag.name} takes one value, got {' '.join(words)}; `rlhf-fast sweep` runs one after another"
        )
    return words[0]


def combinations(flags: Sequence[Flag], command: str) -> list[Combination]:
    """Return the combinations of the values of those flags that have several. UserError if none has, or a value is
    wrong or there twice."""
    fixed, axes = [], []
    for flag in flags:
        values = _swept_values(flag, command)
        if values:
            axes.append([(flag.setting, text, single) for text, single in values])
        else:
            fixed.append(flag)
    if not axes:
        if commas := [flag for flag in flags if flag.kind in (int, float) and any("," in word for word in flag.words)]:
            raise UserError(f"{command}: {commas[0].name}: give the values with spaces between them, without commas")
        raise UserError(
            f"{command}: give a setting several values, as in --ppo.kl.coef 0.01 0.05 0.1; one run is `rlhf-fast run`"
        )
    overrides(fixed, command)
    return [
        Combination({setting: text for setting, text, _ in chosen}, [*fixed, *(single for *_, single in chosen)])
        for chosen in itertools.product(*axes)
    ]


def _swept_values(flag: Flag, command: str) -> list[tuple[str, Flag]]:
    """Return each value of a flag as text, and the flag with it alone; [] for a flag with one value, as a list or
    a map is. A setting that may be one text or several is swept: each of its values is one."""
    if len(flag.words) < 2 or get_origin(flag.kind) in (tuple, dict):
        return []
    if flag.section == EVAL or flag.path in ("out", "resume"):
        raise UserError(
            f"{command}: {flag.name} takes one value, since it changes no weights; got {' '.join(flag.words)}"
        )
    found = []
    for word in flag.words:
        if flag.kind is bool:
            if word not in ("true", "false"):
                raise UserError(f"{command}: {flag.name} takes true and false here, got {word}")
            found.append((word, flag._replace(words=[], is_off=(word == "false") != flag.is_off)))
            continue
        cls = SECTIONS[flag.section] if flag.section else SFTConfig
        text = word
        if flag.section or flag.path in PASSED_ON:
            try:
                value = to_plain(coerce(cls, flag.path, Setting(word, flag.name)))
                text = value if isinstance(value, str) else show(value)
            except UserError as error:
                if "," in word:
                    raise UserError(f"{error}; give the values with spaces between them") from error
                raise
        found.append((text, flag._replace(words=[word])))
    texts = [text for text, _ in found]
    if twice := [text for text in texts if texts.count(text) > 1]:
        raise UserError(f"{command}: {flag.name} has the value {twice[0]} twice")
    return found


def section_help(width: int) -> Iterator[str]:
    """Yield lines with the names of the settings of each section; a group stands as NAME.*."""
    for section, cls in SECTIONS.items():
        names = dict.fromkeys(f"{name.partition('.')[0]}.*" if "." in name else name for name in setting_types(cls))
        start = f"  --{section}.".ljust(12)
        yield from textwrap.wrap(
            "  ".join(names), width, initial_indent=start, subsequent_indent=" " * 12, break_on_hyphens=False
        )
