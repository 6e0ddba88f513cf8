"""Count and time what runs on the device in a span of time, kernel by kernel, by torch's profiler."""

import os
from collections import defaultdict
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

TOP = 12


class DeviceProfile(NamedTuple):
    """A step of a span: the kernels, copies and fills that ran, and the seconds in which one did."""

    launches: float
    host_launches: float
    """Calls by which the host launched these: a graph of many kernels takes one."""
    busy_seconds: float
    kernels: list[dict]
    """name, calls a step and us a step, of the TOP dearest."""


class Profiler:
    """Records between `start` and `stop`. On a CPU it counts torch's ops, so that a dry run passes every line."""

    def __init__(self, device: str):
        self.wanted = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
        activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
        # else each start and stop writes a line `USDT: ...` to standard error; kineto reads this at its first profile
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        self.profile = profile(activities=[activity])

    def start(self) -> None:
        if self.wanted == DeviceType.CUDA:
            torch.cuda.synchronize()
        self.profile.start()

    def stop(self, steps: int) -> DeviceProfile | None:
        """Return what ran in the `steps` steps since the start; None where the profiler saw nothing of the device."""
        if self.wanted == DeviceType.CUDA:
            torch.cuda.synchronize()
        self.profile.stop()
        spans, host_launches = [], 0
        for event in self.profile.events():
            if event.device_type == self.wanted and not getattr(event, "is_user_annotation", False):
                spans.append((event.time_range.start, event.time_range.end, event.name))
            host_launches += (
                event.device_type == DeviceType.CPU and event.name.startswith("cu") and "Launch" in event.name
            )
        return summary(spans, host_launches, steps) if spans else None


def summary(spans: list[tuple[float, float, str]], host_launches: int, steps: int) -> DeviceProfile:
    """Return the profile of spans (start, end, name) in us. Time that spans share counts once in `busy_seconds`."""
    found = defaultdict(lambda: [0, 0.0])
    busy, covered = 0.0, float("-inf")
    for start, end, name in sorted(spans):
        found[name][0] += 1
        found[name][1] += end - start
        busy += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    dearest = sorted(found.items(), key=lambda item: -item[1][1])[:TOP]
    kernels = [
        {"name": name[:120], "calls": round(calls / steps, 2), "us": round(us / steps, 2)}
        for name, (calls, us) in dearest
    ]
    launches = sum(calls for calls, _ in found.values()) / steps
    return DeviceProfile(round(launches, 1), round(host_launches / steps, 1), busy / steps / 1e6, kernels)
