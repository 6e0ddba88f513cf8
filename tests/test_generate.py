"""Lines of `rlhf-fast generate`: the row that each prompt came from, scores, and the files that are known as ours."""

import json

import pytest
import torch
import toy
from test_cli import error_of

from rlhf_fast.batches import Demonstrations
from rlhf_fast.cli.generate import RESPONSE
from rlhf_fast.cli.main import main
from rlhf_fast.config.fields import DataConfig, ModelConfig, SamplingConfig
from rlhf_fast.data import read_demonstrations
from rlhf_fast.data.rows import parse_row
from rlhf_fast.model.model import Model
from rlhf_fast.run.info import run_info

pytestmark = pytest.mark.usefixtures("one_thread", "folder")
OURS = ["rendered_prompt", *RESPONSE]


def generated(folder, rows, *argv, out="o.jsonl"):
    prompts = toy.jsonl(folder / "p.jsonl", rows)
    small = ["--max-new-tokens", "4", "--out", out]
    assert main(["generate", "--model", toy.model_at(folder), "--prompts", prompts, *small, *argv]) == 0
    return toy.rows(folder / out)


def test_a_line_has_the_row_of_its_prompt(folder):
    turns = [{"role": "user", "content": "a b ."}]
    rows = [
        {"id": "x1", "prompt": "a b .", "tags": ["t", {"u": 1}], "answer": None},
        {"messages": [*turns, {"role": "assistant", "content": "a"}], "id": 2},
    ]
    found = generated(folder, rows, "-n", "2", "--template", "dialog")
    assert [list(row) for row in found[::2]] == [
        ["prompt", "id", "tags", "answer", *OURS],
        ["prompt", "id", "messages", *OURS],
    ]
    for row, given in zip(found, [rows[0], rows[0], rows[1], rows[1]], strict=True):
        assert {name: row[name] for name in given} == given
        assert row["rendered_prompt"] == "Human: a b .\n\nAssistant:"
    assert found[2]["prompt"] == turns  # as messages, without the answer that is left out


def test_the_longest_response_is_that_of_the_training(folder, capsys):
    """The default of 128 failed on a model with 64 positions that PPO had just trained with 5."""
    model = toy.model_at(folder)
    prompts = toy.jsonl(folder / "p.jsonl", [{"prompt": "a b ."}])
    cfg = toy.ppo(folder, out="made", sampling=SamplingConfig(max_new_tokens=5))
    (folder / "model/run.json").write_text(json.dumps(run_info("ppo", cfg) | {"data": {}}))
    command = ["generate", "--model", model, "--prompts", prompts, "--out"]
    assert main([*command, "a.jsonl"]) == 0
    assert "generate: max_new_tokens is 5, with which" in capsys.readouterr().err
    assert all(row["tokens"] <= 5 for row in toy.rows(folder / "a.jsonl"))
    assert main([*command, "b.jsonl", "--max_new_tokens=7"]) == 0
    assert "with which" not in capsys.readouterr().err
    (folder / "model/run.json").write_text("{}")  # another program's
    toy.jsonl(folder / "p.jsonl", [{"prompt": "a b ."}, {"prompt": "a " * 40}])
    assert main([*command, "c.jsonl"]) == 0
    said = capsys.readouterr().err
    assert "max_new_tokens is 24, as the longest prompt takes 40 of the 64 positions" in said
    assert all(row["tokens"] <= 24 for row in toy.rows(folder / "c.jsonl"))
    assert "max_new_tokens is 128, but" in error_of(capsys, *command, "d.jsonl", "--max-new-tokens", "128")
    toy.jsonl(folder / "p.jsonl", [{"prompt": "a b ."}, {"prompt": "a " * 60}])
    assert "max_new_tokens is 128, but" in error_of(capsys, *command, "d.jsonl")  # 4 tokens for all are no answers


def test_a_column_under_another_name_is_the_prompt(folder):
    given = {"question": "a b .", "prompt": "no", "n": 1}
    (row,) = generated(folder, [given], "--columns", "prompt", "question", "--remove-columns", "prompt")
    assert list(row) == ["prompt", "question", "n", *OURS]
    assert row["prompt"] == row["question"] == "a b ."


def test_columns_with_our_names_are_kept_under_others(folder, capsys):
    given = {"prompt": "a b .", "completion": "the reference", "tokens": 7, "reward": 0.5}
    (row,) = generated(folder, [given])
    assert (row["input_completion"], row["input_tokens"], row["reward"]) == ("the reference", 7, 0.5)
    assert row["completion"] != "the reference" and list(row)[-7:] == OURS
    note = "columns that generate writes itself are kept as others: completion as input_completion, tokens as input_"
    assert note in capsys.readouterr().err
    (again,) = generated(folder, [given], "--remove-columns", "completion", "--force")
    assert "input_completion" not in again and again["input_tokens"] == 7
    toy.jsonl(folder / "p.jsonl", [row])
    argv = ["--model", toy.model_at(folder), "--prompts", "p.jsonl", "--out", "o2.jsonl", "--max-new-tokens", "3"]
    error = error_of(capsys, "generate", *argv)
    assert error.startswith("p.jsonl:1: has completion, tokens, which generate writes itself, and also the names")
    names = error.rpartition("--remove-columns ")[2].split()
    assert main(["generate", *argv, "--remove-columns", *names]) == 0  # the remedy that it names
    assert "completion" in toy.rows("o2.jsonl")[0]


def test_its_lines_are_demonstrations(folder):
    rows = generated(folder, [{"prompt": text, "id": i} for i, text in enumerate(toy.prompts(3))], "-n", "2")
    for row in rows:
        example = parse_row(row | {"completion": row["completion"] or "a"}, "demonstrations")
        assert (example.prompt, example.responses) == (row["prompt"], (row["completion"] or "a",))


def scalar_model(folder, name):
    model = Model.load(ModelConfig(toy.model_at(folder)), head="scalar", fresh_head=True, seed=3)
    with torch.no_grad():
        model.head_weight.normal_()
    model.save(folder / name)
    return name


def test_scores_are_those_of_the_model_on_the_line(folder, capsys):
    reward, value = scalar_model(folder, "rm"), scalar_model(folder, "v")
    rows = generated(folder, [{"prompt": text} for text in toy.prompts(5)], "--reward", reward, "--value", value)
    assert [list(row)[-2:] for row in rows] == [["reward", "value"]] * 5
    whole = [row for row in rows if row["completion"] and row["tokens"] == len(row["completion"].split())]
    toy.jsonl(folder / "d.jsonl", whole)  # those whose text has all their tokens, none of which is special
    model = Model.load(ModelConfig(reward), head="scalar")
    data = read_demonstrations(DataConfig("d.jsonl", append_eos=False), model.tokenizer).train
    (batch,) = data.in_order(10)
    assert isinstance(batch, Demonstrations)
    expected = model.last_scores(batch.tokens, batch.lengths)
    found = [row["reward"] for row in toy.rows("d.jsonl")]
    assert (
        len(found) >= 2 and len(set(found)) == len(found) and torch.allclose(expected, torch.tensor(found), atol=1e-5)
    )

    rows = generated(folder, [{"prompt": "a ."}], "--reward", "toy:share_of_a", "--overwrite")
    words = rows[0]["completion"].split()
    assert rows[0]["reward"] == pytest.approx(words.count("a") / max(len(words), 1))
    argv = ["generate", "--model", toy.model_at(folder), "--prompts", "p.jsonl", "--out", "n.jsonl"]
    assert "reward: model is no reward model, but a language model" in error_of(capsys, *argv, "--reward", "model")
    assert "reward toy:no: cannot be imported" in error_of(capsys, *argv, "--reward", "toy:no")
    assert "give the folder of a value model" in error_of(capsys, *argv, "--value", "toy:share_of_a")
    assert not (folder / "n.jsonl").exists()


def length_or_none(completions):
    return [None if i == 0 else len(text) for i, text in enumerate(completions)]


def test_several_rewards_each_have_a_column(folder, capsys):
    """The column reward is their sum with the weights, in which a reward without a number counts as 0."""
    rm = scalar_model(folder, "rm")
    rewards = ["--reward", rm, "toy:share_of_a", f"{__name__}:length_or_none"]
    prompts = [{"prompt": text, "rewards/rm": "mine"} for text in toy.prompts(3)]
    rows = generated(folder, prompts, *rewards, "--reward-weights", "2", "-1", "0.5")
    names = ["rewards/rm", "rewards/share_of_a", "rewards/length_or_none"]
    assert [list(row)[-4:] for row in rows] == [["reward", *names]] * 3
    for i, row in enumerate(rows):
        model, share, length = (row[name] for name in names)
        words = row["completion"].split()
        assert share == pytest.approx(words.count("a") / max(len(words), 1))
        assert length == (None if i == 0 else len(row["completion"])) and row["input_rewards/rm"] == "mine"
        assert row["reward"] == pytest.approx(2 * model - share + 0.5 * (length or 0))
    alone = generated(folder, prompts, "--reward", rm, "--force")  # the first of both are known as its own files
    assert [row["reward"] for row in alone] == [row["rewards/rm"] for row in rows]
    assert "rewards/share_of_a" not in alone[0]
    assert len(generated(folder, prompts, *rewards, "--force")) == 3
    argv = ["generate", "--model", toy.model_at(folder), "--prompts", "p.jsonl", "--out", "n.jsonl"]
    for more, sentence in [
        (["--reward-weights", "1"], "--reward-weights must have one number for each reward (none is set), got 1.0"),
        ([*rewards, "--reward-weights", "1"], "one number for each reward (rm, share_of_a, length_or_none), got 1.0"),
        (["--reward", rm, "toy:share_of_a", rm], "generate: --reward names rm twice; give it once"),
        (["--reward", rm, ""], "generate: --reward must be a reward model's folder, module:function"),
        (["--reward", rm, "toy:no"], "generate: reward toy:no: cannot be imported"),
    ]:
        assert sentence in error_of(capsys, *argv, *more)


def test_prompts_of_several_files(folder, capsys):
    for name in ("a", "b"):
        toy.jsonl(folder / f"{name}.jsonl", [{"prompt": text, "id": name} for text in toy.prompts(2)])
    argv = ["generate", "--model", toy.model_at(folder), "--max-new-tokens", "3", "--out"]
    assert main([*argv, "o.jsonl", "--prompts", "b.jsonl", "a.jsonl"]) == 0
    assert [row["id"] for row in toy.rows("o.jsonl")] == ["b", "b", "a", "a"]
    assert main([*argv, "p.jsonl", "--prompts", "[ab].jsonl"]) == 0
    assert [row["id"] for row in toy.rows("p.jsonl")] == ["a", "a", "b", "b"]
    for files in (["a.jsonl", "o.jsonl"], ["?.jsonl"]):
        error = error_of(capsys, *argv, "o.jsonl", "--force", "--prompts", *files)
        assert error.startswith("o.jsonl: is the file that --prompts names")
    for nothing in ([], [""]):
        assert error_of(capsys, *argv, "n.jsonl", "--prompts", *nothing) == "generate: --prompts needs a value"
    assert error_of(capsys, *argv, "n.jsonl", "--prompts", "a.jsonl", "--reward") == "generate: --reward needs a value"
    assert error_of(capsys, *argv, "n.jsonl", "--prompts", "a.jsonl", "c.jsonl").startswith("c.jsonl: there is no such")


def test_its_own_files_are_known_with_any_columns(folder, capsys):
    rows = [{"prompt": "a b .", "id": 1, "reward": 2}]
    first = generated(folder, rows)
    argv = ["generate", "--model", toy.model_at(folder), "--prompts", "p.jsonl", "--out", "o.jsonl"]
    assert "holds responses already; choose another --out, remove it, or replace it with --overwrite" in error_of(
        capsys, *argv
    )
    assert generated(folder, rows, "--force") == first
    generated(folder, rows, "--force", "--reward", "toy:share_of_a")
    generated(folder, rows, "--overwrite")
    for changed in (
        {**first[0], "my_label": "good"},  # a column of the user's behind ours
        {name: first[0][name] for name in sorted(first[0])},
        rows[0],
        {name: first[0][name] for name in first[0] if name != "logprob"},
    ):
        text = json.dumps(first[0]) + "\n" + json.dumps(changed) + "\n"
        (folder / "o.jsonl").write_text(text)
        assert "exists already and no such command wrote it" in error_of(capsys, *argv, "--force")
        assert (folder / "o.jsonl").read_text() == text
