"""The examples do what their first lines say."""

import ast
import re
import shutil
import sys
from pathlib import Path

import pytest
import toy

from rlhf_fast.cli.main import main
from rlhf_fast.demo.materials import Plan, draw_materials, write_rows
from rlhf_fast.demo.run import BASE_MODELS
from rlhf_fast.stages.recipe import read_recipe

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="not a source checkout")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_the_plain_loop_learns(one_thread):
    import ppo_loop

    scores = ppo_loop.main(steps=12)
    assert scores[0] < 0.6 and scores[-1] > scores[0] + 0.1


def test_a_reward_function_of_ones_own_is_learned(folder, one_thread):
    import custom_reward

    custom_reward.main("runs/polite", batches=6)
    scores = [row["objective/scores"] for row in toy.rows(folder / "runs" / "polite" / "metrics.jsonl")]
    assert len(scores) == 6 and scores[-1] > scores[0]
    assert (folder / "runs" / "polite" / "model.safetensors").is_file()


def test_trls_trainer_learns_with_the_fused_head(folder, one_thread, capsys):
    pytest.importorskip("trl", minversion="1.15", reason="trl 1.15 or later is not installed")
    import trl_dpo

    response = trl_dpo.main()
    assert response.startswith("dear udo , thank you for the ")
    shown = capsys.readouterr().out
    assert "before: " in shown and response in shown
    assert "trl: answered by rlhf_fast: ChunkedLogProbFunction 80" in shown and "its own" not in shown
    assert (folder / "runs" / "trl-dpo" / "model.safetensors").is_file()


def test_transformers_trainer_learns_with_lazy_logits(folder, one_thread, capsys):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    import hf_trainer

    response = hf_trainer.main()
    assert response.startswith("dear udo , thank you for the ")
    shown = capsys.readouterr().out
    assert "before: " in shown and response in shown
    assert re.search(r"LlamaForCausalLM: answered by rlhf_fast: linear_cross_entropy 40; lazy now", shown), shown
    assert (folder / "runs" / "hf-trainer" / "model.safetensors").is_file()


def test_a_quantised_model_becomes_an_ordinary_folder(tmp_path, monkeypatch):
    """The GGUF reader is transformers'; here it gives a tiny model that is marked as quantised."""
    import convert_smollm2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    toy.model(tmp_path / "source")
    load, words = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained
    asked = []

    def quantised(source, gguf_file, dtype):
        asked.append(gguf_file)
        model = load(source, dtype=dtype)
        model.config.quantization_config = {"quant_method": "gguf"}
        return model

    monkeypatch.setattr(convert_smollm2.AutoModelForCausalLM, "from_pretrained", quantised)
    monkeypatch.setattr(convert_smollm2.AutoTokenizer, "from_pretrained", lambda source, gguf_file: words(source))
    convert_smollm2.convert(str(tmp_path / "source"), str(tmp_path / "target"))
    monkeypatch.undo()
    assert asked == [convert_smollm2.FILE]
    assert not hasattr(load(tmp_path / "target").config, "quantization_config")
    assert toy.same_weights(tmp_path / "source", tmp_path / "target")


def test_the_recipe_is_whole(folder):
    """Every setting of examples/smollm2.yaml exists, and each stage starts from the one before."""
    for name in ("demonstrations", "rankings", "prompts"):
        Path(f"{name}.jsonl").write_text("{}\n", encoding="utf-8")
    plan = read_recipe(EXAMPLES / "smollm2.yaml")
    assert list(plan.stages) == ["sft", "reward", "ppo"]
    assert plan.stages["reward"].model.path == plan.stages["sft"].out == plan.stages["ppo"].policy.path
    assert plan.stages["ppo"].reward == plan.stages["reward"].out


def test_the_demos_recipe_runs(folder, one_thread, capsys):
    """On rows and a model of the demo, in the places that the demo writes."""
    data = Path("runs/demo/data")
    plan = Plan(demonstrations=16, prompts=12)
    materials = draw_materials(plan, seed=0)
    shutil.copytree(BASE_MODELS / "small", "runs/demo/sft")
    write_rows(
        data / "demonstrations.jsonl", [{"prompt": t.prompt, "completion": "yes ."} for t in materials.demonstrations]
    )
    write_rows(data / "prompts.jsonl", [{"prompt": t.prompt} for t in materials.prompts])
    rows = [{"prompt": t.prompt, "responses": ["yes .", "no ."], "ranks": [1, 2]} for t in materials.demonstrations]
    write_rows(data / "rankings_train.jsonl", rows)
    small = "--sft.epochs 1 --reward.epochs 1 --ppo.episodes 16 --ppo.batch 8 --ppo.minibatch 8"
    assert main(["run", str(EXAMPLES / "demo.yaml"), *small.split()]) == 0, capsys.readouterr().err
    assert len(toy.rows(Path("runs/demo-recipe/ppo/metrics.jsonl"))) == 2
    assert Path("runs/demo-recipe/ppo/model.safetensors").is_file()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_each_says_how_it_is_run(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert f"python examples/{path.name}" in text
    assert path.stem not in sys.stdlib_module_names
