"""A hash of each output of the ops' kernels, a line each: two runs must print the same lines.

    python -m rlhf_fast.bench.checks.output_hashes [--device cuda] [--backend triton] [--op NAME] [--small]

Inputs are drawn from one seed. With RLHF_FAST_STRICT=1 a kernel that falls back to the reference is a fault. The exit
status is 1 where there is a fault. It is short enough to run under compute-sanitizer.
"""

import argparse
import hashlib
import sys

import torch

from rlhf_fast.bench.compare import first_line, kernels_of
from rlhf_fast.bench.problem import Case, Problem
from rlhf_fast.kernels._op import OPS, Op

SECTOR = 32  # bytes; kernels may read a whole sector where a tensor has a part of it, and use that part


def hash_of(tensors: list[torch.Tensor]) -> str:
    """Return the first 16 hex digits of the SHA-256 of the tensors' bytes."""
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return digest.hexdigest()[:16]


def in_whole_sectors(x: object) -> object:
    """Return a tensor of the same values and strides whose memory ends at a sector's end.

    memcheck calls a read beyond a tensor's last byte a fault, although the sector belongs to it.
    """
    if not isinstance(x, torch.Tensor) or not x.numel():
        return x
    given = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
    padded = given.new_zeros(-(-len(given) // SECTOR) * SECTOR)
    padded[: len(given)] = given
    y = torch.empty(0, dtype=x.dtype, device=x.device)
    return y.set_(padded.untyped_storage(), x.storage_offset(), x.shape, x.stride()).requires_grad_(x.requires_grad)


def hashes(op: Op, device: str, backends: list[str], sizes: list[dict]) -> tuple[list[str], list[str]]:
    """Return lines and faults of one op. It is also called without a forced backend ("chosen"), as its users do."""
    lines, faults = [], []
    for backend in backends or [*kernels_of(op, device), "chosen"]:
        for size in sizes:
            for dtype in (torch.float32, torch.bfloat16):
                case = Case(op, size, dtype, op.has_gradient_at(size))
                torch.manual_seed(0)
                try:
                    problem = Problem(case, device)
                    raw = tuple(map(in_whole_sectors, problem.raw))
                    found = problem.run_once(op if backend == "chosen" else op.backend(backend), raw)
                    lines.append(f"{hash_of(found)} {case} {backend}")
                except Exception as error:  # one kernel's fault hides no other's
                    faults.append(f"FAULT {case} {backend}: {first_line(error)}")
    return lines, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", action="append", default=[], help="only these; ops without one are left out")
    parser.add_argument("--op", action="append", default=[], choices=list(OPS), help="only these")
    parser.add_argument("--small", action="store_true", help="not the large inputs")
    parser.add_argument("--sizes", type=int, default=0, help="so many sizes of each op (default: all)")
    options = parser.parse_args()
    num_faults = 0
    for op in OPS.values():
        backends = [b for b in options.backend if op.can_run(b, options.device)]
        if (options.op and op.name not in options.op) or (options.backend and not backends):
            continue
        sizes = (op.small_sizes if options.small else op.large_sizes + op.small_sizes)[: options.sizes or None]
        lines, faults = hashes(op, options.device, backends, sizes)
        print("\n".join([*lines, *faults]), flush=True)
        num_faults += len(faults)
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
