"""`rlhf-fast completion SHELL`: a script that completes commands, their flags, values of choices and file names."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional

from rlhf_fast.config.presets import PRESETS
from rlhf_fast.config.recipe_flags import SECTIONS
from rlhf_fast.config.resolve import setting_docs
from rlhf_fast.config.stages import STAGES

DEVICES = ("auto", "cpu", "cuda", "mps")


class Flag(NamedTuple):
    """A flag of a command, or with `names` empty what stands without a flag."""

    names: tuple[str, ...]
    help: str
    choices: tuple[str, ...] = ()
    takes_value: bool = True
    is_text: bool = False
    """Without choices: whether the value may be the name of a file."""


def script(shell: str, commands: Mapping[str, tuple[str, Any]]) -> str:
    """Return the script of a shell. commands: command -> its summary and the class of its flags."""
    flags = {name: list(flags_of(name, cls)) for name, (_, cls) in commands.items()}
    summaries = {name: summary for name, (summary, _) in commands.items()}
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](summaries, flags)


def flags_of(command: str, cls: Any) -> Iterator[Flag]:
    """Yield the flags of a command as tyro names them. cls: their class; None for the settings of a recipe."""
    if cls is None:
        yield from _recipe_flags(command)
        return
    if command in STAGES:
        yield Flag(("--preset",), "settings to start from", ("default", *PRESETS[command]))
        yield Flag(("--config",), "YAML file with settings", is_text=True)
        yield Flag(("--dry-run",), "print what the run takes, and stop there", takes_value=False)
    yield from _flags(cls, setting_docs(cls), "", "")
    yield Flag(("--help", "-h"), "show all flags", takes_value=False)


def _recipe_flags(command: str) -> Iterator[Flag]:
    """Yield the flags of a command that runs a recipe."""
    yield Flag((), "the recipe's YAML file", is_text=True)
    yield Flag(("--out",), "folder of all stages", is_text=True)
    yield Flag(("--preset",), "settings under those of the recipe", ("default", "paper", "tutorial"))
    yield Flag(("--seed",), "seed of all stages")
    yield Flag(("--device",), "device of all stages", DEVICES)
    for section, cls in SECTIONS.items():
        yield from _flags(cls, setting_docs(cls), "", f"{section}.")
    if command == "run":
        yield Flag(("--dry-run",), "print what each stage takes, and stop there", takes_value=False)
    else:
        yield Flag(("--sweep.out",), "folder of the runs", is_text=True)
    yield Flag(("--help", "-h"), "show the usage", takes_value=False)


def _flags(cls: Any, docs: Mapping[str, str], path: str, prefix: str) -> Iterator[Flag]:
    """Yield the flags of a group of settings. prefix: what stands before their names, with a dot."""
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        kind: Any = hints[field.name]
        marks: list[Any] = []
        if get_origin(kind) is Annotated:
            kind, *marks = get_args(kind)
        inner = f"{path}{field.name}"
        help_ = docs.get(inner, "")
        if dataclasses.is_dataclass(kind):
            omits = OmitArgPrefixes in marks
            yield from _flags(kind, docs, f"{inner}.", prefix if omits else f"{prefix}{_dashed(field.name)}.")
            continue
        config = next((mark for mark in marks if hasattr(mark, "aliases")), None)
        name = getattr(config, "name", None) or _dashed(field.name)
        origin = get_origin(kind) or kind
        if kind is bool:
            names = [f"--{prefix}{name}", *(getattr(config, "aliases", None) or ())]
            if FlagCreatePairsOff not in marks:
                names += [f"--{prefix}no-{other.removeprefix(f'--{prefix}')}" for other in names]
            yield Flag(tuple(names), help_, takes_value=False)
            continue
        choices = tuple(map(str, get_args(kind))) if origin is Literal else DEVICES if name == "device" else ()
        spelled = () if Positional in marks else (f"--{prefix}{name}", *(getattr(config, "aliases", None) or ()))
        yield Flag(spelled, help_, choices, is_text=not choices and _is_text(kind))


def _is_text(kind: Any) -> bool:
    """Return whether a value of the type is a text, or several."""
    if get_origin(kind) in (Union, UnionType):
        return any(map(_is_text, get_args(kind)))
    return kind is str or (get_origin(kind) is tuple and get_args(kind)[0] is str)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _bash(commands: Mapping[str, str], flags: Mapping[str, list[Flag]]) -> str:
    return f"""\
# bash completion of rlhf-fast; add to ~/.bashrc: eval "$(rlhf-fast completion bash)"
_rlhf_fast() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} values=
    COMPREPLY=()
    if [[ $current == "=" ]]; then
        current=
    elif [[ $previous == "=" ]]; then
        previous=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=($(compgen -W "{" ".join(commands)} --help --version" -- "$current"))
        return
    fi
    case "${{COMP_WORDS[1]}} $previous" in
{_cases(flags, "values={values}", "compopt +o default 2>/dev/null; return")}
    esac
    if [[ -z $values && $current == -* ]]; then
        case "${{COMP_WORDS[1]}}" in
{_each(flags, "values={flags}")}
        esac
    elif [[ -z $values && $previous != -* ]]; then
        case "${{COMP_WORDS[1]}}" in
{_positional(flags, "values={values}")}
        esac
    fi
    [[ -z $values ]] || COMPREPLY=($(compgen -W "$values" -- "$current"))
}}
complete -o default -F _rlhf_fast rlhf-fast
"""


def _zsh(commands: Mapping[str, str], flags: Mapping[str, list[Flag]]) -> str:
    described = " ".join(shlex.quote(f"{name}:{summary}") for name, summary in commands.items())
    return f"""\
#compdef rlhf-fast
# zsh completion of rlhf-fast; add to ~/.zshrc, after compinit: eval "$(rlhf-fast completion zsh)"
_rlhf_fast() {{
    local -a values
    if (( CURRENT == 2 )); then
        values=({described})
        _describe command values
        return
    fi
    local previous=$words[CURRENT-1]
    if [[ $words[CURRENT] == --*=* ]]; then
        previous=${{words[CURRENT]%%=*}}
        compset -P '--*='
    fi
    case "$words[2] $previous" in
{_cases(flags, "compadd -- {words}; return", "return")}
    esac
    if [[ $PREFIX == -* ]]; then
        case "$words[2]" in
{_each(flags, "compadd -- {words}")}
        esac
        return
    fi
    if [[ $previous != -* ]]; then
        case "$words[2]" in
{_positional(flags, "compadd -- {words}; return")}
        esac
    fi
    _files
}}
compdef _rlhf_fast rlhf-fast
"""


def _cases(flags: Mapping[str, list[Flag]], choose: str, nothing: str) -> str:
    """Return the branches of a `case` over "COMMAND FLAG" of the flags whose value is a choice, or no file's name."""
    lines = []
    for command, found in flags.items():
        numbers = []
        for flag in found:
            patterns = [f'"{command} {name}"' for name in flag.names]
            if not flag.takes_value or not patterns:
                continue
            if flag.choices:
                action = choose.format(values=shlex.quote(" ".join(flag.choices)), words=shlex.join(flag.choices))
                lines.append(f"        {'|'.join(patterns)}) {action} ;;")
            elif not flag.is_text:
                numbers += patterns
        if numbers:
            lines.append(f"        {'|'.join(numbers)}) {nothing} ;;")
    return "\n".join(lines)


def _each(flags: Mapping[str, list[Flag]], action: str) -> str:
    """Return the branches of a `case` over the command, with all its flags."""
    names = {command: [name for flag in found for name in flag.names] for command, found in flags.items()}
    return "\n".join(
        f"            {command}) {action.format(flags=shlex.quote(' '.join(found)), words=shlex.join(found))} ;;"
        for command, found in names.items()
    )


def _positional(flags: Mapping[str, list[Flag]], action: str) -> str:
    """Return the branches of a `case` over the command, with the choices of what stands without a flag."""
    return "\n".join(
        f"            {command})"
        f" {action.format(values=shlex.quote(' '.join(flag.choices)), words=shlex.join(flag.choices))} ;;"
        for command, found in flags.items()
        for flag in found
        if not flag.names and flag.choices
    )


def _fish(commands: Mapping[str, str], flags: Mapping[str, list[Flag]]) -> str:
    first = "-n 'test (count (commandline -opc)) = 1'"
    lines = [
        "# fish completion of rlhf-fast: rlhf-fast completion fish > ~/.config/fish/completions/rlhf-fast.fish",
        "function __rlhf_fast_command",
        "    set -l words (commandline -opc)",
        "    set -q words[2]; and test $words[2] = $argv[1]",
        "end",
        f"complete -c rlhf-fast {first} -f",
    ]
    for command, summary in commands.items():
        lines.append(f"complete -c rlhf-fast {first} -f -a {command} -d {_fish_quoted(summary)}")
        condition = f"-n '__rlhf_fast_command {command}'"
        for flag in flags[command]:
            words = _fish_quoted(" ".join(flag.choices))
            if not flag.names:
                if flag.choices:
                    lines.append(f"complete -c rlhf-fast {condition} -f -a {words}")
                continue
            value = f"-x -a {words}" if flag.choices else "-r -F" if flag.is_text else "-x" if flag.takes_value else ""
            for name in flag.names:
                option = f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                help_ = _fish_quoted(flag.help.partition(". ")[0].rstrip("."))
                lines.append(f"complete -c rlhf-fast {condition} {option} {value} -d {help_}".replace("  ", " "))
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
