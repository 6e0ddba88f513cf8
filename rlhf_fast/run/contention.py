"""Cores that are shared with other programs: OpenMP threads that wait leave them free, and a run says that it is slow.

GNU's OpenMP lets a thread that waits for work or at a barrier spin for milliseconds, and the thread that it waits for
may be queued on the core that spins. Beside another program a training step of many short parallel regions then takes
60 times as long. Short spins bridge the gaps between the ops of a step all the same.
"""

from __future__ import annotations

import math
import os
import sys
import time

SPIN_COUNT = "3000"
# Two cores of a Xeon with AMX, PPO of a 260K model, 16 x 100 tokens: with counts of 1, 3000, 10000 and GNU's default
# learning took 0.100, 0.105, 0.113 and 0.108 s alone, which is noise, and 0.177, 0.188, 0.271 and 2.89 s beside a
# second torch program with the same count.
ENVIRONMENT = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""OpenMP's own variables; a user who sets one of them has chosen."""
LOAD_SECONDS = 60.0
"""Time over which the system averages its load."""

_started = time.monotonic()
_too_late = False


def shorten_spins() -> None:
    """Let threads that wait spin for a short time. OpenMP reads that when torch is loaded, so it must come before."""
    global _too_late
    if any(name in os.environ for name in ENVIRONMENT):
        return
    if "torch" in sys.modules:
        _too_late = True
    else:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def contention_note(num_threads: int) -> str:
    """Return a sentence if other programs leave fewer than `num_threads` of the machine's cores, else ""."""
    try:
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
    except OSError:  # the system does not tell
        return ""
    elapsed = max(time.monotonic() - _started, 1e-9)
    # This process counts too, with a weight that grows with its age as the system's average does.
    others = load - time.process_time() / elapsed * (1 - math.exp(-elapsed / LOAD_SECONDS))
    if others < 1 or others + num_threads <= cores:
        return ""
    remedies = []
    if (fewer := max(cores - round(others), 1)) < num_threads:
        remedies.append(f"OMP_NUM_THREADS={fewer} leaves them theirs")
    if _too_late and num_threads > 1:
        remedies.append(f"`import rlhf_fast` before torch, or GOMP_SPINCOUNT={SPIN_COUNT}, lets waiting threads sleep")
    busy = f"other programs keep about {min(others, cores):.1f} of {cores} cores busy, so steps take longer"
    return f"{busy}; {', and '.join(remedies)}" if remedies else busy
