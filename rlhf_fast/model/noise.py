"""The training forward is the evaluating one: a check, and the search for the modules that make the two differ.

PPO compares log-probabilities of both, so a random draw in training mode is an error of every ratio. What draws is not
known by name: router jitter, sampled routing, layers that are skipped, statistics of the batch. A module that draws
random numbers, or whose output differs, is left in evaluating mode while the others train. What differs even then is
refused with the module's name.

Rare draws (a layer skipped in one step of a hundred) show in no two forwards. They show in the states of the random
generators, which a forward without noise leaves as they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_fast.errors import UserError

Forward = Callable[[], Tensor]


class Trial(NamedTuple):
    """A forward, on fixed tokens in the mode that the modules have, and what it gives in evaluating mode."""

    forward: Forward
    evaluated: Tensor


ATTEMPTS = 16
"""Classes of modules that are left in evaluating mode before the search is given up."""
SEEDS = 4
"""Forwards with other random states of a module that draws in evaluating mode too, perhaps without using the draw."""


def find_noise(name: str, root: nn.Module, trials: Sequence[Trial], tolerance: float) -> set[nn.Module]:
    """Return the modules of `root` to leave in evaluating mode so that each trial is the same in training mode.
    UserError if there are none. Random states and buffers are restored."""
    quiet: set[nn.Module] = set()
    with _restored(root) as restore_buffers:
        for _ in range(ATTEMPTS):
            for forward, evaluated in trials:
                restore_buffers()
                _set_training(root, quiet)
                before = _random_states()
                gap = _gap(forward(), evaluated)
                drew = not _same_states(before, _random_states())
                if drew or gap > tolerance:
                    break
            else:
                return quiet
            if drew:
                module = _drawing_module(root, forward)
            else:
                module = _differing_module(root, forward, quiet, restore_buffers)
            if module is None or module in quiet:
                if drew and all(_seeded_gap(trial, seed) <= tolerance for trial in trials for seed in range(SEEDS)):
                    return quiet  # it draws numbers, and does not use them
                break
            quiet |= {other for other in root.modules() if type(other) is type(module)}
        raise UserError(f"{name}: {_fault(root, module)}; only models without such noise can be trained here")


def check_causal(name: str, hidden: Callable[[Tensor], Tensor], tokens: Tensor, whole: Tensor, tol: float) -> None:
    """Raise UserError if tokens see the ones after them, or another row. `whole` (B, T, D) is `hidden(tokens)`."""
    part = tokens.shape[1] * 5 // 8
    for row in range(len(tokens)):
        alone = tokens[row : row + 1]
        if _gap(hidden(alone[:, :part]), whole[row : row + 1, :part]) <= tol:
            continue
        if _gap(hidden(alone), whole[row : row + 1]) > tol:
            raise UserError(
                f"{name}: what it computes for a row depends on the other rows of the batch (a batch norm, or experts"
                " of limited capacity); such a model cannot be trained here"
            )
        raise UserError(f"{name}: its tokens see the ones after them; only causal models can be trained here")


def _fault(root: nn.Module, module: nn.Module | None) -> str:
    if module is None:
        return "its forward in training mode is not the one in evaluating mode, and no module of it shows why"
    path = next(path for path, other in root.named_modules() if other is module) or "the model itself"
    return f"{path} ({type(module).__name__}) adds noise, or reads the batch, in training mode and cannot be kept quiet"


def _set_training(root: nn.Module, quiet: set[nn.Module]) -> None:
    for module in root.modules():
        module.training = module not in quiet and not isinstance(module, nn.modules.dropout._DropoutNd)


def _gap(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference in relation to the largest entry (at least 1), infinity for NaN. In half precision
    it is the mean over the tokens of their largest differences: rounding sends single tokens to other experts."""
    gaps = (actual.float() - expected.float()).abs().amax(-1) / expected.float().abs().max().clamp_min(1.0)
    gap = float(gaps.max() if actual.dtype == torch.float32 else gaps.mean())
    return gap if gap == gap else float("inf")


def _seeded_gap(trial: Trial, seed: int) -> float:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    return _gap(trial.forward(), trial.evaluated)


def _drawing_module(root: nn.Module, forward: Forward) -> nn.Module | None:
    """Return the first module whose own code, not that of a module in it, changes a random state."""
    running: list[nn.Module] = []
    found: list[nn.Module] = []
    states = [_random_states()]

    def look() -> None:
        if not _same_states(states[0], now := _random_states()):
            states[0] = now
            if running:
                found.append(running[-1])

    def enter(module: nn.Module, _: Any) -> None:
        look()
        running.append(module)

    def leave(*_: Any) -> None:
        look()
        running.pop()

    with _hooks(root, enter, leave):
        forward()
    return found[0] if found else None


def _differing_module(
    root: nn.Module, forward: Forward, quiet: set[nn.Module], restore_buffers: Callable[[], None]
) -> nn.Module | None:
    """Return the first module to finish whose inputs are the same in both modes, and its output is not."""
    calls: list[tuple[nn.Module, list[Tensor], list[Tensor]]] = []

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((module, _copies((args, kwargs)), _copies(output)))

    def record() -> list[tuple[nn.Module, list[Tensor], list[Tensor]]]:
        restore_buffers()
        calls.clear()
        handles = [module.register_forward_hook(leave, with_kwargs=True) for module in root.modules()]
        try:
            forward()
        finally:
            for handle in handles:
                handle.remove()
        return list(calls)

    _set_training(root, quiet)
    training = record()
    root.eval()
    evaluating = record()
    for (module, inputs, outputs), (other, expected_inputs, expected) in zip(training, evaluating, strict=False):
        if module is not other:
            return None
        if _all_equal(inputs, expected_inputs) and not _all_equal(outputs, expected):
            return module
    return None


def _copies(value: Any) -> list[Tensor]:
    """Return copies of all tensors in a tree of tuples, lists, dicts and outputs of transformers."""
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _copies(item)] if isinstance(value, (tuple, list)) else []


def _all_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@contextmanager
def _hooks(root: nn.Module, enter: Callable, leave: Callable) -> Iterator[None]:
    handles = []
    for module in root.modules():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _restored(root: nn.Module) -> Iterator[Callable[[], None]]:
    """Put random states, modes and buffers (statistics of a batch norm) back after the block. Yield the function that
    puts the buffers back."""
    states, modes = _random_states(), {module: module.training for module in root.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in root.buffers()]

    def restore_buffers() -> None:
        for buffer, before in buffers:
            if not torch.equal(buffer, before):
                buffer.copy_(before)

    try:
        yield restore_buffers
    finally:
        _restore_random_states(states)
        for module, mode in modes.items():
            module.training = mode
        restore_buffers()


def _random_states() -> list[Any]:
    """Return the states of torch's, numpy's and Python's generators."""
    states: list[Any] = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return [*states, np.random.get_state(), random.getstate()]


def _restore_random_states(states: list[Any]) -> None:
    first, *cuda, numpy_state, python_state = states
    torch.set_rng_state(first)
    for device, state in enumerate(cuda):
        torch.cuda.set_rng_state(state, device)
    np.random.set_state(numpy_state)
    random.setstate(python_state)


def _same_states(some: list[Any], others: list[Any]) -> bool:
    *tensors, numpy_state, python_state = some
    *other_tensors, other_numpy, other_python = others
    return (
        len(tensors) == len(other_tensors)
        and all(torch.equal(a, b) for a, b in zip(tensors, other_tensors, strict=True))
        and python_state == other_python
        and numpy_state[2:] == other_numpy[2:]
        and bool((numpy_state[1] == other_numpy[1]).all())
    )
