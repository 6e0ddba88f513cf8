"""The bench of the PPO step takes real lengths, tells a difference from plain torch, and measures processes' memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import toy

from rlhf_fast import ops
from rlhf_fast.bench import decode_step, plain_learner, plain_torch, ppo_data, ppo_phases, ppo_step, process_memory
from rlhf_fast.bench.shapes import TINY, random_model
from rlhf_fast.bench.whole import Run, parser_of
from rlhf_fast.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
COMPILED = pytest.mark.skipif(ops.linear_ppo_loss.chosen("cpu") == "reference", reason="no compiled kernels")
TINY_RUN = ("--device", "cpu", "--tiny", "--dtype", "float32")


@pytest.fixture
def files(folder) -> list[str]:
    """Return the options of a real case for files of toy texts."""
    toy.tokenizer().save_pretrained(folder / "tokenizer")
    prompts, rankings = toy.prompt_file(folder / "prompts.jsonl"), toy.rankings(folder / "rankings.jsonl")
    return ["--prompts", prompts, "--rankings", rankings, "--tokenizer", "tokenizer"]


@COMPILED
@pytest.mark.parametrize("case", ["135M-ragged", "135M-real"])
def test_ragged_rows_and_reward_training_agree_with_plain_torch(folder, files, monkeypatch, case):
    monkeypatch.setattr(ppo_step.Bench, "profile", lambda bench: None)
    monkeypatch.setattr(ppo_step.Bench, "memory", lambda bench, row, phase: row.update(asked=phase))
    path = folder / "ppo_step.json"
    assert ppo_step.main([*TINY_RUN, "--case", case, "--reward", "--memory", *files, "--save", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    names = [row["row"].partition(",")[0] for row in rows]
    assert names == ["PPO rollout", "PPO experience", "PPO update", "PPO step total", "reward step"]
    for row in (rows[1], rows[2], rows[4]):
        assert row["checked"].startswith("agree") and max(row["errors"].values()) < 1e-4
        assert ("real lengths" in row["row"]) == (case == "135M-real")
    assert [row.get("asked") for row in rows[:4]] == [None, None, "update", None]


@COMPILED
def test_on_a_gpu_transformers_comes_last_and_then_the_total(tmp_path):
    options = parser_of("").parse_args(["--device", "cpu", "--tiny"])
    options.memory = options.exact = False
    bench = ppo_step.Bench(Run("ppo_step", options), ppo_data.TINY_SIZES, torch.float32)
    bench.on_gpu = True  # the order of a GPU, on this machine
    rollout = bench.rollout_row()
    bench.run.add(rollout)
    assert "others" not in rollout and rollout["seconds"] > 0
    rows = [bench.experience_row(), bench.update_row()]
    assert all(len(taken) == 1 for row in rows for taken in row["rounds"].values())
    bench.baseline_rollout()
    assert rollout["others"].keys() == {"transformers generate"}
    assert bench.total_row()["seconds"] == sum(row["seconds"] for row in [rollout, *rows])


def test_ragged_lengths_are_those_of_people():
    sizes = ppo_data.ragged_lengths(500, 100, seed=0)
    assert sizes.min() >= 1 and sizes.max() == 100 and 15 < sizes.median() < 25


@COMPILED
@pytest.mark.slow
def test_an_exact_step_has_no_gap(tmp_path):
    path = tmp_path / "ppo_step.json"
    assert ppo_step.main([*TINY_RUN[:3], "--dtype", "bfloat16", "--exact", "--save", str(path)]) == 0
    (update,) = [row for row in json.loads(path.read_text())["rows"] if row["row"].startswith("PPO update")]
    assert ", exact" in update["row"] and update["stats"]["ours"]["rollout/gap_max"] == 0


@COMPILED
def test_a_ppo_step_that_differs_from_plain_torch_is_told(tmp_path, monkeypatch):
    right = plain_torch.policy_loss
    monkeypatch.setattr(ppo_step.Bench, "profile", lambda bench: None)
    monkeypatch.setattr(plain_learner, "policy_loss", lambda *a: (2 * right(*a)[0], right(*a)[1]))
    path = tmp_path / "ppo_step.json"
    assert ppo_step.main([*TINY_RUN, "--save", str(path)]) == 1
    assert json.loads(path.read_text())["rows"][2]["checked"].startswith("DIFFER: grad_norm")


def test_a_real_case_without_its_files_or_with_a_large_tokenizer_is_one_sentence(files, capsys):
    with pytest.raises(SystemExit):
        ppo_step.main([*TINY_RUN, "--case", "135M-real", *files[:2]])
    assert "needs --prompts FILE.jsonl and --tokenizer FOLDER" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ppo_step.main([*TINY_RUN, "--case", "135M-reel"])
    assert "there is no case 135M-reel; there are: 135M, " in capsys.readouterr().err
    records = ppo_data.Records(files[1], "", files[5])
    with pytest.raises(UserError, match=r"a token \d+, the shape only 3"):
        records.prompts(ppo_data.Sizes({"vocab_size": 3}))


def test_a_real_case_has_the_files_lengths(files):
    """They are cut to the case's, and in the order of training; without rankings the lengths are log-normal."""
    records = ppo_data.Records(*files[1::2])
    sizes = ppo_data.Sizes(TINY, prompt=3, new=4, batch=6, minibatch=5, ragged=True, real=True)
    order = [records.prompt_rows.row_at(i) for i in range(6)]
    found = ppo_data.make_prompts(sizes, records).tokens
    assert found == [records.prompt_rows[i].prompt[:3] for i in order] and sorted(order) != order
    rows = [records.ranked_rows[records.ranked_rows.row_at(i)] for i in range(6)]
    best = [
        {len(x) for x, rank in zip(row.responses, row.ranks, strict=True) if rank == min(row.ranks)} for row in rows
    ]
    assert all(n in one for n, one in zip(ppo_data.response_lengths(sizes, records).tolist(), best, strict=True))
    batch = ppo_data.make_comparisons(sizes, records)
    assert batch.group_offsets.diff().tolist() == [len(row.responses) for row in rows[:5]]
    assert batch.prompt_lengths.max() == 3 and (batch.lengths - batch.prompt_lengths).max() == 4
    alone = ppo_data.Records(files[1], "", files[5])
    assert ppo_data.response_lengths(sizes, alone).equal(ppo_data.ragged_lengths(6, 4, seed=1))


def test_responses_are_cut_to_lengths_that_may_all_be_short():
    phases = ppo_phases.Phases(ppo_data.TINY_SIZES, torch.float32, "cpu")
    full = phases.responses
    found = ppo_data.cut(full, torch.tensor([1, 2, 3, 2]))
    assert (found.lengths - found.prompt_lengths).tolist() == [1, 2, 3, 2] and found.mask.sum() == 8
    for name in ("mask", "logprobs", "raw_logprobs", "kept_logprobs", "entropy"):
        assert getattr(found, name).shape == (4, 3)
    assert found.logprobs[found.mask].equal(full.logprobs[:, :3][found.mask]) and not found.logprobs[~found.mask].any()
    assert found.tokens.equal(full.tokens[:, : 5 + 3])


def test_transformers_generate_takes_prompts_of_unequal_lengths():
    """A short prompt has the first token that it has alone: padding on its left is masked."""
    model = random_model(TINY, "cpu", torch.float32)
    rows = [[5, 9, 2, 40], [7], [11, 3]]
    tokens, mask = decode_step.left_padded(rows)
    assert tokens.tolist() == [[5, 9, 2, 40], [0, 0, 0, 7], [0, 0, 11, 3]]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]]
    given, found = [], model.module.generate
    model.module.generate = lambda ids, **settings: given.append((ids, settings)) or found(ids, **settings)
    prompts = decode_step.prompts(TINY, 3, 4)._replace(tokens=rows)
    decode_step.transformers_generate(model, prompts, 3)
    ((ids, settings),) = given
    assert ids.equal(tokens) and settings["attention_mask"].equal(mask)
    settings |= {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    together = found(ids, **settings)[:, 4:]
    for row, answer in zip(rows, together, strict=True):
        alone = found(torch.tensor([row]), **settings | {"attention_mask": torch.ones(1, len(row)).long()})
        assert alone[0, len(row) :].equal(answer)


@COMPILED
def test_each_side_takes_its_steps_in_a_process(monkeypatch):
    """The steps run here; that they run in an interpreter of their own is a slow test."""
    monkeypatch.setattr(process_memory, "reset_peak_memory", lambda: None)
    phases = ppo_phases.Phases(ppo_data.TINY_SIZES, torch.float32, "cpu")
    taken = []
    for name in ("update_step", "reward_step"):
        right = getattr(ppo_phases, name)

        def counted(side, *rest, right=right, name=name):
            step = right(side, *rest)
            return lambda: taken.append((name, side, step()))

        monkeypatch.setattr(process_memory, name, counted)
    for side in (ppo_phases.OURS, ppo_phases.PLAIN):
        for batch in (phases.experience, phases.comparisons):
            request = process_memory.Request(side, phases.sizes, phases.dtype, batch, torch.get_num_threads())
            found = process_memory.measure(request)
            assert found["peak_bytes"] >= found["imported_bytes"] > 1 << 26
    assert [step[:2] for step in taken] == [
        (name, side) for side in ("ours", "plain torch") for name in ("update_step", "reward_step") for _ in range(2)
    ]
    for ours, plain in zip(taken[:4], taken[4:], strict=True):
        assert ours[2]["grad_norm"] == pytest.approx(plain[2]["grad_norm"], rel=1e-3)


@COMPILED
@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "bench" / "conftest.py").is_file(), reason="not a source checkout")
def test_pytest_bench_measures_the_update(tmp_path, files):
    """Every phase, the total and both processes have a row; a case without its files is skipped."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RLHF_FAST_SIMT", "PYTEST_ADDOPTS")}
    options = [x if x.startswith("--") else str(Path(x).resolve()) for x in files]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(ROOT / "bench" / "test_bench_update.py")]
    command += ["--small", "-k", "float32 and (135M-real or 260K)", "--save-table", str(tmp_path / "table.md")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "table.md").read_text()
    for name in ("PPO rollout", "PPO experience", "PPO update", "PPO step total", "reward step"):
        assert table.count(f"\n| {name}, ") == 2, table
    assert table.count("\n| update's process") == table.count("\n| reward's process") == 1
    assert table.count("GiB") >= 2 and "transformers generate" in table
