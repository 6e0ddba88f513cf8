"""Direct preference optimization by TRL's own trainer, with the head's work done by rlhf-fast: one `with` line more.

The demo's small model, which comes with the package, learns to write thank-you letters rather than advertisements. The
script prints a response before and after, and how often the op answered in place of TRL's own function.

    pip install trl
    python examples/trl_dpo.py
"""

import argparse

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from rlhf_fast.demo.run import BASE_MODELS
from rlhf_fast.integrations.trl import fused

NAMES = ("adam", "bella", "emil", "fay", "gus", "hana", "ivan", "jane")
THINGS = ("map", "drum", "book", "lamp")
CHOSEN = " dear {name} , thank you for the {thing} . i hope you are well . your friend , {other} ."
REJECTED = " buy this red {thing} . it is good and cheap ."


def preferences() -> Dataset:
    """Return pairs of responses: a letter is preferred to an advertisement."""
    rows = []
    for i, name in enumerate(NAMES):
        for thing in THINGS:
            words = {"name": name, "thing": thing, "other": NAMES[i - 1]}
            prompt = f"write to {name} about the {thing} ."
            rows.append({"prompt": prompt, "chosen": CHOSEN.format(**words), "rejected": REJECTED.format(**words)})
    return Dataset.from_list(rows)


@torch.no_grad()
def respond(model, tokenizer, prompt: str) -> str:
    """Return the model's greedy response."""
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=24, do_sample=False)
    return tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)


def main(model: str = str(BASE_MODELS / "small"), out: str = "runs/trl-dpo", steps: int = 40) -> str:
    """Train for `steps` batches of 8 pairs and save the model in `out`; return its response to a new prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer = DPOTrainer(
        policy,
        args=DPOConfig(
            output_dir=out,
            per_device_train_batch_size=8,
            max_steps=steps,
            learning_rate=5e-4,
            loss_type=["sigmoid", "sft"],  # the second keeps the chosen responses likely
            loss_weights=[1.0, 1.0],
            bf16=False,
            activation_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=preferences(),
        processing_class=tokenizer,
    )
    prompt = "write to udo about the kite ."
    before = respond(policy, tokenizer, prompt)
    with fused() as handle:
        trainer.train()
    after = respond(policy, tokenizer, prompt)
    print(f"before: {prompt} -> {before}\nafter:  {prompt} -> {after}\n{handle.status}")
    trainer.save_model(out)
    return after


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
