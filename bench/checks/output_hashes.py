"""A line for each answer of the ops' kernels, with a hash of its bits: two runs must print the same.

    python -m rlhf_fast.bench.checks.output_hashes [--device cuda] [--backend triton] [--op NAME] [--small]

Inputs are drawn from one seed. With RLHF_FAST_STRICT=1 a kernel that leaves the call to the reference is a fault; the
exit status is 1 where there is one. Short enough to be run under compute-sanitizer.
"""

import argparse
import hashlib
import sys

import torch

from rlhf_fast.bench.compare import kernels_of, reason
from rlhf_fast.bench.problem import Bout, Case
from rlhf_fast.kernels._op import OPS, Op


def fingerprint(tensors: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return digest.hexdigest()[:16]


SECTOR = 32  # bytes; the kernels may read a sector whole where a tensor has a part of it, and use that part


def in_whole_sectors(x: object) -> object:
    """A tensor of the same values and strides, whose memory ends where a sector does: for memcheck, by which a read
    beyond the last byte is a fault."""
    if not isinstance(x, torch.Tensor) or not x.numel():
        return x
    given = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
    room = given.new_zeros(-(-len(given) // SECTOR) * SECTOR)
    room[: len(given)] = given
    y = torch.empty(0, dtype=x.dtype, device=x.device)
    return y.set_(room.untyped_storage(), x.storage_offset(), x.shape, x.stride()).requires_grad_(x.requires_grad)


def answers(op: Op, device: str, backends: list[str], sizes: list[dict]) -> tuple[list[str], list[str]]:
    """Lines and faults. An op is also called without a backend being forced, as its users call it."""
    lines, faults = [], []
    for backend in backends or [*kernels_of(op, device), "chosen"]:
        for size in sizes:
            for dtype in (torch.float32, torch.bfloat16):
                case = Case(op, size, dtype, op.has_gradient)
                torch.manual_seed(0)
                try:
                    bout = Bout(case, device)
                    raw = tuple(map(in_whole_sectors, bout.raw))
                    found = bout.once(op if backend == "chosen" else op.backend(backend), raw)
                    lines.append(f"{fingerprint(found)} {case} {backend}")
                except Exception as error:  # one kernel's fault hides no other's
                    faults.append(f"FAULT {case} {backend}: {reason(error)}")
    return lines, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", action="append", default=[], help="only these; ops without one are left out")
    parser.add_argument("--op", action="append", default=[], choices=list(OPS), help="only these")
    parser.add_argument("--small", action="store_true", help="not the large inputs")
    parser.add_argument("--sizes", type=int, default=0, help="so many sizes of each op (default: all)")
    options = parser.parse_args()
    bad = 0
    for op in OPS.values():
        backends = [b for b in options.backend if op.can_run(b, options.device)]
        if (options.op and op.name not in options.op) or (options.backend and not backends):
            continue
        sizes = (op.small_sizes if options.small else op.large_sizes + op.small_sizes)[: options.sizes or None]
        lines, faults = answers(op, options.device, backends, sizes)
        print("\n".join([*lines, *faults]), flush=True)
        bad += len(faults)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
