"""Take steps of an SFT trainer when asked: a worker process of unsloth_step, one for each side.

    python -m rlhf_fast.bench.trainer_worker SIDE --folder FOLDER --threads N [--tiny]

The first line it writes is JSON on its first step. Then it answers each line that it reads with one of JSON: `step`
with the seconds of a step, `peak` with the most bytes that a step holds. It ends with its input.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

SIDES = ("ours", "unsloth", "plain")
LIBRARIES = ("unsloth", "unsloth_zoo", "trl", "transformers", "torch")


def loaded_by(unsloth: Any, folder: Path) -> Callable:
    """Return a function that makes `random_llama`, as Unsloth loads it from a folder."""
    import torch
    from transformers import AutoTokenizer

    from rlhf_fast.bench import trainer_step

    def make(tiny: bool) -> Any:
        trainer_step.random_llama(tiny).save_pretrained(folder)
        AutoTokenizer.from_pretrained(trainer_step.BASE_MODELS / "small").save_pretrained(folder)
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            str(folder), max_seq_length=trainer_step.LENGTH, dtype=torch.float32, load_in_4bit=False,
            full_finetuning=True, use_gradient_checkpointing=False,
        )  # fmt: skip
        return model.train()

    return make


def answers(options: argparse.Namespace, questions: TextIO) -> Iterator[dict]:
    """Yield what a first step gave, then the answer to each question."""
    # Before what it replaces is imported: transformers, TRL, and what imports them here.
    unsloth = importlib.import_module("unsloth") if options.side == "unsloth" else None
    import torch

    from rlhf_fast.bench import trainer_step
    from rlhf_fast.bench.timing import Cpu
    from rlhf_fast.integrations.hooks import library_version

    torch.set_num_threads(options.threads)
    make = loaded_by(unsloth, options.folder / "model") if unsloth else trainer_step.random_llama
    step = trainer_step.trl_step("sft", options.tiny, str(options.folder / "runs"), make)
    with step.inside() if options.side == "ours" else nullcontext() as handle:
        yield {
            "loss": float(step.take()),
            "gradient_norm": step.gradient_norm(),
            "answered": bool(handle and handle.status.answered),
            "chunked_loss": getattr(step.model, "_unsloth_cpu_chunked_ce", False),
            "labelled": step.labelled,
            "rows": step.rows,
            "versions": {name: library_version(name) for name in LIBRARIES},
        }
        for question in questions:
            if question.strip() == "step":
                start = time.perf_counter()
                step.take()
                yield {"seconds": time.perf_counter() - start}
            else:
                step.model.zero_grad(set_to_none=True)  # a gradient that is freed on the way would be subtracted
                yield {"bytes": Cpu().peak_bytes(step.take)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    # What libraries print must not come between the answers.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for answer in answers(options, sys.stdin):
        print(json.dumps(answer), file=replies, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
