"""A GGUF file in llama.cpp, through the package llama-cpp-python: tokens of prompts, end tokens, greedy responses.

llama.cpp runs in a process of its own, this file as a program: on a fault it aborts, and ours must not.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.export.agreement import NEAR_TIE, Agreement, Row, compare

PROGRAM = "llama.cpp"
ARITHMETIC = {"silu": 2e-3, "gelu_tanh": 2e-2, "gelu": 5e-2}
"""Largest gap of a near tie that arithmetic alone explains, in nats: llama.cpp looks GELU up in a table of half
precision, and takes the approximation by tanh for the exact one."""


def is_installed() -> bool:
    """Return whether llama-cpp-python is there."""
    return importlib.util.find_spec("llama_cpp") is not None


def check(
    path: Path, rows: Sequence[Row], *, is_chat: bool, ends: Sequence[int], activation: str, kind: str,
    rounding: float, num_tokens: int,
) -> Agreement:  # fmt: skip
    """Compare the file with the model's greedy responses. UserError if a prompt has other tokens in llama.cpp, an end
    token ends nothing, or it says other tokens.

    rounding: how far the file's weights, of type `kind`, move a logit. For q8_0 llama.cpp rounds the activations too,
    which counts once more.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = _ask(path, rows, is_chat, ends, Path(folder))
        for row, prompt in zip(rows, found["prompts"], strict=True):
            _check_prompt(prompt, row)
        for end, does_end in zip(ends, found["ends"], strict=True):
            if not does_end:
                raise UserError(f"{path}: token {end} ends our responses, and does not end {PROGRAM}'s")
        files = {tuple(row.tokens): Path(folder) / f"{i}.npy" for i, row in enumerate(rows)}

        def logits(tokens: Sequence[int]) -> Tensor:
            return torch.from_numpy(np.load(files[tuple(tokens)]))

        allowed = min((2 if kind == "q8_0" else 1) * rounding, NEAR_TIE[kind]) + ARITHMETIC[activation]
        return compare(rows, logits, allowed, num_tokens, PROGRAM)


def _ask(path: Path, rows: Sequence[Row], is_chat: bool, ends: Sequence[int], folder: Path) -> dict[str, Any]:
    """Let a process load the file, and return the tokens of the prompts and which `ends` end a response. The logits of
    row i are in i.npy of `folder`. UserError if the process fails."""
    job = {
        "file": str(path), "folder": str(folder), "is_chat": is_chat, "ends": list(ends),
        "texts": [row.text for row in rows], "rows": [row.tokens for row in rows], "threads": torch.get_num_threads(),
    }  # fmt: skip
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        remedy = "uninstall llama-cpp-python to export without this comparison"
        if name == "SIGILL":
            remedy = (
                "it was compiled for instructions that this machine lacks: CMAKE_ARGS=-DGGML_NATIVE=off pip install"
                " --force-reinstall --no-binary :all: llama-cpp-python"
            )
        raise UserError(f"{path.name}: {PROGRAM} was ended by {name} while it read the file; {remedy}")
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise UserError(f"{path.name}: {PROGRAM} cannot read it: {said[:200]}")
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def _check_prompt(found: list[int], row: Row) -> None:
    """Raise UserError if a prompt's text has other tokens than ours."""
    if found != row.prompt:
        at = next((i for i, (x, y) in enumerate(zip(found, row.prompt, strict=False)) if x != y), None)
        place = "one is longer" if at is None else f"token {at + 1} is {found[at]}, ours {row.prompt[at]}"
        raise UserError(f"{PROGRAM} reads the prompt {row.text[:40]!r} as other tokens than the model: {place}")


def _answer(job: dict[str, Any]) -> None:
    """Do the job of `_ask`, in the process that it starts."""
    import llama_cpp

    longest = max(map(len, job["rows"])) + 8
    engine: Any = llama_cpp.Llama(
        job["file"], n_ctx=longest, n_batch=longest, n_ubatch=longest, logits_all=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, n_threads=job["threads"],
        n_threads_batch=job["threads"],
    )  # fmt: skip
    # a chat template writes its start token itself
    prompts = [
        engine.tokenize(text.encode(), add_bos=not job["is_chat"], special=job["is_chat"]) for text in job["texts"]
    ]
    vocabulary = llama_cpp.llama_model_get_vocab(engine.model)
    ends = [bool(llama_cpp.llama_vocab_is_eog(vocabulary, end)) for end in job["ends"]]
    for i, tokens in enumerate(job["rows"]):
        engine.reset()
        engine.eval(tokens)
        np.save(Path(job["folder"]) / f"{i}.npy", engine.scores[: len(tokens)])
    (Path(job["folder"]) / "found.json").write_text(json.dumps({"prompts": prompts, "ends": ends}), encoding="utf-8")


if __name__ == "__main__":
    _answer(json.load(sys.stdin))
