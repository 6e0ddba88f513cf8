"""Time and memory of a call: on a CPU by the clock, on a GPU by its events, its cache emptied before each call.

A clock's `timer(call)` warms up and gives a function that takes one time; `interleaved` lets many take turns.
"""

import gc
import statistics
import time
from collections.abc import Callable

import torch

SECONDS = 1.5  # spent on the rounds of one comparison
ROUND = 2e-3  # a round of one contestant lasts at least this long on a CPU, where the clock is coarse
FLUSH = 256 << 20  # bytes, more than any GPU's last cache
CAPTURED = 2e-3  # calls shorter than this are also timed by replay: launching is a share of them


def seconds(call: Callable, calls: int = 1) -> float:
    """Wall time of one of `calls` calls in a row; where they time themselves and return it, a float, its median."""
    start = time.perf_counter()
    said = [call() for _ in range(calls)]
    if isinstance(said[0], float):
        return statistics.median(said)
    return (time.perf_counter() - start) / calls


def best(call: Callable, rounds: int = 7) -> float:
    """The least wall time of a call."""
    return min(seconds(call) for _ in range(rounds))


def interleaved(timers: dict[str, Callable[[], float]], budget: float = SECONDS) -> dict[str, list[float]]:
    """Seconds a call, a list for each: every round runs every contestant once."""
    start = time.perf_counter()
    times = {name: [timer()] for name, timer in timers.items()}
    rounds = max(5, min(50, round(budget / (time.perf_counter() - start))))
    for _ in range(rounds - 1):
        for name, timer in timers.items():
            times[name].append(timer())
    return times


class Cpu:
    """Wall time, and what torch allocates."""

    name = "cpu"

    def timer(self, call: Callable) -> Callable[[], float]:
        once = seconds(call)
        calls = 1 if once > 0.5 else max(1, round(ROUND / best(call, 3)))
        return lambda: seconds(call, calls)

    def replay(self, call: Callable) -> None:
        return None

    def bandwidth(self) -> float:
        """Bytes/s, read and written, of a copy that leaves the caches."""
        source, target = torch.ones(2, 1 << 25)
        return 2 * source.nbytes / best(lambda: target.copy_(source))

    def peak(self, call: Callable) -> int:
        """The most bytes that torch held at a time for what `call` allocated, its results included."""
        gc.collect()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            kept = call()
        held = most = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        del kept
        return most

    def forget(self) -> None:
        gc.collect()


class Gpu:
    """Time between two events on the device."""

    name = "cuda"

    def __init__(self):
        self.flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")

    def seconds(self, call: Callable, launched: bool) -> float:
        """From the start event to the end of the call. `launched`: the device is idle before, so that the time to
        launch counts; else the flush still runs while the call is queued, and only the device's own time is left."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        if launched:
            torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def timer(self, call: Callable) -> Callable[[], float]:
        for _ in range(3):
            call()
        return lambda: self.seconds(call, launched=True)

    def replay(self, call: Callable) -> Callable[[], float] | None:
        """A timer of the call replayed as a CUDA graph, the graph's own start included; None where it cannot be
        captured."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(side):
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:  # it waits for the device
            torch.cuda.synchronize()
            return None
        graph.replay()
        return lambda: self.seconds(graph.replay, launched=False)

    def bandwidth(self) -> float:
        """Bytes/s, read and written, of a copy within the device that leaves the cache."""
        source, target = torch.ones(2, 1 << 30, dtype=torch.uint8, device="cuda")
        times = [self.seconds(lambda: target.copy_(source), launched=False) for _ in range(12)]
        return 2 * source.nbytes / statistics.median(times[2:])

    def peak(self, call: Callable) -> int:
        """The most bytes of torch's allocator above those held before the call, its results included."""
        gc.collect()
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = call()
        torch.cuda.synchronize()
        most = torch.cuda.max_memory_allocated() - held
        del kept
        return most

    def forget(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


CLOCKS = {"cpu": Cpu, "cuda": Gpu}
