"""Supervised fine-tuning by transformers' own Trainer, with logits that are made only where somebody reads them.

The demo's small model, which comes with the package, learns to write letters; only the letter's tokens have a loss. One
`with` line lets the ops of rlhf_fast answer the cross-entropy, so that the logits of a batch never exist. The script
prints a response before and after, and how often the op answered.

    pip install accelerate
    python examples/hf_trainer.py
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from rlhf_fast.demo.run import BASE_MODELS
from rlhf_fast.integrations import lazy_head, status

NAMES = ("adam", "bella", "emil", "fay", "gus", "hana", "ivan", "jane")
THINGS = ("map", "drum", "book", "lamp")
LETTER = "dear {name} , thank you for the {thing} . i hope you are well . your friend , {other} ."
IGNORED = -100  # a label without a loss


def demonstrations(tokenizer) -> list[dict[str, list[int]]]:
    """Return prompts with letters as tokens; the prompt's have no label."""
    rows = []
    for i, name in enumerate(NAMES):
        for thing in THINGS:
            prompt = tokenizer(f"write to {name} about the {thing} .").input_ids
            letter = tokenizer(LETTER.format(name=name, thing=thing, other=NAMES[i - 1])).input_ids
            letter.append(tokenizer.eos_token_id)
            rows.append({"input_ids": prompt + letter, "labels": [IGNORED] * len(prompt) + letter})
    return rows


@torch.no_grad()
def respond(model, tokenizer, prompt: str) -> str:
    """Return the model's greedy response."""
    tokens = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=24, do_sample=False)
    return tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)


def main(folder: str = str(BASE_MODELS / "small"), out: str = "runs/hf-trainer", steps: int = 40) -> str:
    """Train for `steps` batches of 8 letters and save the model in `out`; return its response to a new prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=out,
            per_device_train_batch_size=8,
            max_steps=steps,
            learning_rate=5e-4,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=demonstrations(tokenizer),
    )
    prompt = "write to udo about the kite ."
    before = respond(model, tokenizer, prompt)
    with lazy_head(model):
        trainer.train()
        print(status(model))
    after = respond(model, tokenizer, prompt)
    print(f"before: {prompt} -> {before}\nafter:  {prompt} -> {after}")
    trainer.save_model(out)
    return after


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
