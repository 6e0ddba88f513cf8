"""Import verl where one of its functions has moved and one part is left out: the others are replaced, verl goes on."""

import logging

from rlhf_fast.integrations import hooks
from rlhf_fast.integrations import verl as fast

logging.getLogger("rlhf_fast").setLevel(logging.INFO)
moved = hooks.moved
gone = "compute_gae_advantage_return takes (data), not (token_level_rewards)"
hooks.moved = lambda hook: gone if hook.name == "compute_gae_advantage_return" else moved(hook)

import verl  # noqa: E402, F401  loads the plugin
from verl.models.transformers import monkey_patch  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.utils.experimental import torch_functional  # noqa: E402

assert torch_functional.FusedLinearForPPO.__module__ == "rlhf_fast.integrations.verl_head"
assert hasattr(monkey_patch.patch_forward_with_backends, "__wrapped__")
assert not hasattr(core_algos.compute_gae_advantage_return, "__wrapped__")
assert not hasattr(core_algos.compute_value_loss, "__wrapped__")
assert fast.LOSS_MODE not in core_algos.POLICY_LOSS_REGISTRY
print("verl goes on")
