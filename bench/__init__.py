"""Benchmarks, and what they share."""

import os

# Else torch's profiler writes `USDT: ... profiler_start` to standard error. It reads this when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")
