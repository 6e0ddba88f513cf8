"""verl with rlhf-fast's head, GAE and losses, as a plugin: `import verl` loads it where both are installed.

| part | of verl | when |
|---|---|---|
| head | FusedLinearForPPO | model.use_fused_kernels=True, fused_kernel_options.impl_backend=torch |
| gae | compute_gae_advantage_return | algorithm.adv_estimator=gae |
| policy_loss | the registry's `rlhf_fast` | actor.policy_loss.loss_mode=rlhf_fast |
| value_loss | compute_value_loss | with a critic |

RLHF_FAST_VERL=0 turns the plugin off, and RLHF_FAST_VERL=head,gae all parts but these.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from rlhf_fast.errors import UserError, listed
from rlhf_fast.integrations.calls import Calls, is_strict
from rlhf_fast.integrations.hooks import Hook, check, check_version
from rlhf_fast.integrations.import_hook import after_import
from rlhf_fast.integrations.verl_head import fused_head, refusing
from rlhf_fast.integrations.verl_losses import gae, policy_loss, value_loss

log = logging.getLogger("rlhf_fast")

TESTED, SERIES = "0.9.1", "0.9."
LOSS_MODE = "rlhf_fast"
CORE, HEAD = "verl.trainer.ppo.core_algos", "verl.utils.experimental.torch_functional"
MODELS = "verl.models.transformers."
PATCH = MODELS + "monkey_patch"
VISION = ("qwen2_vl", "qwen3_vl", "qwen3_5", "glm4v")


def _hook(module: str, name: str, arguments: str = "", contains: str = "", optional: bool = False) -> Hook:
    file = module.replace(".", "/") + ".py"
    return Hook("verl", TESTED, file, name, tuple(arguments.split()) or None, contains, optional)


_BATCH = "dp_size batch_num_tokens global_batch_size loss_scale_factor"
_AT_CALL = "from verl.utils.experimental.torch_functional import FusedLinearForPPO"
_BACKENDS = "model use_fused_kernels fused_kernels_backend"
_AGG_LOSS = _hook(CORE, "agg_loss", f"loss_mat loss_mask loss_agg_mode {_BATCH}")
PARTS: dict[str, tuple[Hook, ...]] = {
    "head": (
        _hook(HEAD, "FusedLinearForPPO.__init__", "self chunk_size impl_backend"),
        _hook(HEAD, "FusedLinearForPPO.forward", "self hidden_states vocab_weights input_ids temperature"),
        _hook(PATCH, "patch_forward_with_backends", _BACKENDS, "model.__class__.forward = forward_with_torch_backend"),
        _hook(PATCH, "apply_monkey_patch", contains="patch_forward_with_backends(model"),
        _hook(MODELS + "dense_common", "forward_with_torch_backend", contains=_AT_CALL),
        *(_hook(MODELS + name, "forward_with_torch_backend", "", _AT_CALL, True) for name in VISION),
    ),
    "gae": (
        _hook(
            CORE, "compute_gae_advantage_return", "token_level_rewards values response_mask gamma lam",
            "verl_F.masked_whiten(advantages, response_mask)",
        ),
        _hook("verl.utils.torch_functional", "masked_whiten", "values mask shift_mean"),
        _hook(
            "verl.trainer.ppo.ray_trainer", "compute_advantage", contains="core_algos.compute_gae_advantage_return("
        ),
    ),
    "policy_loss": (
        _hook(CORE, "register_policy_loss", "name"),
        _AGG_LOSS,
        _hook(
            CORE, "compute_policy_loss_vanilla",
            "old_log_prob log_prob advantages response_mask loss_agg_mode config rollout_is_weights",
            "torch.clamp(negative_approx_kl, min=-20.0, max=20.0)",
        ),
        _hook("verl.workers.utils.losses", "ppo_loss", contains="get_policy_loss_fn(loss_mode)"),
    ),
    "value_loss": (
        _AGG_LOSS,
        _hook(
            CORE, "compute_value_loss", f"vpreds returns values response_mask cliprange_value loss_agg_mode {_BATCH}",
            "verl_F.clip_by_value(vpreds, values - cliprange_value, values + cliprange_value)",
        ),
        _hook("verl.workers.utils.losses", "value_loss", contains="compute_value_loss(vpreds=vpreds"),
    ),
}  # fmt: skip
HOOKS = tuple(dict.fromkeys(hook for hooks in PARTS.values() for hook in hooks))

MODULES = {HEAD: ("head",), PATCH: ("head",), CORE: ("gae", "policy_loss", "value_loss")}
"""The modules in which the parts are replaced."""

CALLS = Calls("verl")
_installed: set[tuple[str, str]] = set()


def status() -> Calls:
    """Return the counts of this process: calls that an op answered, and those that were left to verl's own."""
    return CALLS


def parts() -> tuple[str, ...]:
    """Return the parts that RLHF_FAST_VERL lets the plugin replace: all if it is not set."""
    text = os.environ.get("RLHF_FAST_VERL", "1").strip()
    if text in ("", "1"):
        return tuple(PARTS)
    names = tuple(name.strip() for name in text.split(",")) if text != "0" else ()
    if unknown := [name for name in names if name not in PARTS]:
        raise UserError(f"RLHF_FAST_VERL: no part is named {listed(unknown)}; give 0, 1 or of {', '.join(PARTS)}")
    return names


def install() -> None:
    """Replace the parts in verl's modules as each of them is imported; those of this process alone. A second call does
    nothing.

    It imports nothing of verl, so that it can run while verl is half imported, and costs nothing in a process that does
    not train. verl goes on with its own function where a part cannot be replaced, and a warning says why; under
    RLHF_FAST_STRICT=1 it is an error.
    """
    try:
        wanted = parts()
        if wanted:
            check_version("verl", TESTED, SERIES)
    except UserError as error:
        fault = error
        if not is_strict():
            _failed("functions", fault)
            return
        for module in MODULES:  # verl hides an error of a plugin that it loads, but not one of its own modules
            after_import(module, lambda _module: _failed("functions", fault))
        return
    actions: dict[str, Callable[[str, Any], None]] = {
        "head": _replace_head, "gae": _replace_gae, "policy_loss": _register, "value_loss": _replace_value_loss,
    }  # fmt: skip
    for module, parts_of_it in MODULES.items():
        if here := [part for part in parts_of_it if part in wanted]:
            after_import(module, functools.partial(_replace, actions={part: actions[part] for part in here}))


def _replace(module: Any, actions: dict[str, Callable[[str, Any], None]]) -> None:
    for part, action in actions.items():
        if (part, module.__name__) in _installed:
            continue
        try:
            check(PARTS[part])
            action(module.__name__, module)
        except Exception as error:  # whatever it is, verl has to go on
            _failed(part, error)
        else:
            _installed.add((part, module.__name__))
            log.info("rlhf_fast: verl's %s is an op's now", part)


def _failed(part: str, error: Exception) -> None:
    if is_strict():
        raise RuntimeError(f"RLHF_FAST_STRICT=1 and verl keeps its own {part}: {error}") from error
    log.warning("rlhf_fast: verl keeps its own %s: %s", part, error)


def _replace_head(name: str, module: Any) -> None:
    if name == HEAD:
        module.FusedLinearForPPO = fused_head(module.FusedLinearForPPO, CALLS)
    else:
        module.patch_forward_with_backends = refusing(module.patch_forward_with_backends)


def _replace_gae(_name: str, module: Any) -> None:
    module.compute_gae_advantage_return = gae(module, CALLS)


def _register(_name: str, module: Any) -> None:
    module.register_policy_loss(LOSS_MODE)(policy_loss(module, CALLS))


def _replace_value_loss(_name: str, module: Any) -> None:
    module.compute_value_loss = value_loss(module, CALLS)
