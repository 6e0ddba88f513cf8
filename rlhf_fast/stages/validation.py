"""What a stage measures on held-out rows, and when."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_fast.batches import Prompts, Responses
from rlhf_fast.data import Dataset
from rlhf_fast.model.model import Model
from rlhf_fast.training.learner import Loss, evaluate


def due(step: int, every: int, batch: int, rows: int, total: int) -> bool:
    """Whether to validate after `step` batches: every so many, or (0) once an epoch of `rows`; always at the end."""
    epochs = step * batch // rows - (step - 1) * batch // rows
    return step == total or (step % every == 0 if every else epochs > 0)


def averages(model: Model, data: Dataset, loss: Loss, tokens: int) -> dict[str, float]:
    """The stats of `loss` over every row of `data`, `tokens` at a time, named valid/..."""
    stats = evaluate(model, loss, list(data.in_order(256)), tokens)
    return {f"valid/{name.partition('/')[2]}": value for name, value in stats.items()}


def prompts_of(data: Dataset, context: int = 0, answer: int = 0) -> Prompts:
    """The prompts in the file's order, but for those that leave no room for `answer` tokens in the model's `context`
    (0: any length); uids are row numbers."""
    rows = [i for i, row in enumerate(data.rows) if not context or len(row.prompt) + answer <= context]
    return Prompts(rows, [data.rows[i].prompt for i in rows], [data.rows[i].text for i in rows])


def told(responses: Responses, prompts: Sequence[str], tokenizer, **columns: Sequence) -> list[dict]:
    """One row for samples.jsonl of each response: its prompt, text, length and end, and further columns."""
    texts = tokenizer.batch_decode(responses.response_ids(), skip_special_tokens=True)
    lengths = (responses.lengths - responses.prompt_lengths).tolist()
    rows = zip(prompts, texts, lengths, responses.finished.tolist(), strict=True)
    return [
        {"prompt": prompt, "response": text, "length": length, "eos": eos}
        | {name: float(values[i]) for name, values in columns.items()}
        for i, (prompt, text, length, eos) in enumerate(rows)
    ]
