"""The backends of one op: which it has, which of them runs, and why no better one."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

from rlhf_fast.kernels._backends import (
    COMPILED,
    DEVICES,
    TRITON_DEFAULT_DEVICES,
    TRITON_DEVICES,
    WHY_MISSING,
    is_strict,
)

log = logging.getLogger("rlhf_fast")
FOR_CALLERS = (
    "backend",
    "backends",
    "can_run",
    "chosen",
    "has_gradient",
    "name",
    "reference",
    "signature",
    "stats",
    "why",
)
"""The attributes that `dir(op)` and completion list; the others are for who writes an op."""
_TRITON_FILES = Path(__file__).parent / "triton"


class Backends:
    """An op's implementations, of which the best that this machine has runs."""

    name: str
    reference: Callable
    implementations: dict[str, Callable]  # backend -> kernel, on normalized arguments
    preference: dict[str, list[str]]  # device -> backends in the order in which they are tried
    required_symbols: dict[str, tuple[str, ...]]  # device -> names of the compiled kernels that its launcher calls
    has_warned: bool  # that no kernel answers
    has_warned_of_transforms: bool  # that the reference runs, whatever kernels there are

    def __init__(self, name: str, reference: Callable):
        self.name = name
        self.reference = reference
        self.implementations = {"reference": reference}
        self.preference = {device: ["reference"] for device in DEVICES}
        self.required_symbols = {}
        self.has_warned = self.has_warned_of_transforms = False
        self._register_triton()

    def __reduce__(self) -> str:
        """Return the name by which pickle and copy find the op again: it is one object of its module."""
        return self.name

    def __dir__(self) -> list[str]:
        return [*FOR_CALLERS, *(name for name in super().__dir__() if name.startswith("__"))]

    def _register_triton(self) -> None:
        """Register the function with the op's name in the file of kernels/triton/ with the name of the op's own file.
        That file is imported by the first call."""
        stem = Path(self.reference.__code__.co_filename).stem
        if TRITON_DEVICES and (_TRITON_FILES / f"{stem}.py").is_file():
            module = f"rlhf_fast.kernels.triton.{stem}"
            self.implementations["triton"] = lambda *args: getattr(import_module(module), self.name)(*args)
            for device in TRITON_DEFAULT_DEVICES:
                self.preference[device].insert(0, "triton")

    def compiled(
        self,
        launch: Callable | None = None,
        *,
        required_symbols: tuple[str, ...] | None = None,
        devices: tuple[str, ...] = DEVICES,
    ):
        """Register `launch(kernels, *args)` for tensors of `devices`, where csrc/ has all of `required_symbols` (by
        default the op's name). The backend "simt" runs the launcher for "cuda" on CPU tensors."""
        if launch is None:
            return functools.partial(self.compiled, required_symbols=required_symbols, devices=devices)
        symbols = required_symbols or (self.name,)
        self.required_symbols |= dict.fromkeys(devices, symbols)
        for backend, module in COMPILED.items():
            family = backend.partition(":")[0]
            device = "cuda" if family == "simt" else family
            if device not in devices or not all(hasattr(module, symbol) for symbol in symbols):
                continue
            self.implementations[backend] = functools.partial(launch, module)
            if family == "simt":  # runs only where it is forced
                continue
            if self.preference[device][0] in COMPILED:  # an older instruction set
                self.preference[device].pop(0)
            self.preference[device].insert(0, backend)
        return launch

    def _missing_backend_error(self, backend: str, where: str = "") -> str:
        why = WHY_MISSING.get(backend.partition(":")[0])
        error = f"{self.name}: no backend {backend!r} here{where}; there are: {', '.join(self.backends)}"
        return f"{error} ({backend}: {why})" if why else error

    def can_run(self, backend: str, device: str) -> bool:
        """Return whether `backend` can be forced on tensors of `device`."""
        if backend not in self.implementations:
            return False
        family = backend.partition(":")[0]
        if family == "triton":
            return device in TRITON_DEVICES
        return family in ("reference", device) or (family == "simt" and device == "cpu")

    @property
    def backends(self) -> list[str]:
        """The backends that can run here, best last: "reference", "triton", "cpu:generic", "cpu:avx2", ..., "cuda"."""
        return list(self.implementations)

    def chosen(self, device: str) -> str:
        """Return the backend that runs for tensors of `device`."""
        return self.preference[device][0] if device in self.preference else "reference"

    def why(self, device: str) -> str:
        """Return one line: the backend that runs on `device`, and why there is no better one."""
        chosen = self.chosen(device)
        if chosen == "triton":
            return f"Triton; no compiled kernel: {self._why_not_compiled(device)}"
        if chosen != "reference":
            return f"compiled kernel {chosen}"
        why = self._why_not_compiled(device)
        if device == "cuda" and "triton" in WHY_MISSING:
            why += f"; no Triton: {WHY_MISSING['triton']}"
        return why

    def _why_not_compiled(self, device: str) -> str:
        symbols = ", ".join(self.required_symbols.get(device, (self.name,)))
        return WHY_MISSING.get(device) or f"csrc/{device} has no kernel {symbols}"

    def _drop_backend(self, backend: str, device: str, error: RuntimeError) -> str:
        """Do not try a backend again that was not compiled for this GPU, and return the reason."""
        self.preference[device] = [other for other in self.preference[device] if other != backend]
        reason = f"csrc/cuda was not compiled for this GPU ({error}); set RLHF_FAST_CUDA_ARCHS and install again"
        WHY_MISSING[device] = reason
        return reason

    def _report_fallback(self, why: str, *, of_transforms: bool = False) -> None:
        """Warn once that the reference runs in a kernel's place, or raise within `strict`."""
        if is_strict():
            raise RuntimeError(f"{self.name}: RLHF_FAST_STRICT=1 and no kernel answers: {why}")
        if torch.compiler.is_compiling():  # it cannot trace a warning
            return
        if self.has_warned_of_transforms if of_transforms else self.has_warned:
            return
        if of_transforms:
            self.has_warned_of_transforms = True
        else:
            self.has_warned = True
        log.warning("%s runs on its plain-torch reference: %s", self.name, why)
