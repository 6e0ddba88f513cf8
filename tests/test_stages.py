"""SFT and reward on the toy task: they learn, write what plain transformers reads, and refuse what is wrong."""

import json
import random
import signal
from dataclasses import replace

import pytest
import toy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_fast.config.fields import DataConfig, LogConfig, ModelConfig, OptimConfig, SamplingConfig
from rlhf_fast.errors import UserError
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.stages import ppo, reward, sft

pytestmark = pytest.mark.usefixtures("one_thread")


# SFT


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sft_learns_the_demonstrations(folder, kind):
    toy.model_at(folder, kind=kind)
    cfg = toy.sft(folder, epochs=10, pretrain_fraction=0.0, residual_dropout=0.0, optim=OptimConfig(lr=1e-2))
    sft.run(cfg)
    rows = toy.rows(folder / "sft/metrics.jsonl")
    assert rows[-1]["loss/sft"] < 0.5 * rows[0]["loss/sft"]
    valid = [row["valid/sft"] for row in rows if "valid/sft" in row]
    assert len(valid) == 10
    assert valid[-1] < valid[0]
    info = json.loads((folder / "sft/run.json").read_text())
    assert info["config"]["optim"]["lr"] == 1e-2
    assert info["finished"]["score"] == pytest.approx(-min(valid))
    model, words = AutoModelForCausalLM.from_pretrained(folder / "sft"), AutoTokenizer.from_pretrained(folder / "sft")
    assert words("a b .").input_ids == toy.tokenizer()("a b .").input_ids
    generated = model.generate(**words("a a .", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert len(generated[0]) > 3
    samples = toy.rows(folder / "sft/samples.jsonl")
    assert {"prompt", "response", "length", "eos", "step"} <= samples[0].keys()
    assert len(samples) == 20


def test_sft_keeps_the_epoch_with_the_best_validation_loss(folder):
    """Random answers can only be memorised, so the validation loss rises and `loss` writes an earlier model."""
    rng = random.Random(0)
    noise = [{"prompt": text, "completion": " ".join(rng.choices("abcdefgh", k=4))} for text in toy.prompts(40)]
    data = DataConfig(toy.jsonl(folder / "noise.jsonl", noise), valid_fraction=0.2)
    optim = OptimConfig(lr=0.01)
    losses = {}
    for select in ("loss", "last"):
        sft.run(toy.sft(folder, select, data=data, select=select, optim=optim, epochs=10, pretrain_fraction=0.0))
        rows = toy.rows(folder / select / "metrics.jsonl")
        losses[select] = [row["valid/sft"] for row in rows if "valid/sft" in row]
    assert losses["loss"] == losses["last"]
    best = losses["loss"].index(min(losses["loss"]))
    assert best < len(losses["loss"]) - 1, "the test needs a run whose last epoch is not its best"
    assert not toy.same_weights(folder / "loss", folder / "last")
    assert json.loads((folder / "loss/run.json").read_text())["finished"]["score"] == -min(losses["loss"])
    assert not (folder / "loss/checkpoints").exists()


def test_sft_mixes_in_pretraining_text_by_its_share(folder):
    cfg = toy.sft(folder, pretrain_fraction=0.2, batch=8)
    sft.run(cfg)
    rows = toy.rows(folder / "sft/metrics.jsonl")
    assert all("loss/pretrain" in row for row in rows)
    assert rows[-1]["loss/pretrain"] < rows[0]["loss/pretrain"]

    class Recorder:
        """Records the batches that are taken from a data set."""

        def __init__(self, data):
            self.data, self.taken = data, []

        def batch(self, position, size):
            self.taken.append((position, size))
            return self.data.batch(position, size)

        def __len__(self):
            return len(self.data)

    model = sft.Model.load(cfg.model)
    demonstrations = Recorder(sft.read_demonstrations(cfg.data, model.tokenizer).train)
    pretrain_data = Recorder(sft.read_texts(cfg.pretrain, model.tokenizer).train)
    steps = [sft.step_terms(cfg, demonstrations, pretrain_data, step) for step in range(1, 9)]
    assert [sum(coefficient for _, _, coefficient in terms) for terms in steps] == pytest.approx([1.0] * 8)
    # 20 % of the sequences: 2 texts to 8 demonstrations, each text once.
    assert pretrain_data.taken == [(2 * step, 2) for step in range(8)]
    assert demonstrations.taken == [(8 * step, 8) for step in range(8)]


def test_sft_chooses_by_the_score_of_a_reward_model(folder):
    reward.run(toy.reward(folder))
    cfg = toy.sft(folder, select="reward", select_reward=str(folder / "reward"))
    sft.run(cfg)
    scores = [row["valid/scores"] for row in toy.rows(folder / "sft/metrics.jsonl") if "valid/scores" in row]
    assert len(scores) == 4
    assert json.loads((folder / "sft/run.json").read_text())["finished"]["score"] == max(scores)
    assert "score" in toy.rows(folder / "sft/samples.jsonl")[0]


def test_sft_without_validation_rows_cannot_select(folder):
    cfg = toy.sft(folder, data=DataConfig(toy.demonstrations(folder / "d.jsonl"), valid_fraction=0.0))
    with pytest.raises(UserError, match="select=loss needs validation rows"):
        sft.run(cfg)


def test_sft_samples_only_prompts_that_leave_room_for_the_longest_response(folder):
    """A demonstration may fit in the model's 64 positions although its prompt plus max_new_tokens does not."""
    rows = [{"prompt": "a " * n + ".", "completion": "a"} for n in (*range(1, 30), 60)]
    sampling = SamplingConfig(max_new_tokens=40)
    for valid, samples in ((rows[10:12] + rows[-1:], 2), (rows[-1:], 0)):
        data = DataConfig(toy.jsonl(folder / "rows.jsonl", rows[:8]), valid=toy.jsonl(folder / "v.jsonl", valid))
        cfg = toy.sft(folder, f"sft{samples}", data=data, sampling=sampling, epochs=1, log=LogConfig(live=False))
        sft.run(cfg)
        assert len(toy.rows(folder / f"sft{samples}/samples.jsonl")) == samples
    reward.run(toy.reward(folder))
    with pytest.raises(UserError, match=r"no validation prompt leaves room for sampling\.max_new_tokens"):
        sft.run(replace(cfg, out="x", select="reward", select_reward=str(folder / "reward")))


# Reward


def test_a_reward_model_at_chance_is_named(folder, capfd):
    """Trained on ranks drawn at random it gets the sentence; trained on an order that can be learned it does not."""
    rng = random.Random(0)
    pairs = [{"prompt": text, "chosen": "a a", "rejected": "b b"} for text in toy.prompts(80)]
    noise = [row if rng.random() < 0.5 else row | {"chosen": "b b", "rejected": "a a"} for row in pairs]
    for name, rows, expected in (("noise", noise, True), ("pairs", pairs, False)):
        data = DataConfig(toy.jsonl(folder / f"{name}.jsonl", rows), valid_fraction=0.3)
        reward.run(toy.reward(folder, name, data=data, demonstrations=DataConfig(), epochs=2))
        printed = " ".join(capfd.readouterr().err.split())
        assert ("do not show that the reward model is better than a coin: it orders" in printed) is expected, printed


def test_reward_learns_ragged_rankings(folder):
    cfg = toy.reward(folder)
    reward.run(cfg)
    rows = toy.rows(folder / "reward/metrics.jsonl")
    assert len(rows) == -(-3 * 86 // 16)
    assert rows[-1]["valid/accuracy"] > 0.9 > rows[0]["reward/accuracy"]
    assert 0 < rows[-1]["valid/longer_wins"] < 1
    good, bad = score_texts(folder / "reward", ["a b . a a a </s>", "a b . c d e </s>"])
    assert good > bad
    sample = toy.rows(folder / "reward/samples.jsonl")[0]
    assert len(sample["responses"]) == len(sample["ranks"]) == len(sample["scores"])


def score_texts(path, texts):
    """Return the scores of texts by plain transformers, one at a time."""
    model, words = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    ids = [words(text, return_tensors="pt").input_ids for text in texts]
    return [float(model(input_ids=row).logits[0, 0].detach()) for row in ids]


def test_the_bias_puts_demonstrations_at_zero_and_keeps_the_ranking(folder):
    from rlhf_fast.data import read_demonstrations
    from rlhf_fast.model.model import Model

    cfg = toy.reward(folder)
    reward.run(cfg)
    reward.run(replace(cfg, out=str(folder / "unbiased"), demonstrations=DataConfig()))
    means = []
    for out in ("reward", "unbiased"):
        model = Model.load(ModelConfig(str(folder / out)), head="scalar")
        means.append(reward.mean_score(model, read_demonstrations(cfg.demonstrations, model.tokenizer).train))
    assert abs(means[0]) < 1e-5 < abs(means[1])
    one, other = ((folder / out / "model.safetensors").read_bytes() for out in ("reward", "unbiased"))
    assert one == other


def test_pairs_are_rankings_of_two(folder):
    rng = random.Random(5)
    pairs = [
        {"prompt": text, "chosen": f"a a {rng.choice('bcd')}", "rejected": f"{rng.choice('bcd')} c a"}
        for text in toy.prompts(64)
    ]
    cfg = toy.reward(folder, data=DataConfig(toy.jsonl(folder / "pairs.jsonl", pairs), valid_fraction=0.1))
    reward.run(cfg)
    assert toy.rows(folder / "reward/metrics.jsonl")[-1]["valid/accuracy"] > 0.9


# Bad input and folders


def test_nan_in_training_stops_with_step_and_rows(folder):
    cfg = toy.sft(folder, optim=OptimConfig(lr=1e30, grad_clip=0.0), pretrain_fraction=0.0, select="last")
    with pytest.raises(UserError, match=r"optimizer step \d+: loss .*demonstrations.jsonl:\d+"):
        sft.run(cfg)


def test_a_run_resumes_only_with_its_own_settings_and_data(folder, capsys):
    cfg = toy.sft(folder)
    sft.run(cfg)
    assert "finished" in capsys.readouterr().err
    assert not (folder / "sft/checkpoints").exists()
    before = (folder / "sft/model.safetensors").stat().st_mtime_ns
    sft.run(replace(cfg, log=LogConfig(every=5)))
    assert "sft is finished already" in capsys.readouterr().err
    assert (folder / "sft/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"finished with optim.lr = 0.003, now 0.1; batch = 16, now 8; set them back"):
        sft.run(replace(cfg, batch=8, optim=OptimConfig(lr=0.1)))
    with pytest.raises(UserError, match="holds a run of sft, not reward"):
        reward.run(toy.reward(folder, "sft"))
    with pytest.raises(UserError, match="holds a run already"):
        sft.run(replace(cfg, resume=False))
    with pytest.raises(UserError, match=r"is what model\.path names"):
        sft.run(replace(cfg, out=cfg.model.path))
    toy.jsonl(folder / "demonstrations.jsonl", [{"prompt": "a .", "completion": "a"}] * 40)
    with pytest.raises(UserError, match=r"demonstrations.jsonl: has changed since"):
        sft.run(cfg)


def test_texts_that_the_tokenizer_cannot_read_get_a_line_of_their_own(folder, capsys):
    """The share stood in the middle of a line, and the stage trained."""
    rows = [{"prompt": f"a {letter}", "completion": "Ω Ψ Φ"} for letter in "abcdefgh"] * 5
    data = DataConfig(toy.jsonl(folder / "foreign.jsonl", rows), valid_fraction=0.1)
    sft.run(toy.sft(folder, data=data), dry_run=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "of the tokens as <unk>; it cannot learn these texts: start from another" in line]
    assert not any("it cannot learn" in line and "demonstrations" in line for line in lines)
    sft.run(toy.sft(folder), dry_run=True)
    assert "cannot learn" not in capsys.readouterr().err


def test_two_processes_cannot_share_a_folder(folder):
    cfg = toy.sft(folder)
    with RunFolder(cfg) as one, RunFolder(cfg) as two:
        one.start_or_resume(1, (), {})
        with pytest.raises(UserError, match="sft: another process runs there"):
            two.start_or_resume(1, (), {})


@pytest.mark.parametrize("stage", [sft, reward, ppo], ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_second_process_is_refused_before_it_plans(folder, stage, monkeypatch, capsys):
    """It reads no data or model. A dry run, which starts nothing, still tells what is left."""
    cfg = getattr(toy, stage.__name__.rpartition(".")[2])(folder)
    with RunFolder(cfg) as first:
        first.start_or_resume(1, (), {})
        with monkeypatch.context() as patch:
            patch.setattr(stage, "check_fit", lambda *_: pytest.fail("it plans"))
            with pytest.raises(UserError, match="another process runs there; wait for it"):
                stage.run(cfg)
        capsys.readouterr()
        stage.run(cfg, dry_run=True)
        assert "a dry run ends here" in capsys.readouterr().err
    with RunFolder(cfg) as second:
        with pytest.raises(UserError, match="another process runs there"), RunFolder(cfg):
            pytest.fail("two have the folder")
        second.start_or_resume(1, (), {})


def test_a_missing_path_is_named(folder):
    with pytest.raises(UserError, match=r"data\.path is not set"):
        sft.run(toy.sft(folder, data=DataConfig()))
    with pytest.raises(UserError, match=r"nowhere.jsonl: there is no such file"):
        sft.run(toy.sft(folder, data=DataConfig("nowhere.jsonl", valid_fraction=0.1)))
    assert not (folder / "sft").exists()


def test_a_run_resumes_only_with_its_own_models(folder, monkeypatch):
    """The weights and the source of a reward function must be unchanged; a run.json in a model's folder may change."""
    (folder / "f2_reward.py").write_text("def score(texts):\n    return [0.0] * len(texts)\n")
    monkeypatch.syspath_prepend(str(folder))
    cfg = toy.ppo(folder, reward="f2_reward:score", episodes=16)
    ppo.run(cfg)
    (folder / "model/run.json").write_text("{}")
    ppo.run(cfg)
    (folder / "f2_reward.py").write_text("def score(texts):\n    return [1.0] * len(texts)\n")
    with pytest.raises(UserError, match=r"f2_reward:score: has changed since"):
        ppo.run(cfg)
    (folder / "f2_reward.py").write_text("def score(texts):\n    return [0.0] * len(texts)\n")
    toy.model(folder / "model", seed=1)
    with pytest.raises(UserError, match=r"model: the model in it has changed since"):
        ppo.run(cfg)


def test_another_torch_or_number_of_threads_gives_a_note(folder):
    cfg = toy.sft(folder)
    with RunFolder(cfg) as run:
        run.start_or_resume(1, (), {})
    manifest = json.loads((folder / "sft/run.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    manifest["machine"]["threads"] = 99
    (folder / "sft/run.json").write_text(json.dumps(manifest))
    torch_note, threads_note = RunFolder(cfg).notes
    assert "torch was 1.0" in torch_note
    assert "threads was 99" in threads_note


def test_a_run_that_another_process_finishes_meanwhile_is_not_started_again(folder):
    cfg = toy.sft(folder)
    late = RunFolder(cfg)
    with RunFolder(cfg) as run:
        run.start_or_resume(1, (), {})
        run.checkpoint(1, {})
        run.finish(lambda path: (path / "config.json").write_text("{}"), {})
    with late, pytest.raises(UserError, match="another process has finished this run meanwhile"):
        late.start_or_resume(1, (), {})


def test_the_first_ctrl_c_prints_a_line_at_once_and_the_second_stops(folder, capfd):
    with RunFolder(toy.sft(folder)) as run:
        run.start_or_resume(1, (), {})
        capfd.readouterr()
        signal.raise_signal(signal.SIGINT)
        printed = capfd.readouterr().err
        assert "the step is being finished and saved" in printed
        assert "a second Ctrl-C stops it at once" in printed
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_validate_every_may_not_differ_on_resume(folder):
    """It decides which weights there are to select from; how often a line is written does not."""
    cfg = toy.sft(folder)
    with RunFolder(cfg) as run:
        run.start_or_resume(1, (), {})
    RunFolder(replace(cfg, log=replace(cfg.log, every=7, samples=1, keep=5, checkpoint_every=9)))
    with pytest.raises(UserError, match=r"was started with log\.validate_every = 0, now 3; set it back"):
        RunFolder(replace(cfg, log=replace(cfg.log, validate_every=3)))


def test_rows_that_fail_in_validation_are_located_in_the_validation_file(folder, monkeypatch):
    """PPO's held-out prompts, then SFT's: uids of validation are rows of the validation file."""
    from rlhf_fast.errors import BadRows
    from rlhf_fast.stages import ppo

    generate = ppo.Rollout.generate

    def failing(self, prompts, samples=1, step=None):
        if step is None:
            raise BadRows("the model gives NaN", [("Responses", prompts.uids[1])])
        return generate(self, prompts, samples, step)

    monkeypatch.setattr(ppo.Rollout, "generate", failing)
    valid = toy.jsonl(folder / "held.jsonl", [{"prompt": text} for text in toy.prompts(4, seed=9)])
    prompts = DataConfig(toy.prompt_file(folder / "prompts.jsonl"), valid=valid)
    with pytest.raises(UserError, match=r"gives NaN \(\S*held.jsonl:2\)"):
        ppo.run(toy.ppo(folder, data=prompts, log=LogConfig(validate_every=1, live=False)))
    valid = toy.demonstrations(folder / "held_out.jsonl", 8)
    data = DataConfig(toy.demonstrations(folder / "d.jsonl"), valid=valid)
    with pytest.raises(UserError, match=r"gives NaN \(\S*held_out.jsonl:2\)"):
        sft.run(toy.sft(folder, data=data))


def test_a_run_that_selects_nothing_has_no_score(folder):
    sft.run(toy.sft(folder, select="last", epochs=1))
    text = (folder / "sft/run.json").read_text()
    assert "Infinity" not in text
    assert json.loads(text)["finished"]["score"] is None
