"""How much memory a stretch of work holds at a time."""

import gc

import torch


def peak_bytes(run) -> int:
    """The most memory that torch held at a time for what `run` allocated, its results included."""
    run()
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    del kept
    return most
