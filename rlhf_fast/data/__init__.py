"""Data: files (files.py), rows (rows.py, fields.py), tokens (encode.py), batches (datasets.py), reports (check.py)."""

from rlhf_fast.data.datasets import Dataset, Split, read_comparisons, read_demonstrations, read_prompts, read_texts
from rlhf_fast.data.encode import Encoder

__all__ = [
    "Dataset",
    "Encoder",
    "Split",
    "read_comparisons",
    "read_demonstrations",
    "read_prompts",
    "read_texts",
]
