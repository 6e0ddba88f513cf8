"""Devices that are not there, and float16 where it cannot train: one sentence from every command, with a remedy."""

import io
import sys

import pytest
import torch
import toy

from rlhf_fast.cli.main import main
from rlhf_fast.errors import UserError
from rlhf_fast.stages.fit import check_device

NO_CUDA = "this build of torch has no CUDA; choose cpu or auto"
FAULTS = {
    "cuda": NO_CUDA,
    "cuda:3": NO_CUDA,
    "mps": "it is the GPU of a Mac, which torch does not see here; choose cpu or auto",
    "gpu": "there is no such device; did you mean cuda? choose auto, cpu, cuda,",
    "cdua": "there is no such device; did you mean cuda? choose auto, cpu, cuda,",
    "cuda:one": "there is no such device; choose auto, cpu, cuda,",
    "cpu:1": "there is one CPU; choose cpu or auto",
    "xpu": "choose cpu or auto",
}
pytestmark = pytest.mark.skipif(
    torch.backends.cuda.is_built() or torch.backends.mps.is_available() or torch.xpu.is_available(),
    reason="the devices are there",
)


def commands(folder):
    """Return the arguments of every command that has a device; {} stands for it."""
    model = toy.model_at(folder)
    demonstrations, rankings = toy.demonstrations(folder / "d.jsonl"), toy.rankings(folder / "r.jsonl")
    prompts = toy.prompt_file(folder / "p.jsonl")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"sft:\n  model:\n    path: {model}\n  data:\n    path: {demonstrations}\n  device: DEVICE\n", encoding="utf-8"
    )
    return {
        "sft": ["sft", "--model.path", model, "--data.path", demonstrations, "--device", "{}"],
        "reward": ["reward", "--model.path", model, "--data.path", rankings, "--device", "{}"],
        "ppo": ["ppo", "--policy.path", model, "--reward", "toy:share_of_a", "--data.path", prompts, "--device", "{}"],
        "run": ["run", str(recipe)],
        "generate": ["generate", "--model", model, "--prompts", prompts, "--device", "{}"],
        "eval": ["eval", "--models", f"base={model}", "--tasks", "lambada", "--device", "{}"],
        "chat": ["chat", model, "--device", "{}"],
    }


@pytest.mark.parametrize("command", ["sft", "reward", "ppo", "run", "generate", "eval", "chat"])
def test_every_command_says_why_a_device_cannot_be_used(folder, capsys, monkeypatch, command):
    argv = commands(folder)[command]
    for device, fault in FAULTS.items():
        recipe = folder / "recipe.yaml"
        before = recipe.read_text()
        recipe.write_text(before.replace("DEVICE", f"'{device}'"))
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        assert main([argument.format(device) for argument in argv]) == 2
        recipe.write_text(before)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        name = "sft" if command == "run" else command
        assert line.startswith(f"rlhf-fast: error: {name}: device {device} cannot be used: ") and fault in line
        assert len(line) < 260
    assert not (folder / "runs").exists()


def test_the_gpus_that_are_there_are_named(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    with pytest.raises(UserError, match="torch sees no GPU; choose cpu or auto, or look at the driver"):
        check_device("sft", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="torch sees only cuda:0, cuda:1; choose one of them, cpu or auto"):
        check_device("sft", "cuda:3")
    check_device("sft", "auto")
    check_device("sft", "cpu")


@pytest.mark.parametrize(
    ("command", "setting"),
    [("sft", "model.dtype"), ("reward", "model.dtype"), ("ppo", "policy.dtype"), ("ppo", "value.dtype")],
)
def test_float16_is_refused_where_it_trains_and_the_sentence_names_what_to_take(folder, capsys, command, setting):
    argv = [argument.format("cpu") for argument in commands(folder)[command]]
    sizes = ["--data.max-prompt-tokens", "16"] + (["--sampling.max-new-tokens", "8"] if command == "ppo" else [])
    assert main([*argv, *sizes, f"--{setting}", "float16"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(f"{command}: {setting} is float16, whose gradients underflow; set it to bfloat16 or float32")


def test_float16_serves_where_nothing_trains(folder, capsys, monkeypatch):
    both = commands(folder)
    flags = ["--dtype", "float16", "--max-new-tokens", "2"]
    assert main([argument.format("cpu") for argument in both["generate"]] + ["--limit", "1", *flags]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b .\n"))
    assert main([argument.format("cpu") for argument in both["chat"]] + flags) == 0
