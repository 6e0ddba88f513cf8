"""Print what the figures of a GPU depend on, and the two rates that its floors are made of.

    python -m rlhf_fast.bench.gpu_facts [--device cuda] [--save PATH.json]

The rates are measured, not read from a datasheet: bytes per second, read and written, of a large copy, and operations
per second of bfloat16 products on random data, square ones and those of a language model's head. The clocks and the
power are noted before and after. The file is written after each fact, so that an interrupted run loses none.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rlhf_fast.bench import report
from rlhf_fast.bench.timing import CLOCKS, Cpu, Gpu

N, D, V = 8192, 4096, 151936  # tokens, depth and vocabulary of a head
PRODUCTS: dict[str, Callable] = {  # the operands, from a function that draws a matrix, with the strides of a head's
    "square": lambda random, n, d, v: (random(n, n), random(n, n)),
    "logits = hidden weight'": lambda random, n, d, v: (random(n, d), random(v, d).t()),
    "d hidden = d logits weight": lambda random, n, d, v: (random(n, v), random(v, d)),
    "d weight = d logits' hidden": lambda random, n, d, v: (random(n, v).t(), random(n, d)),
}
QUERY = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,utilization.gpu,pstate"


def state() -> dict[str, str]:
    """Return the card's clocks, power and temperature as nvidia-smi gives them; empty without it."""
    try:
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
    except OSError:
        return {}
    return dict(zip(QUERY.split(","), (cell.strip() for cell in lines[0].split(",")), strict=False)) if lines else {}


def capabilities(device: str) -> dict[str, object]:
    """Return what torch can do there that the training head depends on."""
    from rlhf_fast.kernels.triton._head import can_multiply_to_float32

    found: dict[str, object] = {
        "16-bit product to float32": can_multiply_to_float32(False, torch.device(device)),
        "16-bit product added to float32": can_multiply_to_float32(True, torch.device(device)),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
    }
    if device == "cuda":
        found |= {
            "TF32 in matmul": torch.backends.cuda.matmul.allow_tf32,
            "bfloat16 reduction in matmul": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        }
    return found


def properties() -> dict[str, object]:
    """Return the device's sizes."""
    p = torch.cuda.get_device_properties(0)
    names = (
        "multi_processor_count", "total_memory", "L2_cache_size", "shared_memory_per_block_optin",
        "shared_memory_per_multiprocessor", "regs_per_multiprocessor", "max_threads_per_multi_processor", "major",
        "minor",
    )  # fmt: skip
    return {name: getattr(p, name) for name in names if hasattr(p, name)}


def product_rate(clock: Cpu | Gpu, dtype: torch.dtype, name: str, shrink: int) -> dict[str, object]:
    """Return the median seconds and the FLOP/s of one of PRODUCTS by torch.mm on random data."""
    n, d, v = N // shrink, D // shrink, V // shrink

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=clock.name, dtype=dtype)

    a, b = PRODUCTS[name](random, n, d, v)
    out = torch.empty(len(a), b.shape[1], device=clock.name, dtype=dtype)
    timer = clock.timer(lambda: torch.mm(a, b, out=out))
    seconds = statistics.median(timer() for _ in range(7))
    shape = [len(a), *b.shape]
    rate = 2.0 * math.prod(shape) / seconds
    return {"rows, inner, columns": shape, "dtype": str(dtype)[6:], "seconds": seconds, "flops_per_second": rate}


def host_seconds(clock: Cpu | Gpu) -> dict[str, float]:
    """Return the host's seconds for one small torch op, queued, and a call of it as the benches time one."""
    x, calls = torch.zeros(1, device=clock.name), 500
    add = clock.timer(lambda: x.add_(1))
    one = statistics.median(add() for _ in range(9))
    start = time.perf_counter()
    for _ in range(calls):
        x.add_(1)
    return {"queued": (time.perf_counter() - start) / calls, "a call": one}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=tuple(CLOCKS), default="cpu")
    parser.add_argument("--save", type=Path, help="write the facts as JSON")
    options = parser.parse_args()
    clock, on_gpu = CLOCKS[options.device](), options.device == "cuda"
    facts: dict[str, object] = {}

    def note(name: str, call: Callable[[], object]) -> None:
        """Measure one fact, print it and write all so far; an error is a fact too."""
        try:
            facts[name] = call()
        except Exception as error:  # one fact's fault hides no other's
            facts[name] = f"{type(error).__name__}: {error}"
        print(f"{name}: {facts[name]}", flush=True)
        if options.save:
            options.save.write_text(json.dumps(facts, indent=1, default=str) + "\n", encoding="utf-8")

    note("machine", lambda: report.machine(clock.name, clock.copy_bandwidth()))
    note("state before", state)
    if on_gpu:
        note("properties", properties)
    note("capabilities", lambda: capabilities(options.device))
    note("host seconds of a torch op", lambda: host_seconds(clock))
    shrink = 1 if on_gpu else 64
    dtype = torch.bfloat16 if on_gpu else torch.float32
    for name in PRODUCTS:
        note(f"product, {name}", lambda name=name: product_rate(clock, dtype, name, shrink))
        clock.empty_cache()
    note("state after", state)
    return 0


if __name__ == "__main__":
    sys.exit(main())
