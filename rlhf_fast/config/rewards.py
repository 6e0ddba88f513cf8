"""The type of settings that name rewards: a model's folder, module:function, a Python function, or several of them."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from tyro.constructors import PrimitiveConstructorSpec

RewardSpec = str | Callable[..., Any]
"""The folder or hub name of a reward model, module:function, or a function itself."""
EXPECTED = "must be a reward model's folder, module:function, a Python function, or a list of these"


class FunctionOfRun(str):
    """module:function of a run that was started in another directory, `folder`, which holds the module perhaps."""

    folder: str

    def __new__(cls, name: str, folder: str) -> FunctionOfRun:
        self = super().__new__(cls, name)
        self.folder = folder
        return self

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return str(self), self.folder


def reward_specs(value: RewardSpec | Sequence[RewardSpec]) -> tuple[RewardSpec, ...]:
    """Return the rewards that a setting names; () if it names none."""
    if isinstance(value, str) or callable(value):
        return (value,) if value else ()
    return tuple(value)


def reward_value(value: object) -> RewardSpec | tuple[RewardSpec, ...]:
    """Return a setting's value in its one form: a list of one is its entry, ~ is the home. ValueError for others."""
    if value is None:
        return ""
    if isinstance(value, str) or callable(value):
        return _expanded(value)
    if isinstance(value, os.PathLike):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError(EXPECTED)
    entries: list[RewardSpec] = []
    for i, given in enumerate(value, 1):
        entry = str(given) if isinstance(given, os.PathLike) else given
        if not entry or not (isinstance(entry, str) or callable(entry)):
            raise ValueError(f"{EXPECTED}; entry {i} is none")
        entries.append(_expanded(entry))
    return entries[0] if len(entries) == 1 else tuple(entries) or ""


def _expanded(spec: RewardSpec) -> RewardSpec:
    return str(Path(spec).expanduser()) if isinstance(spec, str) and spec.startswith("~") else spec


def is_function(spec: RewardSpec) -> bool:
    """Return True for a function and for module:function, False for a folder or hub name."""
    return not isinstance(spec, str) or (":" in spec and not Path(spec).exists())


def model_specs(value: RewardSpec | Sequence[RewardSpec]) -> list[str]:
    """Return the reward models among the rewards of a setting: folders and hub names."""
    return [spec for spec in reward_specs(value) if isinstance(spec, str) and not is_function(spec)]


def spec_name(spec: RewardSpec) -> str:
    """Return a reward as text: as it was given, or of a function its module:function."""
    if isinstance(spec, str):
        return spec
    owner = bare_function(spec)
    return f"{getattr(owner, '__module__', None) or '?'}:{getattr(owner, '__qualname__', type(spec).__name__)}"


def bare_function(spec: Callable[..., Any]) -> Any:
    """Return what has the name and source of a callable: a partial's function, or the class of an object."""
    while isinstance(spec, functools.partial):
        spec = spec.func
    return spec if hasattr(spec, "__qualname__") else type(spec)


def short_names(specs: Sequence[RewardSpec]) -> list[str]:
    """Return a name for the metrics of each reward: the last part of its path or name. Of two equal ones the second
    gets -2."""
    names: list[str] = []
    for spec in specs:
        name = spec_name(spec)
        last = name.rpartition(":")[2].rpartition(".")[2] if is_function(spec) else Path(name).name
        names.append(last if last not in names else f"{last}-{len(names) + 1}")
    return names


def weights_rule(weights: Sequence[float], value: RewardSpec | Sequence[RewardSpec]) -> str:
    """Return what weights of rewards must be, if they are not: none, or a finite one for each and not all 0."""
    names = short_names(reward_specs(value))
    if weights and len(weights) != len(names):
        return f"must have one number for each reward ({', '.join(names) or 'none is set'})"
    if not all(map(math.isfinite, weights)):
        return "must be finite numbers"
    return "must not all be 0" if weights and not any(weights) else ""


def given_twice(value: RewardSpec | Sequence[RewardSpec]) -> str:
    """Return the name of a reward that a setting names twice; "" if there is none."""
    specs = reward_specs(value)
    return next((spec_name(spec) for i, spec in enumerate(specs) if spec in specs[:i]), "")


def _from_words(words: list[str]) -> Any:
    return words[0] if len(words) == 1 else tuple(words)  # the dataclass has the checks


def _as_words(value: Any) -> list[str]:
    return [spec_name(spec) for spec in reward_specs(value)]


RewardSpecs = Annotated[
    RewardSpec | Sequence[RewardSpec],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="REWARD [REWARD ...]",
        instance_from_str=_from_words,
        is_instance=lambda value: isinstance(value, (str, tuple)) or callable(value),
        str_from_instance=_as_words,
    ),
]
"""A setting that names one reward or several. A YAML file and the flags give text alone, Python functions too."""
REWARD_SPECS = get_args(RewardSpecs)[0]
"""The type that `typing.get_type_hints` returns for such a setting."""
