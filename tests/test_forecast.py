"""A stage says before its first step what it takes: true counts, dry runs that leave nothing, refusals, no trace."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy

from rlhf_fast.cli.main import main
from rlhf_fast.config.fields import LogConfig, LoraConfig, ModelConfig, OptimConfig, SamplingConfig
from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model
from rlhf_fast.model.packed_graphs import PackedGraphs
from rlhf_fast.run import estimate, machine
from rlhf_fast.run.estimate import GIB, Knobs, ModelSize, Work, memory_needed, smaller
from rlhf_fast.stages import forecast, ppo, reward, sft, timing
from rlhf_fast.training.learner import Learner

STAGES = {"sft": sft, "reward": reward, "ppo": ppo}
MAKE = {
    "sft": lambda folder, out="out", **changes: toy.sft(folder, out, **{"epochs": 3, **changes}),
    "reward": lambda folder, out="out", **changes: toy.reward(folder, out, **{"epochs": 2, **changes}),
    "ppo": toy.ppo,
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=list(STAGES))
def stage(request):
    return request.param


@pytest.fixture
def plans(monkeypatch):
    """Return the list of the plans of the runs that follow."""
    found, tell = [], forecast.tell

    def keep(cfg, run_folder, model, plan, dry_run):
        found.append(plan)
        return tell(cfg, run_folder, model, plan, dry_run)

    monkeypatch.setattr(forecast, "tell", keep)
    return found


def logged_tokens(out: Path, after: int = 0) -> float:
    rows = [row for row in toy.rows(out / "metrics.jsonl") if row["step"] > after]
    return sum(row["perf/tokens_per_second"] * row["time/step"] for row in rows)


def test_counts_are_those_of_the_run(folder, stage, plans, capsys):
    cfg = MAKE[stage](folder, "out")
    STAGES[stage].run(cfg)
    rows = toy.rows(folder / "out/metrics.jsonl")
    (plan,) = plans
    assert plan.steps == len(rows)
    text = capsys.readouterr().err
    if stage == "ppo":
        assert plan.tokens == cfg.num_batches * cfg.batch * cfg.sampling.max_new_tokens
        assert 0.3 * plan.tokens < logged_tokens(folder / "out") <= plan.tokens + 0.5
        assert f"{cfg.num_batches} batches of {cfg.batch} episodes in {int(rows[0]['steps'])} steps" in text
    else:
        assert plan.tokens == round(logged_tokens(folder / "out"))
        assert f"{cfg.epochs} epochs, {len(rows)} steps of {cfg.batch}; {estimate.count(plan.tokens)} tokens" in text
    assert re.search(rf"^{stage}: memory about [\d.]+ of [\d.]+ GiB; disk (under )?[\d.]+ GiB, later", text, re.M)


@pytest.mark.exhaustive(1)
def test_a_resumed_run_says_what_is_left(folder, stage, plans, monkeypatch, capsys):
    cfg = MAKE[stage](folder, "out", log=LogConfig(checkpoint_every=2, live=False))
    count, step = [0], Learner.step
    per_step = {"ppo": 4}.get(stage, 1)  # two steps of two learners

    def dies(self, terms):
        count[0] += 1
        if count[0] > 3 * per_step:
            raise KeyboardInterrupt
        return step(self, terms)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            STAGES[stage].run(cfg)
    capsys.readouterr()
    damaged = folder / "out/checkpoints/step_99"  # a newer one that is no checkpoint does not count
    damaged.mkdir()
    with pytest.warns(UserWarning, match="step_99: skipped"):
        STAGES[stage].run(cfg)
    rows = toy.rows(folder / "out/metrics.jsonl")
    assert plans[1].steps == len(rows) - 2
    name = "batches" if stage == "ppo" else "steps"
    assert f"{len(rows) - 2} of {len(rows)} {name} left" in capsys.readouterr().err
    if stage != "ppo":
        assert plans[1].tokens == round(logged_tokens(folder / "out", after=2))


def test_a_dry_run_leaves_nothing(folder, stage, capsys):
    cfg = MAKE[stage](folder, "out")
    before = sorted(folder.rglob("*"))
    STAGES[stage].run(cfg, dry_run=True)
    assert sorted(folder.rglob("*")) == before
    assert "a dry run ends here; nothing is written" in capsys.readouterr().err
    STAGES[stage].run(cfg)
    assert "finished" in json.loads((folder / "out/run.json").read_text())


def test_the_flag_ends_with_0(folder, capsys):
    path, data = toy.model_at(folder), toy.demonstrations(folder / "d.jsonl")
    arguments = ["sft", "--model.path", path, "--data.path", data, "--out", "runs/sft"]
    assert main([*arguments, "--dry-run"]) == 0
    assert not (folder / "runs").exists()
    assert "61 rows, 16 epochs" in capsys.readouterr().err


def test_a_recipe_says_it_of_each_stage(folder, capsys):
    """The models that an earlier stage has yet to write are replaced by those that it starts from."""
    data = {"sft": toy.demonstrations(folder / "d.jsonl"), "reward": toy.rankings(folder / "r.jsonl")}
    data["ppo"] = toy.prompt_file(folder / "p.jsonl")
    start = f"model.path: {toy.model_at(folder)}, residual_dropout: 0"
    ppo_part = "episodes: 32, batch: 16, minibatch: 8, sampling.max_new_tokens: 4"
    (folder / "r.yaml").write_text(
        f"out: runs/r\nsft: {{{start}, data.path: {data['sft']}}}\nreward: {{data.path: {data['reward']}}}\n"
        f"ppo: {{data.path: {data['ppo']}, {ppo_part}}}\n"
    )
    assert main(["run", "r.yaml", "--dry-run"]) == 0
    text = capsys.readouterr().err
    for name in STAGES:
        assert re.search(rf"^{name}: memory about ", text, re.M)
    assert "40 prompts, 2 batches of 16 episodes in 2 steps; at most 128 tokens to sample" in text
    assert not (folder / "runs").exists()


def recipe_with(folder, **sections):
    """Write a recipe of all stages on the toy model, with further settings of each section."""
    data = {"sft": toy.demonstrations(folder / "d.jsonl"), "reward": toy.rankings(folder / "r.jsonl")}
    data["ppo"] = toy.prompt_file(folder / "p.jsonl")
    own = {"sft": [f"model.path: {toy.model_at(folder)}", "epochs: 1", "select: last"], "reward": [], "ppo": []}
    own["ppo"] += ["episodes: 16", "batch: 16", "minibatch: 8", "sampling.max_new_tokens: 4"]
    parts = {name: [f"data.path: {data[name]}", *own[name], *sections.get(name, [])] for name in STAGES}
    (folder / "r.yaml").write_text(
        "out: runs/r\n" + "".join(f"{name}: {{{', '.join(part)}}}\n" for name, part in parts.items())
    )
    return ["run", "r.yaml"]


# Refusals


@pytest.mark.parametrize("stage", ["reward", "ppo"])
@pytest.mark.exhaustive(1)
def test_a_recipe_refuses_a_later_stage_before_the_first_one_trains(folder, stage, monkeypatch, capsys):
    """Only that stage does not fit. With log.check_fit false, or where all fit, the first stage runs."""
    usable, run_of = 2**40, STAGES[stage].run

    def with_little_memory(*args):
        nonlocal usable
        usable = 2**20
        try:
            return run_of(*args)
        finally:
            usable = 2**40

    monkeypatch.setattr(machine, "usable_memory", lambda device: usable)
    monkeypatch.setattr(STAGES[stage], "run", with_little_memory)
    argv = recipe_with(folder)
    assert main(argv) == 2
    text = capsys.readouterr().err
    assert f"rlhf-fast: error: {stage}: needs about" in text and "of memory, and under 0.01 GiB can be had" in text
    assert not (folder / "runs").exists()
    assert main(recipe_with(folder, **{stage: ["log.check_fit: false"]})) == 0
    assert (folder / "runs/r/ppo/run.json").exists()


def test_a_recipe_looks_at_its_later_stages_once_and_times_nothing(folder, monkeypatch, capsys):
    """The later stages read their prompts in the format that sft teaches the model, not in its own."""
    monkeypatch.setattr(timing, "MIN_SECONDS", 1e9)
    (folder / "model").mkdir()
    toy.model(folder / "model")
    run = {"stage": "sft", "config": {"data": {"template": "dialog"}}, "data": {}, "versions": {}, "machine": {}}
    (folder / "model" / "run.json").write_text(json.dumps(run))
    argv = recipe_with(folder, sft=["data.template: plain"])
    assert main(argv) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "will take memory about" in line]
    assert [line.partition(":")[0] for line in lines] == ["reward", "ppo"]
    templates = [json.loads((folder / f"runs/r/{name}/run.json").read_text())["template"] for name in STAGES]
    assert [template["kind"] for template in templates] == ["plain"] * 3
    assert main([*argv, "--ppo.out", "runs/b", "--ppo.seed", "3"]) == 0
    assert "will take memory" not in capsys.readouterr().err  # one stage alone, which looks itself


def need(cfg, stage, monkeypatch) -> int:
    """Return the bytes that the estimate gives for a run."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(estimate, "memory_needed", lambda *a: found.append(memory_needed(*a)) or found[-1])
        STAGES[stage].run(cfg, dry_run=True)
    return found[0]


def test_memory_is_refused_with_a_setting_that_fits(folder, stage, monkeypatch):
    cfg = MAKE[stage](folder, "out", optim=OptimConfig(micro_batch_tokens=100_000))
    if stage == "ppo":
        cfg = replace(cfg, value_optim=cfg.optim)
    monkeypatch.setattr("rlhf_fast.run.folder.resident_memory", lambda: 10**8)
    usable = need(cfg, stage, monkeypatch) - 1000
    monkeypatch.setattr(machine, "usable_memory", lambda _: usable)
    rule = rf"{stage}: needs about [\d.]+ GiB of memory, and [\d.]+ GiB can be had: .* would take .*log.check_fit to"
    with pytest.raises(UserError, match=rule) as error:
        STAGES[stage].run(cfg)
    assert not (folder / "out").exists()
    proposed = re.search(r"optim\.micro_batch_tokens (\d+)", str(error.value))
    assert proposed, str(error.value)
    optim = replace(cfg.optim, micro_batch_tokens=int(proposed[1]))
    changes = {"optim": optim} | ({"value_optim": optim} if stage == "ppo" else {})
    STAGES[stage].run(replace(cfg, **changes), dry_run=True)


def test_a_run_that_never_fits_may_go_on_all_the_same(folder, monkeypatch, capsys):
    cfg = MAKE["sft"](folder, "out")
    monkeypatch.setattr(machine, "usable_memory", lambda _: 1000)
    with pytest.raises(UserError, match=r"no setting makes this model fit, the least is .*set log.check_fit to false"):
        sft.run(cfg)
    sft.run(replace(cfg, log=replace(cfg.log, check_fit=False)))
    assert "log.check_fit is false, so it goes on" in capsys.readouterr().err
    assert (folder / "out/model.safetensors").exists()


@pytest.mark.exhaustive(1)
def test_a_small_disk_is_refused_with_a_setting_that_fits(folder, stage, plans, monkeypatch):
    cfg = MAKE[stage](folder, "out", log=LogConfig(checkpoint_every=1, keep=5, live=False))
    STAGES[stage].run(cfg, dry_run=True)
    per = plans[0].checkpoint
    trained = sum(p.numel() for p in Model.load(ModelConfig(toy.model_at(folder))).module.parameters())
    assert per == pytest.approx({"ppo": 28}.get(stage, 12) * trained, rel=0.05)
    free = 4 * per + 2 * plans[0].best + plans[0].saved
    monkeypatch.setattr(machine, "free_disk", lambda _: free)
    with pytest.raises(
        UserError, match=r"of disk in .*out while it runs, and .* are free: log.keep (\d) would"
    ) as error:
        STAGES[stage].run(cfg)
    keep = int(re.search(r"log.keep (\d)", str(error.value))[1])
    STAGES[stage].run(replace(cfg, log=replace(cfg.log, keep=keep)))
    monkeypatch.setattr(machine, "free_disk", lambda _: 10)
    with pytest.raises(UserError, match="free some space, or choose another `out`"):
        STAGES[stage].run(MAKE[stage](folder, "other"))


def test_a_checkpoint_has_the_bytes_of_the_estimate(folder, stage, plans):
    sizes = []
    save = ppo.RunFolder.checkpoint

    def measured(self, step, state):
        save(self, step, state)
        sizes.append(max(machine.size_of(f) for f in self.checkpoints.glob("step_*")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.RunFolder, "checkpoint", measured)
        STAGES[stage].run(MAKE[stage](folder, "out", log=LogConfig(checkpoint_every=1, live=False)))
    headers = 40_000 * (2 if stage == "ppo" else 1)  # names of tensors, random states, JSON
    assert plans[0].checkpoint <= max(sizes) <= plans[0].checkpoint + headers
    models = sum(file.stat().st_size for file in (folder / "out").rglob("*.safetensors"))
    assert plans[0].saved == pytest.approx(models, rel=0.15)


# Time


@pytest.mark.exhaustive(1)
def test_a_run_that_was_timed_has_the_same_weights(folder, stage, monkeypatch):
    """Dropout, adapters' dropout, sampling and shuffles draw what they draw without the timing."""
    timed = []
    for names in ("rates_of", "ppo_rates"):
        function = getattr(timing, names)
        monkeypatch.setattr(timing, names, lambda *a, function=function: timed.append(function(*a)) or timed[-1])
    for kind in ("plain", "lora"):
        changes = {}
        if kind == "lora":
            pytest.importorskip("peft")
            model = ModelConfig(toy.model_at(folder), dtype="bfloat16", lora=LoraConfig(rank=2, dropout=0.1))
            changes = {"policy": model, "value": replace(model, path="")} if stage == "ppo" else {"model": model}
        timed.clear()
        for out, threshold in ((f"{kind}-timed", 0.0), (f"{kind}-not", 1e30)):
            monkeypatch.setattr(timing, "MIN_SECONDS", threshold)
            STAGES[stage].run(MAKE[stage](folder, out, **changes))
        assert len(timed) == 1 and all(rate > 0 for rate in timed[0])
        a, b = folder / f"{kind}-timed", folder / f"{kind}-not"
        files = sorted(str(file.relative_to(a)) for file in a.rglob("*.safetensors"))
        assert files
        for file in files:
            assert (a / file).read_bytes() == (b / file).read_bytes(), file
        assert toy.metrics(a) == toy.metrics(b)
        assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()


def test_no_trace_puts_graphs_and_random_states_back(folder):
    model = Model.load(ModelConfig(toy.model_at(folder)))
    graphs, state = model._packed_graphs, torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), timing.no_trace(model):
        assert isinstance(model._packed_graphs, PackedGraphs) and model._packed_graphs is not graphs
        torch.rand(3)
        _ = 1 / 0
    assert model._packed_graphs is graphs
    assert torch.equal(torch.get_rng_state(), state)


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_larger_passes_are_timed_as_long_as_they_are_cheap(monkeypatch):
    clock, runs = FakeClock(), []
    monkeypatch.setattr(timing, "clock", clock)

    def run(size):
        clock.now += 0.1 * size + (0.7 if not runs else 0)
        runs.append(size)

    size, elapsed = timing._largest_timed(run, [1, 2, 4, 8, 16], 200.0, torch.device("cpu"))
    assert runs == [1, 1, 2, 4] and size == 4 and elapsed == pytest.approx(0.4)  # 0.8 + 0.1 + 0.2 + 0.4 of 2 s
    runs.clear()
    size, elapsed = timing._largest_timed(lambda size: run(30 * size), [1, 2], 20.0, torch.device("cpu"))
    assert runs == [30] and size == 1 and elapsed == pytest.approx(3.7)  # a second one would take too long


def test_the_time_is_that_of_tokens_and_steps(folder, monkeypatch, capsys):
    monkeypatch.setattr(timing, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(timing, "rates_of", lambda *_: timing.Rates(token=0.25, step=2.0))
    cfg = toy.sft(folder, "out", data=replace(toy.sft(folder).data, valid_fraction=0.0), select="last")
    sft.run(cfg, dry_run=True)
    sft.run(cfg)
    tokens, steps = logged_tokens(folder / "out"), len(toy.rows(folder / "out/metrics.jsonl"))
    seconds = 0.25 * tokens + 2.0 * steps
    text = capsys.readouterr().err
    assert f"sft: about {estimate.duration(seconds)} ({estimate.count(tokens / seconds)} tokens/s by a" in text


def test_ppo_counts_steps_of_decoding_and_full_responses(folder, monkeypatch, capsys):
    rates = timing.PPORates(prefill=0.0, decode=1.0, score=0.0, policy=0.0, value=0.0, step=0.0)
    monkeypatch.setattr(timing, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(timing, "ppo_rates", lambda *_: rates)
    cfg = toy.ppo(folder, "out", sampling=SamplingConfig(max_new_tokens=6, batch=4), data=replace(
        toy.ppo(folder).data, valid_fraction=0.0))  # fmt: skip
    ppo.run(cfg, dry_run=True)
    batch = 6 * -(-cfg.batch // 4)
    said = capsys.readouterr().err
    assert f"at most about {estimate.duration(batch * cfg.num_batches)} and the reward functions'" in said
    assert f"{estimate.duration(batch)} a batch: generate 100%, score 0%, learn 0%" in said


def test_a_python_reward_is_not_called(folder, monkeypatch):
    called = []
    monkeypatch.setattr(timing, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(toy, "share_of_a", lambda texts: called.append(1) or [0.0] * len(texts))
    ppo.run(toy.ppo(folder, "out"), dry_run=True)
    assert not called


def test_tiny_runs_are_not_timed(folder, stage, monkeypatch):
    monkeypatch.setattr(timing, "no_trace", None)
    STAGES[stage].run(MAKE[stage](folder, "out"), dry_run=True)


# Arithmetic

SMALL = ModelSize(
    params=135_000_000, trained=135_000_000, itemsize=4, layers=30, hidden=576, inner=1536, heads=576, kv=192,
    vocab=49_152,
)  # fmt: skip
WORK = Work(base=GIB // 2, trained=(SMALL,), step_tokens=8192, longest=512)


def test_memory_has_16_bytes_of_each_trained_weight():
    other = SMALL._replace(params=235_000_000, trained=235_000_000)
    more = memory_needed(replace(WORK, trained=(other,)), Knobs(8192)) - memory_needed(WORK, Knobs(8192))
    assert more == 20 * 100_000_000  # with 4 of the copy that is compared with the saved folder


def test_ema_and_frozen_models_count():
    ema = memory_needed(replace(WORK, ema=True), Knobs(8192)) - memory_needed(WORK, Knobs(8192))
    assert ema == 4 * SMALL.trained
    frozen = memory_needed(replace(WORK, frozen=(SMALL,)), Knobs(8192)) - memory_needed(WORK, Knobs(8192))
    assert frozen == SMALL.weights


def test_keys_and_values_are_those_of_pages():
    work = replace(WORK, prompts=(100, 50, 10), new_tokens=29, page=32)
    per_position = 2 * SMALL.layers * SMALL.kv * 4
    assert estimate.cache_needed(work, 3) == per_position * 32 * (4 + 3 + 2)
    assert estimate.cache_needed(work, 1) == per_position * 32 * 4


def test_every_proposal_needs_less_and_changes_least_first():
    start = Knobs(8192, slots=3)
    work = replace(WORK, prompts=(4000, 50, 10), new_tokens=29)
    now = memory_needed(work, start)
    tried = list(smaller(work, start))
    assert tried[0].micro_batch_tokens == 4096 and not tried[0].bfloat16
    assert all(memory_needed(work, knobs) < now for knobs in tried if knobs.micro_batch_tokens < 8192)
    assert tried[-1].bfloat16 and tried[-1].rank and tried[-1].checkpointing
    assert memory_needed(work, tried[-1]) == min(memory_needed(work, knobs) for knobs in tried)
    assert min(knobs.micro_batch_tokens for knobs in tried) == work.longest


def test_no_adapter_is_proposed_where_none_is_allowed():
    work = replace(WORK, may_adapt=False)
    assert not any(knobs.rank for knobs in smaller(work, Knobs(8192)))
    assert any(knobs.rank for knobs in smaller(WORK, Knobs(8192)))


def test_disk_keeps_one_more_checkpoint_while_it_is_written():
    assert estimate.disk_needed(checkpoint=10, saved=4, best=0, keep=2, written=9) == (30, 4)
    assert estimate.disk_needed(checkpoint=10, saved=4, best=0, keep=2, written=1) == (14, 4)
    assert estimate.disk_needed(checkpoint=10, saved=4, best=3, keep=1, written=9) == (26, 4)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (940, "940"), (11_240, "11.2k"), (999_960, "1.0M"), (123_456, "123k"), (1.2e6, "1.2M"), (3e9, "3.0B")],
)
def test_counts_as_people_write_them(number, text):
    assert estimate.count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (42, "42 s"), (95, "1.6 min"), (720, "12 min"), (12_600, "3.5 h"), (864_000, "10 days")],
)
def test_durations(seconds, text):
    assert estimate.duration(seconds) == text


# The machine


@pytest.mark.parametrize("version", [1, 2])
def test_a_cgroup_limits_the_memory(tmp_path, monkeypatch, version):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\nSwapFree: 500 kB\n")
    (proc / "self/statm").write_text("100 10 5 1 0 1 0\n")
    monkeypatch.setattr(machine, "PROC", proc)
    monkeypatch.setattr(machine, "CGROUPS", groups)
    own = machine.resident_memory()
    assert machine.usable_memory(torch.device("cpu")) == 8500 * 1024 + own  # no cgroup
    (proc / "self/cgroup").write_text("0::/jobs/7\n" if version == 2 else "4:cpu:/x\n3:memory:/jobs/7\n")
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        groups = groups / "memory"
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (groups / "jobs/7").mkdir(parents=True)
    for folder, limit in (
        (groups / "jobs/7", "max" if version == 2 else str(2**63 - 4096)),
        (groups / "jobs", "3000000"),
    ):
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text("1500000\n")
        (folder / "memory.stat").write_text(f"anon 3\n{names[2]} 200000\n")
    assert machine.usable_memory(torch.device("cpu")) == 3_000_000 - 1_500_000 + 200_000 + own


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    assert machine.free_disk(tmp_path / "a/b/c") == pytest.approx(machine.free_disk(tmp_path), rel=0.1)
    (tmp_path / "x").mkdir()
    (tmp_path / "x/y").write_bytes(b"123")
    assert machine.size_of(tmp_path) == 3
    assert machine.size_of(tmp_path / "none") == 0
