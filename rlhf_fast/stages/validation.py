"""When a stage validates, and what it measures on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlhf_fast.batches import Prompts, Responses
from rlhf_fast.data import Dataset
from rlhf_fast.data.datasets import Row, join_prompts
from rlhf_fast.model.model import Model
from rlhf_fast.run.samples import RAW_PROMPT
from rlhf_fast.training.learner import Loss, evaluate


def should_validate(step: int, every: int, batch: int, rows: int, total: int) -> bool:
    """Return whether to validate after step 1, 2, ..., `total`.

    every: steps between validations; 0 = once an epoch of `rows`, at `batch` rows a step. The last step validates.
    """
    if step == total:
        return True
    if every:
        return step % every == 0
    return step * batch // rows > (step - 1) * batch // rows


def validation_metrics(model: Model, data: Dataset, loss: Loss, micro_batch_tokens: int) -> dict[str, float]:
    """Return the stats of `loss` over every row of `data`, under the names valid/..."""
    stats = evaluate(model, loss, list(data.in_order(256)), micro_batch_tokens)
    return {f"valid/{name.partition('/')[2]}": value for name, value in stats.items()}


def validation_prompts(data: Dataset, context: int = 0, max_new_tokens: int = 0) -> Prompts:
    """Return the prompts in the file's order, their row numbers as uids.

    Prompts that leave no room for max_new_tokens in the model's `context` are left out; 0 = any length.
    """
    rows = [i for i, row in enumerate(data.rows) if not context or len(row.prompt) + max_new_tokens <= context]
    return join_prompts([data.rows[i] for i in rows], rows)


def sample_rows(responses: Responses, rows: Sequence[Row], tokenizer: Any, **columns: Tensor) -> list[dict[str, Any]]:
    """Return a row for samples.jsonl of each response: prompt, text, length, whether it ended, and `columns`.

    rows: the rows of the data set whose prompts are answered.
    """
    texts = responses.texts(tokenizer)
    lengths = (responses.lengths - responses.prompt_lengths).tolist()
    finished = responses.finished.tolist()
    return [
        prompt_columns(row)
        | {"response": text, "length": lengths[i], "eos": finished[i]}
        | {name: float(values[i]) for name, values in columns.items()}
        for i, (row, text) in enumerate(zip(rows, texts, strict=True))
    ]


def prompt_columns(row: Row) -> dict[str, str]:
    """Return the columns of samples.jsonl for a prompt: its text, and as the data have it where the two differ."""
    return {"prompt": row.text} | ({RAW_PROMPT: row.raw_prompt} if row.raw_prompt != row.text else {})
