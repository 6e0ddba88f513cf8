"""The measurement of an op's kernels beside its reference, torch.compile and other libraries.

A provider is verified first and timed after: one that is wrong is not timed, nor is a kernel that falls back to the
reference.
"""

import contextlib
import signal
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.nn import functional

from rlhf_fast.bench.baselines import baselines_of
from rlhf_fast.bench.problem import TOLERANCE, Case, Problem, label, tensors
from rlhf_fast.bench.timing import MAX_CAPTURED, Cpu, Gpu, has_bf16_products, interleaved, median_ratios
from rlhf_fast.kernels._backends import strict
from rlhf_fast.kernels._op import Op

BARE, PADDED = "bare products", "bare products, padded"
PADDED_MULTIPLE = 64  # columns: a GPU's products are several times faster with these than at V = 50257
Clock = Cpu | Gpu


class Result(NamedTuple):
    """Rows for the table, notes on what is left out and why, and faults: kernels that are wrong."""

    rows: list[dict]
    notes: list[str]
    faults: list[str]


class BareProducts(NamedTuple):
    """A linear head's matrix products by torch.mm into existing memory, with nothing around them."""

    run: Callable[[], None]
    flops: float


def bare_products(
    heads: list[tuple], hidden_grad: bool, weight_grad: bool, vocab_block: int = 0, multiple: int = 1
) -> BareProducts:
    """Return the products of `heads`, pairs (hidden, weight) of which the last are references, and their flops.

    `hidden_grad` and `weight_grad` add the products of the first head's gradients. The logits are whole, or made in
    blocks of `vocab_block` columns. The weights are as given, or padded beforehand with rows of zeros to a `multiple`
    of rows, and then so are the logits' columns; the flops are always those of the given weights.
    """
    products = sum(w.numel() for _, w in heads) + (hidden_grad + weight_grad) * heads[0][1].numel()
    heads = [(hidden.detach().flatten(0, -2), weight.detach()) for hidden, weight in heads]
    if rows := -len(heads[0][1]) % multiple:
        heads = [(hidden, functional.pad(weight, (0, 0, 0, rows))) for hidden, weight in heads]
    (hidden, weight), on_cpu = heads[0], heads[0][0].device.type == "cpu"
    if hidden.dtype != weight.dtype or (on_cpu and hidden.dtype != torch.float32 and not has_bf16_products()):
        heads = [(x.float(), w.float()) for x, w in heads]
        hidden, weight = heads[0]
    (N, _), V = hidden.shape, len(weight)
    logits = hidden.new_empty(N * V)
    logit_grads = logits.view(N, V)  # the values do not matter
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight) if weight_grad else None
    step = vocab_block or V

    def run():
        for x, w in reversed(heads):
            for first in range(0, V, step):
                last = min(first + step, V)
                torch.mm(x, w[first:last].T, out=logits[first * N : last * N].view(N, -1))
        if hidden_grad:
            torch.mm(logit_grads, weight, out=d_hidden)
        if weight_grad:
            torch.mm(logit_grads.T, hidden, out=d_weight)

    return BareProducts(run, 2.0 * N * products)


def bare_products_of(problem: Problem) -> dict[str, BareProducts]:
    """Return the bare products of an op on a linear head: as given, and padded where V is not already a multiple of
    PADDED_MULTIPLE. There are none for the other ops."""
    given = dict(zip(problem.op.names, problem.args, strict=True))
    if not {"hidden", "weight"} <= set(given) or not given["hidden"].numel():
        return {}
    heads = [(given["hidden"], given["weight"])]
    if "ref_hidden" in given:
        heads.append((given["ref_hidden"], given["ref_weight"]))
    wanted = [problem.case.gradient and given[name].requires_grad for name in ("hidden", "weight")]
    found = {BARE: bare_products(heads, *wanted)}
    if len(given["weight"]) % PADDED_MULTIPLE:
        found[PADDED] = bare_products(heads, *wanted, multiple=PADDED_MULTIPLE)
    return found


class TimeLimitExceeded(BaseException):
    """Raised by `time_limit`. It is no Exception, so that a compiler does not catch it as a fault of its own."""


@contextlib.contextmanager
def time_limit(limit: float) -> Iterator[None]:
    """Raise TimeLimitExceeded in the main thread after `limit` seconds."""

    def ring(*_):
        raise TimeLimitExceeded(f"more than {limit:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def kernels_of(op: Op, device: str) -> list[str]:
    """Return the backends to time: on a CPU the best compiled one, on a GPU all."""
    names = [op.chosen("cpu")] if device == "cpu" else [b for b in op.backends if op.can_run(b, device)]
    return [name for name in names if name != "reference"]


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    message = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {message[:160]}"


def verified(problem: Problem, clock: Clock, compile_seconds: float, result: Result) -> dict[str, Callable]:
    """Return the providers that run and are right, ready to be timed, our kernels first.

    `result` gets a note or a fault for each of the others.
    """
    case, op, device = problem.case, problem.op, clock.name
    providers: dict[str, Callable] = {}

    def verify(
        name: str, call: Callable, args: tuple, tolerance: float, to: list[str], first_output: bool = False
    ) -> None:
        try:
            error = problem.error(problem.run_once(call, args), tolerance, first_output)
            if not error:
                providers[name] = problem.timed(call, args)
                return
        except (Exception, TimeLimitExceeded) as raised:  # one provider's fault hides no other's
            unsupported = "no kernel answers" in str(raised) or f"no backend {name!r}" in str(raised)
            error, to = first_line(raised), result.notes if unsupported else to
        to.append(f"{case}: {name} not timed: {error}")
        clock.empty_cache()

    tolerance = TOLERANCE[case.dtype]
    with strict():
        for name in kernels_of(op, device):
            call = op if name == op.chosen(device) else op.backend(name)
            verify(name, call, problem.raw, tolerance, result.faults)
    if not providers:
        result.notes.append(f"{case}: no kernel to time")
        return {}
    if case.target.chunk:
        result.notes.append(f"{case}: the reference is checked {case.target.chunk} rows at a time and not timed")
    else:
        verify("reference", op.reference, problem.args, tolerance, result.notes)
    if compile_seconds and not case.target.chunk:
        torch._dynamo.reset()
        with contextlib.suppress(TimeLimitExceeded), time_limit(compile_seconds):
            compiled = torch.compile(op.reference, dynamic=False)
            verify("torch.compile", compiled, problem.args, tolerance, result.notes)
    for baseline in baselines_of(op.name, device, problem.args):
        bound = max(tolerance, baseline.tolerance)
        verify(baseline.name, baseline.call, problem.args, bound, result.notes, first_output=True)
    return providers


def min_bytes_and_flops(problem: Problem, outputs: list[torch.Tensor]) -> tuple[float, float]:
    """Return the bytes and operations that a call needs: the op's own count, or every tensor read or written once."""
    if problem.op.cost_function:
        return problem.op.cost_function(problem.case.gradient, *problem.args)
    written = [problem.args[i] for i in problem.op.mutates]
    return float(sum(x.nbytes for x in tensors([*problem.args, *written, *outputs]))), 0.0


def timings(providers: dict[str, Callable], captured: list[str], clock: Clock, budget: float) -> tuple[dict, dict]:
    """Return seconds by rounds for each provider: of whole calls, and of the device alone for those of `captured` whose
    calls are short. A capture that fails spoils torch's allocator before 2.12, so what may wait for the host is left
    out."""
    times = interleaved({name: clock.timer(call) for name, call in providers.items()}, budget)
    short = {name: call for name, call in providers.items() if statistics.median(times[name]) < MAX_CAPTURED}
    graphs = {name: clock.graph_timer(call) for name, call in short.items() if name in captured}
    graphs = {name: timer for name, timer in graphs.items() if timer}
    return times, interleaved(graphs, budget / 3) if graphs else {}


def measure(case: Case, clock: Clock, bandwidth: float, *, seconds: float, compile_seconds: float) -> Result:
    """Return one row for each of our kernels.

    `seconds` is the budget for the rounds. The floor is the least bytes over a copy's `bandwidth` in bytes/s, or a
    head's bare matrix products, the faster of given and padded ones.
    """
    result = Result([], [], [])
    problem = Problem(case, clock.name)
    providers = verified(problem, clock, compile_seconds, result)
    if not providers:
        return result
    peaks = {name: clock.peak_bytes(call) for name, call in providers.items()}
    moved, flops = min_bytes_and_flops(problem, next(iter(providers.values()))())
    bare = bare_products_of(problem)
    providers |= {name: products.run for name, products in bare.items()}
    times, device_times = timings(providers, [*kernels_of(case.op, clock.name), *bare], clock, seconds)
    numbers = {
        name: {
            "seconds": statistics.median(taken),
            "device_seconds": statistics.median(device_times[name]) if name in device_times else None,
            "peak_bytes": peaks.get(name),
        }
        for name, taken in times.items()
    }
    floor = moved / bandwidth
    if bare:
        floor = max(floor, min(flops * numbers[name]["seconds"] / products.flops for name, products in bare.items()))
    for name in [name for name in kernels_of(case.op, clock.name) if name in providers]:
        own = numbers[name]
        fastest = own["device_seconds"] or own["seconds"]
        compared = {other: ratio for other, ratio in median_ratios(times, name).items() if not _is_kernel(other, case)}
        row = {
            "op": case.op.name, "size": label(case.size), "dtype": str(case.dtype)[6:], "pass": case.direction,
            "backend": name, **own, "bytes": moved, "flops": flops, "floor_seconds": floor, "share": floor / fastest,
            "rate": f"{flops / fastest / 1e12:.3g} TFLOP/s" if bare else f"{moved / fastest / 1e9:.3g} GB/s",
            "ratios": compared,
            "others": {other: found for other, found in numbers.items() if other != name},
            "checked": f"all rows, {case.target.chunk} at a time" if case.target.chunk else "whole",
        }  # fmt: skip
        row["target"] = str(case.target) if case.target.of else None
        row["met"] = case.target.met(name, row)
        result.rows.append(row)
    return result


def _is_kernel(provider: str, case: Case) -> bool:
    return provider in case.op.backends and provider != "reference"
