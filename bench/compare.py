"""An op's kernels beside its reference, torch's compiler and other libraries: first whether they are right, then time.

A contestant that is wrong is not timed, nor is a kernel that leaves the call to the reference.
"""

import contextlib
import signal
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from rlhf_fast.bench.baselines import rivals_of
from rlhf_fast.bench.problem import TOLERANCE, Bout, Case, label, tensors
from rlhf_fast.bench.timing import CAPTURED, Cpu, Gpu, interleaved
from rlhf_fast.kernels._backends import strict
from rlhf_fast.kernels._op import Op

BARE = "bare products"


class Result(NamedTuple):
    """Rows for the table; what was left out, and why; kernels that are wrong."""

    rows: list[dict]
    notes: list[str]
    faults: list[str]


def bare_products(op: Op, args: tuple, gradient: bool) -> tuple[Callable, float] | None:
    """A head's matrix products by torch.mm, into memory that is there, with nothing around; and their operations."""
    given = dict(zip(op.names, args, strict=True))
    if not {"hidden", "weight"} <= set(given) or not given["hidden"].numel():
        return None
    heads = [(given["hidden"].detach().flatten(0, -2), given["weight"].detach())]
    wanted = [gradient and given[name].requires_grad for name in ("hidden", "weight")]
    if "ref_hidden" in given:
        heads.append((given["ref_hidden"].flatten(0, -2), given["ref_weight"]))
    (hidden, weight), on_cpu = heads[0], heads[0][0].device.type == "cpu"
    if hidden.dtype != weight.dtype or (on_cpu and hidden.dtype != torch.float32 and not _half_products()):
        heads = [(x.float(), w.float()) for x, w in heads]
        hidden, weight = heads[0]
    logits = hidden.new_empty(len(hidden), len(weight))
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight) if wanted[1] else None

    def run():
        for x, w in reversed(heads):
            torch.mm(x, w.T, out=logits)
        if wanted[0]:
            torch.mm(logits, weight, out=d_hidden)
        if wanted[1]:
            torch.mm(logits.T, hidden, out=d_weight)

    flops = 2.0 * len(hidden) * (sum(w.numel() for _, w in heads) + sum(wanted) * weight.numel())
    return run, flops


def _half_products() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class TimeIsUp(BaseException):
    """Not an Exception: what compiles must not take it for a fault of its own."""


@contextlib.contextmanager
def alarm(limit: float) -> Iterator[None]:
    """TimeIsUp after so many seconds, in the main thread."""

    def ring(*_):
        raise TimeIsUp(f"more than {limit:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def kernels_of(op: Op, device: str) -> list[str]:
    """The backends to time: on a CPU the best compiled one, on a GPU all."""
    names = [op.chosen("cpu")] if device == "cpu" else [b for b in op.backends if op.can_run(b, device)]
    return [name for name in names if name != "reference"]


def reason(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:160]}"


def admitted(bout: Bout, clock: Cpu | Gpu, compile_seconds: float, result: Result) -> dict[str, Callable]:
    """The contestants that run and are right, ready to be timed: our kernels first. Why others are not, in `result`."""
    case, op, device, contestants = bout.case, bout.op, clock.name, {}

    def admit(name: str, call: Callable, args: tuple, tolerance: float, to: list[str], first=False) -> None:
        try:
            wrong = bout.wrong(bout.once(call, args), tolerance, first)
            if not wrong:
                contestants[name] = bout.timed(call, args)
                return
        except (Exception, TimeIsUp) as error:  # one contestant's fault hides no other's
            declined = "no kernel answers" in str(error) or f"no backend {name!r}" in str(error)
            wrong, to = reason(error), result.notes if declined else to
        to.append(f"{case}: {name} not timed: {wrong}")
        clock.forget()

    tolerance = TOLERANCE[case.dtype]
    with strict():
        for name in kernels_of(op, device):
            admit(name, op if name == op.chosen(device) else op.backend(name), bout.raw, tolerance, result.faults)
    if not contestants:
        result.notes.append(f"{case}: no kernel to time")
        return {}
    admit("reference", op.reference, bout.args, tolerance, result.notes)
    if compile_seconds:
        torch._dynamo.reset()
        with contextlib.suppress(TimeIsUp), alarm(compile_seconds):
            admit("torch.compile", torch.compile(op.reference, dynamic=False), bout.args, tolerance, result.notes)
    for rival in rivals_of(op.name, device, bout.args):
        admit(rival.name, rival.call, bout.args, max(tolerance, rival.tolerance), result.notes, True)
    return contestants


def least(bout: Bout, outputs: list[torch.Tensor]) -> tuple[float, float]:
    """Bytes and operations that a call cannot do without: by default every tensor that comes or goes, once."""
    if bout.op.cost_function:
        return bout.op.cost_function(bout.case.gradient, *bout.args)
    written = [bout.args[i] for i in bout.op.mutates]
    return float(sum(x.nbytes for x in tensors([*bout.args, *written, *outputs]))), 0.0


def timings(contestants: dict[str, Callable], clock: Cpu | Gpu, budget: float) -> tuple[dict, dict]:
    """Seconds of each, a list by rounds: of calls, and of the device alone where a call is short."""
    times = interleaved({name: clock.timer(call) for name, call in contestants.items()}, budget)
    short = {name: call for name, call in contestants.items() if statistics.median(times[name]) < CAPTURED}
    replays = {name: clock.replay(call) for name, call in short.items()}
    replays = {name: timer for name, timer in replays.items() if timer}
    return times, interleaved(replays, budget / 3) if replays else {}


def measure(case: Case, clock: Cpu | Gpu, bandwidth: float, *, seconds: float, compile_seconds: float) -> Result:
    """One row for each of our kernels. `seconds` are spent on the rounds; the floor is by a copy's `bandwidth`,
    bytes/s, or by a head's bare matrix products."""
    result = Result([], [], [])
    bout = Bout(case, clock.name)
    contestants = admitted(bout, clock, compile_seconds, result)
    if not contestants:
        return result
    peaks = {name: clock.peak(call) for name, call in contestants.items()}
    moved, flops = least(bout, next(iter(contestants.values()))())
    bare = bare_products(case.op, bout.args, case.gradient)
    if bare:
        contestants[BARE] = bare[0]
    times, replayed = timings(contestants, clock, seconds)
    others = {
        name: {
            "seconds": statistics.median(taken),
            "device_seconds": statistics.median(replayed[name]) if name in replayed else None,
            "peak_bytes": peaks.get(name),
        }
        for name, taken in times.items()
    }
    floor = max(moved / bandwidth, flops * others[BARE]["seconds"] / bare[1] if bare else 0.0)
    for name in [name for name in kernels_of(case.op, clock.name) if name in contestants]:
        own = others[name]
        best = own["device_seconds"] or own["seconds"]
        row = {
            "op": case.op.name, "size": label(case.size), "dtype": str(case.dtype)[6:], "pass": case.visit,
            "backend": name, **own, "bytes": moved, "flops": flops, "floor_seconds": floor, "share": floor / best,
            "rate": f"{flops / best / 1e12:.3g} TFLOP/s" if bare else f"{moved / best / 1e9:.3g} GB/s",
            "ratios": {
                other: statistics.median(a / b for a, b in zip(taken, times[name], strict=True))
                for other, taken in times.items() if other not in case.op.backends or other == "reference"
            },
            "others": {other: numbers for other, numbers in others.items() if other != name},
            "checked": f"all rows, {case.target.chunk} at a time" if case.target.chunk else "whole",
        }  # fmt: skip
        row["target"] = str(case.target) if case.target.of else None
        row["met"] = case.target.met(name, row)
        result.rows.append(row)
    return result
