"""Targets of the ops on a data-centre GPU: sizes of real training, and how fast they should be, the dearest first.

A target is printed as met or missed, never asserted. A share is of the measured copy bandwidth, or of the bare matrix
products' rate; the op itself says how many bytes it must move (`op.cost`).
"""

from typing import NamedTuple

import torch

from rlhf_fast.bench.report import duration

BF16 = (torch.bfloat16,)
BOTH = (torch.float32, torch.bfloat16)


class Target(NamedTuple):
    """A size and its goal: most "seconds" of a call, most "device" seconds of it, or smallest "share" of the floor."""

    op: str
    size: dict
    gradient: bool = False
    of: str = ""
    goal: float = 0.0
    cuda: float = 0.0  # for the compiled kernel, where it is another
    dtypes: tuple = BF16
    chunk: int = 0  # rows that the reference takes at a time, where all at once would not fit; it is not timed then

    def goal_of(self, backend: str) -> float:
        """Return the goal of one backend."""
        return self.cuda or self.goal if backend == "cuda" else self.goal

    def met(self, backend: str, row: dict) -> bool | None:
        """Return whether the row meets the goal; None without a goal or without such a number."""
        columns = {"seconds": "seconds", "device": "device_seconds", "share": "share"}
        found = row[columns[self.of]] if self.of else None
        if found is None:
            return None
        return found >= self.goal_of(backend) if self.of == "share" else found <= self.goal_of(backend)

    def __str__(self) -> str:
        goals = [self.goal, self.cuda] if self.cuda else [self.goal]
        shown = [f"{100 * g:.0f} %" if self.of == "share" else duration(g) for g in goals]
        return " / CUDA ".join(shown) + (" on the device" if self.of == "device" else "")


LARGE_HEAD, SMALL_HEAD = {"N": 8192, "D": 4096, "V": 151936}, {"N": 8192, "D": 768, "V": 50257}
LLAMA_1B, SMOLLM2_135M = {"H": 32, "Hkv": 8, "d": 64, "P": 64}, {"H": 9, "Hkv": 3, "d": 64, "P": 64}
TARGETS = [
    Target("linear_ppo_loss", LARGE_HEAD, True, "seconds", 44e-3, chunk=2048),
    Target("token_logprobs", {"shape": (8192,), "V": 151936}, False, "seconds", 0.95e-3),
    Target("ppo_loss", {"shape": (512, 1024)}, True, "device", 8e-6, dtypes=BOTH),
    Target("ppo_advantages", {"B": 512, "T": 1024}, False, "device", 8e-6, dtypes=BOTH),
    Target("decode_attention", {"lengths": (2048,) * 64, **LLAMA_1B, "d": 128}, False, "share", 0.8),
    Target("decode_attention", {"lengths": (2048,) * 64, **LLAMA_1B}, False, "share", 0.8),
    Target("decode_attention", {"lengths": (2048,) * 64, **SMOLLM2_135M}, False, "share", 0.8),
    Target("decode_attention", {"lengths": (512,) * 64, **LLAMA_1B}),
    Target("decode_attention", {"lengths": (512,) * 64, **SMOLLM2_135M}),
    Target("decode_attention", {"lengths": (512,), **LLAMA_1B}),
    Target("sample_tokens", {"B": 256, "V": 128256, "top_p": 0.9}, False, "device", 80e-6),
    Target("sample_tokens", {"B": 256, "V": 128256}),
    Target("linear_cross_entropy", LARGE_HEAD, True, "seconds", 44e-3, chunk=2048),
    Target("linear_ppo_loss", SMALL_HEAD, True, "seconds", 4.5e-3),
    Target("linear_cross_entropy", SMALL_HEAD, True, "seconds", 4.5e-3),
    Target("token_logprobs", {"shape": (8192,), "V": 151936}, True),
    Target("ppo_advantages", {"B": 8192, "T": 2048}, False, "share", 0.70, 0.75, BOTH),
    Target("ppo_loss", {"shape": (8192, 2048)}, True, dtypes=BOTH),
]
