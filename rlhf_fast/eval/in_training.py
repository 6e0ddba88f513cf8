"""The tasks of `rlhf-fast eval` on a model in training, every log.eval_every steps."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_fast.config.fields import LogConfig, SamplingConfig
from rlhf_fast.data.datasets import prompt_as_text
from rlhf_fast.data.encode import PromptFormat
from rlhf_fast.eval.encoding import PLAIN, Encoder
from rlhf_fast.eval.generation import GenerationTask
from rlhf_fast.eval.judges import Judge, load_judge
from rlhf_fast.eval.likelihood import LikelihoodTask
from rlhf_fast.eval.measures import Measure
from rlhf_fast.eval.run_task import answer_rows, read_scores, score_rows
from rlhf_fast.eval.task_rows import TaskRows, select_rows
from rlhf_fast.model.model import Model

NO_BASELINE = "it compares models, and here is only one"


class TrainingEvaluation:
    """Evaluates a model as it is in memory, by the built-in judges.

    prompt_format: that in which answers are asked for. notes: what was left out.
    """

    def __init__(self, cfg: LogConfig, model: Model, prompt_format: PromptFormat):
        self.cfg, self.model, self.prompt_format = cfg, model, prompt_format
        self.notes: list[str] = []
        self._tasks: list[TaskRows] = []
        self._judges: dict[str, Judge] = {}
        if not cfg.eval_every:
            return
        self._tasks, notes, _ = select_rows(cfg.eval_tasks, cfg.eval_data, cfg.eval_limit, {}, NO_BASELINE)
        self.notes = [f"log.eval_every: {note}" for note in notes]
        roles = [role for task, _ in self._tasks if isinstance(task, GenerationTask) for role in task.judges]
        self._judges = {role: load_judge("", role) for role in dict.fromkeys(roles)}

    def is_due(self, step: int, last: int) -> bool:
        """Return whether the model is evaluated after step 1, 2, ..., `last`."""
        return bool(self.cfg.eval_every) and (step == last or step % self.cfg.eval_every == 0)

    def __call__(self) -> dict[str, float]:
        """Return the value of each measure, by the name of its metric."""
        found = {}
        for task, rows in self._tasks:
            for measure in self._measures(TaskRows(task, rows)):
                found[f"eval/{task.name}.{measure.name}"] = measure.estimate().value
        return found

    def _measures(self, found: TaskRows) -> list[Measure]:
        task, rows = found
        tokenizer, positions = self.model.tokenizer, self.model.max_positions
        if isinstance(task, LikelihoodTask):
            records = score_rows(self.model, task, rows, Encoder(tokenizer, positions, PLAIN))
            return task.measures(rows, [read_scores(record) for record in records])
        encoder = Encoder(tokenizer, positions, self.prompt_format)
        greedy = SamplingConfig(temperature=0.0, max_new_tokens=task.max_new_tokens)
        answers = [record["answer"] for record in answer_rows(self.model, task, rows, encoder, greedy)]
        return judged_measures(task, found.rows, answers, self._judges)


def judged_measures(
    task: GenerationTask, rows: list[dict], answers: list[str], judges: Mapping[str, Judge]
) -> list[Measure]:
    """Return the measures of a task for one model's answers."""
    prompts = [prompt_as_text(task.question(row)) for row in rows]
    verdicts = {role: judges[role](prompts, answers, rows) for role in task.judges if role in judges}
    return task.measures(rows, answers, verdicts, judges)
