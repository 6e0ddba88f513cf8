"""The ops in other people's trainers. Each library is imported only when its function is called."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_fast.integrations import layers, openrlhf, trl, verl
    from rlhf_fast.integrations.lazy_forward import lazy_head, status

__all__ = ["layers", "lazy_head", "openrlhf", "status", "trl", "verl"]

_MODULES = {"lazy_head": "lazy_forward", "status": "lazy_forward"}


def __getattr__(name: str) -> Any:
    if name in ("layers", "openrlhf", "trl", "verl"):
        return import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
