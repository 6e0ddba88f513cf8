"""Time and memory of a call: on a CPU by the wall clock, on a GPU by events, with its cache emptied before each call.

`Cpu` and `Gpu` are the clocks. A clock's `timer(call)` warms the call up and returns a function that measures it once.
`interleaved` lets the timers of several providers take turns: every table in bench/ is made by it.
"""

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable

import torch

SECONDS = 1.5  # for the rounds of one comparison
MIN_ROUND = 2e-3  # seconds of a round of one provider on a CPU, whose clock is coarse
MIN_ROUNDS, MAX_ROUNDS = 5, 50
FLUSH_BYTES = 256 << 20  # more than any GPU's last-level cache
MAX_CAPTURED = 2e-3  # seconds; shorter calls are also timed as a CUDA graph, since launching is a share of them

Timer = Callable[[], float]


def seconds(call: Callable, calls: int = 1) -> float:
    """Return the wall time of one of `calls` calls in a row.

    A call that returns a float has timed itself; then the median of these is returned.
    """
    start = time.perf_counter()
    returned = [call() for _ in range(calls)]
    if isinstance(returned[0], float):
        return statistics.median(returned)
    return (time.perf_counter() - start) / calls


def fastest(call: Callable, rounds: int = 7) -> float:
    """Return the shortest wall time of a call."""
    return min(seconds(call) for _ in range(rounds))


def rounds_in(budget: float, one_round: float) -> int:
    """Return how many rounds of `one_round` seconds the budget allows, within MIN_ROUNDS and MAX_ROUNDS."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, round(budget / one_round)))


def interleaved(
    timers: dict[str, Timer], budget: float = SECONDS, rounds: int = 0, repeat: Callable | None = None
) -> dict[str, list[float]]:
    """Return seconds a call, one list for each provider: every round runs every provider once.

    `rounds` 0 means as many as the budget allows after a first round, which is kept then. `repeat(last, others,
    rounds)` runs the rounds in place of a plain loop: pytest-benchmark's `pedantic` does, which times the last itself.
    """
    times: dict[str, list[float]] = {name: [] for name in timers}
    last = [*timers][-1]

    def run(name: str) -> None:
        times[name].append(timers[name]())

    def others() -> None:
        for name in timers:
            if name != last:
                run(name)

    if not rounds:
        start = time.perf_counter()
        others()
        run(last)
        rounds = rounds_in(budget, time.perf_counter() - start) - 1
    if repeat is not None:
        repeat(lambda: run(last), others, rounds)
    else:
        for _ in range(rounds):
            others()
            run(last)
    return times


def median_ratios(times: dict[str, list[float]], ours: str) -> dict[str, float]:
    """Return each provider's time over ours: taken within a round, then the median over the rounds."""
    return {
        name: statistics.median(theirs / own for theirs, own in zip(taken, times[ours], strict=True))
        for name, taken in times.items()
        if name != ours
    }


def has_bf16_products() -> bool:
    """Return whether the processor multiplies bfloat16 itself; elsewhere torch's product takes minutes."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Cpu:
    """Wall time, and the bytes that torch allocates."""

    name = "cpu"

    def timer(self, call: Callable, calls: int = 0) -> Timer:
        """Return a function that times `calls` calls, by default enough for MIN_ROUND."""
        once = seconds(call)
        if not calls:
            calls = 1 if once > 0.5 else max(1, round(MIN_ROUND / fastest(call, 3)))
        return lambda: seconds(call, calls)

    def graph_timer(self, call: Callable) -> None:
        """Return None: a CPU has no graphs."""
        return

    def empty_graph_seconds(self) -> None:
        """Return None: a CPU has no graphs."""
        return

    def copy_bandwidth(self) -> float:
        """Return bytes/s, read and written, of a copy that exceeds the caches."""
        source, target = torch.ones(2, 1 << 25)
        return 2 * source.nbytes / fastest(lambda: target.copy_(source))

    def read_bandwidth(self) -> float:
        """Return bytes/s of a sum over memory that exceeds the caches."""
        source = torch.ones(1 << 25)
        return source.nbytes / fastest(source.sum)

    def product_rate(self) -> float:
        """Return FLOP/s of torch's float32 matrix product."""
        a, out = torch.ones(2, 1536, 1536)
        return 2 * 1536**3 / fastest(lambda: torch.mm(a, a, out=out))

    def peak_bytes(self, call: Callable) -> int:
        """Return the most bytes that torch holds at a time for what `call` allocates, its results included."""
        gc.collect()
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch 2.13 writes two lines to stderr
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            results = call()
        held = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        del results
        return peak

    def empty_cache(self) -> None:
        """Free what Python's collector holds."""
        gc.collect()


class Gpu:
    """Time between two events on the device."""

    name = "cuda"

    def __init__(self):
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def seconds(self, call: Callable, launched: bool) -> float:
        """Return seconds from the start event to the end of the call.

        With `launched` the device is idle before, so that the time to launch counts. Without, the flush still runs
        while the call is queued, and only the device's own time is left.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        if launched:
            torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def timer(self, call: Callable) -> Timer:
        """Return a function that times one call, its launches included."""
        for _ in range(3):
            call()
        return lambda: self.seconds(call, launched=True)

    def graph_timer(self, call: Callable) -> Timer | None:
        """Return a timer of the call replayed as a CUDA graph, or None where it waits for the host."""
        if self.waits(call):
            return None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:  # the number for the whole call is kept
            torch.cuda.synchronize()
            return None
        graph.replay()
        return lambda: self.seconds(graph.replay, launched=False)

    def empty_graph_seconds(self) -> float:
        """Return what `graph_timer` measures of a graph of one kernel that writes one number."""
        x = torch.zeros(1, device="cuda")
        timer = self.graph_timer(x.zero_)
        return statistics.median(timer() for _ in range(20))

    def waits(self, call: Callable) -> bool:
        """Return whether torch waits for the device within the call. A failed capture would tell it too, but before
        torch 2.12 it leaves the allocator and the random generator capturing: later calls fail."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return False

    def queued_seconds(self, call: Callable) -> float:
        """Return seconds of the device alone, for a call of at most a thousand launches, the most that a GPU queues.

        The device sleeps while the host queues the call, so that the host's time does not count.
        """
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(2e9 * (1.5 * (time.perf_counter() - start) + 1e-3)))  # at about 2 GHz
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    def product_rate(self) -> float:
        """Return FLOP/s of torch's bfloat16 matrix product."""
        a, out = torch.randn(2, 8192, 8192, device="cuda").bfloat16()  # ones would need less power, and run faster
        times = [self.seconds(lambda: torch.mm(a, a, out=out), launched=False) for _ in range(12)]
        return 2 * 8192**3 / statistics.median(times[2:])

    def copy_bandwidth(self) -> float:
        """Return bytes/s, read and written, of a copy within the device that exceeds its cache."""
        source, target = torch.ones(2, 1 << 30, dtype=torch.uint8, device="cuda")
        times = [self.seconds(lambda: target.copy_(source), launched=False) for _ in range(12)]
        return 2 * source.nbytes / statistics.median(times[2:])

    def peak_bytes(self, call: Callable) -> int:
        """Return the most bytes of torch's allocator above those held before the call, its results included."""
        gc.collect()
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - held
        del results
        return peak

    def empty_cache(self) -> None:
        """Give torch's cached blocks back to the device."""
        gc.collect()
        with contextlib.suppress(RuntimeError):  # torch before 2.12 cannot after a failed capture
            torch.cuda.empty_cache()


CLOCKS = {"cpu": Cpu, "cuda": Gpu}
