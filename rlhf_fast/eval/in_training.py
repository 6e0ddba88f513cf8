"""The tasks of `rlhf-fast eval` on a model in training, every log.eval_every steps."""

from __future__ import annotations

from rlhf_fast.config.fields import LogConfig, SamplingConfig
from rlhf_fast.data.encode import PromptFormat
from rlhf_fast.eval.encoding import PLAIN, Encoder
from rlhf_fast.eval.files import Row
from rlhf_fast.eval.judged import default_judge, measures_of, roles_of
from rlhf_fast.eval.judges import Judge, load_answer_judge
from rlhf_fast.eval.likelihood import LikelihoodTask
from rlhf_fast.eval.measures import Measure
from rlhf_fast.eval.run_task import Task, answer_rows, is_dialog, score_rows
from rlhf_fast.eval.task_rows import TaskRows, select_rows
from rlhf_fast.model.model import Model

NO_BASELINE = "it compares models, and here is only one"


class TrainingEvaluation:
    """Evaluates a model as it is in memory, by the built-in judges.

    prompt_format: that in which answers are asked for. notes: what was left out.
    """

    def __init__(self, cfg: LogConfig, model: Model, prompt_format: PromptFormat):
        self.cfg, self.model = cfg, model
        self.notes: list[str] = []
        self._tasks: list[TaskRows] = []
        self._encoders: dict[str, Encoder] = {}
        self._judges: dict[str, Judge] = {}
        if not cfg.eval_every:
            return
        self._tasks, notes, _ = select_rows(cfg.eval_tasks, cfg.eval_data, cfg.eval_limit, {}, NO_BASELINE)
        self.notes = [f"log.eval_every: {note}" for note in notes]
        for task, _ in self._tasks:
            own = prompt_format if is_dialog(task) else PLAIN
            self._encoders[task.name] = Encoder(model.tokenizer, model.max_positions, own)
        roles = roles_of([task for task, _ in self._tasks])
        self._judges = {role: load_answer_judge(default_judge(cfg.eval_data, role), role) for role in roles}

    def is_due(self, step: int, last: int) -> bool:
        """Return whether the model is evaluated after step 1, 2, ..., `last`."""
        return bool(self.cfg.eval_every) and (step == last or step % self.cfg.eval_every == 0)

    def __call__(self) -> dict[str, float]:
        """Return the value of each measure, by the name of its metric."""
        found = {}
        for task, rows in self._tasks:
            for measure in self._measures(task, rows):
                found[f"eval/{task.name}.{measure.name}"] = measure.estimate().value
        return found

    def _measures(self, task: Task, rows: list[Row]) -> list[Measure]:
        encoder = self._encoders[task.name]
        if isinstance(task, LikelihoodTask):
            records = score_rows(self.model, task, rows, encoder)
        else:
            greedy = SamplingConfig(temperature=0.0, max_new_tokens=task.max_new_tokens)
            records = answer_rows(self.model, task, rows, encoder, greedy)
        return measures_of(task, rows, records, self._judges)
