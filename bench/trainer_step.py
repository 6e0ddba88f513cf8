"""Time a step of other trainers with our ops and without: transformers' Trainer, and TRL's SFT, DPO and GRPO.

    python -m rlhf_fast.bench.trainer_step [--only trainer,layers,sft,dpo,grpo] [--save PATH.json] [--rounds N] [--tiny]
        [--unsloth PYTHON]

A step is the loss of one batch of 4 rows of 128 tokens and its gradients, by the trainer's own `compute_loss`, without
the optimizer. DPO's 4 rows are 4 pairs, and the padded rows have 1/4, 2/4, 3/4 and all of the length. The model is a
random Llama of 10 million parameters with a vocabulary of 50,257. `lazy_head` is under transformers' Trainer, with
padded rows `layers.fused` too, and `integrations.trl.fused()` under TRL's. Both sides take turns in one process, on 2
threads unless OMP_NUM_THREADS says otherwise. `head_bytes` is the peak of the head alone, from hidden states to their
gradient and the weight's, which is in it. --unsloth adds a row of Unsloth's SFT trainer (unsloth_step).
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from rlhf_fast import integrations
from rlhf_fast.bench import unsloth_step
from rlhf_fast.bench.ppo_phases import TOLERANCE, checked
from rlhf_fast.bench.timing import interleaved, median_ratios
from rlhf_fast.bench.whole import Run, parser_of
from rlhf_fast.demo.run import BASE_MODELS
from rlhf_fast.demo.world import FOODS, PEOPLE, PLACES
from rlhf_fast.errors import UserError

OURS, PLAIN = "ours", "as it is"
ROWS, LENGTH = 4, 128
SMALL = {"hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 4, "num_attention_heads": 4}
NONE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IGNORED = -100


class Step(NamedTuple):
    """A trainer's step: `loss` of its batch, `inside` which ours is, and the head alone with the rows it is given."""

    model: nn.Module
    loss: Callable[[], Tensor]
    inside: Callable[[], AbstractContextManager]
    head: Callable[[Tensor, nn.Linear], Tensor]
    labelled: int
    rows: int

    def take(self) -> Tensor:
        """Compute the gradients of one step; return its loss."""
        self.model.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def head_alone(self) -> None:
        """Compute the head's gradients for random hidden states."""
        layer = self.model.get_output_embeddings()
        hidden = torch.randn(self.rows, layer.weight.shape[1], requires_grad=True)
        self.head(hidden, layer).sum().backward()

    def gradient_norm(self) -> float:
        return float(torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm())


def random_llama(tiny: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    vocabulary = 1031 if tiny else 50_257
    config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, pad_token_id=1, **(NONE if tiny else SMALL))
    return LlamaForCausalLM(config).train()


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices([*PEOPLE, *FOODS, *PLACES], k=words))


def settings(kind: type, folder: str, **more: Any) -> Any:
    return kind(
        output_dir=folder, per_device_train_batch_size=ROWS, max_steps=1, report_to="none", use_cpu=True, bf16=False,
        save_strategy="no", disable_tqdm=True, **more,
    )  # fmt: skip


def trl_settings(kind: Any, folder: str, **more: Any) -> Any:
    """Return settings that keep all activations. TRL before 1.16 has transformers' name of the option."""
    name = "activation_checkpointing"
    if name not in kind.__dataclass_fields__:
        name = "gradient_checkpointing"
    return settings(kind, folder, **{name: False}, **more)


def trainer_step(tiny: bool, folder: str, padded: bool = False) -> Step:
    """Return the step of transformers' Trainer: a prompt of an eighth of the row has no label. padded: rows of several
    lengths, and our layers too."""
    model = random_llama(tiny)
    ids = torch.randint(2, model.config.vocab_size, (ROWS, LENGTH))
    lengths = LENGTH * torch.arange(1, ROWS + 1) // ROWS if padded else torch.tensor([LENGTH] * ROWS)
    columns = torch.arange(LENGTH)
    mask = columns < lengths[:, None]
    labels = ids.masked_fill((columns < LENGTH // 8) | ~mask, IGNORED)
    trainer = Trainer(model, settings(TrainingArguments, folder))
    batch = {"input_ids": ids, "labels": labels} | ({"attention_mask": mask.long()} if padded else {})
    count = (labels[:, 1:] != IGNORED).sum()

    def head(hidden: Tensor, layer: nn.Linear) -> Tensor:
        # The model's own loss shifts the labels and pads them at the end; here they are given as it makes them.
        shifted = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
        return nn.functional.cross_entropy(layer(hidden).float(), shifted, ignore_index=IGNORED, reduction="sum")

    return Step(
        model,
        lambda: trainer.compute_loss(model, dict(batch), num_items_in_batch=count),
        lambda: both(model) if padded else integrations.lazy_head(model),
        head,
        int(count),
        ROWS * LENGTH,
    )


@contextmanager
def both(model: nn.Module) -> Iterator[tuple]:
    with integrations.lazy_head(model) as head, integrations.layers.fused(model) as layers:
        yield head, layers


def trl_step(name: str, tiny: bool, folder: str, make: Callable[[bool], Any] = random_llama) -> Step:
    """Return the step of one of TRL's trainers on a batch of its own data loader; of GRPO, on random responses.

    make(tiny): the model.
    """
    import trl
    from datasets import Dataset

    model, rng = make(tiny), random.Random(0)
    words = AutoTokenizer.from_pretrained(BASE_MODELS / "small")
    made: dict[str, Any] = {"processing_class": words}
    if name == "sft":
        data = [{"prompt": sentence(rng, LENGTH // 8), "completion": f" {sentence(rng, LENGTH)}"} for _ in range(ROWS)]
        args = trl_settings(trl.SFTConfig, folder, max_length=LENGTH)
        trainer = trl.SFTTrainer(model, args, train_dataset=Dataset.from_list(data), **made)
    elif name == "dpo":
        pair = ("chosen", "rejected")
        data = [
            {"prompt": sentence(rng, LENGTH // 2)} | {kind: f" {sentence(rng, LENGTH // 2 - 1)}" for kind in pair}
            for _ in range(ROWS)
        ]
        args = trl_settings(trl.DPOConfig, folder, max_length=LENGTH)
        made |= {"ref_model": make(tiny)}
        trainer = trl.DPOTrainer(model, args=args, train_dataset=Dataset.from_list(data), **made)
    else:
        data = [{"prompt": sentence(rng, 8)} for _ in range(ROWS)]
        args = trl_settings(trl.GRPOConfig, folder, num_generations=ROWS, beta=0.0)
        made |= {"reward_funcs": lambda completions, **_: [0.0] * len(completions)}
        trainer = trl.GRPOTrainer(model, args=args, train_dataset=Dataset.from_list(data), **made)
    if name == "grpo":
        trainer.current_gradient_accumulation_steps = 1
        batch = responses(model.config.vocab_size)
        labelled = batch["completion_mask"].sum()
        rows = ROWS * (LENGTH - 1)
    else:
        batch = next(iter(trainer.get_train_dataloader()))
        mask = batch["labels"] != IGNORED if "labels" in batch else batch["completion_mask"].bool()
        labelled, rows = mask[:, 1:].sum(), mask[:, 1:].numel()
    more = {"num_items_in_batch": labelled} if name == "sft" else {}
    return Step(
        model,
        lambda: trainer.compute_loss(model, dict(batch), **more),
        integrations.trl.fused,
        trl_head(int(labelled), rows),
        int(labelled),
        rows,
    )


def responses(vocabulary: int) -> dict[str, Tensor]:
    """Return what GRPO's loss reads of a batch: prompts of three quarters of a row, and responses."""
    prompt, new = LENGTH - LENGTH // 4, LENGTH // 4
    logps = -torch.rand(ROWS, new) - 10
    return {
        "prompt_ids": torch.randint(vocabulary, (ROWS, prompt)),
        "prompt_mask": torch.ones(ROWS, prompt, dtype=torch.long),
        "completion_ids": torch.randint(vocabulary, (ROWS, new)),
        "completion_mask": torch.ones(ROWS, new, dtype=torch.long),
        "advantages": torch.randn(ROWS),
        "num_items_in_batch": torch.tensor(ROWS * new),
        "old_per_token_logps": logps,
    }


def trl_head(labelled: int, rows: int) -> Callable[[Tensor, nn.Linear], Tensor]:
    """Return the head as TRL's forward pass calls it: on a CPU, as it is, on every row."""

    def head(hidden: Tensor, layer: nn.Linear) -> Tensor:
        from trl.trainer import utils

        kept = hidden[:labelled] if utils._use_triton(hidden.device) else hidden
        targets = torch.randint(layer.weight.shape[0], (len(kept),))
        outputs = ("log_probs", "entropy")
        return utils._ChunkedLogProbFunction.apply(
            kept, layer.weight, layer.bias, targets, 1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
        )[0]

    return head


STEPS: dict[str, Callable[[bool, str], Step]] = {
    "trainer": trainer_step,
    "layers": lambda tiny, folder: trainer_step(tiny, folder, padded=True),
    **{name: lambda tiny, folder, name=name: trl_step(name, tiny, folder) for name in ("sft", "dpo", "grpo")},
}
TITLES = {
    "trainer": "transformers Trainer",
    "layers": "transformers Trainer of padded rows",
    "sft": "TRL SFTTrainer",
    "dpo": "TRL DPOTrainer",
    "grpo": "TRL GRPOTrainer",
}


def row_of(run: Run, name: str, step: Step) -> dict:
    """Return the row of a step: seconds of both sides by turns, losses and gradient norms compared, peaks."""
    losses, norms, peaks, heads = {}, {}, {}, {}

    def timed(side: str) -> float:
        with step.inside() if side == OURS else nullcontext():
            return run.seconds(step.take)

    answered = False
    for side in (PLAIN, OURS):
        with step.inside() if side == OURS else nullcontext() as handle:
            losses[side], norms[side] = float(step.take()), step.gradient_norm()
            if side == OURS:
                handles = handle if isinstance(handle, tuple) else (handle,)
                answered = all(each.status.answered for each in handles)
            for call, into in ((step.take, peaks), (step.head_alone, heads)):
                step.model.zero_grad(set_to_none=True)  # a gradient that is freed on the way would be subtracted
                into[side] = run.clock.peak_bytes(call)
    rounds = 1 if run.options.tiny else run.options.rounds
    times = interleaved({side: lambda side=side: timed(side) for side in (PLAIN, OURS)}, rounds=rounds)
    errors = {
        "loss": abs(losses[OURS] - losses[PLAIN]) / max(abs(losses[PLAIN]), 1e-3),
        "gradient norm": abs(norms[OURS] / norms[PLAIN] - 1),
        "steps without our ops": 0.0 if answered else 1.0,
    }
    share = step.labelled / step.rows
    return {
        "row": f"{TITLES[name]}, {share:.0%} of {step.rows} rows have a label", "labelled": share,
        "seconds": statistics.median(times[OURS]), "ratios": median_ratios(times, OURS), "rounds": times,
        "peak_bytes": peaks[OURS], "head_bytes": heads[OURS], "head_ratio": heads[PLAIN] / heads[OURS],
        "errors": errors, "checked": checked(errors, TOLERANCE[torch.float32] / 10),
        "others": {
            PLAIN: {
                "seconds": statistics.median(times[PLAIN]), "peak_bytes": peaks[PLAIN], "head_bytes": heads[PLAIN],
            }
        },
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser: argparse.ArgumentParser = parser_of(__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(STEPS), help=f"which of {', '.join(STEPS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="of both sides by turns (default: 9; with --tiny 1)")
    parser.add_argument(
        "--unsloth", metavar="PYTHON", help="the python of an environment with Unsloth: adds its row, `unsloth`"
    )
    options = parser.parse_args(arguments)
    if options.device != "cpu":
        parser.error("--device: the steps are measured on a CPU alone")
    if options.rounds < 1:
        parser.error(f"--rounds: {options.rounds} is not at least 1")
    names = options.only.split(",")
    if options.unsloth and "unsloth" not in names:
        names.append("unsloth")
    if unknown := [name for name in names if name not in (*STEPS, "unsloth")]:
        parser.error(f"--only: there is no {', '.join(unknown)}; there are: {', '.join(STEPS)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(2)
    if "unsloth" in names:
        if not options.unsloth:
            parser.error("--only unsloth: add --unsloth PYTHON, the python of an environment that has Unsloth")
        try:
            unsloth_step.check_python(options.unsloth)
        except UserError as error:
            parser.error(f"--unsloth: {error}")
    run = Run("trainer_step", options)

    def measured(name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            run.add(row_of(run, name, STEPS[name](options.tiny, folder)))
        row = run.rows[-1]
        other = row["others"][PLAIN]
        print(f"  head alone: {row['head_bytes'] / 2**20:.0f} MiB, {other['head_bytes'] / 2**20:.0f} MiB as it is")

    def unsloth_command(side: str, folder: Path) -> list[str]:
        return unsloth_step.command_of(options.unsloth, side, folder, options.tiny)

    for name in names:
        if name == "unsloth":
            run.measure(unsloth_step.TITLE, unsloth_step.measure, run, unsloth_command)
        else:
            run.measure(TITLES[name], measured, name)
    run.failed |= any("DIFFER" in row["checked"] for row in run.rows)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
