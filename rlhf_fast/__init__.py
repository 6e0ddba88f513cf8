"""rlhf-fast: fused kernels for RLHF, and a thin trainer of InstructGPT's three stages on top of them.

The names of `__all__` are imported at their first use (PEP 562): `import rlhf_fast` alone does not load torch.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_fast.run.contention import shorten_spins

if TYPE_CHECKING:
    from rlhf_fast import ops
    from rlhf_fast.batches import Prompts, Responses
    from rlhf_fast.config.fields import (
        DataConfig,
        KLConfig,
        LogConfig,
        LoraConfig,
        ModelConfig,
        OptimConfig,
        SamplingConfig,
    )
    from rlhf_fast.config.stages import PPOConfig, RewardConfig, SFTConfig
    from rlhf_fast.errors import UserError
    from rlhf_fast.model.model import Model
    from rlhf_fast.rollout.rollout import Rollout
    from rlhf_fast.scoring import Score, Scorer
    from rlhf_fast.stages.recipe import run_stage

shorten_spins()

__version__ = "0.1.0"
__all__ = [
    "DataConfig",
    "KLConfig",
    "LogConfig",
    "LoraConfig",
    "Model",
    "ModelConfig",
    "OptimConfig",
    "PPOConfig",
    "Prompts",
    "Responses",
    "RewardConfig",
    "Rollout",
    "SFTConfig",
    "SamplingConfig",
    "Score",
    "Scorer",
    "UserError",
    "__version__",
    "ops",
    "run_stage",
]

# Name -> module below rlhf_fast/ that defines it; `ops` is a module itself.
_MODULES = {
    "DataConfig": "config.fields",
    "KLConfig": "config.fields",
    "LogConfig": "config.fields",
    "LoraConfig": "config.fields",
    "Model": "model.model",
    "ModelConfig": "config.fields",
    "OptimConfig": "config.fields",
    "PPOConfig": "config.stages",
    "Prompts": "batches",
    "Responses": "batches",
    "RewardConfig": "config.stages",
    "Rollout": "rollout.rollout",
    "SFTConfig": "config.stages",
    "SamplingConfig": "config.fields",
    "Score": "scoring",
    "Scorer": "scoring",
    "UserError": "errors",
    "ops": "ops",
    "run_stage": "stages.recipe",
}

# In a wheel kernels/ and bench/ are inside this package; in a source checkout they stand beside it. They have no
# __init__.py of their own: Hugging Face's package is called `kernels` too, and a checkout must not hide it.
_checkout = Path(__file__).parent.parent
if (_checkout / "kernels" / "_op.py").is_file() and (_checkout / "csrc").is_dir():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULES[name]}")
    value = module if name == "ops" else getattr(module, name)
    globals()[name] = value  # later uses find it without a call of this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
